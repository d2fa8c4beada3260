"""The journal on raw bytes: round trip, every cut, every flipped bit."""

from __future__ import annotations

import math
import os
import struct
import time
import zlib

import pytest

from zo_offload.errors import JournalError, StorageError
from zo_offload.journal.journal import RECORD_BYTES, Journal, StepRecord, pack_step, read_journal
from zo_offload.kernels.records import Update

HEADER = {"format": 1, "seed": 7}
STEPS = [
    StepRecord(0, (Update(11, 0.5, 1.0),), 1.25, 0.1, 1e-6, False, 99),
    StepRecord(1, (), math.nan, math.nan, 1e-6, True, 5),
    StepRecord(2, (Update(13, -0.25, 0.5, False), Update(14, 2.0, 1.0, begins=False)), 1.0, -3.0, 2e-6),
    StepRecord(3, (Update((1 << 64) - 1, 0.0, 1.0),), 0.5, 0.0, 0.0),
]
PACKED = [  # what only journals of the present format hold
    *STEPS[:2],
    StepRecord(2, tuple(Update(i + 1, i / 4, 1.0 if i else 0.5, i == 7, i == 0) for i in range(8)), 1.0, -3.0, 2e-6),
    StepRecord(3, (Update(3, 0.5, 1.0, False), Update(4, 0.25, 1.0, False, False)), 0.5, 0.1, 1e-6,
               scalars=(0.1, -math.inf, 3.0, 4.0, 5.0, 6.0)),
    StepRecord(4, (Update(5, 0.5, 1.0, False),), 0.5, 0.1, 1e-6, scalars=(math.pi,)),
]  # fmt: skip


def write(path, steps):
    journal = Journal.create(path, HEADER)
    for step in steps:
        journal.append(step)
    journal.close()
    return path


@pytest.fixture
def written(tmp_path):
    return write(tmp_path / "run.zoj", STEPS)


def same(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert (a.step, a.updates, a.skipped, a.batch_crc, a.lr) == (b.step, b.updates, b.skipped, b.batch_crc, b.lr)
        assert a.scalars == b.scalars
        assert a.loss == b.loss or (math.isnan(a.loss) and math.isnan(b.loss))


@pytest.mark.parametrize("steps", [STEPS, PACKED], ids=["steps", "packed"])
def test_what_was_appended_is_read_back(steps, tmp_path):
    journal = Journal.open(write(tmp_path / "run.zoj", steps))
    assert journal.header == HEADER and journal.dropped_bytes == 0
    same(journal.steps, steps)


def test_a_step_of_packed_records_is_whole_or_dropped(tmp_path):
    data = write(tmp_path / "run.zoj", PACKED).read_bytes()
    records = [len(pack_step(step)[0]) // RECORD_BYTES for step in PACKED]
    begin = len(data) - sum(records) * RECORD_BYTES
    for count in range(sum(records)):
        found = read_journal(data[: begin + count * RECORD_BYTES])
        same(found.steps, PACKED[: sum(sum(records[: i + 1]) <= count for i in range(len(records)))])
        assert found.good == begin + sum(records[: len(found.steps)]) * RECORD_BYTES


def test_a_reopened_journal_goes_on_where_it_ended(written):
    journal = Journal.open(written)
    more = StepRecord(4, (Update(15, 1.0),), 0.25, 1.0, 1e-6)
    journal.append(more)
    journal.close()
    same(Journal.open(written).steps, [*STEPS, more])


@pytest.mark.parametrize("cut", range(1, RECORD_BYTES))
def test_any_cut_in_the_last_record_keeps_the_rest(written, cut):
    whole = written.read_bytes()
    written.write_bytes(whole[:-cut])
    journal = Journal.open(written)
    same(journal.steps, STEPS[:3])
    assert journal.dropped_bytes == RECORD_BYTES - cut
    journal.append(STEPS[3])
    journal.close()
    same(Journal.open(written).steps, STEPS)
    assert len(written.read_bytes()) == len(whole)


def test_a_step_cut_between_its_records_is_dropped_whole(written):
    data = written.read_bytes()[:-RECORD_BYTES]  # step 2 is whole now, as the last
    same(read_journal(data).steps, STEPS[:3])
    found = read_journal(data[:-RECORD_BYTES])  # the first of step 2's two records
    same(found.steps, STEPS[:2])
    assert found.good == len(data) - 2 * RECORD_BYTES


@pytest.mark.parametrize("steps", [STEPS, PACKED[:4]], ids=["steps", "packed"])
def test_every_flipped_bit_is_found_where_it_was_durable_and_harmless_in_the_tail(steps, tmp_path):
    """Steps 0 and 1 were synced before the others were added: damage there is named. The rest may be a crash's tail."""
    journal = Journal.create(tmp_path / "run.zoj", HEADER, commit_s=3600)
    journal.append(steps[0])
    journal.append(steps[1])
    journal.make_durable(2)
    durable = journal.path.stat().st_size
    journal.append(steps[2])
    journal.append(steps[3])
    data = journal.path.read_bytes()
    journal.close()
    for position in range(len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[position] ^= 1 << bit
            if position >= durable:
                found = read_journal(bytes(broken))
                same(found.steps, steps[: len(found.steps)])
                assert 2 <= len(found.steps) < 4
            else:
                with pytest.raises(JournalError):
                    read_journal(bytes(broken))


def test_any_pages_of_the_unsynced_tail_may_be_missing_after_a_power_cut(tmp_path):
    """Every subset of the unsynced records zeroed: what is before the first hole is kept, the durable steps always."""
    journal = Journal.create(tmp_path / "run.zoj", HEADER, commit_s=3600)
    steps = [StepRecord(i, (Update(i + 1, 0.5),), 1.0, 0.1, 1e-6) for i in range(9)]
    for step in steps[:3]:
        journal.append(step)
    journal.make_durable(3)
    for step in steps[3:]:
        journal.append(step)
    data = journal.path.read_bytes()
    journal.close()
    begin = len(data) - 6 * RECORD_BYTES
    for lost in range(1, 1 << 6):
        broken = bytearray(data)
        for i in range(6):
            if lost >> i & 1:
                broken[begin + i * RECORD_BYTES : begin + (i + 1) * RECORD_BYTES] = bytes(RECORD_BYTES)
        first = (lost & -lost).bit_length() - 1
        same(read_journal(bytes(broken)).steps, steps[: 3 + first])


def test_records_cannot_be_swapped_dropped_or_taken_from_another_run(tmp_path):
    def write(name, header, steps):
        journal = Journal.create(tmp_path / name, header, commit_s=3600)
        for step in steps:
            journal.append(step)
            journal.make_durable(step.step + 1)
        journal.close()
        return journal.path.read_bytes()

    steps = [StepRecord(i, (Update(i + 1, 0.5),), 1.0, 0.1, 1e-6) for i in range(5)]
    ours, theirs = write("a", HEADER, steps), write("b", {**HEADER, "seed": 8}, steps)
    records = [ours[len(ours) - (5 - i) * RECORD_BYTES :][:RECORD_BYTES] for i in range(5)]
    head = ours[: -5 * RECORD_BYTES]
    for order in ([0, 2, 1, 3, 4], [0, 2, 3, 4], [0, 0, 1, 2, 3, 4]):
        with pytest.raises(JournalError, match="fails its checksum"):
            read_journal(head + b"".join(records[i] for i in order))
    with pytest.raises(JournalError, match="fails its checksum"):
        read_journal(head + b"".join(records[:2]) + theirs[-3 * RECORD_BYTES :])


def test_steps_are_synced_within_the_bound_without_anybody_asking(tmp_path, monkeypatch):
    synced = []
    journal = Journal.create(tmp_path / "run.zoj", HEADER, commit_s=0.05)
    monkeypatch.setattr("zo_offload.system.diskio.sync", lambda fd: synced.append(len(journal.steps)))
    journal.append(STEPS[0])
    deadline = time.monotonic() + 20
    while not synced and time.monotonic() < deadline:
        time.sleep(0.01)
    assert synced == [1]
    journal.make_durable(1)
    assert synced == [1], "what is durable is not synced again"
    journal.close()


def test_a_full_disk_leaves_a_whole_journal_and_is_final(tmp_path, monkeypatch):
    journal = Journal.create(tmp_path / "run.zoj", HEADER)
    journal.append(STEPS[0])
    real = os.write

    def half(fd, data):
        if len(data) < RECORD_BYTES:
            raise OSError(28, "No space left on device")
        return real(fd, data[:20])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(StorageError, match=r"journaling to .*run.zoj: No space left on device, .* free there"):
        journal.append(STEPS[1])
    monkeypatch.undo()
    with pytest.raises(StorageError, match="No space"):
        journal.append(STEPS[1])
    journal.close()
    same(Journal.open(tmp_path / "run.zoj").steps, STEPS[:1])


def test_a_failed_sync_is_never_retried_as_if_it_had_worked(tmp_path, monkeypatch):
    journal = Journal.create(tmp_path / "run.zoj", HEADER, commit_s=3600)
    journal.append(STEPS[0])
    monkeypatch.setattr(
        "zo_offload.system.diskio.sync", lambda fd: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    )
    with pytest.raises(StorageError, match="Input/output error"):
        journal.make_durable(1)
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(StorageError, match="Input/output error"):
            journal.make_durable(1)
    journal.close()


def test_a_deleted_journal_is_noticed(tmp_path):
    journal = Journal.create(tmp_path / "run.zoj", HEADER, commit_s=3600)
    journal.append(STEPS[0])
    (tmp_path / "run.zoj").unlink()
    with pytest.raises(StorageError, match="deleted while the run used it"):
        journal.make_durable(1)
    journal.close()


@pytest.mark.parametrize("text", [b"[1]", b"\xff", b"[" * 100_000, b"", b"1e999"])
def test_a_header_that_is_not_an_object_is_refused(text):
    head = b"ZOJ2" + struct.pack("<I", len(text)) + text
    with pytest.raises(JournalError):
        read_journal(head + struct.pack("<I", zlib.crc32(head)))


def test_a_run_is_never_overwritten(written):
    before = written.read_bytes()
    with pytest.raises(JournalError, match="Resume it"):
        Journal.create(written, HEADER)
    assert written.read_bytes() == before


def test_what_is_not_a_journal_is_named(tmp_path):
    (tmp_path / "x").write_bytes(b"hello world, this is text")
    with pytest.raises(JournalError, match="not a journal"):
        Journal.open(tmp_path / "x")
    with pytest.raises(JournalError, match="missing"):
        Journal.open(tmp_path / "nothing")


def test_the_size_of_a_step_is_what_the_docstring_says():
    assert len(pack_step(STEPS[0])[0]) == RECORD_BYTES == 64
    assert len(pack_step(STEPS[2])[0]) == 2 * RECORD_BYTES
    assert [len(pack_step(step)[0]) // RECORD_BYTES for step in PACKED] == [1, 1, 1 + 3, 1 + 1 + 2, 1 + 1]
