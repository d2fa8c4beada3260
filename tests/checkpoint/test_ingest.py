"""Weights in and out a run at a time: the same bytes as whole tensors give, no more read or held than is asked for."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from support.zoo.models import ZOO, tokens
from zo_offload import QZO, Engine, MeZO
from zo_offload.checkpoint import weights
from zo_offload.checkpoint.checkpoint import Checkpoint
from zo_offload.checkpoint.safetensors_io import SafetensorsFile
from zo_offload.checkpoint.weights import Crcs, combine, tensor_digest
from zo_offload.errors import CheckpointError
from zo_offload.formats import FORMATS, encode_values, get_format
from zo_offload.stream.ingest import Filler, ModuleBase

ROOT = Path(__file__).resolve().parents[2]
BATCH = tokens(labels=tokens()["input_ids"])
CHUNK = 256  # a multiple of every group, and less than most pieces here


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    monkeypatch.setattr(weights, "CHUNK", CHUNK)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints whose tensors are as in the model, are merged, and are split."""
    folder = tmp_path_factory.mktemp("saved")
    for name in ("llama-tied", "mixtral", "hrm-text"):
        ZOO[name].build(torch.bfloat16).save_pretrained(folder / name, max_shard_size="30KB")
    return folder


def engine_of(path, storage: str, **settings) -> Engine:
    method = MeZO(lr=1e-3) if get_format(storage).trains else QZO(lr=1e-3)
    return Engine(path, method=method, storage=storage, block_numel=1024, **settings)


def reference_block(engine: Engine, index: int) -> Tensor:
    """The block from whole tensors, each piece encoded at once."""
    layout, checkpoint = engine.layout, engine.checkpoint
    block = torch.zeros(layout.block_bytes[index], dtype=torch.uint8)
    for piece in engine.plan.blocks[index].pieces:
        place = layout.places[piece]
        values = checkpoint.load(piece.name).view(-1)[piece.start : piece.stop]
        stored, residual = encode_values(values, place.fmt)
        block[place.offset : place.offset + place.nbytes] = stored
        if residual is not None:
            block[place.residual_offset : place.residual_offset + place.residual_nbytes] = residual
    return block


@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "hrm-text"])
def test_blocks_are_what_whole_tensors_give(saved, name, storage):
    engine = engine_of(saved / name, storage)
    filler = Filler(engine.plan, engine.layout, engine.base)
    assert max(piece.numel for block in engine.plan.blocks for piece in block.pieces) > CHUNK
    for index, nbytes in enumerate(engine.layout.block_bytes):
        buffer = torch.full((nbytes,), 0xAB, dtype=torch.uint8)
        filler.fill(index, buffer)
        assert torch.equal(buffer, reference_block(engine, index)), engine.plan.blocks[index]


@pytest.mark.parametrize("native", [True, False])
def test_the_reference_encodes_runs_too(saved, native, monkeypatch):
    if not native:
        monkeypatch.setattr("zo_offload.kernels.native.library", lambda: None)
    for storage in FORMATS:
        engine = engine_of(saved / "llama-tied", storage)
        buffer = torch.empty(engine.layout.block_bytes[0], dtype=torch.uint8)
        Filler(engine.plan, engine.layout, engine.base).fill(0, buffer)
        assert torch.equal(buffer, reference_block(engine, 0)), storage


@pytest.mark.parametrize("name", ["mixtral", "hrm-text"])
def test_filling_a_block_reads_the_elements_of_its_pieces_and_no_others(saved, name, monkeypatch):
    engine = engine_of(saved / name, "bf16")
    read, reads = SafetensorsFile.read_into, []

    def counted(self, tensor: str, start: int, out: Tensor) -> None:
        reads.append(len(out))
        read(self, tensor, start, out)

    monkeypatch.setattr(SafetensorsFile, "read_into", counted)
    filler = Filler(engine.plan, engine.layout, engine.base)
    for index, block in enumerate(engine.plan.blocks):
        reads.clear()
        filler.fill(index, torch.empty(engine.layout.block_bytes[index], dtype=torch.uint8))
        assert sum(reads) == block.numel and max(reads) <= CHUNK


@pytest.mark.parametrize("seed", range(3))
def test_the_digest_does_not_depend_on_the_order_of_blocks(saved, seed, monkeypatch):
    wanted = Checkpoint.open(saved / "mixtral").digest()
    engine = engine_of(saved / "mixtral", "int8")
    order = list(range(len(engine.plan.blocks)))
    random.Random(seed).shuffle(order)
    for index in [*order, order[0]]:
        buffer = torch.empty(engine.layout.block_bytes[index], dtype=torch.uint8)
        Filler(engine.plan, engine.layout, engine.base).fill(index, buffer)
    monkeypatch.setattr(SafetensorsFile, "read_into", lambda *_: pytest.fail("read again"))
    assert engine.base.digest() == wanted


def test_a_module_in_memory_has_the_digest_of_its_tensors():
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 7))
    model[0].weight = nn.Parameter(torch.randn(30, 20).t())
    base = ModuleBase(model)
    for name, parameter in model.named_parameters():
        assert base.digest_of(name) == tensor_digest(name, parameter)
        out = torch.empty(13)
        base.read_into(name, 3, out[: min(13, parameter.numel() - 3)])
        assert torch.equal(out[:4], parameter.detach().reshape(-1)[3:7])


def test_crcs_of_runs_in_any_order():
    data = torch.randint(0, 256, (1000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = zlib.crc32(data.numpy().tobytes())
    for cut in (0, 1, 499, 1000):
        parts = [zlib.crc32(part.numpy().tobytes()) for part in (data[:cut], data[cut:])]
        assert combine(*parts, 1000 - cut) == whole
    for seed in range(20):
        draw, crcs = random.Random(seed), Crcs()
        cuts = [0, *sorted(draw.sample(range(1, 1000), 9)), 1000]
        runs = list(itertools.pairwise(cuts))
        draw.shuffle(runs)
        for begin, end in runs:
            crcs.add("x", begin, data[begin:end], 1000)
        assert crcs.of("x", lambda: pytest.fail("read again")) == whole


def test_crcs_of_overlapping_runs_are_taken_again():
    data, crcs = torch.arange(100, dtype=torch.uint8), Crcs()
    for begin, end in [(0, 60), (50, 100)]:
        crcs.add("x", begin, data[begin:end], 100)
    assert crcs.of("x", lambda: iter([data[:30], data[30:]])) == zlib.crc32(data.numpy().tobytes())


# ---- what a format cannot hold, and what is not there ---------------------------------------------------------------


def spoilt(model: nn.Module, value: float, places: list[int]) -> ModuleBase:
    with torch.no_grad():
        model.lm_head.weight.view(-1)[places] = value
    return ModuleBase(model)


def test_values_that_cannot_be_stored_are_counted_over_the_whole_piece(tmp_path):
    def fill(value: float, storage: str) -> None:
        model = ZOO["llama"].build()
        base = spoilt(model, value, [0, 700, 1500])
        engine = engine_of(model, storage, base=base, run_dir=tmp_path / storage, offload="disk")
        with engine:
            engine.run(BATCH)

    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' of the base: 2 of 1024 values are NaN or infinite"):
        fill(float("nan"), "fp32")
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' of the base: values up to 1e\+30, more than fp16"):
        fill(1e30, "fp16")
    assert not list(tmp_path.rglob("*.zoj")), "no run began"


def test_a_base_of_other_shapes_is_named_before_any_block_is_written(tmp_path):
    model, flushed = ZOO["llama"].build(), []

    class Wrong(ModuleBase):
        def shape_of(self, name: str) -> torch.Size:
            return torch.Size([1]) if name == "lm_head.weight" else super().shape_of(name)

    engine = engine_of(model, "fp32", base=Wrong(model))
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is \(1,\) in the base, \(96, 32\) in the model"):
        engine.run(BATCH)
    assert not flushed


# ---- out of an engine -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", FORMATS)
def test_any_run_of_a_parameter_is_that_of_the_whole(saved, storage):
    """With a fold behind and updates pending, across pieces, at any element, whatever was read before."""
    with engine_of(saved / "mixtral", storage, fold_every=3) as engine:
        for _ in range(4):
            engine.step(BATCH)
        whole = dict(engine.weights())
        reader, draw = engine.active.start().streamer.reader, random.Random(0)
        for _ in range(60):
            name = draw.choice(list(whole))
            flat = whole[name].view(-1)
            start = draw.randrange(len(flat))
            out = torch.empty(draw.randint(0, min(3000, len(flat) - start)), dtype=reader.dtype_of(name))
            reader.read_into(name, start, out)
            assert torch.equal(out, flat[start : start + len(out)]), (name, start, len(out))


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "llama-tied"])
@pytest.mark.parametrize("block_numel", [4096, 10**6])
def test_an_export_fetches_each_block_once(tmp_path, name, block_numel):
    """Experts lie in turns in the blocks, all projections of each; the files have a tensor of each projection."""
    ZOO[name].build(torch.bfloat16).save_pretrained(tmp_path / "base")
    with Engine(tmp_path / "base", offload="disk", block_numel=block_numel, run_dir=tmp_path / "run") as engine:
        engine.run(BATCH)
        window, loads = engine.active.start().streamer.window, []
        load = window.load
        window.load = lambda block, **options: loads.append(block) or load(block, **options)
        engine.save_pretrained(tmp_path / "out", max_shard_bytes=20_000)
    assert loads == list(range(len(engine.plan.blocks)))
    cls = getattr(transformers, ZOO[name].model)
    again, first = (cls.from_pretrained(tmp_path / which) for which in ("out", "base"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), first.parameters(), strict=True))


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_no_way_in_or_out_takes_memory_with_the_largest_parameter():
    """160 MiB of bf16 in one parameter, plain and in merged experts, blocks of 8 MiB: no phase takes much more than
    three blocks and a constant, where one copy of the parameter would be twice that."""
    command = [sys.executable, "-m", "benchmarks.ingest", "--mib", "160", "--block-numel", str(2 << 20)]
    command += ["--only", "digest", "ingest", "export", "replay"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    phases = ["digest", "ingest", "export", "replay"]
    assert [(row["case"], row["phase"]) for row in rows] == [(c, p) for c in ("vocabulary", "experts") for p in phases]
    allowed = 1.25 * rows[0]["goal_bytes"]  # heaps are not exact
    assert allowed < 0.75 * rows[0]["largest_bytes"]
    assert [(row["case"], row["phase"], row["peak_bytes"]) for row in rows if row["peak_bytes"] > allowed] == []
