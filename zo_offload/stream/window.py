"""The window: moves blocks between their tier and the slots, as scheduled.

The main thread walks the plan's visits. Before each visit it has enqueued the fetches of the next `ahead` stays, so
copies overlap with compute, also across the end of a pass. At the end of a visit, pieces that no module used are
brought to the last fold (`settle`), so a block always leaves the window at one version.

Updates after the last fold are applied in registers at every visit and not written: between folds no block is written,
so none is flushed. So `fold_every=K` saves K - 1 of K flushes, and as many roundings.

For blocks with split parameters the streamed part is fetched at every stay, the residual part only for stays that fold.
A fetch is enqueued ahead, often before the step that may fold has been taken, so this is predicted from the step's
number; if the prediction is wrong (an evaluation that starts, a skipped step), the residual is fetched when it is
needed, and compute waits. Evaluation reads both parts: it sees the same weights as `read` and an export.

If a pass is interrupted anywhere (a signal handler's exception can occur at any bytecode), `mend` makes the window
usable again without any fold or flush. The slots' contents are dropped, since the tier has every block at some version.
In a block that lives in the window, each piece is at the version before or after the pass that wrote it (`Slot.mend`),
and the next visit continues from there. A block whose version is unknown, and which has no other copy, is lost: `mend`
reports it. Spans for profilers: `zo_offload.stream:fetch`, `:flush`, `:wait`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from ..devices import Device, Event, Stream
from ..numerics.updates import UpdateLog
from ..plan.blocks import Piece
from ..plan.layout import Layout
from ..plan.plan import Plan
from ..system.spans import span
from ..tiers import UNKNOWN, Tier
from .schedule import Op, OpKey, last_visits, schedule
from .slots import Slot, Traffic, WindowSize


class BlockWindow:
    """Slots, streams and events over a tier.

    how: how blocks move. settle(slot): brings the pieces of a block that no module asked for to the last fold, as the
    others are; who knows what is in it says how. needed(block, fold): the version that a block must have for that fold.
    """

    def __init__(
        self,
        plan: Plan,
        layout: Layout,
        tier: Tier,
        device: Device,
        log: UpdateLog,
        *,
        how: WindowSize,
        fold_every: int,
        settle: Callable[[Slot], None],
        needed: Callable[[int, int], int],
    ) -> None:
        self.plan, self.layout, self.tier, self.device, self.log = plan, layout, tier, device, log
        self._how, self.fold_every, self._settle, self._needed = how, fold_every, settle, needed
        self.traffic = Traffic()
        self._pinned: dict[int, Slot] = {}
        streamed = [b for b in range(len(plan.blocks)) if b not in how.pinned]
        slot_bytes = max((layout.block_bytes[b] for b in streamed), default=0)
        self._slots = [Slot(device.alloc(slot_bytes)) for _ in range(how.num_slots if streamed else 0)]
        self._fetch_stream: Stream = device.stream("fetch", how.io_threads)
        self._flush_stream: Stream = device.stream("flush", min(1, how.io_threads))
        self._flushes: deque[Event] = deque()
        self._events: dict[OpKey, Event] = {}
        self._live: dict[int, Slot] = {}  # stay -> its slot, from fetch to the end of the stay
        self._base, self._position = 0, -1  # visits before this pass; the visit under way, -1 before the first
        self._slot: Slot | None = None
        self._stray: Slot | None = None
        self.exact = False
        """The pass under way is one of lanes that see the masters."""
        self.set_plan(plan)

    # ---- passes ----------------------------------------------------------------------------------------------------

    def set_plan(self, plan: Plan) -> None:
        """Take a plan whose owners were lifted or whose order was learnt; the blocks must be the same."""
        assert [b.pieces for b in plan.blocks] == [b.pieces for b in self.plan.blocks]
        self.plan = plan
        self._visits = tuple(plan.visits)
        self._last = last_visits(self._visits)
        self.restart()

    def begin_pass(self, exact: bool = False) -> None:
        """Start one forward of all lanes. exact: no lane is perturbed, and all are to see the masters (evaluation)."""
        assert self._position == len(self._visits) or self._position == -1, "the last pass was neither ended nor reset"
        if self._position != -1:
            self._base += len(self._visits)
        self._position = -1
        self.exact = exact

    def end_pass(self) -> None:
        """All lanes have returned: end the remaining visits, and bring what has none (adapters) to the same fold."""
        while self._position < len(self._visits):
            self._advance()
        for slot in [self._pinned[b] for b in self.plan.resident if b in self._pinned and b in self.layout.written]:
            self._settle(slot)
            self._mark_used(slot)
        if not self._slots or self.tier.in_memory:
            self.device.tidy(streams=False)

    def mend(self) -> list[int]:
        """See the module: nothing is folded, flushed or forgotten that the tier does not have. The blocks that are
        lost. May be broken off itself, and called again."""
        self._drain()
        self._flushes.clear()  # what failed there is in its tier as it was before
        lost = []
        for block, slot in list(self._pinned.items()):
            if not slot.mend():
                if self.tier.view(block) is None:
                    del self._pinned[block]  # read again from its tier
                else:
                    lost.append(block)
        for slot in self._slots:
            slot.writing, slot.dirty = None, False
        self._forget_pass()
        return lost + [b for b in self.layout.written if b not in self._pinned and self.tier.version(b) == UNKNOWN]

    # ---- blocks outside of passes ------------------------------------------------------------------------------------

    def flush_all(self, between: Callable[[], None] = lambda: None) -> None:
        """Bring every block to the last fold in its tier. Called before save, return and close. between: called
        before each block. Updates after it stay pending: they are in the journal, and `read` applies them."""
        self.restart()
        self._raise_failed_flush()
        for block in range(len(self.plan.blocks)):
            between()
            if self.tier.version(block) < self._needed(block, self.log.folded):
                self.bring(block)

    def bring(self, block: int) -> None:
        """One block to the last fold, in its tier. Not in a pass, and with nothing fetched ahead."""
        slot = self.load(block, into_window=True)
        if self.tier.version(block) < self._needed(block, self.log.folded):
            self._settle(slot)
            self._write_back(slot)
        self.device.synchronize()  # before the slots are fetched into again, and before anyone reads the tier

    def is_in_memory(self, block: int) -> bool:
        """Whether a block lives in memory for the whole run: its tier is memory, or it is pinned."""
        return block in self._how.pinned or self.tier.in_memory

    def copy_block(self, block: int, out: Tensor, start: int = 0) -> int:
        """Copy such a block, or its bytes from `start` on, between steps; its version."""
        if block in self._pinned:
            out.copy_(self._pinned[block].memory[start : start + out.numel()])
            return self._pinned[block].uniform_version(self.plan)
        self._flush_stream.drain()
        self.tier.fetch(block, out, start)
        return self.tier.version(block)

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights in the device's memory: the window and the pinned blocks."""
        pinned = sum(self.layout.block_bytes[block] for block in self._how.pinned)
        return pinned + sum(slot.own.numel() for slot in self._slots)

    def close(self) -> None:
        """End the worker threads and let the window go; nothing is flushed. Safe to call twice."""
        self._drain()
        self._flush_stream.close()
        self._fetch_stream.close()
        self._forget_pass()
        self._slots, self._pinned = [], {}

    @property
    def is_ahead(self) -> bool:
        """Whether slots hold blocks that were fetched for the next or the current pass."""
        return bool(self._live)

    # ---- walking the visits ------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Between passes: drop blocks that were fetched ahead, flush written ones. The next pass starts cold."""
        for slot in list(self._live.values()):
            if slot.dirty and slot.block >= 0:
                self._settle(slot)
                self._mark_used(slot)
                self._enqueue_flush(slot, self.device.event())
        self._drain()
        for slot in self._live.values():
            slot.count(self.traffic)
        self._forget_pass()

    def _drain(self) -> None:
        """Wait until all copies have ended."""
        self._flush_stream.drain()
        # Fetches that wait for a flush which will now never be enqueued must not wait for ever. What they read is
        # not used.
        for event in list(self._events.values()):
            if not event.is_done():
                event.set()
        self._fetch_stream.drain()

    def _forget_pass(self) -> None:
        self._events, self._live = {}, {}
        self._base, self._position = 0, -1
        self._slot = self._stray = None
        # What was launched may still run on a GPU: of a pass that was broken off in mid-visit, which nobody marked, and
        # of whoever had the memory before, since an allocator gives it away while it is computed with.
        so_far = self.device.mark()
        for slot in self._slots:
            slot.give_back()
            slot.ready, slot.used, slot.block, slot.dirty = None, so_far, -1, False
        self._ops: Iterator[Op] = schedule(
            self._visits,
            num_slots=self._how.num_slots,
            pinned=self._how.pinned,
            ahead=self._how.ahead,
            written=self.layout.written,
        )

    def acquire(self, block: int) -> tuple[Slot, bool]:
        """The slot that holds `block`, ready, and whether this visit writes it."""
        if block in self.plan.resident:
            return self.load(block), True
        position = self._position
        if 0 <= position < len(self._visits) and self._visits[position] == block:
            assert self._slot is not None
            return self._slot, self._last[position] or block in self._how.pinned
        try:
            target = self._visits.index(block, max(0, position + 1))
        except ValueError:
            if position + 1 < len(self._visits) or block not in self._visits:
                return self._acquire_stray(block), False
            self.end_pass()  # the model was called again in the same run, as `generate` does: one more pass
            self.begin_pass(self.exact)
            return self.acquire(block)
        while self._position < target:
            self._advance()
        assert self._slot is not None
        return self._slot, self._last[target] or block in self._how.pinned

    def _acquire_stray(self, block: int) -> Slot:
        """A block that the plan does not expect here (the forward took another way than the traced one).

        It is read on the side, and not written: lanes apply what it lacks in registers, so the losses are the same.
        """
        if self._stray is None or self._stray.block != block:
            self._stray = self.load(block, wait_for_flush=True)
        return self._stray

    def _advance(self) -> None:
        """End the current visit and enter the next one: enqueue its ops, wait for its block."""
        if self._position >= 0 and self._slot is not None:
            if self._last[self._position] and self._slot.block in self.layout.written:
                self._settle(self._slot)
            self._mark_used(self._slot)
            self._stray = None
            if self._slots and not self.tier.in_memory:
                self.device.tidy(streams=True)
        self._position += 1
        if self._position == len(self._visits):
            self._slot = None
            return
        for op in self._ops:
            if op.kind == "fetch":
                self._enqueue_fetch(op)
            elif op.kind == "flush":
                slot = self._live.pop(op.stay)
                self._enqueue_flush(slot, self._event(op.key))
            else:
                assert op.visit == self._base + self._position, f"{op} at visit {self._base + self._position}"
                self._slot = self.load(op.block) if op.stay < 0 else self._live[op.stay]
                break
        assert self._slot is not None
        self.wait(self._slot)

    def _mark_used(self, slot: Slot) -> None:
        slot.used = self.device.mark()

    def wait(self, slot: Slot) -> None:
        """Wait until the slot's block is there."""
        if slot.ready is not None:
            start = time.perf_counter()
            with span("zo_offload.stream:wait", self.traffic.times, slot.block):
                slot.ready.wait()
            self.traffic.wait_s += time.perf_counter() - start
            slot.ready = None
            slot.count(self.traffic)

    def _enqueue_fetch(self, op: Op) -> None:
        for stay in [s for s, slot in self._live.items() if slot is self._slots[op.slot]]:
            del self._live[stay]  # a clean stay that ended: no flush op took it out
        slot = self._slots[op.slot]
        slot.block, slot.dirty = op.block, False
        self._live[op.stay] = slot
        target, whole = self._foretold(op), self.exact
        after = [self._event(key) for key in op.after if key[0] == "flush"]
        if slot.used is not None:  # what computed with the slot's last block is enqueued, on a GPU it may still run
            after.append(slot.used)

        def fetch() -> None:
            with span("zo_offload.stream:fetch", self.traffic.times, op.block):
                slot.fetch(op.block, self.plan.blocks[op.block].pieces, self.tier, self.layout, target, whole)

        slot.ready = self._fetch_stream.submit(fetch, after, self._event(op.key))

    def _foretold(self, op: Op) -> int:
        """The fold that the stay's block must reach.

        Known for the current pass. For the next pass it is predicted: one more step, which folds depending on its
        number.
        """
        if self.exact:  # evaluation: the next pass is most often one more batch of it
            return self.log.folded
        visits = len(self._visits)
        last = op.visit  # of a stay that goes on into the next pass, the last visit counts
        while last < op.visit + visits and self._visits[(last + 1) % visits] == op.block:
            last += 1
        if last < self._base + visits or (self.log.version + 1) % self.fold_every:
            return self._needed(op.block, self.log.folded)
        return self._needed(op.block, self.log.version + 1)

    def own(self, slot: Slot) -> None:
        """Before a slot is written: copy lent bytes (no fold was predicted) into the slot's own memory."""
        if slot.lent is not None:
            self._fetch_now(slot, slot.fetch_own)

    def fetch_residual(self, slot: Slot) -> None:
        """The residual part into a slot that was fetched without it. The compute waits."""
        self._fetch_now(slot, slot.fetch_residual)

    def _fetch_now(self, slot: Slot, read: Callable[[Iterable[Piece], Tier, Layout], None]) -> None:
        start = time.perf_counter()
        with span("zo_offload.stream:fetch", self.traffic.times, slot.block):
            read(self.plan.blocks[slot.block].pieces, self.tier, self.layout)
            slot.count(self.traffic)
        self.traffic.wait_s += time.perf_counter() - start

    def _enqueue_flush(self, slot: Slot, event: Event) -> None:
        """Write a slot back if it was written; the event is set either way, since the next fetch waits for it."""
        if not slot.dirty:
            event.set()
            return
        block, version = slot.block, slot.uniform_version(self.plan)
        slot.dirty = False
        data, spans = slot.memory[: self.layout.block_bytes[block]], self.layout.spans[block]

        def flush() -> None:
            with span("zo_offload.stream:flush", self.traffic.times, block):
                self.tier.flush(block, data, spans, version)

        after = () if slot.used is None else (slot.used,)  # the bytes are whole once the passes that write them ended
        self._flushes.append(self._flush_stream.submit(flush, after, event))
        self.traffic.flush_bytes += sum(nbytes for _, nbytes in spans)
        self._raise_failed_flush()

    def _raise_failed_flush(self) -> None:
        """Raise the error of a failed flush at the next one, on the caller's thread, where it can be handled."""
        while self._flushes and self._flushes[0].is_done():
            self._flushes.popleft().wait()

    def _event(self, key: OpKey) -> Event:
        """The event of an op, made at the first request. Old finished ones are dropped now and then."""
        if len(self._events) > 8 * (len(self._visits) + self._how.num_slots) + 64:
            recent = max(stay for _, stay in self._events) - 2 * (len(self._visits) + self._how.num_slots)
            self._events = {k: e for k, e in self._events.items() if k[1] >= recent or not e.is_done()}
        if key not in self._events:
            self._events[key] = self.device.event()
        return self._events[key]

    # ---- one block -----------------------------------------------------------------------------------------------

    def load(self, block: int, *, wait_for_flush: bool = False, into_window: bool = False) -> Slot:
        """A block outside the schedule: a pinned one (loaded once), or a copy on the side.

        into_window: between passes the slots are empty, so the copy needs no memory of its own.
        """
        if block in self._pinned:
            return self._pinned[block]
        if wait_for_flush:
            self._flush_stream.drain()
        memory = self.tier.view(block)
        if memory is None:
            nbytes = self.layout.block_bytes[block]
            spare = into_window and block not in self._how.pinned
            slot = Slot(self._slots[0].own[:nbytes] if spare else self.device.alloc(nbytes), block)
            slot.fetch(block, self.plan.blocks[block].pieces, self.tier, self.layout, None)
            slot.count(self.traffic)
        else:
            version = dict.fromkeys(self.plan.blocks[block].pieces, self.tier.version(block))
            slot = Slot(memory, block, version=version, residual=True)
        if block in self._how.pinned:
            self._pinned[block] = slot
        return slot

    def _write_back(self, slot: Slot) -> None:
        """Flush a slot and wait: on the stream, like every flush, where no signal handler can interrupt it."""
        slot.dirty = True
        self._mark_used(slot)
        self._enqueue_flush(slot, self.device.event())
        self._flush_stream.drain()
        self._raise_failed_flush()
