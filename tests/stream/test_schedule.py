"""The schedule, proven on small cases: every order in which its ops can run, not only the one that happens here."""

from __future__ import annotations

import itertools

import pytest

from zo_offload.errors import ConfigError
from zo_offload.stream.schedule import Op, last_visits, schedule

VISITS = [(0,), (0, 1), (0, 1, 2), (0, 1, 0), (0, 1, 2, 0), (0, 1, 2, 1, 0), (0, 1, 0, 2, 0)]
VISITS += [(0, 1, 2, 3, 4), (3, 1, 1, 2)]
KINDS = ("fetch", "compute", "flush")
PASSES = 3


def take(visits, num_slots, ahead, pinned=frozenset(), passes=PASSES) -> list[Op]:
    ops, stream = [], schedule(visits, num_slots=num_slots, ahead=ahead, pinned=pinned)
    for op in stream:
        if op.kind == "compute" and op.visit >= passes * len(visits):
            return ops
        ops.append(op)
    raise AssertionError("the schedule ended")


def grid():
    for visits, num_slots in itertools.product(VISITS, (1, 2, 3, 4)):
        for ahead in range(num_slots):
            for size in range(len(set(visits))):
                for pinned in itertools.combinations(sorted(set(visits)), size):
                    yield visits, num_slots, ahead, frozenset(pinned)


class Machine:
    """What memory holds while ops run one by one: `step` of the bytes in each tier block and in each slot."""

    def __init__(self, visits, pinned):
        self.visits, self.pinned = visits, pinned
        self.tier = dict.fromkeys(visits, 0)  # passes folded into the stored bytes
        self.slot: dict[int, tuple[int, int, int]] = {}  # slot -> (stay, block, passes folded)
        self.writes = last_visits(visits)

    def run(self, op: Op) -> None:
        pass_index, position = divmod(op.visit, len(self.visits))
        if op.kind == "fetch":
            self.slot[op.slot] = (op.stay, op.block, self.tier[op.block])
        elif op.kind == "compute":
            assert self.visits[position] == op.block
            if op.stay < 0:
                assert op.block in self.pinned
                return
            stay, block, folded = self.slot[op.slot]
            assert (stay, block) == (op.stay, op.block), f"{op}: the slot holds stay {stay} of block {block}"
            assert folded == pass_index, f"{op}: bytes of pass {folded} seen in pass {pass_index}"
            if self.writes[position]:
                self.slot[op.slot] = (stay, block, folded + 1)
        else:
            stay, block, folded = self.slot[op.slot]
            assert (stay, block) == (op.stay, op.block), f"{op}: the slot was overwritten before it was flushed"
            assert folded > self.tier[block]
            self.tier[block] = folded


@pytest.mark.parametrize("case", list(grid()), ids=str)
def test_ops_in_enqueue_order_use_the_right_bytes(case):
    visits, num_slots, ahead, pinned = case
    machine, done = Machine(visits, pinned), set()
    pending: list[Op] = []
    for op in take(visits, num_slots, ahead, pinned):
        pending.append(op)
        progressed = True
        while progressed:  # a fetch may wait for a flush enqueued after it
            progressed = False
            for waiting in list(pending):
                if all(key in done for key in waiting.after):
                    machine.run(waiting)
                    done.add(waiting.key)
                    pending.remove(waiting)
                    progressed = True
                    break
        assert op.kind != "compute" or op.key in done, f"{op} waits for something enqueued later: deadlock"


@pytest.mark.parametrize("visits", [v for v in VISITS if len(v) <= 5], ids=str)
@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_every_interleaving_of_the_three_streams_is_right(visits, num_slots):
    """Depth-first over all orders that the streams and the waits allow; each reachable state is checked once."""
    for ahead in range(num_slots):
        ops = take(visits, num_slots, ahead, passes=2)
        known = {op.key for op in ops}  # cut here, a prefetch may wait for an op of the pass after: leave it out
        ops = [op for op in ops if all(key in known for key in op.after)]
        streams = {kind: [op for op in ops if op.kind == kind] for kind in ("fetch", "compute", "flush")}
        enqueue = {op.key: index for index, op in enumerate(ops)}
        seen, finished = set(), 0
        todo = [(0, 0, 0)]
        while todo:
            state = todo.pop()
            if state in seen:
                continue
            seen.add(state)
            done = replay(visits, streams, state)
            moved = False
            for which, kind in enumerate(("fetch", "compute", "flush")):
                if state[which] == len(streams[kind]):
                    continue
                op = streams[kind][state[which]]
                # The main thread enqueues in order: an op exists once every compute before it has been issued.
                issued = all(o.key in done for o in ops[: enqueue[op.key]] if o.kind == "compute")
                if issued and all(key in done for key in op.after):
                    todo.append(tuple(n + (i == which) for i, n in enumerate(state)))
                    moved = True
            if not moved:
                assert all(state[i] == len(streams[k]) for i, k in enumerate(("fetch", "compute", "flush"))), "deadlock"
                finished += 1
        assert finished == 1


_ORDERS: dict = {}


def replay(visits, streams, state):
    """Runs the first state[k] ops of each stream, in an order that their waits allow; returns their keys."""
    machine, done, left = Machine(visits, frozenset()), set(), dict(zip(KINDS, state, strict=True))
    position = dict.fromkeys(left, 0)
    while any(position[kind] < left[kind] for kind in left):
        for kind in ("flush", "compute", "fetch") if sum(state) % 2 else ("fetch", "compute", "flush"):
            if position[kind] < left[kind]:
                op = streams[kind][position[kind]]
                if all(key in done for key in op.after):
                    machine.run(op)
                    done.add(op.key)
                    position[kind] += 1
                    break
        else:
            raise AssertionError("a reachable state cannot be rebuilt: the waits are inconsistent")
    return done


def test_a_tied_block_is_written_once_a_pass_and_stays_across_the_end_of_the_pass():
    ops = take((0, 1, 2, 0), num_slots=2, ahead=1)
    flushes = [op for op in ops if op.kind == "flush"]
    assert [op.block for op in flushes if op.visit < 8] == [1, 2, 0, 1, 2]
    stays = {op.stay: [o.visit for o in ops if o.kind == "compute" and o.stay == op.stay] for op in ops}
    assert [3, 4] in stays.values(), "the head's stay serves the next pass's embedding"


def test_prefetch_runs_across_the_end_of_a_pass():
    ops = take((0, 1, 2), num_slots=3, ahead=2)
    fetch_of_next_pass = next(i for i, op in enumerate(ops) if op.kind == "fetch" and op.visit == 3)
    last_compute = next(i for i, op in enumerate(ops) if op.kind == "compute" and op.visit == 2)
    assert fetch_of_next_pass < last_compute


def test_frozen_blocks_are_never_flushed():
    stream = schedule((0, 1, 2), num_slots=2, written=frozenset({1}))
    ops = list(itertools.islice(stream, 60))
    assert {op.block for op in ops if op.kind == "flush"} == {1}


def test_pinned_blocks_neither_move_nor_wait():
    ops = take((0, 1, 2), num_slots=2, ahead=1, pinned=frozenset({0, 1, 2}))
    assert {op.kind for op in ops} == {"compute"} and all(not op.after for op in ops)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_slots=0), "at least one slot"),
        (dict(num_slots=2, ahead=2), "at most 1 stays"),
        (dict(num_slots=2, ahead=-1), "prefetch=-1"),
    ],
)
def test_settings_that_cannot_stream_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        schedule((0, 1), **settings)
    with pytest.raises(ConfigError, match="no block"):
        schedule((), num_slots=2)
