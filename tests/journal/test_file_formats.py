"""docs/file_formats.md says what is on the disk: a reader that knows only the page finds what the engine knows."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from support.zoo.small import tiny_llama
from zo_offload import FZOO, Engine, MeZO
from zo_offload.plan.layout import Layout

ROOT = Path(__file__).resolve().parents[2]
READER, HEXDUMP = ROOT / "examples" / "read_run.py", ROOT / "docs" / "hexdump_of_a_run.py"
STEPS = 8  # of whole folds: the blocks then have all of them


def module_at(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reader():
    return module_at(READER)


def batches(count=STEPS):
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": x, "labels": x} for x in torch.randint(0, 61, (count, 4, 9), generator=generator)]


def weights_of(blocks: dict[int, bytes], layout: Layout) -> dict[str, torch.Tensor]:
    """Each parameter's values, from its pieces' bytes."""
    found: dict[str, list[torch.Tensor]] = {}
    for piece, place in sorted(layout.places.items(), key=lambda item: item[0].start):
        block = torch.frombuffer(bytearray(blocks[place.block]), dtype=torch.uint8)
        stored = block[place.offset : place.offset + place.nbytes]
        residual = block[place.residual_offset : place.residual_offset + place.residual_nbytes]
        split = place.residual_nbytes > 0
        values = place.fmt.join(stored, residual, piece.numel) if split else place.fmt.decode(stored, piece.numel)
        found.setdefault(piece.name, []).append(values)
    return {name: torch.cat(pieces) for name, pieces in found.items()}


RUNS = {
    "fp32, all trained": dict(method=MeZO(lr=1e-2, weight_decay=0.1, batch_size=4), storage="fp32"),
    "bf16+8, a layer trained": dict(
        method=MeZO(lr=1e-2, batch_size=4), storage="bf16+8", trainable=["model.layers.1*"], fold_every=2
    ),
    "fzoo, int8+8, many blocks": dict(
        method=FZOO(lr=1e-2, directions=3, batch_size=4), storage="int8+8", block_numel=2048, fold_every=4
    ),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_reader_of_the_page_finds_what_the_engine_knows(kind, reader, tmp_path):
    with Engine(tiny_llama(2), offload="disk", run_dir=tmp_path, **RUNS[kind]) as engine:
        engine.fit(batches(), steps=STEPS)
        weights, layout, journal = dict(engine.weights()), engine.layout, engine.journal
    header, steps, notes, names = reader.read_journal((tmp_path / "journal.zoj").read_bytes())
    assert header == journal.header and notes == [(note.step, note.values) for note in journal.notes]
    assert len(steps) == STEPS
    for found, record in zip(steps, journal.steps, strict=True):
        for name, value in (("step", record.step), ("loss", record.loss), ("grad", record.grad), ("lr", record.lr)):
            assert found[name] == value
        assert found["batch"] == record.batch_crc
        assert found["updates"] == [(u.seed, u.coeff, u.decay) for u in record.updates]
    assert [name[b"ZOB3"] for name in names] == [journal.history(t) for t in range(STEPS + 1)]

    blocks = {}
    for index, shape in enumerate(json.loads((tmp_path / "blocks" / "shapes.json").read_text())):
        found = reader.read_block((tmp_path / "blocks" / f"{index:05d}.zob").read_bytes(), *shape)
        assert found, f"block {index}: no generation is sound"
        for version, (magic, name), _ in found.values():
            assert name == names[version][magic]
        version, _, blocks[index] = max(found.values())
        assert version == (STEPS if shape[2] else 0)
    found = weights_of(blocks, layout)
    assert found.keys() == weights.keys()
    for name, values in found.items():
        want = weights[name]
        assert torch.equal(values.view(want.shape).to(want.dtype), want), name


def test_skipped_steps_and_halved_eps_are_read(reader, tmp_path):
    """A step whose loss is not finite: recorded, no update."""
    more = [0.0]

    def objective(model, batch):
        return model(**batch).loss + more[-1]

    method = MeZO(lr=1e-2, batch_size=4, on_nonfinite="halve_eps")
    with Engine(tiny_llama(2), method=method, objective=objective, run_dir=tmp_path) as engine:
        for batch, value in zip(batches(3), (0.0, math.nan, 0.0), strict=True):
            more.append(value)
            engine.step(batch)
        journal = engine.journal
    _, steps, _, names = reader.read_journal((tmp_path / "journal.zoj").read_bytes())
    assert [len(step["updates"]) for step in steps] == [1, 0, 1] and steps[1]["flags"] & ~1 == 2 | 8
    assert [name[b"ZOB3"] for name in names] == [journal.history(t) for t in range(4)]


def test_damage_and_a_crashs_tail_are_seen(reader, tmp_path):
    with Engine(tiny_llama(2), offload="disk", run_dir=tmp_path, fold_every=1, **RUNS["fp32, all trained"]) as engine:
        engine.fit(batches(3), steps=3)
    data = (tmp_path / "journal.zoj").read_bytes()
    for cut in (1, 20, 63):
        assert len(reader.read_journal(data[:-cut])[1]) == 2
    path, shape = tmp_path / "blocks" / "00000.zob", json.loads((tmp_path / "blocks" / "shapes.json").read_text())[0]
    block = path.read_bytes()
    generations = reader.read_block(block, *shape)
    assert len(generations) == 2
    for at, lost in ((8192 + 5, 0), (len(block) - 1, 1), (16, 0), (4096 + 50, 1)):
        damaged = bytearray(block)
        damaged[at] ^= 1
        assert reader.read_block(bytes(damaged), *shape).keys() == {0, 1} - {lost}


def test_what_it_prints(tmp_path):
    with Engine(tiny_llama(2), offload="disk", run_dir=tmp_path, **RUNS["fp32, all trained"]) as engine:
        engine.fit(batches(2), steps=2)
        losses, blocks = [record.loss for record in engine.journal.steps], len(engine.layout.block_bytes)
    text = subprocess.run([sys.executable, READER, tmp_path], check=True, capture_output=True, text=True).stdout
    assert all(f"step {i}  loss {loss!r}" in text for i, loss in enumerate(losses))
    assert text.count("of this journal") >= blocks and "NOT OF" not in text and "no generation" not in text


def test_it_stands_alone():
    assert "zo_offload" not in READER.read_text() and "torch" not in READER.read_text()


@pytest.mark.parametrize("form", [2, 3])
@pytest.mark.parametrize("name", ["mezo-fp32", "mezo-int8+8", "fzoo-host"])
def test_files_of_the_earlier_formats_are_read_too(name, form, reader, tmp_path, capsys):
    with tarfile.open(ROOT / "tests" / "data" / f"runs_format{form}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    reader.main(tmp_path / name)
    text = capsys.readouterr().out
    assert (tmp_path / name / "journal.zoj").read_bytes()[:4] == b"ZOJ%d" % form
    assert "of this journal" in text and "NOT OF" not in text and "no generation" not in text


def test_the_page_shows_what_the_script_makes():
    script = module_at(HEXDUMP)
    assert script.section() in script.PAGE.read_text(), "run docs/hexdump_of_a_run.py --write, and see what changed"
