"""A checkpoint is used whole or not at all, and none of its code runs unasked: through Engine and the command line."""

from __future__ import annotations

import builtins
import contextlib
import json
import logging
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from support.zoo.models import BERT, LLAMA, VOCAB, ZOO, Tiny
from zo_offload import Engine, MeZO
from zo_offload.checkpoint.checkpoint import Checkpoint
from zo_offload.checkpoint.safetensors_io import SafetensorsFile
from zo_offload.cli import main
from zo_offload.errors import CheckpointError, ConfigError
from zo_offload.replay import replay

BATCH = {"input_ids": torch.arange(3, 21).reshape(2, 9), "labels": torch.arange(3, 21).reshape(2, 9)}
ROWS = [{"text": "good film"}, {"text": "bad film"}] * 2


pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture
def llama(tmp_path):
    ZOO["llama"].build().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def change_config(path: Path, **values) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))


def drop(part: str):
    return lambda v: [v.pop(name) for name in list(v) if part in name]


def add(name: str, *shape: int, dtype: torch.dtype = torch.float32):
    return lambda v: v.update({name: torch.zeros(shape, dtype=dtype)})


def rename(old: str, new: str):
    return lambda v: [v.update({name.replace(old, new): v.pop(name)}) for name in list(v) if old in name]


# ---- whole ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("layers.1.mlp"), r"lack 3 of its tensors: model\.layers\.1\.mlp\.down_proj\.weight \[32, 48\]"),
        (drop("lm_head"), r"lack 1 .*lm_head\.weight \[96, 32\]\. A language model's head is not made up"),
        (drop("model.norm"), r"lack 1 .*model\.norm\.weight"),
        (rename("self_attn", "attention"), r"lack 8 .*and 4 more; 8 of their 21 tensors have no place.*\[32, 32\]"),
        (
            add("model.layers.2.mlp.up_proj.weight", 48, 32),
            r"1 of their 22 .*layers\.2\.mlp\.up_proj\.weight \[48, 32\]",
        ),
        (add("model.layers.0.self_attn.q_proj.bias", 32), r"no place in it: model\.layers\.0\.self_attn\.q_proj\.bias"),
        (add("lm_head.bias", 96), r"no place in it: lm_head\.bias"),
        (add("model.layers.0.self_attn.q_proj.lora_A.weight", 4, 32), "lora_A.*merge adapters"),
        (add("stray", 4), r"no place in it: stray \[4\]"),
    ],
    ids=["layer", "head", "norm", "other-names", "layer-more", "bias", "bias-of-head", "adapter", "stray"],
)
def test_files_that_do_not_hold_the_model_are_refused_before_they_are_read(
    llama, capsys, monkeypatch, tmp_path, change, said
):
    change_tensors(llama, change)
    monkeypatch.setattr(SafetensorsFile, "read_into", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError, match=said):
        Engine(llama, method=MeZO(), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert main(["plan", str(llama)]) == 2
    assert "its files do not hold the LlamaForCausalLM that config.json describes" in capsys.readouterr().err


def test_an_expert_that_is_not_there_is_refused(tmp_path):
    ZOO["mixtral"].build().save_pretrained(tmp_path)
    change_tensors(tmp_path, drop("layers.1.block_sparse_moe.experts.5.w1"))
    with pytest.raises(CheckpointError, match="experts"):
        Engine(tmp_path)


@pytest.mark.parametrize(
    ("saved", "wanted", "new"),
    [
        (ZOO["llama"], "LlamaForSequenceClassification", {"score.weight"}),
        (
            Tiny("BertModel", "BertConfig", BERT), "AutoModelForTokenClassification",
            {"classifier.weight", "classifier.bias"},
        ),
        (
            Tiny("BertForMaskedLM", "BertConfig", BERT), "BertForSequenceClassification",
            {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"},
        ),
        (Tiny("GPT2Model", "GPT2Config", ZOO["gpt2"].options), "GPT2ForSequenceClassification", {"score.weight"}),
    ],
    ids=["llama", "bert", "bert-mlm", "gpt2"],
)  # fmt: skip
def test_a_new_head_is_made_from_the_seed_and_said(tmp_path, capsys, caplog, saved, wanted, new):
    saved.build().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        engine = Engine(tmp_path, model_class=wanted, seed=3)
    assert set(engine.checkpoint.missing) == new
    assert any("a new head" in note and "the run's seed" in note for note in engine.plan.notes)
    assert "a new head" in caplog.text and min(new) in caplog.text
    head = max(new)
    values = [dict(Engine(tmp_path, model_class=wanted, seed=seed).weights())[head] for seed in (3, 3, 4)]
    assert torch.equal(values[0], values[1]) and (not torch.equal(values[0], values[2]) or "bias" in head)
    capsys.readouterr()
    assert main(["plan", str(tmp_path), "--model-class", wanted]) == 0
    assert "note: a new head" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        (Tiny("LlamaModel", "LlamaConfig", LLAMA), "LlamaForCausalLM"),
        (Tiny("BertModel", "BertConfig", BERT), "BertForMaskedLM"),
    ],
    ids=["llama", "bert"],
)
def test_the_head_of_a_language_model_is_not_made_up(tmp_path, saved, wanted):
    saved.build().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="A language model's head is not made up"):
        Engine(tmp_path, model_class=wanted)


def test_a_head_that_the_checkpoint_says_it_has_is_not_new(tmp_path):
    Tiny("BertForSequenceClassification", "BertConfig", BERT).build().save_pretrained(tmp_path)
    change_tensors(tmp_path, drop("classifier"))
    with pytest.raises(CheckpointError, match="lack 2 of its tensors: classifier"):
        Engine(tmp_path)


@pytest.mark.parametrize(
    ("saved", "wanted", "unused"),
    [
        (ZOO["llama"], "LlamaModel", "lm_head.weight"),
        (ZOO["bert-pretraining"], "BertForMaskedLM", "cls.seq_relationship.weight"),
        (ZOO["bart"], "BartForSequenceClassification", "final_logits_bias"),
    ],
    ids=["llama", "bert", "bart"],
)
def test_what_another_class_has_no_use_for_is_noted(tmp_path, saved, wanted, unused):
    saved.build().save_pretrained(tmp_path)
    engine = Engine(tmp_path, model_class=wanted)
    assert any("not used" in note for note in engine.plan.notes)
    assert any(unused in name for name in engine.checkpoint.unexpected)


def test_a_base_bert_with_its_pooler_and_both_heads_is_taken_as_config_json_says(tmp_path):
    """As published: the pretraining checkpoint, whose config names the masked language model."""
    ZOO["bert-pretraining"].build().save_pretrained(tmp_path)
    change_config(tmp_path, architectures=["BertForMaskedLM"])
    assert any("cls.seq_relationship" in name for name in Engine(tmp_path).checkpoint.unexpected)


@pytest.mark.parametrize(
    ("name", "stray", "shape", "taken"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", (4,), True),
        ("gpt2", "transformer.h.0.attn.masked_bias", (), True),
        ("gpt2", "transformer.h.0.attn.bias", (1, 1, 64, 64), True),
        ("gpt-neox", "gpt_neox.layers.0.attention.bias", (1, 1, 64, 64), True),
        ("gpt-neox", "gpt_neox.layers.0.attention.dense.masked", (64,), False),
        ("bert", "bert.encoder.layer.0.attention.bias", (32,), False),
    ],
)
def test_constants_of_older_versions_are_passed_over_and_biases_are_not(tmp_path, name, stray, shape, taken):
    ZOO[name].build().save_pretrained(tmp_path)
    change_tensors(tmp_path, add(stray, *shape))
    if taken:
        assert Engine(tmp_path).plan.notes == ()
    else:
        with pytest.raises(CheckpointError, match="no place in it"):
            Engine(tmp_path)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("qweight", "qzeros", "scales", "g_idx"), r"quantized \(GPTQ or AWQ.*beside quantize_config.json.*Supported"),
        (("weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"), "bitsandbytes' description"),
        (("SCB",), r"down_proj.weight', which it cannot be decoded without, is missing"),
        (("weight_packed", "weight_shape", "weight_scale"), r"\[outputs, inputs / 2\] is expected"),
        (("weight_scale_inv",), r"quantized \(scaled fp8.*tensors beside them are missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_quantized_weights_that_are_not_whole_are_named(llama, capsys, names, told):
    def change(v):
        for name in [n for n in v if "mlp" in n]:
            v.pop(name)
            v.update({name.removesuffix("weight") + part: torch.zeros(4, dtype=torch.uint8) for part in names})

    change_tensors(llama, change)
    (llama / "quantize_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=told):
        Engine(llama)
    assert main(["eval", str(llama), "--data", "nothing.jsonl"]) == 2
    assert str(llama) in capsys.readouterr().err


# ---- its own code ---------------------------------------------------------------------------------------------------

CONFIGURATION = """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own-model"
    doubled = True
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
from .helper_own import twice
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.loss = twice(out.loss) if self.config.doubled else out.loss
        return out
"""
TOKENIZER = """
from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    own = True
"""


def make_tokenizer(**more):
    words = ["<pad>", "<s>", "</s>", "<unk>", "good", "bad", "film"]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tok, **{**names, **more})


@pytest.fixture
def own(llama):
    """A checkpoint whose config, model and tokenizer are classes of its own."""
    make_tokenizer().save_pretrained(llama)
    (llama / "configuration_own.py").write_text(CONFIGURATION)
    (llama / "modeling_own.py").write_text(MODELING)
    (llama / "helper_own.py").write_text("def twice(x):\n    return 2 * x\n")
    (llama / "tokenization_own.py").write_text(TOKENIZER)
    auto = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change_config(llama, model_type="own-model", architectures=["OwnForCausalLM"], auto_map=auto)
    make_tokenizer_own(llama)
    return llama


def make_tokenizer_own(path: Path) -> None:
    file = path / "tokenizer_config.json"
    auto = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "OwnTokenizer", "auto_map": auto}))


@pytest.fixture
def nobody_asks(monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *args: pytest.fail("somebody was asked"))


def test_code_of_a_checkpoint_is_not_run_and_the_setting_is_named(own, capsys, nobody_asks):
    for file in own.glob("*.py"):
        file.write_text("raise SystemExit('ran')")
    with pytest.raises(CheckpointError, match=r"not run.*trust_remote_code=True"):
        Engine(own)
    assert main(["plan", str(own)]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    change_config(own, model_type="llama", auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    with pytest.raises(CheckpointError, match=r"OwnForCausalLM is in modeling_own\.py.*trust_remote_code=True"):
        Engine(own)


def test_code_of_a_tokenizer_is_not_run_and_nobody_is_asked(llama, nobody_asks):
    make_tokenizer().save_pretrained(llama)
    make_tokenizer_own(llama)
    (llama / "tokenization_own.py").write_text("raise SystemExit('ran')")
    engine = Engine(llama, method=MeZO(batch_size=2))
    with pytest.raises(CheckpointError, match=r"its tokenizer .*not run.*trust_remote_code=True.*tokenizer="):
        engine.fit(ROWS, steps=1)


def test_a_checkpoint_with_code_of_its_own_is_trained_resumed_replayed_and_exported(own, tmp_path, nobody_asks):
    run, method = tmp_path / "run", MeZO(lr=1e-3, batch_size=2)
    with Engine(own, method=method, offload="none", trust_remote_code=True) as engine:
        assert type(engine.model).__name__ == "OwnForCausalLM"
        engine.fit(ROWS, steps=4)
        weights = dict(engine.weights())
    with Engine(own, method=method, offload="disk", run_dir=run, trust_remote_code=True) as engine:
        engine.fit(ROWS, steps=2)
    with Engine.resume(run) as engine:
        engine.fit(ROWS, steps=4)
        assert all(torch.equal(value, weights[name]) for name, value in engine.weights())
        assert engine.batching.tokenizer().own
        engine.save_pretrained(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM" and loaded.config.doubled
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True).own
    again = dict(loaded.named_parameters())
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        replay(own, run, tmp_path / "replayed")
    replay(own, run, tmp_path / "replayed", trust_remote_code=True)
    assert (tmp_path / "replayed" / "helper_own.py").exists()
    header = (run / "journal.zoj").read_bytes()
    assert b"trust_remote_code" not in header


# ---- tokenizers and overrides ---------------------------------------------------------------------------------------


def test_a_tokenizer_of_one_vocabulary_file_is_found(tmp_path):
    Tiny("BertForSequenceClassification", "BertConfig", BERT).build().save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"])
    )
    rows = [{"text": "good film", "label": 1}, {"text": "bad film", "label": 0}] * 2
    with Engine(tmp_path, method=MeZO(batch_size=2), offload="none") as engine:
        assert engine.fit(rows, steps=1).steps == 1


def test_the_command_line_takes_a_tokenizer(llama, tmp_path, capsys):
    make_tokenizer().save_pretrained(tmp_path / "tok")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["fit", llama, "--data", tmp_path / "data.jsonl", "--steps", 1, "--batch-size", 2, "--quiet"]
    command += ["--offload", "none", "--out", tmp_path / "out"]
    assert main([str(part) for part in command]) != 0
    assert main([*map(str, command), "--tokenizer", str(tmp_path / "tok")]) == 0
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("bad film")["input_ids"] == [5, 6]
    assert main([*map(str, command[:-2]), "--tokenizer", str(tmp_path / "nowhere")]) == 2


def test_config_overrides_make_a_head_of_other_size_and_are_kept(tmp_path):
    Tiny("BertModel", "BertConfig", BERT).build().save_pretrained(tmp_path / "base")
    rows = [{"input_ids": [1, 5, 6, 2], "labels": i % 5} for i in range(5)]
    settings = dict(method=MeZO(batch_size=5), model_class="BertForSequenceClassification", offload="disk")
    overrides = {"num_labels": 5, "attn_implementation": "eager"}
    with Engine(tmp_path / "base", run_dir=tmp_path / "run", config_overrides=overrides, **settings) as engine:
        assert engine.model.config._attn_implementation == "eager"
        engine.fit(rows, steps=1)
    with Engine.resume(tmp_path / "run") as engine:
        engine.fit(rows, steps=2)
        engine.save_pretrained(tmp_path / "out")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.classifier.weight.shape == (5, 32)
    replay(tmp_path / "base", tmp_path / "run", tmp_path / "replayed")
    assert load_file(tmp_path / "replayed" / "model.safetensors")["classifier.weight"].shape == (5, 32)


@pytest.mark.parametrize(
    ("overrides", "error", "said"),
    [
        ({"num_label": 5}, CheckpointError, "LlamaConfig has no setting num_label"),
        ({"vocab_size": 12}, CheckpointError, r"is \[96, 32\] in the files and \[12, 32\]"),
        ({"attn_implementation": "evil/kernel"}, CheckpointError, "kernels from a hub"),
        ({"num_labels": {1, 2}}, ConfigError, "plain values"),
        (5, ConfigError, "plain values"),
    ],
    ids=["typo", "size", "kernel", "set", "number"],
)
def test_overrides_that_cannot_be(llama, overrides, error, said):
    with pytest.raises(error, match=said):
        Engine(llama, config_overrides=overrides)


# ---- hostile files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_implementation", "evil-org/kernel"), ("attn_implementation", {"": "evil-org/kernel"}),
        ("experts_implementation", "evil-org/kernel"),
        ("num_hidden_layers", 10**7), ("num_labels", 10**12), ("num_labels", 1e30), ("vocab_size", 2**62),
        ("hidden_size", 2**40), ("hidden_size", -4), ("num_attention_heads", 0), ("num_attention_heads", "a"),
        ("dtype", "__class__"), ("dtype", "load"), ("dtype", 7), ("torch_dtype", "hub"), ("architectures", [5]),
        ("architectures", "LlamaForCausalLM"), ("architectures", {}),
        ("architectures", True), ("auto_map", [1]), ("rope_parameters", 3), ("auto_map", 7),
        ("auto_map", {"AutoModelForCausalLM": 7}), ("model_type", 5), ("model_type", None), ("id2label", 5),
        ("max_position_embeddings", 10**15), ("tie_word_embeddings", "x"), ("quantization_config", 5),
        ("hidden_act", "__import__"), ("layer_types", [1]),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_a_hostile_configuration_is_an_error_of_ours_or_taken(llama, key, value, nobody_asks):
    change_config(llama, **{key: value})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(CheckpointError, ConfigError):
        Engine(llama, offload="none")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 600_000  # kB


@pytest.mark.parametrize("text", ["5", "null", '"a"', "[]", "{", '{"eos_token_id": "x"}'])
def test_a_hostile_generation_config_is_an_error_of_ours_or_taken(llama, text):
    (llama / "generation_config.json").write_text(text)
    with contextlib.suppress(CheckpointError):
        Engine(llama, offload="none")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for seed in (0, 1):
        ZOO["llama"].build(seed=seed).save_pretrained(tmp_path / f"seed{seed}", max_shard_size="20KB")
    second = sorted((tmp_path / "seed1").glob("*.safetensors"))[1]
    target = sorted((tmp_path / "seed0").glob("*.safetensors"))[0]
    target.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match="is in model-00001-of-.* and in model-00002-of-.*two checkpoints"):
        Engine(tmp_path / "seed0")


def test_kernels_named_in_a_configuration_are_refused(llama):
    change_config(llama, attn_implementation="evil-org/kernel")
    with pytest.raises(CheckpointError, match="kernels from a hub .*not run"):
        Engine(llama)


def test_layers_that_the_files_cannot_hold_are_refused_at_once(llama, capsys):
    change_config(llama, num_hidden_layers=10**7)
    with pytest.raises(CheckpointError, match="num_hidden_layers=10000000; at most 1000000 are taken"):
        Engine(llama)
    change_config(llama, num_hidden_layers=10**5)
    with pytest.raises(CheckpointError, match="Correct its number of layers"):
        Engine(llama)
    change_config(llama, num_hidden_layers=10**11)
    with pytest.raises(CheckpointError, match="num_hidden_layers=100000000000; at most"):
        Engine(llama)


def write_header(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}',
         "'a' is in it twice"),
        (b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', "'dtype' is in it twice"),
        (b'{"a":{"dtype":"F32","shape":[%d,%d,0],"data_offsets":[0,0]}}' % (2**61, 2**61), "malformed"),
        (b'{"a":{"dtype":"F32","shape":[0,%d],"data_offsets":[0,0]}}' % (2**61), "malformed"),
        (b'{"a":{"dtype":"F32","shape":[' + b"1," * 99 + b'1],"data_offsets":[0,4]}}', "malformed"),
    ],
    ids=["key-twice", "field-twice", "overflow", "overflow-of-nothing", "dimensions"],
)  # fmt: skip
def test_hostile_headers_are_refused(llama, header, said):
    write_header(llama / "model.safetensors", header, bytes(8) if b"[0,8]" in header else b"")
    with pytest.raises(CheckpointError, match=said):
        Engine(llama)


@pytest.mark.parametrize("part", [b"[],", b"0,", b'"":"",', b"{},"], ids=["lists", "numbers", "pairs", "objects"])
def test_a_header_of_nothing_takes_little_memory(llama, part):
    inner = part * (40_000_000 // len(part))
    bomb = b'{"__metadata__":' + (b"{" + inner[:-1] + b"}" if b":" in part else b"[" + inner[:-1] + b"]") + b"}"
    write_header(llama / "model.safetensors", bomb)
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from zo_offload.checkpoint.safetensors_io import SafetensorsFile\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: SafetensorsFile(Path(sys.argv[1]))\nexcept Exception as e: print(type(e).__name__, end=' ')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, llama / "model.safetensors"], capture_output=True, text=True, check=True
    )
    name, kilobytes = done.stdout.split()
    assert name == "CheckpointError" and int(kilobytes) < 250_000


def test_headers_with_brackets_in_their_metadata_are_read(llama):
    tensors = load_file(llama / "model.safetensors")
    note = json.dumps([[]] * 10_000)
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt", "note": note})
    assert Checkpoint.open(llama).build_model().config.vocab_size == VOCAB


# ---- what goes along with an export ---------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False], ids=["beside-the-checkpoint's", "the-only-one"])
def test_the_tokenizer_that_was_given_is_exported(llama, tmp_path, own):
    if own:
        make_tokenizer(pad_token=None).save_pretrained(llama)
        (llama / "merges.txt").write_text("of another tokenizer")
    given = make_tokenizer(pad_token="<unk>")
    given.chat_template = "{{ messages[0]['content'] }}"
    with Engine(llama, method=MeZO(batch_size=2), offload="none", tokenizer=given) as engine:
        engine.fit(ROWS, steps=1)
        engine.save_pretrained(tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.pad_token == "<unk>" and loaded.chat_template == given.chat_template
    assert not (tmp_path / "out" / "merges.txt").exists()


def test_a_tokenizer_that_cannot_be_saved_is_found_before_training(llama):
    given = make_tokenizer()
    given.save_pretrained = lambda folder: (_ for _ in ()).throw(TypeError("not plain"))
    with pytest.raises(CheckpointError, match="cannot be saved, so no export could hold it: TypeError: not plain"):
        Engine(llama, tokenizer=given)


@pytest.mark.parametrize("in_memory", [True, False], ids=["module", "checkpoint"])
def test_a_generation_config_that_transformers_finds_invalid_loses_no_weights(tmp_path, in_memory):
    model = ZOO["llama"].build()
    model.save_pretrained(tmp_path / "base")
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, False
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": false}')
    with Engine(model if in_memory else tmp_path / "base", method=MeZO(), offload="none") as engine:
        engine.step(BATCH)
        engine.save_pretrained(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.generation_config.temperature == 0.6
