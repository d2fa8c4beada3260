"""Blocks that are used as they lie in the page cache: the same numbers, checked when it is promised, and given back."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from support.block_files import SHAPES, content, fetched, started
from support.compare import assert_same
from support.training import METHOD, batches, resident, train
from support.zoo.small import tiny_llama, tiny_opt
from zo_offload import ConfigError, Engine
from zo_offload.errors import CheckpointError
from zo_offload.replay import replayed
from zo_offload.stream.slots import Slot
from zo_offload.stream.window import BlockWindow
from zo_offload.tiers import lending
from zo_offload.tiers.block_file import FileShape, extents
from zo_offload.tiers.disk import DiskTier

WHOLE = SHAPES["all trained"]

if lending._native() is None:
    pytest.skip("no native library: nothing is lent", allow_module_level=True)


@pytest.fixture
def counted(monkeypatch):
    """How stays came by their bytes: "lent", or "copied", or "copied late" for a fold that was not foretold."""
    counts: Counter[str] = Counter()
    fetch, fetch_own = Slot.fetch, Slot.fetch_own

    def counting(self, block, pieces, tier, layout, target, whole=True):
        fetch(self, block, pieces, tier, layout, target, whole)
        counts["lent" if self.lent else "copied"] += 1

    def late(self, *args):
        counts["copied late"] += 1
        fetch_own(self, *args)

    monkeypatch.setattr(Slot, "fetch", counting)
    monkeypatch.setattr(Slot, "fetch_own", late)
    return counts


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def lent_bytes(tier: DiskTier, nbytes: int) -> bytes | None:
    lent = tier.lend(0, nbytes)
    if lent is None:
        return None
    data = lent.memory.numpy().tobytes()
    lent.give_back()
    return data


@pytest.mark.parametrize(
    "settings",
    [
        dict(storage="fp32", io_threads=2), dict(storage="int8+8"), dict(storage="fp32", trainable="*norm*"),
        dict(storage="bf16", overlap=False, num_slots=1),
    ],
    ids=str,
)  # fmt: skip
def test_lent_blocks_give_the_numbers_of_memory(settings, counted, tmp_path):
    found = train(tiny_llama(), 6, offload="disk", run_dir=tmp_path / "lent", fold_every=4, **settings)
    assert counted["lent"] > counted["copied"] > 0, "most visits fold nothing"
    numbers = {k: v for k, v in settings.items() if k in ("storage", "trainable")}
    assert_same(found, resident(tiny_llama, 6, fold_every=4, **numbers))


def test_with_scrub_every_1_all_are_copies_of_the_same_numbers(counted, tmp_path):
    settings = dict(storage="fp32", fold_every=4)
    found = train(tiny_llama(), 6, offload="disk", run_dir=tmp_path / "copied", scrub_every=1, **settings)
    assert counted["copied"] and not counted["lent"]
    assert_same(found, resident(tiny_llama, 6, **settings))


def test_a_fold_that_was_not_foretold_is_made_in_a_copy(counted, monkeypatch, tmp_path):
    monkeypatch.setattr(BlockWindow, "_foretold", lambda self, op: 0)
    found = train(tiny_llama(), 6, offload="disk", run_dir=tmp_path / "run", fold_every=4, storage="fp32")
    assert counted["lent"] and counted["copied late"]
    assert_same(found, resident(tiny_llama, 6, fold_every=4, storage="fp32"))


def test_an_evaluation_reads_both_parts_of_blocks_that_were_lent_in_part(counted, tmp_path):
    def trained(**settings):
        with Engine(tiny_opt(), method=METHOD, storage="int8+8", fold_every=4, **settings) as engine:
            losses = []
            for batch in batches(5):
                losses += [engine.evaluate([batch]), engine.step(batch).loss]
            return losses, dict(engine.weights())

    found = trained(offload="disk", run_dir=tmp_path / "run")
    assert counted["lent"] and counted["copied late"]
    assert_same(found, trained(offload="none"))


@pytest.mark.parametrize("every", [2, 5])
def test_damage_in_memory_is_seen_by_the_scrub_at_the_stated_rate(every, tmp_path):
    started(tmp_path, WHOLE).close()
    tier = DiskTier.open(tmp_path, [WHOLE], scrub_every=every)
    good = content(WHOLE, 0).numpy().tobytes()
    assert lent_bytes(tier, WHOLE.nbytes) == good  # summed: this process had not seen it
    flip(tmp_path / "00000.zob", extents(WHOLE, 0)[0][0].at + 77)
    seen = [lent_bytes(tier, WHOLE.nbytes) is not None for _ in range(every)]
    assert seen == [True] * (every - 1) + [False]
    with pytest.raises(CheckpointError, match="block 0 is damaged"):
        fetched(tier, WHOLE)
    tier.close()


def test_damage_is_seen_at_once_after_opening_and_before_a_fold(tmp_path):
    started(tmp_path, WHOLE).close()
    flip(tmp_path / "00000.zob", extents(WHOLE, 0)[0][0].at + 5000)
    tier = DiskTier.open(tmp_path, [WHOLE], scrub_every=1000)
    assert tier.lend(0, WHOLE.nbytes) is None
    tier.close()
    tier = started(tmp_path, WHOLE)
    assert tier.lend(0, WHOLE.nbytes) is not None, "written and summed by this process"
    flip(tmp_path / "00000.zob", extents(WHOLE, 0)[0][0].at + 5000)
    assert tier.lend(0, WHOLE.nbytes) is not None
    with pytest.raises(CheckpointError, match="block 0 is damaged"):
        fetched(tier, WHOLE)  # what a stay does whose block will be folded into
    tier.close()


def test_damage_in_memory_is_named_before_a_fold_and_never_folded(tmp_path, caplog):
    """Losses between are of the damaged bytes, and so the updates; the weights are those of the updates."""
    run = tmp_path / "run"
    with Engine(tiny_opt(), method=METHOD, storage="bf16", fold_every=4, offload="disk", run_dir=run) as engine:
        for batch in batches(6):
            engine.step(batch)
        tier = engine.active.session.tier
        generation = tier.headers(1)[0][0]
        flip(run / "blocks" / "00001.zob", extents(tier.shapes[1], generation)[0][0].at + 1)
        for batch in batches(4):
            engine.step(batch)
        assert "00001.zob: generation" in caplog.text and "is damaged" in caplog.text
        weights = dict(engine.weights())
    with replayed(tiny_opt(), run / "journal.zoj") as engine:
        assert_same((0, weights), (0, dict(engine.weights())))


def test_only_what_lies_in_one_place_and_in_the_cache_is_lent(tmp_path):
    shape = SHAPES["parts, odd sizes"]
    tier = started(tmp_path, shape)
    assert lent_bytes(tier, shape.nbytes) == content(shape, 0).numpy().tobytes()
    tier.flush(0, content(shape, 1), shape.spans, 1)
    assert tier.lend(0, shape.nbytes) is None, "the second generation's trained bytes lie apart from the frozen ones"
    tier.close()

    two = SHAPES["two regions"]
    tier = started(tmp_path, two)
    tier.flush(0, content(two, 1), two.spans, 1)
    assert lent_bytes(tier, 9000) == content(two, 1).numpy().tobytes()[:9000]
    assert tier.lend(0, 9001) is None
    os.truncate(tmp_path / "00000.zob", two.file_bytes - 1)
    assert tier.lend(0, 9000) is None, "somebody has cut the file"
    tier.close()


def test_what_went_from_the_cache_is_read_and_summed(tmp_path):
    shape = FileShape(0, 1 << 20, 1 << 20, ((0, 1 << 20),))
    tier = started(tmp_path, shape)
    assert lent_bytes(tier, shape.nbytes) is not None
    tier.flush(0, content(shape, 1), shape.spans, 1)
    tier.seal(0, drop=True)
    view = tier._blocks[0].lender._mapped()[shape.second : shape.second + shape.nbytes]
    if lending._native().are_cached(view.data_ptr(), shape.nbytes):
        pytest.skip("this file system keeps pages that it was asked to drop")
    assert tier.lend(0, shape.nbytes) is None
    assert torch.equal(fetched(tier, shape), content(shape, 1))
    assert lent_bytes(tier, shape.nbytes) == content(shape, 1).numpy().tobytes()
    tier.close()


def mapped_bytes(path: Path) -> int:
    """Of a file's mappings, what counts as this process's memory."""
    text, total = Path("/proc/self/smaps").read_text(), 0
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text):
        if str(path) in entry.splitlines()[0]:
            total += 1024 * int(re.search(r"^Rss:\s+(\d+)", entry, re.M)[1])
    return total


def test_a_views_pages_are_this_processs_only_while_it_is_out(tmp_path):
    shape = FileShape(0, 1 << 20, 1 << 20, ((0, 1 << 20),))
    tier, path = started(tmp_path, shape), tmp_path / "00000.zob"
    lent = tier.lend(0, shape.nbytes)
    assert lent is not None and shape.nbytes <= mapped_bytes(path) < shape.file_bytes
    before = path.read_bytes()
    lent.memory[100:5000] = 7  # nobody may; the file does not get it
    assert path.read_bytes() == before
    lent.give_back()
    assert mapped_bytes(path) == 0
    assert lent_bytes(tier, shape.nbytes) == content(shape, 0).numpy().tobytes()
    tier.close()
    assert mapped_bytes(path) == 0


def test_between_passes_nothing_is_out(tmp_path):
    with Engine(tiny_opt(), method=METHOD, offload="disk", run_dir=tmp_path / "run", fold_every=8) as engine:
        for batch in batches(3):
            engine.step(batch)
        slots = engine.active.streamer.window._slots
        assert any(slot.lent for slot in slots), "fetched for the next step"
        dict(engine.weights())
        assert not any(slot.lent for slot in slots) and all(slot.memory is slot.own for slot in slots)


def test_scrub_every_is_a_number_of_visits():
    with pytest.raises(ConfigError, match="scrub_every=0: expected at least 1"):
        Engine(tiny_opt(), scrub_every=0)
