"""Checkpoints in and out, against transformers' own from_pretrained and save_pretrained."""

from __future__ import annotations

import hashlib
import json
import math
import resource
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from support.zoo.models import BERT, LLAMA, ZOO, Tiny, tokens
from zo_offload.checkpoint import weights
from zo_offload.checkpoint.checkpoint import Checkpoint, save_pretrained
from zo_offload.checkpoint.safetensors_io import DTYPES, SafetensorsFile
from zo_offload.errors import CheckpointError

SHARD = 20_000


pytestmark = pytest.mark.usefixtures("quiet_transformers")


def shapes(directory: Path) -> dict[str, tuple[list[int], str]]:
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118  # not a dict
                part = opened.get_slice(key)
                found[key] = (part.get_shape(), part.get_dtype())
    return found


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in directory.glob("*.safetensors") for key, tensor in load_file(file).items()}


def logits(model, inputs):
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output[0]


def assert_loads_as(checkpoint: Checkpoint, reference: nn.Module) -> None:
    """Every canonical parameter and persistent buffer equals the reference's, bit for bit, in its dtype."""
    parameters = dict(reference.named_parameters())
    assert tuple(parameters) == checkpoint.names
    for name, parameter in parameters.items():
        loaded = checkpoint.load(name)
        assert loaded.dtype == checkpoint.dtype_of(name) and loaded.is_contiguous()
        assert loaded.numel() == checkpoint.numel(name) and loaded.nbytes == checkpoint.bytes_of(name)
        assert torch.equal(loaded.to(parameter.dtype), parameter), name
    for name in checkpoint.buffer_names:
        buffer = reference.get_buffer(name)
        assert torch.equal(checkpoint.load(name).to(buffer.dtype), buffer), name


def assert_same_skeleton(model: nn.Module, reference: nn.Module) -> None:
    """Parameters on meta with the reference's dtypes and ties; buffers real and equal."""
    built, wanted = (dict(m.named_parameters(remove_duplicate=False)) for m in (model, reference))
    assert list(built) == list(wanted)
    for name, parameter in built.items():
        assert parameter.is_meta and (parameter.shape, parameter.dtype) == (wanted[name].shape, wanted[name].dtype), (
            name
        )
    assert ties(model) == ties(reference)
    real, expected = dict(model.named_buffers()), dict(reference.named_buffers())
    assert list(real) == list(expected)
    for name, buffer in real.items():
        assert buffer.dtype == expected[name].dtype and torch.equal(buffer, expected[name]), name
    assert not model.training


def ties(model: nn.Module) -> set[frozenset[str]]:
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values()}


# ---- the same as transformers, architecture by architecture ---------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_loads_what_from_pretrained_loads(tmp_path, name, sharded):
    tiny = ZOO[name]
    dtype = torch.bfloat16 if sharded else torch.float32
    tiny.build(dtype).save_pretrained(tmp_path, max_shard_size="5KB" if sharded else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    reference = getattr(transformers, tiny.model).from_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    model = checkpoint.build_model()
    assert_same_skeleton(model, reference)
    assert_loads_as(checkpoint, reference)
    assert checkpoint.missing == () and checkpoint.unexpected == ()
    assert checkpoint.dtype == dtype


@pytest.mark.parametrize("name", ZOO)
def test_an_export_is_what_transformers_would_save(tmp_path, name, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK", 128)  # so that tensors are in several chunks
    tiny = ZOO[name]
    first, ours, theirs = tmp_path / "first", tmp_path / "ours", tmp_path / "theirs"
    tiny.build().save_pretrained(first)
    checkpoint = Checkpoint.open(first)
    model = checkpoint.build_model()
    written = save_pretrained(
        ours, model=model, names=checkpoint.names, weights=checkpoint, checkpoint=checkpoint, max_shard_bytes=SHARD
    )
    cls = getattr(transformers, tiny.model)
    reference = cls.from_pretrained(first)
    reference.save_pretrained(theirs)
    assert shapes(ours) == shapes(theirs)
    saved, wanted = tensors(ours), tensors(theirs)
    assert all(torch.equal(saved[key], wanted[key]) for key in wanted)
    assert json.loads((ours / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    assert (ours / "generation_config.json").exists() == (theirs / "generation_config.json").exists()
    assert all(path.is_file() and path.parent == ours for path in written)
    reloaded = cls.from_pretrained(ours)
    torch.manual_seed(0)
    inputs = tiny.inputs()
    assert torch.equal(logits(reloaded, inputs), logits(reference, inputs))
    for file in ours.glob("*.safetensors"):
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert sum(sizes) <= SHARD or len(sizes) == 1


def test_the_zoo_covers_conversions_ties_and_buffers(tmp_path):
    """The tests above would prove little if no tiny checkpoint needed them."""
    for name in ("mixtral", "hrm-text", "bart", "resnet"):
        ZOO[name].build().save_pretrained(tmp_path / name)
    stored = shapes(tmp_path / "mixtral")
    experts = Checkpoint.open(tmp_path / "mixtral")
    fused = [name for name in experts.names if "experts.gate_up_proj" in name]
    assert any(".experts.11.w1.weight" in key for key in stored) and fused and not set(fused) & set(stored)
    assert len(ties(Checkpoint.open(tmp_path / "bart").build_model())) < len(
        list(ZOO["bart"].build().named_parameters(remove_duplicate=False))
    )
    split = shapes(tmp_path / "hrm-text")
    assert any("gqkv_proj" in key for key in split) and not any("attn.q_proj" in key for key in split)
    assert any("running_mean" in name for name in Checkpoint.open(tmp_path / "resnet").buffer_names)


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        (Tiny("LlamaModel", "LlamaConfig", dict(LLAMA, tie_word_embeddings=True)), "LlamaForCausalLM"),
        (ZOO["llama"], "LlamaModel"),
        (ZOO["llama"], "AutoModelForCausalLM"),
        (Tiny("BertModel", "BertConfig", BERT), "AutoModelForSequenceClassification"),
        (ZOO["bert-pretraining"], "BertForMaskedLM"),
        (Tiny("MixtralModel", "MixtralConfig", ZOO["mixtral"].options), "MixtralForSequenceClassification"),
        (Tiny("T5Model", "T5Config", ZOO["t5"].options), "T5ForConditionalGeneration"),
        (ZOO["t5"], "T5EncoderModel"),
        (Tiny("GPT2Model", "GPT2Config", ZOO["gpt2"].options), "GPT2LMHeadModel"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model,
)  # fmt: skip
def test_another_head_than_the_one_saved(tmp_path, saved, wanted):
    saved.build().save_pretrained(tmp_path)
    cls = getattr(transformers, wanted)
    reference, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    checkpoint = Checkpoint.open(tmp_path)
    model = checkpoint.build_model(model_class=wanted)
    assert type(model) is type(reference)
    assert_same_skeleton(model, reference)
    assert set(checkpoint.missing) == set(info["missing_keys"])
    assert set(checkpoint.unexpected) == set(info["unexpected_keys"])
    for name, parameter in reference.named_parameters():
        if name not in checkpoint.missing:
            assert torch.equal(checkpoint.load(name), parameter), name


def test_legacy_norm_names(tmp_path):
    ZOO["bert"].build().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for key, tensor in load_file(file).items():
        for new, legacy in old.items():
            key = key.replace(new, legacy)
        renamed[key] = tensor
    assert any("gamma" in key for key in renamed)
    save_file(renamed, file, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path)
    assert_same_skeleton(checkpoint.build_model(), reference := ZOO["bert"].build().from_pretrained(tmp_path))
    assert_loads_as(checkpoint, reference)
    assert checkpoint.missing == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_modules_that_stay_in_fp32(tmp_path, dtype):
    ZOO["t5"].build().save_pretrained(tmp_path)
    reference = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert_same_skeleton(Checkpoint.open(tmp_path).build_model(dtype), reference)


def counted_reads(monkeypatch) -> dict[str, list[int]]:
    """Elements of each read from the files from now on, by the tensor's name."""
    read, reads = SafetensorsFile.read_into, {}

    def counted(self, name: str, start: int, out: torch.Tensor) -> None:
        reads.setdefault(name, []).append(len(out))
        read(self, name, start, out)

    monkeypatch.setattr(SafetensorsFile, "read_into", counted)
    return reads


def test_a_fused_tensor_is_read_once_for_all_its_parts(tmp_path, monkeypatch):
    ZOO["hrm-text"].build().save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.build_model()
    reads = counted_reads(monkeypatch)
    for name in checkpoint.names:
        checkpoint.load(name)
    sizes = {name: math.prod(shape) for name, (shape, _) in shapes(tmp_path).items()}
    assert {name: sum(runs) for name, runs in reads.items()} == sizes and len(sizes) < len(checkpoint.names)


@pytest.mark.parametrize("equal", [True, False])
def test_a_tie_with_both_sides_in_the_files_holds_if_they_are_equal(tmp_path, equal):
    ZOO["llama-tied"].build().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file(tensors, file, metadata={"format": "pt"})
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert_same_skeleton(checkpoint.build_model(), reference)
    assert_loads_as(checkpoint, reference)
    assert ("lm_head.weight" in checkpoint.names) != equal


def test_either_name_of_a_tied_parameter_loads_it(tmp_path):
    ZOO["llama-tied"].build().save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.build_model()
    assert torch.equal(checkpoint.load("lm_head.weight"), checkpoint.load("model.embed_tokens.weight"))


def test_the_dtype_of_the_file_survives_another_build_dtype(tmp_path):
    ZOO["llama"].build(torch.bfloat16).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    model = checkpoint.build_model(torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {checkpoint.load(name).dtype for name in checkpoint.names} == {torch.bfloat16}
    assert model.config.dtype == torch.float32 and checkpoint.config.dtype == torch.bfloat16


def test_use_cache_is_off_in_the_model_and_as_before_in_an_export(tmp_path):
    ZOO["llama"].build().save_pretrained(tmp_path / "a")
    checkpoint = Checkpoint.open(tmp_path / "a")
    model = checkpoint.build_model()
    assert model.config.use_cache is False
    save_pretrained(tmp_path / "b", model=model, names=checkpoint.names, weights=checkpoint, checkpoint=checkpoint)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "b").use_cache is True


@pytest.mark.parametrize("name", ["mixtral", "hrm-text"])  # many tensors become one; one becomes many
def test_threads_may_load_at_the_same_time(tmp_path, name):
    ZOO[name].build().save_pretrained(tmp_path, max_shard_size="20KB")
    checkpoint = Checkpoint.open(tmp_path)
    reference = getattr(transformers, ZOO[name].model).from_pretrained(tmp_path)
    checkpoint.build_model()
    parameters = list(reference.named_parameters())

    def wrong(turn: int) -> list[str]:
        mine = parameters[turn:] + parameters[:turn]
        return [name for name, parameter in mine if not torch.equal(checkpoint.load(name), parameter)]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(wrong, range(8))) == [[]] * 8


# ---- parameters the files lack --------------------------------------------------------------------------------------


@pytest.fixture
def headless(tmp_path):
    model = Tiny("BertModel", "BertConfig", BERT).build()
    model.save_pretrained(tmp_path)
    return tmp_path


def fresh_head(path, *, seed=0, dtype="auto", model_class="BertForSequenceClassification"):
    checkpoint = Checkpoint.open(path)
    checkpoint.build_model(dtype, model_class, seed=seed)
    return checkpoint.load("classifier.weight")


def test_a_fresh_head_is_reported_and_initialised_as_the_model_would(headless):
    checkpoint = Checkpoint.open(headless)
    model = checkpoint.build_model(model_class="BertForSequenceClassification")
    assert checkpoint.missing == ("classifier.bias", "classifier.weight")
    assert all(p.is_meta for p in model.parameters())
    weight = checkpoint.load("classifier.weight")
    assert abs(float(weight.std()) / model.config.initializer_range - 1) < 0.4  # 64 normal values
    assert torch.equal(checkpoint.load("classifier.bias"), torch.zeros(2))


def test_a_fresh_head_depends_on_the_seed_and_its_module_alone(headless):
    head = fresh_head(headless)
    before = torch.random.get_rng_state()
    torch.manual_seed(123)
    again = fresh_head(headless, dtype=torch.bfloat16)
    assert torch.equal(torch.random.get_rng_state(), torch.manual_seed(123).get_state())
    torch.random.set_rng_state(before)
    assert torch.equal(head, again)
    assert not torch.equal(head, fresh_head(headless, seed=1))
    Tiny("BertForMaskedLM", "BertConfig", BERT).build().save_pretrained(headless)  # has no pooler: another new thing
    assert torch.equal(head, fresh_head(headless))


def test_loading_twice_gives_copies(headless):
    checkpoint = Checkpoint.open(headless)
    checkpoint.build_model(model_class="BertForSequenceClassification")
    for name in ("classifier.weight", "bert.pooler.dense.weight"):
        first = checkpoint.load(name)
        first.zero_()
        assert checkpoint.load(name).abs().max() > 0


# ---- digest ---------------------------------------------------------------------------------------------------------


def test_the_digest_is_the_documented_one(tmp_path):
    ZOO["resnet"].build().save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    lines = ""
    for name in sorted(checkpoint.names + checkpoint.buffer_names):
        tensor = checkpoint.load(name)
        crc = zlib.crc32(tensor.numpy().tobytes())
        line = f"{name} {str(tensor.dtype)[6:]} {list(tensor.shape)} {crc:08x}"
        lines += f"{name} {hashlib.blake2b(line.encode(), digest_size=8).hexdigest()}\n"
    assert checkpoint.digest() == hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()


def test_the_digest_knows_contents_not_sharding_or_order(tmp_path):
    model = ZOO["mixtral"].build()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    one, many = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "many")
    for name in reversed(many.names):
        many.load(name)
    assert one.digest() == many.digest()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[11, 0, 0].mul_(1 + 2**-23)
    model.save_pretrained(tmp_path / "other")
    assert Checkpoint.open(tmp_path / "other").digest() != one.digest()


def test_the_digest_after_an_ingestion_reads_nothing_again(tmp_path, monkeypatch):
    ZOO["mixtral"].build().save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.build_model()
    wanted = Checkpoint.open(tmp_path).digest()
    for name in checkpoint.names:
        checkpoint.load(name)
    reads = counted_reads(monkeypatch)
    assert checkpoint.digest() == wanted and not reads


# ---- without weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "bart", "whisper", "gemma3"])
def test_a_config_alone_can_be_built(tmp_path, name):
    model = ZOO[name].build()
    model.save_pretrained(tmp_path / "full")
    model.config.save_pretrained(tmp_path / "config")
    full = Checkpoint.open(tmp_path / "full").build_model()
    for source in (tmp_path / "config", model.config, tmp_path / "full"):
        checkpoint = Checkpoint.open(source, weights=False)
        built = checkpoint.build_model(model_class=ZOO[name].model)
        assert ties(built) == ties(full) and checkpoint.missing == ()
        for (key, buffer), (other, wanted) in zip(built.named_buffers(), full.named_buffers(), strict=True):
            assert key == other
            if key not in full.state_dict():  # persistent ones are in the files
                assert torch.equal(buffer, wanted), key
    with pytest.raises(CheckpointError, match=r"no model\.safetensors.*weights=False"):
        Checkpoint.open(tmp_path / "config")
    with pytest.raises(CheckpointError, match="opened without weights"):
        checkpoint.load(checkpoint.names[0])


# ---- what can be wrong with a path ----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    directory = tmp_path / "saved"
    ZOO["llama"].build().save_pretrained(directory, max_shard_size="20KB")
    return directory


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_paths_that_are_no_checkpoint(tmp_path, saved):
    shard = next(saved.glob("*.safetensors"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("x")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for path, message in [
        (tmp_path / "nowhere", "does not exist"),
        (shard, "is a file; give the checkpoint directory"),
        (tmp_path / "empty", r"no config\.json\. Found: notes\.md"),
        (tmp_path / "adapter", "PEFT adapter"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(path)


def test_pickled_weights_of_other_kinds_are_refused(saved):
    for file in saved.glob("model*"):
        file.unlink()
    (saved / "model.ckpt").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="only pytorch_model.bin.*model.ckpt.*save_pretrained"):
        Checkpoint.open(saved)


def test_a_missing_shard_is_named(saved):
    shard = sorted(saved.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name} is missing; the index puts \d+ tensors there"):
        Checkpoint.open(saved)


@pytest.mark.parametrize("name", ["../saved/model-00001-of-00003.safetensors", "/etc/passwd", "..", "a\\b", "", 7])
def test_an_index_cannot_point_outside(saved, name):
    edit_json(saved / "model.safetensors.index.json", lambda v: v["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        Checkpoint.open(saved)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "\xff"])
def test_a_broken_index_is_named(saved, text):
    (saved / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="not an index of shards"):
        Checkpoint.open(saved)


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        (b"{", b"", None, "header is not JSON"),
        (b"\xff\xfe", b"", None, "header is not JSON"),
        ([1], b"", None, "JSON list, not an object"),
        ({}, b"", 10**9, "header of 1000000000 bytes in a file of"),
        ({"a": {"dtype": "F32"}}, b"", None, "'a' is malformed"),
        ({"a": entry(0, 8, [-2])}, bytes(8), None, "'a' is malformed"),
        ({"a": entry(0, 8, [2], "F31")}, bytes(8), None, "'a' has dtype F31"),
        ({"a": entry(0, 8, [3])}, bytes(8), None, r"\[3\] and dtype F32 needs 12 bytes.*hold 8"),
        ({"a": entry(0, 8, [2])}, bytes(7), None, "'a' ends at byte .*cut short"),
        (
            {"a": entry(0, 8, [2]), "b": entry(4, 12, [2])},
            bytes(12),
            None,
            "'b' begins at byte .*without gap or overlap",
        ),
        ({"a": entry(4, 12, [2])}, bytes(12), None, "'a' begins at byte"),
        ({"a": entry(0, 8, [2])}, bytes(9), None, "1 bytes after the last tensor"),
    ],
)
def test_damaged_files_are_refused_when_opened(saved, header, data, length, message):
    (saved / "model.safetensors.index.json").unlink()
    write_raw(saved / "model.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(saved)


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_a_truncated_shard_is_refused(saved, keep):
    shard = sorted(saved.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=shard.name):
        Checkpoint.open(saved)


def test_a_file_cut_after_it_was_opened_is_an_error_not_a_crash(saved):
    checkpoint = Checkpoint.open(saved)
    checkpoint.build_model()
    for shard in saved.glob("*.safetensors"):
        with open(shard, "r+b") as file:
            file.truncate(5000)
    with pytest.raises(CheckpointError, match="cut short after it was opened"):
        for name in checkpoint.names:
            checkpoint.load(name)


def test_shapes_that_do_not_match_are_named(saved):
    edit_json(saved / "config.json", lambda v: v.update(vocab_size=100))
    with pytest.raises(CheckpointError, match=r"is \[96, 32\] in the files and \[100, 32\] in LlamaForCausalLM"):
        Checkpoint.open(saved).build_model()


def test_weights_of_another_model_are_refused(saved):
    transformers.ViTConfig(**ZOO["vit"].options, architectures=["ViTModel"]).save_pretrained(saved)
    with pytest.raises(CheckpointError, match=r"none of its 21 tensors .* fits ViTModel"):
        Checkpoint.open(saved).build_model()


def test_configs_that_cannot_be_used(saved):
    config = saved / "config.json"
    good = config.read_text()
    edit_json(config, lambda v: v.update(quantization_config={"quant_method": "aqlm", "bits": 4}))
    with pytest.raises(CheckpointError, match=r"quantized \(aqlm\), which is not supported. Supported: .*gptq"):
        Checkpoint.open(saved)
    config.write_text(good)
    edit_json(config, lambda v: v.update(architectures=["NoSuchModel"]))
    with pytest.raises(CheckpointError, match="no model class 'NoSuchModel'"):
        Checkpoint.open(saved).build_model()
    edit_json(config, lambda v: v.pop("architectures"))
    with pytest.raises(CheckpointError, match="names no architectures"):
        Checkpoint.open(saved).build_model()
    with pytest.raises(CheckpointError, match="AutoModelForSeq2SeqLM has no model of type 'llama'"):
        Checkpoint.open(saved).build_model(model_class="AutoModelForSeq2SeqLM")
    with pytest.raises(CheckpointError, match="dtype='bf16'"):
        Checkpoint.open(saved).build_model("bf16", "AutoModelForCausalLM")
    edit_json(config, lambda v: v.update(model_type="nonesuch", auto_map={"AutoConfig": "evil.Evil"}))
    (saved / "evil.py").write_text("raise SystemExit('ran code from the checkpoint')")
    with pytest.raises(CheckpointError, match="not run.*trust_remote_code=True"):
        Checkpoint.open(saved)
    config.write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: .*cannot use it"):
        Checkpoint.open(saved)


def test_unknown_names_are_named(saved):
    with pytest.raises(CheckpointError, match="LlamaForCausalLM has no parameter or persistent buffer 'nope'"):
        Checkpoint.open(saved).load("nope")


def test_hub_ids_come_from_the_cache_or_say_so(tmp_path, saved, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match="'org/tiny' is neither a directory nor in the local Hugging Face cache"):
        Checkpoint.open("org/tiny")
    repo = tmp_path / "hub" / "models--org--tiny"
    commit = "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    saved.rename(repo / "snapshots" / commit)
    checkpoint = Checkpoint.open("org/tiny")
    assert checkpoint.load("lm_head.weight").shape == (96, 32)


# ---- writing --------------------------------------------------------------------------------------------------------


def export(path: Path, model: nn.Module, **options) -> list[Path]:
    return save_pretrained(path, model=model, **options)


def test_ties_declared_both_ways_are_saved_once(tmp_path):
    model = ZOO["llama-tied"].build()
    names = ["lm_head.weight", "model.embed_tokens.weight"]
    model._tied_weights_keys = dict(zip(names, reversed(names), strict=True))
    model.save_pretrained(tmp_path / "theirs")
    export(tmp_path / "ours", model)
    assert shapes(tmp_path / "ours") == shapes(tmp_path / "theirs")
    assert len(set(names) & set(shapes(tmp_path / "ours"))) == 1


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "bart", "bert"])
def test_a_model_in_memory_is_saved_as_transformers_saves_it(tmp_path, name):
    model = ZOO[name].build()
    model.save_pretrained(tmp_path / "theirs")
    export(tmp_path / "ours", model)
    assert shapes(tmp_path / "ours") == shapes(tmp_path / "theirs")
    again = type(model).from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(again, ZOO[name].inputs()), logits(model, ZOO[name].inputs()))


def test_read_decides_values_and_dtype(tmp_path):
    model = ZOO["llama-tied"].build()
    values = {n: torch.full_like(p, i, dtype=torch.bfloat16) for i, (n, p) in enumerate(model.named_parameters())}
    given = Given(values)
    export(tmp_path / "a", model, names=list(values), weights=given)
    assert given.elements == {name: value.numel() for name, value in values.items()}, "each read once"
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "a")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(p, values[n]) for n, p in again.named_parameters())


class Given:
    """Weights from tensors in memory; counts the elements that are read."""

    def __init__(self, values: dict[str, torch.Tensor], failing: str | None = None):
        self.values, self.failing, self.elements, self.longest = values, failing, {}, 0

    def shape_of(self, name: str) -> torch.Size:
        return self.values[name].shape

    def dtype_of(self, name: str) -> torch.dtype:
        return self.values[name].dtype

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        if name == self.failing:
            raise KeyboardInterrupt
        out.copy_(self.values[name].detach().reshape(-1)[start : start + len(out)])
        self.elements[name] = self.elements.get(name, 0) + len(out)
        self.longest = max(self.longest, len(out))


class Odd(nn.Module):
    """Not a PreTrainedModel: sizes that are no multiple of anything, a tie, scalar, empty, an integer tensor."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
        self.b = nn.Parameter(torch.randn(5, 7))
        self.c = nn.Parameter(torch.randn(()))
        self.d = nn.Parameter(torch.randn(0, 4))
        self.inner = nn.Linear(7, 5)
        self.inner.weight = self.b
        self.register_buffer("e", torch.arange(5))
        self.register_buffer("f", torch.ones(2, dtype=torch.bool))
        self.register_buffer("g", torch.ones(2), persistent=False)
        self.view = nn.Parameter(torch.randn(6, 4).t())


@pytest.mark.parametrize("max_shard_bytes", [1, 100, 10**6])
def test_any_module_is_saved_as_its_state_dict(tmp_path, max_shard_bytes):
    model = Odd()
    files = export(tmp_path / "a", model, max_shard_bytes=max_shard_bytes)
    stored = {}
    for file in files:
        if file.suffix == ".safetensors":
            stored.update(load_file(file))
    assert set(stored) == set(model.state_dict()) - {"inner.weight"}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in stored.items())
    missing, unexpected = (other := Odd()).load_state_dict(stored, strict=False)
    assert missing == ["inner.weight"] and unexpected == []
    assert torch.equal(other.inner.weight, model.b)


def test_tensors_stay_aligned_in_every_file(tmp_path):
    for file in export(tmp_path / "a", Odd(), max_shard_bytes=100):
        if file.suffix == ".safetensors":
            raw = file.read_bytes()
            length = int.from_bytes(raw[:8], "little")
            header = json.loads(raw[8 : 8 + length])
            assert length % 8 == 0 and header.pop("__metadata__")["format"] == "pt"
            assert all(v["data_offsets"][0] % DTYPES[v["dtype"]].itemsize == 0 for v in header.values())


def test_tokenizer_templates_and_licence_go_along_and_nothing_else(saved, tmp_path):
    carried = {
        "tokenizer.json": "{}", "tokenizer_config.json": "{}", "chat_template.jinja": "{{ x }}", "vocab.txt": "a",
        "spiece.model": "m", "LICENSE": "free", "additional_chat_templates/tool.jinja": "t",
        "generation_config.json": '{"max_new_tokens": 7, "eos_token_id": 2}',
    }  # fmt: skip
    left = {"optimizer.pt": "x", "README.md": "x", "modeling_x.py": "x", ".hidden.json": "{}", "model.onnx": "x",
            "pytorch_model.bin.index.json": "{}", "adapter_config.json": "{}", "trainer_state.json": "{}"}  # fmt: skip
    for name, text in {**carried, **left}.items():
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_text(text)
    checkpoint = Checkpoint.open(saved)
    model = checkpoint.build_model()
    assert model.generation_config.max_new_tokens == 7
    save_pretrained(tmp_path / "b", model=model, names=checkpoint.names, weights=checkpoint, checkpoint=checkpoint)
    found = {str(p.relative_to(tmp_path / "b")) for p in (tmp_path / "b").rglob("*") if p.is_file()}
    assert found == set(carried) | {"config.json", "model.safetensors"}
    assert all((tmp_path / "b" / name).read_text() == text for name, text in carried.items())


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_a_directory_with_something_in_it_is_left_alone(tmp_path):
    target = tmp_path / "a"
    target.mkdir()
    (target / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"is not empty \(it holds mine\.txt\).*overwrite=True"):
        export(target, Odd())
    assert files_in(tmp_path) == {"a/mine.txt": b"precious"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        export(tmp_path / "file", Odd())


def test_overwrite_replaces_an_export_and_keeps_what_it_did_not_make(tmp_path):
    target, model = tmp_path / "a", ZOO["llama"].build()
    target.mkdir()
    (target / "mine.txt").write_text("precious")
    export(target, model, overwrite=True, max_shard_bytes=SHARD)
    assert len(list(target.glob("*.safetensors"))) > 1
    other = ZOO["llama"].build(seed=1)
    for shard_bytes in (10**9, SHARD, 2 * SHARD):
        export(target, other, overwrite=True, max_shard_bytes=shard_bytes)
        again = transformers.LlamaForCausalLM.from_pretrained(target)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), other.parameters(), strict=True))
        shards = {p.name for p in target.glob("*.safetensors")}
        index = target / "model.safetensors.index.json"
        listed = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        assert shards == listed
    assert (target / "mine.txt").read_text() == "precious"


def test_overwrite_does_not_delete_weights_of_others(tmp_path):
    target = tmp_path / "a"
    ZOO["llama"].build().save_pretrained(target)
    before = files_in(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was not written by an export of ours"):
        export(target, ZOO["llama"].build(seed=1), overwrite=True, max_shard_bytes=SHARD)
    assert files_in(tmp_path) == before


def test_the_source_is_never_the_target(saved):
    checkpoint = Checkpoint.open(saved)
    model = checkpoint.build_model()
    before = files_in(saved)
    with pytest.raises(CheckpointError, match="the checkpoint this model is read from"):
        save_pretrained(
            saved, model=model, names=checkpoint.names, weights=checkpoint, checkpoint=checkpoint, overwrite=True
        )
    assert files_in(saved) == before


def test_a_failure_in_the_middle_leaves_nothing_behind(tmp_path, saved):
    checkpoint = Checkpoint.open(saved)
    model = checkpoint.build_model()

    given = Given({name: checkpoint.load(name) for name in checkpoint.names}, failing="model.norm.weight")
    before = files_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(tmp_path / "b", model=model, names=checkpoint.names, weights=given, checkpoint=checkpoint)
    assert given.elements, "it failed in the middle"
    assert files_in(tmp_path) == before and not (tmp_path / "b").exists()


def test_a_full_disk_is_a_clear_error_and_leaves_nothing_behind(tmp_path, saved):
    """A limit on the size of files stands for a full disk: the write fails in the kernel all the same."""
    checkpoint = Checkpoint.open(saved)
    model = checkpoint.build_model()
    before, limits = files_in(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not write .*File too large .*GB free there"):
            save_pretrained(tmp_path / "b", model=model, names=checkpoint.names, weights=checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_in(tmp_path) == before


def test_what_cannot_be_saved_is_named_before_anything_is_written(tmp_path, saved):
    checkpoint = Checkpoint.open(saved)
    model = checkpoint.build_model()
    for options, message in [
        ({}, r"'model\.embed_tokens\.weight' cannot be saved: it is on meta"),
        ({"names": checkpoint.names[1:], "weights": checkpoint}, "cannot be saved: it is on meta"),
        ({"names": checkpoint.names}, "both names and weights"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            export(tmp_path / "b", model, **options)
    with pytest.raises(CheckpointError, match="not among the names to read"):
        export(tmp_path / "b", Odd(), names=["a"], weights=Given({"a": torch.zeros(3)}))
    names = checkpoint.names
    with pytest.raises(CheckpointError, match=r"was read with shape \[1\]; the model has \[96, 32\]"):
        export(tmp_path / "b", model, names=names, weights=Given(dict.fromkeys(names, torch.zeros(1))))
    assert not (tmp_path / "b").exists()


def test_the_inputs_of_the_zoo_matter():
    """Guards the logits tests: two seeds of one architecture give different logits."""
    one, two = (ZOO["llama"].build(seed=seed) for seed in (0, 1))
    assert not torch.equal(logits(one, tokens()), logits(two, tokens()))
