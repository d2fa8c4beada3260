"""Quantized checkpoints are read as their libraries decode them, streamed; what does not fit together is refused."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from functools import partial
from random import Random

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from support.compare import assert_same
from support.quantized_models import (
    WRITERS,
    awq,
    fp8_blocks,
    gptq,
    nf4,
    nvfp4,
    pack_quantized,
    quantize_checkpoint,
    write_gguf,
)
from support.record_quantized import FILE
from support.training import batches
from support.zoo.models import ZOO, tokens
from zo_offload import Engine, MeZO
from zo_offload.checkpoint.checkpoint import Checkpoint
from zo_offload.checkpoint.kept import kept_formats, kept_part
from zo_offload.checkpoint.recipe import Join, Source
from zo_offload.cli import command as cli
from zo_offload.cli.plan_details import open_config
from zo_offload.errors import CheckpointError, ConfigError, JournalError
from zo_offload.formats import decode_values, get_format, kept_since
from zo_offload.formats.grouped import pack
from zo_offload.quantized.base import formats_of_groups
from zo_offload.quantized.files import Files, Spec
from zo_offload.quantized.gguf_blocks import BLOCKS
from zo_offload.quantized.gguf_file import GGUFFile
from zo_offload.quantized.sizes import file_bytes
from zo_offload.quantized.table import find
from zo_offload.replay import replayed
from zo_offload.stream.ingest import Filler

ROWS_BATCH = tokens()


def records() -> dict[str, dict]:
    """Case -> settings, dtype, stored and expected tensors, as libraries wrote them (support/record_quantized.py)."""
    found = {}
    with safe_open(FILE, "pt") as file:
        for case, text in sorted(file.metadata().items()):
            parts = {kind: {} for kind in ("stored", "expected")}
            for name in file.keys():  # noqa: SIM118  # not a dict
                owner, kind, tensor = name.split("/")
                if owner == case:
                    parts[kind][tensor] = file.get_tensor(name)
            found[case] = json.loads(text) | parts
    return found


RECORDS = records()


def in_memory(tensors: dict[str, torch.Tensor]) -> Files:
    def read_into(name, start, out):
        out.copy_(tensors[name].reshape(-1)[start : start + len(out)])

    return Files({name: Spec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}, read_into)


@pytest.mark.parametrize("case", [case for case in RECORDS if case.startswith("gguf")])
def test_blocks_are_decoded_as_ggml_decodes_them(case):
    record = RECORDS[case]
    kind = BLOCKS[record["settings"]["type"]]
    assert (kind.numel, kind.nbytes) == (record["expected"]["blocks"].shape[1], record["stored"]["blocks"].shape[1])
    assert_same(kind.decode(record["stored"]["blocks"]), record["expected"]["blocks"])
    codes, scales, minima = kind.parts(record["stored"]["blocks"])
    for held, shift in kind.kept:
        fmt = get_format(formats_of_groups(held, kind.group)[0])
        low = (torch.zeros_like(scales) if minima is None else minima) - shift * scales
        plane = powers_of(scales) if held == "mxfp4" else scales.view(torch.uint8)
        narrow = (codes + shift).reshape(-1).to(torch.int8).view(torch.uint8)
        packed = fmt.pack_codes(narrow) if fmt.value_bits == 4 else narrow
        least = low.view(torch.uint8).view(-1) if fmt.minimum_bytes else None
        stored = pack(fmt, codes.numel(), packed, plane.view(-1), least)
        found = decode_values(stored, None, fmt, codes.numel()).view(codes.shape)
        assert bool((found == record["expected"]["blocks"]).all()), fmt.name


def powers_of(scales):
    return (scales.log2() + 127).to(torch.uint8)


@pytest.mark.parametrize("case", [case for case in RECORDS if not case.startswith("gguf")])
def test_decoded_as_the_library_decodes(case):
    record = RECORDS[case]
    files = in_memory(record["stored"])
    weights, hidden = find(files, record["settings"], getattr(torch, record["dtype"]))
    assert {w.name for w in weights} == set(record["expected"])
    assert hidden == set(record["stored"])
    for weight in weights:
        expected = record["expected"][weight.name]
        assert weight.shape == tuple(expected.shape) and weight.dtype == expected.dtype
        for step in (expected.numel(), 1000, 77):  # whole, and in runs that begin and end inside of rows and groups
            out = torch.empty(expected.numel(), dtype=weight.dtype)
            for start in range(0, len(out), step):
                weight.read_into(files, start, out[start : start + step])
            assert_same(out.view(expected.shape), expected)


# ---- whole models ----------------------------------------------------------------------------------------------------

MODELS = [
    ("llama", "fp8"), ("llama", "gptq"), ("llama", "awq"), ("llama", "compressed-tensors"), ("llama", "nvfp4"),
    ("llama", "nf4"), ("llama", "int8"), ("gpt-oss", "mxfp4"), ("mixtral", "fp8"), ("deepseek-v3", "fp8"),
    ("qwen3-moe", "awq"), ("mixtral", "gptq"), ("llama", "fp8 channels"), ("llama", "int8 channels"), ("llama", "fp4"),
]  # fmt: skip


def written(folder, model, scheme, hidden=64, inner=96, writer=None):
    """(quantized, plain) checkpoints of a tiny model, and the decoded weights by their names in the files."""
    tiny = ZOO[model]
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "moe_intermediate_size": 32}
    options = tiny.options | {name: size for name, size in sizes.items() if name in tiny.options}
    replace(tiny, options=options).build(torch.bfloat16).save_pretrained(folder / "source")
    decoded = quantize_checkpoint(folder / "source", folder / "quantized", scheme, folder / "plain", writer)
    assert decoded, "nothing is quantized"
    return folder / "quantized", folder / "plain", decoded


@pytest.mark.parametrize(("model", "scheme"), MODELS, ids=lambda value: value)
def test_trained_from_disk_as_the_decoded_checkpoint_is(tmp_path, model, scheme):
    quantized, plain, _ = written(tmp_path, model, scheme)
    found = {}
    for path in (quantized, plain):
        settings = dict(offload="disk", run_dir=tmp_path / f"run-{path.name}", storage="bf16+16", block_numel=2048)
        with Engine(path, method=MeZO(lr=1e-3, batch_size=2), **settings) as engine:
            losses = engine.fit(batches(3, vocab=96), steps=3).losses
            engine.save_pretrained(tmp_path / f"out-{path.name}")
            found[path.name] = losses, dict(engine.weights())
            logits = engine.run(ROWS_BATCH).logits
    assert_same(found["quantized"], found["plain"])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out-quantized", dtype=torch.float32)
    with torch.no_grad():
        assert_same(loaded(**ROWS_BATCH).logits, logits)
    assert "quantization_config" not in json.loads((tmp_path / "out-quantized" / "config.json").read_text())


# ---- GGUF ------------------------------------------------------------------------------------------------------------

GGUFS = {
    "llama": ("llama", {"attn_q": "Q4_0", "attn_k": "Q5_1", "ffn_down": "Q8_0", "token_embd": "F16"}, "Q4_1", 1),
    "llama-tied": ("llama", {"attn_v": "F32", "ffn_up": "Q5_0"}, "BF16", 3),
    "qwen3": ("qwen3", {"attn_q": "Q8_0", "ffn_down": "MXFP4"}, "Q4_0", 1),
}
"""Model -> architecture, types, files."""
GGUF_ROWS = [{"text": text} for text in ("ABCDEF", "GHIABC", "JKLMNO", "OPQRST")] * 3


@pytest.fixture(params=GGUFS)
def gguf_model(request, tmp_path):
    """The path of a GGUF model that the package gguf wrote."""
    pytest.importorskip("gguf", reason="the package gguf writes the files of this test")
    arch, kinds, default, parts = GGUFS[request.param]
    tiny = ZOO[request.param]
    options = dict(hidden_size=64, intermediate_size=96, head_dim=128 if arch == "qwen3" else 16)
    model = replace(tiny, options=tiny.options | options).build()
    write_gguf(tmp_path / "tiny.gguf", model, arch, kinds, default, parts)
    return next(tmp_path.glob("tiny*.gguf"))


def test_gguf_is_what_transformers_makes_of_it(gguf_model):
    checkpoint = Checkpoint.open(gguf_model)
    model = checkpoint.build_model()
    if len(list(gguf_model.parent.glob("*.gguf"))) > 1:
        assert len(checkpoint.names) > 10
        return  # transformers does not read models that are split
    loaded = transformers.AutoModelForCausalLM.from_pretrained(gguf_model.parent, gguf_file=gguf_model.name)
    expected = dict(loaded.named_parameters())
    assert set(expected) == set(checkpoint.names)
    assert type(model) is type(loaded)
    for name in checkpoint.names:
        assert_same(checkpoint.load(name).float(), expected[name].detach(), name)
        out = torch.empty(7, dtype=checkpoint.dtype_of(name))
        checkpoint.read_into(name, 5, out)
        assert_same(out.float(), expected[name].detach().reshape(-1)[5:12], name)


def test_naming_the_tensors_of_a_gguf_file_does_not_take_longer_for_each_layer(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf", reason="the package gguf writes the file of this test")
    write_gguf(tmp_path / "tiny.gguf", ZOO["llama"].build(), "llama", {}, "F16")
    real, made = gguf.get_tensor_name_map, []
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *args: made.append(args) or real(*args))
    Checkpoint.open(tmp_path / "tiny.gguf").close()
    assert len(made) == 2  # the model and its trunk; a table has the names of all layers


def test_gguf_is_trained_from_disk_and_exported_with_its_tokenizer(gguf_model, tmp_path):
    run = tmp_path / "run"
    settings = dict(
        offload="disk", run_dir=run, storage="bf16+16", block_numel=8192
    )  # pieces of 16 rows: BLAS computes fewer otherwise
    with Engine(gguf_model, method=MeZO(lr=1e-3, batch_size=2), **settings) as engine:
        losses = engine.fit(GGUF_ROWS, steps=3, batch_size=2).losses
        assert len(set(losses)) == 3
        logits = engine.run(ROWS_BATCH).logits
        engine.save_pretrained(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert_same(loaded(**ROWS_BATCH).logits, logits)
    own = transformers.AutoTokenizer.from_pretrained(gguf_model.parent, gguf_file=gguf_model.name)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported("ABCXYZ").input_ids == own("ABCXYZ").input_ids
    with Engine.resume(run) as engine:
        assert len(engine.fit(GGUF_ROWS, steps=4, batch_size=2).losses) == 1


MIXED = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "ffn_gate": "Q5_K", "attn_output": "Q3_K", "token_embd": "Q8_0",
         "ffn_up": "Q2_K", "output": "Q4_0"}  # fmt: skip
MIXED_AS = {"embed": "int8_g32", "q_proj": "int4f_g32", "k_proj": "int4f_g32", "v_proj": "int8_g16",
            "o_proj": "int8_g16", "gate": "int8f_g32", "up_": "int4f_g16", "down": "int8_g16",
            "lm_head": "int4f_g32"}  # fmt: skip


def test_ggufs_codes_are_kept_and_an_adapter_is_trained_on_them(tmp_path):
    """A file of many types; rows of q and k come in another order."""
    pytest.importorskip("gguf", reason="the package gguf writes the file of this test")
    tiny = ZOO["llama"]
    options = dict(hidden_size=256, intermediate_size=256, head_dim=64)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, replace(tiny, options=tiny.options | options).build(), "llama", MIXED, "Q4_K")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    settings = dict(offload="disk", run_dir=tmp_path / "run", storage="kept", block_numel=1 << 15, adapter="r=4")
    with Engine(path, method=MeZO(lr=1e-2, batch_size=2), **settings) as engine:
        with torch.no_grad():
            assert_same(engine.run(ROWS_BATCH).logits, plain(**ROWS_BATCH).logits)
        held = {name: fmt.name for name, fmt in engine.layout.formats.items() if fmt.group}
        assert held == {name: MIXED_AS[part] for name in held for part in MIXED_AS if part in name} and len(held) == 16
        found = as_stored(engine)
        for name, weight in plain.named_parameters():
            if (name := f"base_model.model.{name}") in held:
                assert bool((found[name].view(weight.shape) == weight).all()), name
        assert len(set(engine.fit(GGUF_ROWS, steps=3, batch_size=2).losses)) == 3
        logits = engine.run(ROWS_BATCH).logits
    with Engine.resume(tmp_path / "run") as engine:
        assert_same(engine.run(ROWS_BATCH).logits, logits)
    for given in (path, tmp_path):  # the file, and a directory with one
        checkpoint = open_config(str(given))
        checkpoint.build_model()
        assert checkpoint.kept_formats("model.layers.0.self_attn.q_proj.weight")[0].name == "int4f_g32"


# ---- bad input -------------------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj."


def drop(name):
    return lambda tensors: tensors.pop(Q + name)


def cut(name):
    return lambda tensors: tensors.update({Q + name: tensors[Q + name][:-1].clone()})


def put(name, value):
    return lambda tensors: tensors.update({Q + name: value})


def with_nan(tensors):
    tensors[Q + "weight_scale_inv"][0, 0] = float("nan")


WRONG = [
    ("fp8", drop("weight_scale_inv"), r"q_proj.weight' is float8_e4m3fn \[64, 64\], and its scales are missing"),
    ("fp8", put("weight_scale_inv", torch.ones(3, 1)), r"float32 \[3, 1\], which does not fit .*blocks of 128 x 128"),
    ("fp8", put("weight_scale_inv", torch.ones(1, 1, dtype=torch.int32)), "one of float32, bfloat16"),
    ("fp8", put("weight", torch.empty(0, 64).to(torch.float8_e4m3fn)), r"float8_e4m3fn \[0, 64\]; a matrix of"),
    ("fp8 channels", put("weight_scale", torch.ones(1).bfloat16()), "one scale for all of .* settings say channel"),
    ("fp8 channels", put("weight", torch.ones(64, 64, dtype=torch.int8)), "the settings say codes of the type float"),
    ("int8 channels", put("weight", torch.tensor(1, dtype=torch.int8)), "a matrix of codes is expected"),
    ("int8 channels", put("weight_scale", torch.ones(64, 1, dtype=torch.uint8)), "exponents are scales of floats"),
    ("compressed-tensors", put("weight_scale", torch.ones(64, 8).bfloat16()), "of 8 inputs; the settings say 16"),
    ("gptq", drop("g_idx"), "g_idx' is missing, and the settings say desc_act"),
    ("gptq", drop("scales"), "q_proj.scales', which it cannot be decoded without, is missing"),
    ("gptq", drop("qzeros"), "q_proj.qzeros', which it cannot be decoded without, is missing"),
    ("gptq", cut("qzeros"), r"qzeros' is int32 \[3, 8\], which does not fit .* 4 groups"),
    ("gptq", cut("g_idx"), r"g_idx' is int32 \[63\]; \[64\] is expected"),
    ("gptq", put("g_idx", torch.full((64,), 4, dtype=torch.int32)), r"names groups 4 .. 4; there are 4"),
    ("gptq", put("g_idx", torch.full((64,), -1, dtype=torch.int32)), r"names groups -1"),
    ("gptq", put("weight", torch.ones(32, 64)), "q_proj.weight' is in the files twice"),
    ("awq", cut("qzeros"), r"qzeros' is int32 \[3, 8\]; \[4, 8\] is expected"),
    ("awq", put("scales", torch.ones(4, 9)), "neither GPTQ nor AWQ's GEMM layout"),
    ("compressed-tensors", drop("weight_shape"), "weight_shape', which it cannot be decoded without, is missing"),
    ("compressed-tensors", put("weight_shape", torch.tensor([2**40, 64])), r"weight_shape' says \[1099511627776, 64\]"),
    ("compressed-tensors", put("weight_shape", torch.tensor([64, 33])), "8 words for 33 codes of .4. bits fit none"),
    ("compressed-tensors", cut("weight_scale"), r"weight_scale' is bfloat16 \[63, 4\], which does not fit"),
    ("nvfp4", cut("weight_scale"), r"weight_scale' is float8_e4m3fn \[63, 4\]; \[64, 4\] is expected"),
    ("nvfp4", put("weight_scale_2", torch.ones(2)), r"\[2\]; one number is expected"),
    ("nvfp4", drop("weight_scale_2"), "weight_scale_2', which it cannot be decoded without, is missing"),
    ("nf4", drop("weight.absmax"), "absmax', which it cannot be decoded without, is missing"),
    ("nf4", cut("weight"), r"says \[64, 64\], and .* is uint8 \[2047, 1\]: 2048 bytes expected"),
    ("nf4", put("weight.quant_state.bitsandbytes__nf4", torch.tensor([123, 5], dtype=torch.uint8)), "description"),
    ("int8", cut("SCB"), r"SCB' is float32 \[63\]; \[64\] is expected"),
    ("int8", put("weight_format", torch.tensor(1, dtype=torch.uint8)), "permuted for a kernel"),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "change", "told"), WRONG, ids=[f"{s}: {told[:40]}" for s, _, told in WRONG])
def test_what_does_not_fit_is_told_before_a_weight_is_read(tmp_path, scheme, change, told):
    path, _, _ = written(tmp_path, "llama", scheme)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=told) as caught:
        Engine(path)
    assert str(path) in str(caught.value)


def test_a_mixture_of_schemes_is_refused(tmp_path):
    path, _, _ = written(tmp_path, "llama", "gptq")
    tensors = load_file(path / "model.safetensors")
    stored, _ = awq("model.layers.0.mlp.up_proj.weight", torch.randn(96, 64))
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        tensors.pop(f"model.layers.0.mlp.up_proj.{part}")
    save_file(tensors | {n: t.contiguous() for n, t in stored.items()}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match="in several schemes, which nobody writes together .gptq: .*; awq: "):
        Engine(path)


def test_values_that_are_not_finite_name_the_weight(tmp_path):
    path, _, _ = written(tmp_path, "llama", "fp8")
    tensors = load_file(path / "model.safetensors")
    with_nan(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with Engine(path, offload="none") as engine, pytest.raises(CheckpointError, match="q_proj.weight.*NaN or infinite"):
        engine.fit(batches(1, vocab=96), steps=1)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "layout 'marlin' is not supported"),
        ({"quant_method": "gptq", "bits": 8}, "zero points of 4 bits; the settings say 8"),
        ({"quant_method": "gptq", "bits": 4, "sym": True}, "the settings say sym, and zero points are not all 8"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"(": {}}}, "no expression"),
        ({"quant_method": "gptq", "bits": 4, "rotation": "hadamard"}, "rotation='hadamard' is not supported"),
        ({"quant_method": "hqq"}, r"quantized \(hqq\), which is not supported. Supported: .*gptq"),
        ({"quant_method": ["x"]}, "not supported"), ("int4", "cannot use it"),
        ({"quant_method": "bitsandbytes"}, r"GPTQ or AWQ: .*; quantization_config says 'bitsandbytes'\) .* of another"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_contradict_the_tensors(tmp_path, settings, told):
    path, _, _ = written(tmp_path, "llama", "gptq")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(CheckpointError, match=told):
        Engine(path, offload="none").fit(batches(1, vocab=96), steps=1)


@pytest.mark.parametrize(
    ("scheme", "settings", "told"),
    [
        ("awq", {"group_size": 32}, r"has \d groups; \d\d inputs in groups of 32 are others"),
        ("awq", {"group_size": -1}, r"has \d groups; \d\d inputs in groups of -1 are others"),
        ("compressed-tensors", {"transform_config": {"config_groups": {"u": {"apply": [
            {"targets": ["Linear"], "location": "input"}, {"targets": ["Linear"], "location": "weight_input"}]}}}},
         "transform_config has transforms at input"),
        ("compressed-tensors", {"transform_config": {"config_groups": 5}}, "at an unknown place"),
        ("compressed-tensors", {"format": ["marlin-24"]}, ""),
        ("compressed-tensors", {"transform_config": {"config_groups": {"v": {"apply": [
            {"targets": ["Linear"], "location": "weight_input"}]}}}}, ""),
        ("awq", {"group_size": 32, "extra_config": {"a": {"group_size": 16}}}, ""),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_ask_for_what_the_tensors_are_not(tmp_path, scheme, settings, told):
    path, _, _ = written(tmp_path, "llama", scheme)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= settings
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=told) if told else contextlib.nullcontext():
        Checkpoint.open(path).build_model()


@pytest.mark.parametrize("scheme", ["gptq", "nf4", "fp8"])
def test_quantized_without_a_word_in_config_json(tmp_path, scheme):
    path, plain, _ = written(tmp_path, "llama", scheme)
    (path / "config.json").write_text((plain / "config.json").read_text())
    quantized, expected = Checkpoint.open(path), Checkpoint.open(plain)
    quantized.build_model(), expected.build_model()
    assert quantized.digest() == expected.digest()


def test_tied_weights_of_a_quantized_checkpoint_stay_tied(tmp_path):
    path, plain, _ = written(tmp_path, "llama-tied", "awq")
    quantized, expected = Checkpoint.open(path), Checkpoint.open(plain)
    model = quantized.build_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected.build_model()
    assert quantized.digest() == expected.digest()


def test_what_transformers_does_not_read_of_a_gguf_header_is_told(tmp_path, monkeypatch, caplog):
    gguf = pytest.importorskip("gguf", reason="the package gguf writes the file of this test")
    add_heads = gguf.GGUFWriter.add_head_count

    def with_scaling(writer, count):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
        writer.add_logit_scale(1.0)  # changes nothing
        add_heads(writer, count)

    write_gguf(tmp_path / "plain.gguf", ZOO["llama"].build(), "llama", {}, "F16")
    Checkpoint.open(tmp_path / "plain.gguf").close()
    assert "llama.cpp" not in caplog.text
    monkeypatch.setattr(gguf.GGUFWriter, "add_head_count", with_scaling)
    write_gguf(tmp_path / "scaled.gguf", ZOO["llama"].build(), "llama", {}, "F16")
    Checkpoint.open(tmp_path / "scaled.gguf").close()
    assert "does not read llama.rope.scaling.type='linear', llama.rope.scaling.factor=4.0. For" in caplog.text


def test_a_gguf_file_that_is_damaged_is_an_error_of_ours(tmp_path):
    pytest.importorskip("gguf", reason="the package gguf writes the file of this test")
    write_gguf(tmp_path / "whole.gguf", ZOO["llama"].build(), "llama", {}, "F16")
    raw = (tmp_path / "whole.gguf").read_bytes()
    Checkpoint.open(tmp_path / "whole.gguf").close()
    random, path = Random(0), tmp_path / "sub" / "hurt.gguf"
    path.parent.mkdir()
    for count in range(60):
        if count % 2:
            hurt = raw[: random.randrange(len(raw))]
        else:  # a byte of what the header is made of
            at = random.randrange(2000)
            hurt = raw[:at] + bytes([raw[at] ^ 1 << random.randrange(8)]) + raw[at + 1 :]
        path.write_bytes(hurt)
        with contextlib.suppress(CheckpointError):
            GGUFFile(path).close()
    path.write_bytes(raw[:-100])
    with pytest.raises(CheckpointError, match="was cut short"):
        Checkpoint.open(path)
    (path.parent / "other.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match="holds 2 GGUF models .*give the path of one"):
        Checkpoint.open(path.parent)


# ---- kept ------------------------------------------------------------------------------------------------------------

KEPT_AS = {
    "awq-g32": "int4f_g32", "bnb-fp4-b64-float32": "fp4", "bnb-fp4-b64-nested-bfloat16": "fp4",
    "bnb-int8": "int8_127",
    "bnb-nf4-b128-float32": "nf4", "bnb-nf4-b64-float16": "nf4", "bnb-nf4-b64-nested-bfloat16": "nf4",
    "ct-fp8-block": "fp8f_g64", "ct-fp8-channel": "fp8f", "ct-fp8-tensor": "fp8f",
    "ct-int3-g32-asym-bfloat16": "int4f_g32", "ct-int4-channel": "int4", "ct-int4-g128-asym-bfloat16": "int4f",
    "ct-int4-g128-sym-float16": "int4f", "ct-int4-g32-asym-float16": "int4f_g32",
    "ct-int4-g32-sym-bfloat16": "int4f_g32", "ct-int8-channel": "int8", "ct-int8-g32-asym-bfloat16": "int8f_g32",
    "ct-int8-g64-sym-bfloat16": "int8_g64", "ct-mxfp4": "mxfp4", "ct-nvfp4": "nvfp4_two",
    "gptq-2-g32-asym-v1": "int4f_g32", "gptq-3-g32-asym-v1": "int4f_g32", "gptq-3-g32-sym-v2": "int4f_g32",
    "gptq-4-g128-asym-v1": "int4f", "gptq-4-g32-sym-v1": "int4f_g32", "gptq-4-g64-asym-v2": "int4f_g64",
    "gptq-8-g32-asym-v2": "int8f_g32", "gptq-8-g32-sym-v1": "int8_g32",
}  # fmt: skip
"""Case -> the format that storage="kept" takes; "": none holds its codes."""


@pytest.mark.parametrize("case", [case for case in RECORDS if not case.startswith("gguf")])
def test_kept_codes_are_what_the_library_rounds(case):
    """In every format that holds them, whole, and from a multiple of a group on."""
    record = RECORDS[case]
    files = in_memory(record["stored"])
    for weight in find(files, record["settings"], getattr(torch, record["dtype"]))[0]:
        expected, source = record["expected"][weight.name], Source(weight.name, *shape_and_dtype(weight))
        formats = kept_formats(source, {weight.name: weight}, files)
        assert (formats[0].name if formats else "") == KEPT_AS.get(case)
        for fmt in formats:
            for start in (0, fmt.group * 3):
                count = expected.numel() - start
                stored = kept_part(source, fmt, {weight.name: weight}, files, start, count, "w")
                found = decode_values(stored, None, fmt, count)
                assert_same(found.to(expected.dtype), expected.reshape(-1)[start:], (fmt.name, start))


def shape_and_dtype(weight):
    return math.prod(weight.shape), weight.dtype


KEPT = {
    "fp8 powers": (lambda name, w: fp8_powers(name, w), WRITERS["fp8"][1], "fp8_e4m3"),
    "fp8": (fp8_blocks, WRITERS["fp8"][1], "fp8f"),
    "gptq": (partial(gptq, group=128, order=False), WRITERS["gptq"][1] | {"group_size": 128}, "int4f"),
    "awq": (partial(awq, group=32), WRITERS["awq"][1] | {"group_size": 32}, "int4f_g32"),
    "compressed-tensors": (partial(pack_quantized, group=64), WRITERS["compressed-tensors"][1], "int4_g64"),
    "nvfp4": (nvfp4, WRITERS["nvfp4"][1], "nvfp4_two"),
    "mxfp4": (*WRITERS["mxfp4"], "mxfp4_across"),
    "int8": (*WRITERS["int8"], "int8_127"),
    "nf4": (nf4, WRITERS["nf4"][1], "nf4"),
    "nf4 32": (partial(nf4, block=32), WRITERS["nf4"][1], "nf4_g32"),
}  # fmt: skip
KEPT_MODELS = [(scheme, "llama") for scheme in KEPT if scheme != "mxfp4"]
KEPT_MODELS += [("fp8 powers", "mixtral"), ("awq", "mixtral"), ("mxfp4", "gpt-oss")]


@pytest.mark.parametrize(
    ("groups", "order", "expected"),
    [
        ([160], False, ["int4f_g32", "int4f_g16"]),  # and 96 that are left
        ([112], False, ["int4f_g16"]),
        ([64], True, []),
        ([256, 64], False, ["int4f_g64", "int4f_g32", "int4f_g16"]),  # two that become one
        ([64, 96], False, ["int4f_g32", "int4f_g16"]),
    ],
)
def test_groups_that_are_not_alike_are_kept_in_those_that_fit_into_all(groups, order, expected):
    stored, decoded, parts = {}, [], []
    for number, group in enumerate(groups):
        w = torch.randn(32, 256, generator=torch.Generator().manual_seed(number)) * 0.02
        tensors, values = gptq(f"{number}.weight", w, group=group, order=order)
        stored |= {name: t.contiguous() for name, t in tensors.items()}
        decoded.append(values)
        parts.append(Source(f"{number}.weight", w.numel(), torch.float16))
    files = in_memory(stored)
    weights = {
        weight.name: weight for weight in find(files, {"quant_method": "gptq", "group_size": groups[0]}, torch.half)[0]
    }
    recipe = Join(1, parts) if len(parts) > 1 else parts[0]
    formats = [fmt for fmt in kept_formats(recipe, weights, files) if fmt.kernel == "int4f"]
    assert [fmt.name for fmt in formats] == expected
    for fmt in formats:
        n, start = recipe.numel, 3 * fmt.group
        found = decode_values(kept_part(recipe, fmt, weights, files, start, n - start, "w"), None, fmt, n - start)
        assert_same(found.half(), torch.cat(decoded).reshape(-1)[start:])


@pytest.mark.parametrize("outputs", [184, 180])
@pytest.mark.parametrize("change", [None, "zeros", "far", "nan"])
def test_gpt_oss_is_kept_across_rows_or_in_fp8_where_neighbours_scales_are_near(change, outputs):
    """Across rows if they are a multiple of 8. Equal to what transformers makes of the codes."""
    chance = torch.Generator().manual_seed(1)
    groups = 3
    blocks = torch.randint(256, (2, outputs, groups, 16), dtype=torch.uint8, generator=chance)
    scales = torch.randint(113, 128, (2, outputs, groups), dtype=torch.uint8, generator=chance)
    if change == "zeros":
        blocks[1, 7, 1], scales[1, 7, 1] = 0x80, 0
    elif change is not None:
        scales[1, 7, 1] = {"far": 100, "nan": 255}[change]
    files = in_memory({"x_blocks": blocks, "x_scales": scales})
    (weight,), _ = find(files, {"quant_method": "mxfp4"}, torch.bfloat16)
    source, weights = Source("x", *shape_and_dtype(weight)), {"x": weight}
    formats = kept_formats(source, weights, files)
    own = ["mxfp4_across_184"] if outputs == 184 and change != "nan" else []
    assert [fmt.name for fmt in formats] == own + ([] if change in ("far", "nan") else ["fp8_e4m3"])
    for fmt in formats:
        whole = convert_moe_packed_tensors(blocks, scales).reshape(-1)
        read = torch.empty_like(whole)
        weight.read_into(files, 0, read)
        assert_same(read, whole)
        for start in (0, fmt.group * 2, fmt.group * 3 if own else fmt.group * 50):
            stored = kept_part(source, fmt, weights, files, start, source.numel - start, "x")
            assert_same(decode_values(stored, None, fmt, source.numel - start).bfloat16(), whole[start:])


def fp8_powers(name, w):
    """Scales rounded up to powers of two."""
    stored, _ = fp8_blocks(name, w)
    scale = torch.exp2(stored[f"{name}_scale_inv"].log2().ceil())
    each = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: w.shape[0], : w.shape[1]]
    codes = (w.float() / each).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale}, (codes.float() * each).bfloat16()


def as_stored(engine):
    """What lanes see of each parameter, float32 and flat."""
    filler, found = Filler(engine.plan, engine.layout, engine.base), {}
    for block in engine.plan.blocks:
        buffer = torch.empty(engine.layout.block_bytes[block.index], dtype=torch.uint8)
        filler.fill(block.index, buffer)
        for piece in block.pieces:
            place = engine.layout.places[piece]
            stored = buffer[place.offset : place.offset + place.nbytes]
            found.setdefault(piece.name, []).append(decode_values(stored, None, place.fmt, piece.numel))
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize(("scheme", "model"), KEPT_MODELS)
def test_kept_codes_decode_to_what_the_library_rounds(tmp_path, monkeypatch, scheme, model):
    """Also where experts are merged on the way, and where a block ends inside of a weight."""
    writer, settings, name_of_format = KEPT[scheme]
    kind = scheme if scheme == "mxfp4" else "this"  # experts alone
    monkeypatch.setitem(WRITERS, kind, (writer, settings))
    path, plain, _ = written(tmp_path, model, kind, hidden=128, inner=256)
    expected = Checkpoint.open(plain)
    expected.build_model()
    trained = dict(trainable="*norm*", method=MeZO(lr=1e-2, batch_size=2))
    settings = dict(offload="disk", run_dir=tmp_path / "run", storage="kept", block_numel=1 << 14)
    with Engine(path, **trained, **settings) as engine:
        losses = engine.fit(batches(3, vocab=96), steps=3).losses
        assert len(set(losses)) == 3
        held = [
            name for name, fmt in engine.layout.formats.items() if name_of_format in (fmt.name, fmt.kernel)
        ]  # of mxfp4_across, of any width
        assert len(held) >= (4 if model == "gpt-oss" else 8) and any("mlp" in name for name in held)
        weights = dict(engine.weights())
        found = as_stored(engine)
        for name in held:
            want = expected.load(name)
            assert_same(found[name].to(want.dtype).view(want.shape), want, name)
        stored = engine.layout.total_bytes
        engine.save_pretrained(tmp_path / "out")
    assert set(weights) >= set(held)
    assert stored < 0.8 * sum(2 * t.numel() for t in weights.values())
    with Engine.resume(tmp_path / "run") as engine:
        assert_same(dict(engine.weights()), weights)


@pytest.mark.parametrize(("scheme", "since", "name_of_format"), [("gptq", 0, "int8"), ("nvfp4", 1, "nvfp4")])
def test_a_run_goes_on_in_the_formats_that_its_version_kept(tmp_path, monkeypatch, scheme, since, name_of_format):
    """Begun by a version that knew fewer formats: resumed by the command line, too, and replayed."""
    path, *_ = written(tmp_path, "llama", scheme, hidden=128, inner=256, writer=KEPT[scheme][0])
    run, rows, newest = tmp_path / "run", tmp_path / "rows.jsonl", Checkpoint.kept_formats
    rows.write_text("".join(json.dumps({"input_ids": row}) + chr(10) for row in torch.arange(96).view(12, 8).tolist()))

    def begin(chosen, run):
        settings = dict(offload="disk", storage="kept", block_numel=1 << 14, trainable="*norm*", run_dir=run)
        with monkeypatch.context() as patched:
            patched.setattr(Checkpoint, "kept_formats", lambda *of: tuple(f for f in newest(*of) if chosen(f)))
            with Engine(path, method=MeZO(lr=1e-2, batch_size=2), **settings) as engine:
                engine.fit(rows, steps=3)
                return formats_of(engine), dict(engine.weights())

    held, weights = begin(lambda fmt: kept_since(fmt) <= since, run)
    assert held["model.layers.0.mlp.up_proj.weight"] == name_of_format
    with Engine.resume(run) as engine:
        assert formats_of(engine) == held
        assert_same(dict(engine.weights()), weights)
    assert cli.main(["fit", str(run), "--resume", "--steps", "4", "--quiet"]) == 0
    with replayed(path, run, to=3) as engine:
        assert formats_of(engine) == held
        assert_same(dict(engine.weights()), weights)
    if scheme == "gptq":
        begin(lambda fmt: fmt.name == "int4f_g32", tmp_path / "odd")  # as no version has it
        with pytest.raises(JournalError, match="storage: .* began with storage='kept' in zo_offload .* that version"):
            Engine.resume(tmp_path / "odd").fit(steps=4)


@pytest.mark.parametrize(("numel", "kernel"), [(1 << 14, "mxfp4_across"), (1 << 13, "fp8_e4m3")])
def test_pieces_that_begin_inside_of_a_band_take_the_next_format(tmp_path, numel, kernel):
    path, *_ = written(tmp_path, "gpt-oss", "mxfp4", hidden=128, inner=256)
    with Engine(path, storage="kept", trainable="*norm*", offload="none", block_numel=numel) as engine:
        name = "model.layers.0.mlp.experts.gate_up_proj"  # rows of 512
        assert len(engine.plan.pieces_of(name)) > 4 and engine.layout.formats[name].kernel == kernel
        out = torch.empty(1000, dtype=torch.bfloat16)
        engine.base.read_into(name, 5000, out)
        assert_same(as_stored(engine)[name][5000:6000].bfloat16(), out)


def formats_of(engine):
    return {name: fmt.name for name, fmt in engine.layout.formats.items()}


def test_nothing_to_keep_is_an_error_that_says_so(tmp_path):
    _, plain, _ = written(tmp_path, "llama", "fp8")
    with pytest.raises(ConfigError, match="no quantized weights whose codes a storage format holds"):
        Engine(plain, storage="kept")
    again = kept_llama(tmp_path / "again")
    with pytest.raises(ConfigError, match=r"storage='int\d.* never rewritten"):
        Engine(again, storage="kept")
    with pytest.raises(ConfigError, match="keep='embed_tokens': storage='kept' keeps the checkpoint's own codes"):
        Engine(again, storage="kept", keep="embed_tokens", trainable="*norm*")


def kept_llama(folder):
    folder.mkdir()
    return written(
        folder, "llama", "compressed-tensors", hidden=128, inner=256, writer=partial(pack_quantized, group=64)
    )[0]


@pytest.mark.parametrize("scheme", ["compressed-tensors", "gptq", "nvfp4"])
def test_lora_on_kept_codes_is_trained_from_disk(tmp_path, capsys, scheme):
    writer, _, name_of_format = KEPT[scheme]
    path, *_ = written(tmp_path, "llama", scheme, hidden=128, inner=256, writer=writer)
    settings = dict(offload="disk", run_dir=tmp_path / "run", storage="kept", block_numel=1 << 14, adapter="r=4")
    with Engine(path, method=MeZO(lr=1e-2, batch_size=2), **settings) as engine:
        losses = engine.fit(batches(3, vocab=96), steps=3).losses
        assert len(set(losses)) == 3
        assert sum(fmt.name == name_of_format for fmt in engine.layout.formats.values()) == 14
        logits = engine.run(ROWS_BATCH).logits
    with Engine.resume(tmp_path / "run") as engine:
        assert_same(engine.run(ROWS_BATCH).logits, logits)
    if scheme == "nvfp4":
        assert cli.main(["plan", str(path), "--storage", "kept", "--lora", "4", "--gpu", "rtx-4090"]) == 0
        assert f"stored as {name_of_format}, " in capsys.readouterr().out


@pytest.mark.parametrize("scheme", ["fp8", "gptq", "awq", "compressed-tensors", "nvfp4", "int8", "nf4", "plain"])
def test_an_export_in_float32_has_the_logits_of_few_bits(tmp_path, scheme):
    """What plain transformers computes of it equals the engine; in the usual layout it is rounded to bf16."""
    if scheme == "plain":
        path, *_ = written(tmp_path, "llama", "fp8", hidden=128, inner=256)
        settings = dict(storage="int8+8")
    else:
        writer, _, _ = KEPT[scheme]
        path, *_ = written(tmp_path, "llama", scheme, hidden=128, inner=256, writer=writer)
        settings = dict(storage="kept", trainable="*norm*")
    with Engine(path, method=MeZO(lr=1e-2), offload="none", **settings) as engine:
        engine.step(ROWS_BATCH | {"labels": ROWS_BATCH["input_ids"]})
        want = engine.run(ROWS_BATCH).logits
        engine.save_pretrained(tmp_path / "full", scheme="safetensors-f32")
        engine.save_pretrained(tmp_path / "usual")
    found = {}
    for name in ("full", "usual"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        with torch.no_grad():
            found[name] = model(**ROWS_BATCH).logits
    assert_same(found["full"], want)
    assert not torch.equal(found["usual"], want)


@pytest.mark.parametrize(
    ("config", "settings", "gigabytes"),
    [
        ("DeepseekV3Config", WRITERS["fp8"][1], 673),
        ("GptOssConfig", WRITERS["mxfp4"][1] | {"modules_to_not_convert": ["model.layers.*.self_attn"]}, 65.2),
        ("LlamaConfig", WRITERS["gptq"][1] | {"group_size": 128}, 3.9),
    ],
)
def test_a_plan_says_what_the_files_take(tmp_path, config, settings, gigabytes):
    """From a config alone; DeepSeek-V3's and gpt-oss-120b's published files have 688 and 65 GB, the first with a layer
    more."""
    real = getattr(transformers, config)()
    real.architectures = [config.replace("Config", "ForCausalLM")]
    real.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": settings}))
    checkpoint = Checkpoint.open(tmp_path, weights=False)
    model = checkpoint.build_model(torch.bfloat16)
    nbytes = file_bytes(checkpoint.settings, ((name, tuple(p.shape)) for name, p in model.named_parameters()))
    assert nbytes == pytest.approx(gigabytes * 1e9, rel=0.02)
