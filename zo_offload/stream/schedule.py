"""Schedules consecutive forwards as a list of ops: fetches, uses and flushes of blocks, their slots and dependencies.

Pure: no torch, no threads. `window.py` executes the ops; tests verify the schedule by enumeration.

The model's forward visits blocks in a fixed order, `visits`, pass after pass (training steps and evaluation batches
alike), so the order is cyclic and the next blocks are always known, across the end of a pass too. Some blocks are
*pinned*: they live in memory for the whole run. The others stream through `num_slots` slots in turn. A *stay* is one
residence of a block in a slot; it covers all consecutive visits of that block, also across the end of a pass (a tied
head followed by the next pass's embedding is one stay, fetched once).

    pass           0                             1
    visits         E   L0   L1   L2   E(head)    E   L0 ...
    stay / slot    0   1    2    0    1------------  2            num_slots = 3
    fetch           E  L0  L1 | L2 | E | L0 ...                   `ahead` stays before its first compute
    compute             E    L0   L1   L2   E     E    L0
    flush                    E?   L0   L1   L2              E     after the stay's last compute, if it was written

Ordering, as event waits (`Op.after`):
    fetch    after the slot's previous stay has been flushed (or, if clean, computed),
             and after the same block's previous flush: otherwise it would read the bytes of an older step;
    compute  after the stay's fetch;
    flush    after the stay's last compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError

OpKind = Literal["fetch", "compute", "flush"]
OpKey = tuple[OpKind, int]  # ("fetch", stay) | ("compute", visit) | ("flush", stay)


@dataclass(frozen=True)
class Stay:
    """One residence of a streamed block in a slot: visits `first_visit..last_visit` (counted over all passes)."""

    index: int
    block: int
    slot: int
    first_visit: int
    last_visit: int
    dirty: bool  # one of its visits writes the block: it must be flushed before the slot is used again


@dataclass(frozen=True)
class Op:
    """One op of the schedule. `key` names it, `after` names the ops that must have finished before it starts."""

    kind: OpKind
    block: int
    slot: int  # -1: a pinned block, which has a place of its own
    stay: int  # -1: pinned
    visit: int  # the visit computed, or the stay's first (fetch) or last (flush) one
    after: tuple[OpKey, ...]

    @property
    def key(self) -> OpKey:
        return (self.kind, self.visit if self.kind == "compute" else self.stay)


def last_visits(visits: Sequence[int]) -> tuple[bool, ...]:
    """For each visit of a pass, whether it is the block's last one in the pass. Only then is the block written.

    Earlier visits of the same pass apply pending updates in registers and leave the stored bytes alone, so a block
    visited twice (tied embedding and head) is written and flushed once a step.
    """
    last = {block: position for position, block in enumerate(visits)}
    return tuple(last[block] == position for position, block in enumerate(visits))


def stays(visits: Sequence[int], pinned: frozenset[int], num_slots: int, written: frozenset[int]) -> Iterator[Stay]:
    """The endless sequence of stays of the streamed blocks; stay i lives in slot i % num_slots.

    written: blocks that a training step writes (those with a trainable parameter).
    """
    if all(block in pinned for block in visits):
        return
    writes = last_visits(visits)
    index, visit = 0, 0
    current: list[int] = []  # visits of the open stay
    block = -1
    while True:
        now = visits[visit % len(visits)]
        if now not in pinned:
            if current and now != block:
                yield _close(index, block, num_slots, current, writes, written)
                index, current = index + 1, []
            block = now
            current.append(visit)
            if len(current) >= 2 * len(visits):
                # Only one streamed block in the whole model: its stay would never end. Cut it once a pass.
                yield _close(index, block, num_slots, current, writes, written)
                index, current = index + 1, []
        visit += 1


def _close(
    index: int, block: int, num_slots: int, current: list[int], writes: tuple[bool, ...], written: frozenset[int]
) -> Stay:
    dirty = block in written and any(writes[v % len(writes)] for v in current)
    return Stay(index, block, index % num_slots, current[0], current[-1], dirty)


def schedule(
    visits: Sequence[int],
    *,
    num_slots: int,
    pinned: frozenset[int] = frozenset(),
    ahead: int | None = None,
    written: frozenset[int] | None = None,
) -> Iterator[Op]:
    """Ops in enqueue order, without end: one op stream over all passes.

    visits: block index of each visit of one pass; ahead: number of stays that are fetched in advance (default num_slots
    - 1, the safe maximum); written: blocks that training changes (default all). Raises ConfigError for settings that
    cannot stream.
    """
    if not visits:
        raise ConfigError("the plan visits no block: the model's forward uses no parameter")
    ahead = max(0, num_slots - 1) if ahead is None else ahead
    streams = any(block not in pinned for block in visits)
    if streams and num_slots < 1:
        raise ConfigError(f"num_slots={num_slots}: streaming needs at least one slot (two to overlap)")
    if streams and not 0 <= ahead < num_slots:
        raise ConfigError(f"prefetch={ahead} with {num_slots} slots: at most {num_slots - 1} stays can be ahead")
    written = frozenset(visits) if written is None else written
    source = stays(visits, pinned, num_slots, written)
    return _interleave(visits, pinned, source if streams else iter(()), ahead)


def _interleave(visits: Sequence[int], pinned: frozenset[int], source: Iterator[Stay], ahead: int) -> Iterator[Op]:
    in_slot: dict[int, Stay] = {}
    flush_of: dict[int, OpKey] = {}  # block -> the flush of its latest dirty stay, enqueued yet or not
    queue: list[Stay] = []  # fetched, not finished: [current, next, ...]
    visit = 0
    while True:
        block = visits[visit % len(visits)]
        if block in pinned:
            yield Op("compute", block, -1, -1, visit, ())
            visit += 1
            continue
        while len(queue) <= ahead:
            stay = next(source)
            yield _fetch(stay, in_slot.get(stay.slot), flush_of)
            in_slot[stay.slot] = stay
            if stay.dirty:
                flush_of[stay.block] = ("flush", stay.index)
            queue.append(stay)
        stay = queue[0]
        yield Op("compute", block, stay.slot, stay.index, visit, (("fetch", stay.index),))
        if visit == stay.last_visit:
            queue.pop(0)
            if stay.dirty:
                yield Op("flush", block, stay.slot, stay.index, visit, (("compute", visit),))
        visit += 1


def _fetch(stay: Stay, previous: Stay | None, flush_of: dict[int, OpKey]) -> Op:
    after: list[OpKey] = []
    if previous is not None:
        # the slot is free once its block is back in its tier, not once its compute is done
        after.append(("flush", previous.index) if previous.dirty else ("compute", previous.last_visit))
    if stay.block in flush_of and flush_of[stay.block] not in after:
        after.append(flush_of[stay.block])
    return Op("fetch", stay.block, stay.slot, stay.index, stay.first_visit, tuple(after))
