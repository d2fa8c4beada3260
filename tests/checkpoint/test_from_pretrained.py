"""What users of from_pretrained pass, and modules as they come: as in transformers, or refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from support.compare import assert_same
from support.zoo.models import ZOO
from zo_offload import Engine, EngineConfig, MeZO
from zo_offload.checkpoint.load_options import REFUSED
from zo_offload.cli import main
from zo_offload.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.usefixtures("quiet_transformers")

IDS = torch.arange(3, 21).reshape(2, 9)
BATCH = {"input_ids": IDS, "labels": IDS}
METHOD = MeZO(lr=1e-3)


@pytest.fixture
def base(tmp_path):
    ZOO["llama"].build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def logits(model, **settings):
    with Engine(model, method=METHOD, offload="none", **settings) as engine:
        return engine.run(BATCH).logits.clone()


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "float32"], ids=str)
def test_a_dtype_is_that_of_weights_and_forward(base, name, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    with torch.no_grad():
        want = model(**BATCH).logits
    assert_same(logits(base, **{name: dtype}), want)


@pytest.mark.parametrize("wide", ["", "down_proj"], ids=["all", "some"])
def test_tensors_in_float64_are_read_in_float32_as_transformers_reads_them(tmp_path, wide):
    model = ZOO["llama"].build()
    for name, p in model.named_parameters():
        if wide in name:
            p.data = p.data.double() + 1e-9 * torch.rand(p.shape, dtype=torch.float64)  # no float32 values
    model.save_pretrained(tmp_path / "wide")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32).eval()
    with torch.no_grad():
        want = model(**BATCH).logits
    with Engine(tmp_path / "wide", method=METHOD, offload="disk", run_dir=tmp_path / "run") as engine:
        assert_same(engine.run(BATCH).logits, want)
        engine.step(BATCH)
        engine.save_pretrained(tmp_path / "tuned")
        tuned = dict(engine.weights())
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").state_dict()
    assert {t.dtype for t in tuned.values()} == {torch.float32}
    assert_same({name: saved[name] for name in tuned}, tuned)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64], ids=str)
def test_a_weight_that_is_no_floating_number_is_named_before_anything_is_read(base, dtype):
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].to(dtype)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj.weight' is \w+ in the files, and floating numbers"):
        Engine(base, method=METHOD)


def test_settings_of_the_config_may_stand_by_themselves(base, tmp_path, capsys):
    with Engine(base, attn_implementation="eager", method=METHOD, offload="none") as engine:
        assert engine.model.config._attn_implementation == "eager"
    ZOO["bert"].build().base_model.save_pretrained(tmp_path / "bert")
    with Engine(tmp_path / "bert", model_class="AutoModelForSequenceClassification", num_labels=5, offload="none") as e:
        assert e.run({"input_ids": IDS}).logits.shape == (2, 5)
    with pytest.raises(ConfigError, match="num_labels is given twice"):
        Engine(base, num_labels=3, config_overrides={"num_labels": 4})
    with pytest.raises(CheckpointError, match="no_such_attention"):
        Engine(base, attn_implementation="no_such_attention")
    assert main(["plan", str(base), "--attn-implementation", "eager"]) == 0


def test_settings_that_are_given_twice_or_are_no_settings_are_named(base):
    for settings, said in (
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, "dtype='bfloat16' and torch_dtype='float32' are one setting"),
        ({"num_labels": 0}, "num_labels=0: expected a whole number of classes"),
        ({"num_labels": "3"}, "num_labels='3': expected a whole number of classes"),
        ({"config": ZOO["llama"].build().config}, "config= takes an EngineConfig, and this is a LlamaConfig"),
        ({"config": EngineConfig(), "storage": "int8"}, "storage= is given beside config="),
        (
            {"adapter": {"peft_type": "CARTRIDGE", "num_virtual_tokens": 3, "num_frozen_tokens": 1}},
            "num_frozen_tokens=1",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            Engine(base, **settings)


def test_flex_attention_is_served_as_plain_transformers_computes_it(base):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="flex_attention").eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        want = model(**BATCH).logits
    with Engine(base, attn_implementation="flex_attention", method=METHOD, offload="host", num_slots=2) as engine:
        assert_same(engine.run(BATCH).logits, want)
        assert engine.step(BATCH).grad != 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_here_is_refused_with_what_has(base, name):
    with pytest.raises(ConfigError, match=f"{name}= is an argument of from_pretrained that has no place here: "):
        Engine(base, **{name: None})


@pytest.mark.parametrize("dtype", [torch.float64, "int8", 3], ids=str)
def test_dtypes_that_nothing_is_stored_in_are_refused(base, dtype):
    with pytest.raises(ConfigError, match="dtype=.*weights are stored by storage="):
        Engine(base, dtype=dtype)


def test_a_revision_is_that_of_a_hub_id(base, monkeypatch):
    asked = []

    def download(repo, **options):
        asked.append((repo, options["revision"]))
        return str(base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    want = logits(base)
    assert_same(logits("org/name", revision="v2"), want)
    assert_same(logits("org/name@v2"), want)
    assert_same(logits("org/name"), want)
    assert asked == [("org/name", "v2"), ("org/name", "v2"), ("org/name", None)]
    with pytest.raises(ConfigError, match="revision='v2' is of a hub id"):
        Engine(base, revision="v2")


def test_a_tokenizer_of_ones_own_and_one_in_old_files_are_exported(base, tmp_path):
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(90))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")
    with Engine(base, tokenizer=own, method=METHOD, offload="none") as engine:
        engine.save_pretrained(tmp_path / "own")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "own")
    assert again("w1 w5").input_ids == own("w1 w5").input_ids
    (base / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(["<|endoftext|>", "a", "b", "ab"])}))
    (base / "merges.txt").write_text("#version: 0.2\na b\n")
    old = transformers.GPT2Tokenizer.from_pretrained(base)
    with Engine(base, method=METHOD, offload="none") as engine:
        engine.save_pretrained(tmp_path / "old")
    assert transformers.GPT2Tokenizer.from_pretrained(tmp_path / "old")("ab").input_ids == old("ab").input_ids == [3]


def test_a_tokenizer_may_be_given_by_its_place(base, tmp_path):
    words = {w: i for i, w in enumerate(["<unk>", "</s>", *(f"w{i}" for i in range(90))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(tmp_path / "own")
    with Engine(base, tokenizer=str(tmp_path / "own"), method=METHOD, offload="none") as engine:
        assert engine.fit([{"text": "w1 w5 w9"}] * 2, steps=1, batch_size=2).steps == 1
        engine.save_pretrained(tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("w7").input_ids[0] == words["w7"]
    with pytest.raises(CheckpointError, match="nowhere.*cannot load its tokenizer"):
        Engine(base, tokenizer=str(tmp_path / "nowhere"))


# ---- modules as they come --------------------------------------------------------------------------------------------


class FourBitLinear(nn.Module):
    """A linear layer as bitsandbytes has it: two codes a byte in a frozen uint8 parameter, decoded in its forward."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        w = inner.weight.detach()
        self.absmax = nn.Parameter(w.abs().amax().double(), requires_grad=False)
        codes = ((w / self.absmax.float() + 1) * 7.5).round().to(torch.uint8).view(-1, 2)
        self.weight = nn.Parameter((codes[:, 0] << 4 | codes[:, 1])[:, None].contiguous(), requires_grad=False)
        self.shape = w.shape

    def forward(self, x):
        codes = torch.cat([self.weight >> 4, self.weight & 15], dim=1).view(self.shape)
        return x @ ((codes.float() / 7.5 - 1) * self.absmax.float()).T


def four_bits(model):
    for layer in model.model.layers:
        for name in ("q_proj", "down_proj"):
            holder = layer.self_attn if name == "q_proj" else layer.mlp
            setattr(holder, name, FourBitLinear(getattr(holder, name)))
    return model


def test_packed_linears_stay_as_they_are_and_the_rest_trains(tmp_path):
    model = four_bits(ZOO["llama"].build())
    want = {n: p.detach().clone() for n, p in model.named_parameters() if "absmax" in n or p.dtype == torch.uint8}
    with torch.no_grad():
        before = model(**BATCH).logits.clone()
    with Engine(model, method=MeZO(lr=1e-2), offload="disk", run_dir=tmp_path / "run") as engine:
        assert_same(engine.run(BATCH).logits, before)
        losses = [engine.step(BATCH).loss for _ in range(3)]
        engine.restore()
    assert len(set(losses)) == 3
    assert_same({n: p.detach() for n, p in model.named_parameters() if n in want}, want)


@pytest.mark.parametrize("scheme", [None, "fp8", "gguf"])
def test_layers_that_are_compiled_are_exported_by_their_plain_names(tmp_path, scheme):
    tiny = ZOO["llama"]
    model = replace(tiny, options=tiny.options | dict(hidden_size=128, intermediate_size=128, head_dim=64)).build()
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")
    with Engine(model, method=METHOD, offload="none") as engine:
        engine.step(BATCH)
        want = engine.run(BATCH).logits
        engine.save_pretrained(tmp_path / "out", scheme=scheme)
    names = {"gguf_file": "model.gguf"} if scheme == "gguf" else {}
    again, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **names, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    if scheme != "fp8":
        with torch.no_grad():
            assert_same(again.eval()(**BATCH).logits, want)


def test_a_model_with_hooks_of_accelerate_and_its_weights_there_is_served(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    with torch.no_grad():
        want = ZOO["llama"].build()(**BATCH).logits
    model = ZOO["llama"].build()
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.AlignDevicesHook("cpu", place_submodules=True), True)
    assert hasattr(model, "_hf_hook")
    with Engine(model, method=METHOD, offload="disk", run_dir=tmp_path / "run") as engine:
        assert_same(engine.run(BATCH).logits, want)
        assert engine.step(BATCH).step == 0
