"""The journal on raw bytes: round trip, every cut, every flipped bit."""

from __future__ import annotations

import math

import pytest

from zo_offload.errors import JournalError
from zo_offload.fused import Update
from zo_offload.journal import RECORD_BYTES, Journal, StepRecord, pack_step, read_journal

HEADER = {"format": 1, "seed": 7}
STEPS = [
    StepRecord(0, (Update(11, 0.5, 1.0),), 1.25, 0.1, 1e-6, False, 99),
    StepRecord(1, (), math.nan, math.nan, 1e-6, True, 5),
    StepRecord(2, (Update(13, -0.25, 0.5, False), Update(14, 2.0, 1.0)), 1.0, -3.0, 2e-6),
    StepRecord(3, (Update((1 << 64) - 1, 0.0, 1.0),), 0.5, 0.0, 0.0),
]


@pytest.fixture
def written(tmp_path):
    journal = Journal.create(tmp_path / "run.zoj", HEADER)
    for step in STEPS:
        journal.append(step)
    journal.close()
    return tmp_path / "run.zoj"


def same(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert (a.step, a.updates, a.skipped, a.batch_crc, a.lr) == (b.step, b.updates, b.skipped, b.batch_crc, b.lr)
        assert a.loss == b.loss or (math.isnan(a.loss) and math.isnan(b.loss))


def test_what_was_appended_is_read_back(written):
    journal = Journal.open(written)
    assert journal.header == HEADER and journal.dropped_bytes == 0
    same(journal.steps, STEPS)


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
    assert written.read_bytes() == whole


def test_a_step_cut_between_its_records_is_dropped_whole(written):
    data = written.read_bytes()[:-RECORD_BYTES]  # step 2 is whole now, as the last
    _, steps, _ = read_journal(data)
    same(steps, STEPS[:3])
    _, steps, good = read_journal(data[:-RECORD_BYTES])  # the first of step 2's two records
    same(steps, STEPS[:2])
    assert good == len(data) - 2 * RECORD_BYTES


def test_every_flipped_bit_is_found(written):
    data = written.read_bytes()
    last = len(data) - RECORD_BYTES
    for position in range(len(data)):
        broken = bytearray(data)
        broken[position] ^= 1 << (position % 8)
        if position >= last:  # the last record: indistinguishable from a cut, so dropped
            same(read_journal(bytes(broken))[1], STEPS[:3])
        else:
            with pytest.raises(JournalError):
                read_journal(bytes(broken))


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
    assert len(pack_step(STEPS[0])) == RECORD_BYTES == 64
    assert len(pack_step(STEPS[2])) == 2 * RECORD_BYTES
