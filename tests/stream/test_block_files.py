"""Block files on raw bytes: what a reader gets after a crash, a power cut at any write, a flipped bit, a wrong size."""

from __future__ import annotations

import os
import random
import struct
import zlib

import numpy as np
import pytest
import torch

from support.block_files import SHAPES, Alone, content, fetched, started
from zo_offload.errors import BudgetError, CheckpointError, StorageError
from zo_offload.kernels import native
from zo_offload.system import diskio
from zo_offload.tiers import checksum as checksums
from zo_offload.tiers import summed_io
from zo_offload.tiers.block_file import DATA, PAGE, FileShape, extents
from zo_offload.tiers.checksum import checksum, reference
from zo_offload.tiers.disk import DiskTier, shapes_of

# ---- the checksum ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, 3, 4, 5, 4095, 4096, 4097, 9001, 3 * 4096, 1 << 20])
@pytest.mark.parametrize("offset", [0, 64, 1 << 40])
def test_native_checksum_is_the_reference(nbytes, offset):
    data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(nbytes))
    if native.library() is not None:
        assert checksums._native() is not None, "the library lacks the checksum, or fails its known answer"
    assert checksum(data, offset) == reference(data, offset)


def test_checksum_is_what_its_docstring_says():
    mask = (1 << 64) - 1

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    weights = [mix((i + 1) * checksums.GOLDEN & mask) >> 32 | 1 for i in range(1024)]
    data = bytes(i % 255 for i in range(9001))
    total = 0
    for begin in range(0, len(data), 4096):
        chunk = data[begin : begin + 4096]
        words = struct.unpack(f"<{-(-len(chunk) // 4)}I", chunk + bytes(-len(chunk) % 4))
        h = sum(x * w for x, w in zip(words, weights, strict=False))
        total += mix((h ^ ((64 + begin + 1) * checksums.GOLDEN)) & mask)
    assert total & mask == checksums.KNOWN == reference(torch.tensor(list(data), dtype=torch.uint8), 64)


def test_checksum_of_pieces_adds_up_and_sees_what_pages_do():
    data = torch.randint(0, 256, (8 * 4096 + 77,), dtype=torch.uint8)
    whole = checksum(data, 128)
    pieces = sum(checksum(data[a : a + 8192], 128 + a) for a in range(0, len(data), 8192))
    assert pieces & ((1 << 64) - 1) == whole
    swapped = data.clone()
    swapped[:4096], swapped[4096:8192] = data[4096:8192], data[:4096].clone()
    zeroed, stale = data.clone(), data.clone()
    zeroed[4096:8192] = 0
    stale[:4096] = data[8192:12288]
    assert len({whole, *(checksum(x, 128) for x in (swapped, zeroed, stale))}) == 4


def test_two_flips_of_the_same_bit_do_not_cancel():
    data = torch.zeros(4096, dtype=torch.uint8)
    seen = {checksum(data)}
    for i in range(3, 400, 4):
        other = data.clone()
        other[i] = other[i + 4] = 0x80
        seen.add(checksum(other))
    assert len(seen) == 101


# ---- writing and reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_what_was_flushed_is_fetched_whole_and_in_parts(name, tmp_path):
    shape = SHAPES[name]
    tier = started(tmp_path, shape)
    for version in range(1, 7):
        want = content(shape, version)
        tier.flush(0, want, shape.spans, version)
        if version % 3 == 0:
            tier.seal(0)
        assert tier.version(0) == version and torch.equal(fetched(tier, shape), want)
        part = torch.empty(shape.streamed, dtype=torch.uint8)
        tier.fetch(0, part)
        assert torch.equal(part, want[: shape.streamed])
        rest = torch.empty(shape.nbytes - shape.streamed, dtype=torch.uint8)
        tier.fetch(0, rest, start=shape.streamed)
        assert torch.equal(rest, want[shape.streamed :])
        middle = torch.empty(5000, dtype=torch.uint8)
        tier.fetch(0, middle, start=777)
        assert torch.equal(middle, want[777:5777])
    tier.close()
    again = DiskTier.open(tmp_path, [shape])
    assert again.version(0) == 6 and torch.equal(fetched(again, shape), content(shape, 6))
    again.close()


@pytest.mark.parametrize("name", SHAPES)
def test_extents_tile_the_block_and_the_file(name):
    shape = SHAPES[name]
    for generation in (0, 1):
        trained, frozen = extents(shape, generation)
        covered = np.zeros(shape.nbytes, int)
        for extent in (*trained, *frozen):
            covered[extent.offset : extent.offset + extent.nbytes] += 1
            assert extent.sum == (extent not in trained) + 2 * (extent.offset >= shape.streamed)
            assert extent.at >= DATA and extent.at + extent.nbytes <= shape.file_bytes
        assert (covered == 1).all()
    first, second = ({(e.at, e.at + e.nbytes) for e in extents(shape, g)[0]} for g in (0, 1))
    assert not any(a < d and c < b for a, b in first for c, d in second), "the generations must not overlap"


def test_a_flush_never_touches_the_durable_generation(tmp_path):
    shape = SHAPES["parts, odd sizes"]
    tier = started(tmp_path, shape)
    tier.flush(0, content(shape, 1), shape.spans, 1)
    tier.seal(0)
    for version in range(2, 9):
        tier.flush(0, content(shape, version), shape.spans, version)
        assert [header.version for _, header in tier.headers(0)] == [version, 1]
    tier.seal(0)
    tier.flush(0, content(shape, 9), shape.spans, 9)
    assert [header.version for _, header in tier.headers(0)] == [9, 8]
    tier.close()


def test_bytes_reach_a_file_only_after_their_journal(tmp_path, monkeypatch):
    """The write-ahead rule, in the one place that writes blocks."""
    shape = SHAPES["all trained"]
    events, full = [], []

    def journal(version):
        if full:
            raise StorageError(28, "journal: no space")
        events.append(("journal", version))

    tier = started(tmp_path, shape, Alone(journal))
    events.clear()
    real, real_summed = diskio.write_at, summed_io.write_summed
    monkeypatch.setattr(diskio, "write_at", lambda *a: (events.append(("write",)), real(*a)))
    monkeypatch.setattr(summed_io, "write_summed", lambda *a: (events.append(("write",)), real_summed(*a))[1])
    for version in (1, 2, 3):
        tier.flush(0, content(shape, version), shape.spans, version)
    journaled = [i for i, event in enumerate(events) if event[0] == "journal"]
    assert [events[i][1] for i in journaled] == [1, 2, 3] and journaled[0] == 0
    assert all(events[i + 1] == ("write",) for i in journaled)

    full.append(True)
    before = len(events)
    with pytest.raises(StorageError, match="journal: no space"):
        tier.flush(0, content(shape, 4), shape.spans, 4)
    assert len(events) == before and tier.version(0) == 3
    tier.close()


def test_native_reads_and_writes_are_the_references(tmp_path):
    """Bytes, checksums, file offsets and short files, at sizes around the 256 kB that are moved at a time."""
    if native.library() is not None:
        assert summed_io._native() is not None, "the library lacks reads and writes of block files"
    fd = os.open(tmp_path / "blocks", os.O_RDWR | os.O_CREAT)
    for nbytes in (0, 1, 4095, 4096, 4097, summed_io.CACHED - 1, summed_io.CACHED + 1, 3 * summed_io.CACHED + 5000):
        data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
        for at, begin in ((0, 0), (8192, 4096)):
            os.ftruncate(fd, 0)
            wrote = summed_io.write_summed(fd, data, at, begin)
            assert os.fstat(fd).st_size == (at + nbytes if nbytes else 0)
            assert wrote == summed_io.reference_write_summed(fd, data, at, begin) == checksum(data, begin)
            for threads in (1, 2):
                for read in (summed_io.read_summed, lambda *a: summed_io.reference_read_summed(*a[:4])):
                    out = torch.zeros(nbytes, dtype=torch.uint8)
                    assert read(fd, out, at, begin, threads) == wrote and torch.equal(out, data)
                    short = torch.zeros(nbytes + 1, dtype=torch.uint8)
                    assert read(fd, short, at, begin, threads) is None, "the file ends before that"
    os.close(fd)
    for read in (summed_io.read_summed, summed_io.reference_read_summed):
        with pytest.raises(OSError, match="Bad file descriptor"):
            read(fd, torch.zeros(9, dtype=torch.uint8), 0, 0)
    for write in (summed_io.write_summed, summed_io.reference_write_summed):
        with pytest.raises(OSError, match="Bad file descriptor"):
            write(fd, torch.zeros(9, dtype=torch.uint8), 0, 0)


# ---- crashes ---------------------------------------------------------------------------------------------------------


class Recorder:
    """Records every write and sync of one file, so that any moment's file can be made again."""

    def __init__(self, monkeypatch):
        self.ops = []
        real_write, real_sync = diskio.write_at, diskio.sync

        def write_at(fd, data, offset):
            self.ops.append((offset, bytes(data)))
            real_write(fd, data, offset)

        def sync(fd):
            real_sync(fd)
            self.ops.append(None)

        monkeypatch.setattr(diskio, "write_at", write_at)
        monkeypatch.setattr(summed_io, "write_summed", summed_io.reference_write_summed)  # it writes through diskio
        monkeypatch.setattr(diskio, "sync", sync)

    def killed(self, upto, image):
        """The file after the first `upto` ops: a killed process, whose writes the system still has."""
        for op in self.ops[:upto]:
            if op is not None:
                image[op[0] : op[0] + len(op[1])] = op[1]
        return image

    def power_cut(self, upto, image, rng, unit=512):
        """What was synced is there; of every sector written since, any of its states since then."""
        synced = max((i for i, op in enumerate(self.ops[:upto]) if op is None), default=-1) + 1
        base = self.killed(synced, image)
        states = {}
        current = bytearray(base)
        for op in self.ops[synced:upto]:
            offset, data = op
            current[offset : offset + len(data)] = data
            for sector in range(offset // unit, (offset + len(data) - 1) // unit + 1):
                states.setdefault(sector, []).append(bytes(current[sector * unit : (sector + 1) * unit]))
        for sector, later in states.items():
            choice = rng.randrange(-1, len(later))
            if choice >= 0:
                base[sector * unit : sector * unit + len(later[choice])] = later[choice]
        return base


@pytest.mark.parametrize("name", SHAPES)
def test_any_kill_and_any_power_cut_leave_a_sound_block(name, tmp_path, monkeypatch):
    """Cut at every write: the block opens at a version that was flushed, with that version's bytes, base not needed."""
    shape, rng = SHAPES[name], random.Random(3)
    recorder = Recorder(monkeypatch)
    tier = started(tmp_path, shape)
    sealed_at = len(recorder.ops)
    marks = [(sealed_at, 0)]
    for version in range(1, 9):
        tier.flush(0, content(shape, version), shape.spans, version)
        marks.append((len(recorder.ops), version))
        if version % 3 == 2:
            tier.seal(0)
    tier.close()
    monkeypatch.undo()
    path = tmp_path / "00000.zob"
    versions_seen = set()
    for upto in range(sealed_at, len(recorder.ops) + 1):
        newest = max(version for at, version in marks if at <= upto)
        for image in [recorder.killed(upto, bytearray(shape.file_bytes))] + [
            recorder.power_cut(upto, bytearray(shape.file_bytes), rng) for _ in range(4)
        ]:
            path.write_bytes(image)
            tier = DiskTier.open(tmp_path, [shape])
            data = fetched(tier, shape)  # raises if neither generation is sound
            assert torch.equal(data, content(shape, tier.version(0)))
            assert tier.version(0) <= newest + 1
            versions_seen.add(tier.version(0))
            tier.close()
    assert len(versions_seen) >= 5


def test_a_kill_in_the_first_write_leaves_a_block_that_says_so(tmp_path, monkeypatch):
    shape = SHAPES["parts, odd sizes"]
    recorder = Recorder(monkeypatch)
    started(tmp_path, shape).close()
    monkeypatch.undo()
    for upto in range(len(recorder.ops) - 1):  # but for the last header
        (tmp_path / "00000.zob").write_bytes(recorder.killed(upto, bytearray(shape.file_bytes)))
        tier = DiskTier.open(tmp_path, [shape])
        assert tier.torn == {0} or upto == len(recorder.ops) - 2
        tier.close()


def test_a_failed_sync_gives_the_generation_up(tmp_path, monkeypatch):
    """After a failed fdatasync the system may have dropped what it could not write: only the durable one counts."""
    shape = SHAPES["all trained"]
    tier = started(tmp_path, shape)
    tier.flush(0, content(shape, 1), shape.spans, 1)
    monkeypatch.setattr(diskio, "sync", lambda fd: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(StorageError, match=r"syncing .*00000.zob: Input/output error"):
        tier.seal(0)
    monkeypatch.undo()
    assert tier.version(0) == 0 and torch.equal(fetched(tier, shape), content(shape, 0))
    tier.flush(0, content(shape, 2), shape.spans, 2)
    assert torch.equal(fetched(tier, shape), content(shape, 2))
    tier.close()


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_every_flip_is_found_or_harmless(name, tmp_path):
    """Random bits of the whole file: the block that comes out is a version that was written, bit for bit, or an error
    that names the block."""
    shape, rng = SHAPES[name], random.Random(5)
    tier = started(tmp_path, shape)
    for version in (1, 2):
        tier.flush(0, content(shape, version), shape.spans, version)
        tier.seal(0)
    tier.close()
    path = tmp_path / "00000.zob"
    good, kinds = path.read_bytes(), []
    for _ in range(400):
        at = rng.choice([rng.randrange(92), PAGE + rng.randrange(92), rng.randrange(len(good))])
        broken = bytearray(good)
        broken[at] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        tier = DiskTier.open(tmp_path, [shape])
        try:
            assert torch.equal(fetched(tier, shape), content(shape, tier.version(0)))
            kinds.append(tier.version(0))
        except CheckpointError as error:
            assert "00000.zob: block 0 is damaged" in str(error)
            kinds.append("error")
        tier.close()
    assert {1, 2} <= set(kinds) and ("error" in kinds) == bool(shape.frozen)


def test_a_block_without_a_sound_generation_is_rebuilt_from_the_base(tmp_path):
    shape = SHAPES["parts, odd sizes"]
    started(tmp_path, shape).close()
    path = tmp_path / "00000.zob"
    data = bytearray(path.read_bytes())
    data[DATA + 5] ^= 1  # a frozen byte: of both generations
    path.write_bytes(data)
    tier = DiskTier.open(tmp_path, [shape], Alone(base=lambda block, out: out.copy_(content(shape, 0))))
    assert torch.equal(fetched(tier, shape), content(shape, 0)) and tier.version(0) == 0
    tier.close()
    tier = DiskTier.open(tmp_path, [shape])
    assert torch.equal(fetched(tier, shape), content(shape, 0))
    tier.close()


@pytest.mark.parametrize("size", [0, 40, 5000, 20000])
def test_a_file_that_was_cut_is_refused_by_name(size, tmp_path):
    shape = SHAPES["all trained"]
    started(tmp_path, shape).close()
    os.truncate(tmp_path / "00000.zob", size)
    with pytest.raises(CheckpointError, match=f"00000.zob: {size} bytes, the plan expects {shape.file_bytes}"):
        DiskTier.open(tmp_path, [shape])


def test_a_file_cut_while_it_is_used_is_an_error_not_a_short_block(tmp_path):
    shape = SHAPES["all trained"]
    tier = started(tmp_path, shape)
    os.truncate(tmp_path / "00000.zob", 9000)
    with pytest.raises(CheckpointError, match="block 0 is damaged"):
        fetched(tier, shape)
    tier.close()


def test_a_missing_or_foreign_file_is_named(tmp_path):
    a, b = (FileShape(i, 8192, 8192, ((0, 8192),)) for i in range(2))
    tier = DiskTier.create(tmp_path, [a, b], Alone())
    for block in (0, 1):
        tier.flush(block, content(a, block), a.spans, 0)
    tier.close()
    (tmp_path / "00001.zob").rename(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"00001.zob: block 1 of 2 is missing"):
        DiskTier.open(tmp_path, [a, b])
    (tmp_path / "00001.zob").write_bytes((tmp_path / "00000.zob").read_bytes())
    with pytest.raises(CheckpointError, match="holds block 0 of 8192 bytes .* expects block 1"):
        DiskTier.open(tmp_path, [a, b])


def test_a_header_that_lies_is_bounded_by_its_shape(tmp_path):
    """Sizes are taken from the plan, never from the file: a forged header cannot make a reader allocate or seek."""
    shape = SHAPES["all trained"]
    started(tmp_path, shape).close()
    path = tmp_path / "00000.zob"
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, 24, 1 << 62)
    struct.pack_into("<I", data, 88, zlib.crc32(data[:88]))
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="holds block 0 of 4611686018427387904 bytes"):
        DiskTier.open(tmp_path, [shape])


def test_space_is_checked_before_anything_is_written(tmp_path):
    with pytest.raises(BudgetError, match="two generations of the trained blocks need"):
        DiskTier.create(tmp_path / "blocks", shapes_of([1 << 60], [((0, 1 << 60),)]), Alone())


def test_a_deleted_file_is_noticed_when_it_is_sealed(tmp_path):
    shape = SHAPES["all trained"]
    tier = started(tmp_path, shape)
    tier.flush(0, content(shape, 1), shape.spans, 1)
    (tmp_path / "00000.zob").unlink()
    with pytest.raises(StorageError, match="deleted while the run used it"):
        tier.seal(0)
    tier.close()


def test_a_damaged_second_part_is_never_mixed_with_another_step(tmp_path):
    """The first part was taken from the newest generation: the rest may not come from the other one in silence."""
    shape = SHAPES["two regions"]
    tier = started(tmp_path, shape)
    tier.flush(0, content(shape, 1), shape.spans, 1)
    tier.seal(0)
    tier.flush(0, content(shape, 2), shape.spans, 2)
    part = torch.empty(shape.streamed, dtype=torch.uint8)
    tier.fetch(0, part)
    (span,) = [e for e in extents(shape, 0)[0] if e.offset >= shape.streamed]
    path = tmp_path / "00000.zob"
    data = bytearray(path.read_bytes())
    data[span.at + 10] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="second part of block 0 at step 2 is damaged. Resume"):
        tier.fetch(0, torch.empty(shape.nbytes - shape.streamed, dtype=torch.uint8), start=shape.streamed)
    tier.close()
    tier = DiskTier.open(tmp_path, [shape])
    assert tier.version(0) == 1 and torch.equal(fetched(tier, shape), content(shape, 1))
    tier.close()


def test_a_block_is_rebuilt_also_where_only_its_first_part_was_asked_for(tmp_path):
    shape = SHAPES["two regions"]
    started(tmp_path, shape).close()
    path = tmp_path / "00000.zob"
    data = bytearray(path.read_bytes())
    data[DATA + 5] ^= 1
    path.write_bytes(data)
    tier = DiskTier.open(tmp_path, [shape], Alone(base=lambda block, out: out.copy_(content(shape, 0))))
    part = torch.empty(shape.streamed, dtype=torch.uint8)
    tier.fetch(0, part)
    assert torch.equal(part, content(shape, 0)[: shape.streamed])
    tier.close()
