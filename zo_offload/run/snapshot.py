"""Background snapshots: every trained block reaches the disk once in `minutes` (or `steps`), one layer after another.

A snapshot is not a moment of the run: each block is a state of its own (bytes and version), and replay brings it to
any later step. So the blocks of one layer at a time are taken, at the boundary of a step, paced over the whole
interval:

    a block in memory (tiers none and host, pinned blocks)    copied to one staging buffer, written and synced
    a block that streams from disk                            synced: its next flush goes to its other generation

Memory: one buffer of the largest layer, never a second copy of the model. Disk: one layer's bytes an interval / number
of layers. On the run's own thread: the copy of one layer now and then. A snapshot that fails (disk full) costs nothing
but a longer replay: it is logged, and tried again when its turn comes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from ..devices.streams import Event, Stream
from ..errors import BudgetError, StorageError
from ..plan.layout import Layout
from ..tiers import DiskTier, Tier

_log = logging.getLogger(__name__)


class Blocks(Protocol):
    """What snapshots ask of the window."""

    def is_in_memory(self, block: int) -> bool:
        """Whether a block lives in memory for the whole run: its tier is memory, or it is pinned."""
        ...

    def copy_block(self, block: int, out: Tensor) -> int:
        """Copy such a block, between steps; its version."""
        ...


class Snapshots:
    """Call `tick` between steps.

    open_files: gives the block files, made at the first snapshot of a run in memory. groups: the trained blocks, those
    together that are taken in one turn.
    """

    def __init__(
        self,
        tier: Tier,
        open_files: Callable[[], DiskTier],
        layout: Layout,
        groups: Sequence[Sequence[int]],
        alloc: Callable[[int], Tensor],
        *,
        minutes: float | None,
        steps: int | None,
    ) -> None:
        self._tier, self._open, self._layout, self._groups, self._alloc = tier, open_files, layout, groups, alloc
        self._seconds = None if minutes is None else 60 * minutes
        self._steps = steps
        self._files: DiskTier | None = tier if isinstance(tier, DiskTier) else None
        self._staging: Tensor | None = None
        self._stream: Stream | None = None
        self._busy: Event | None = None
        self._begin, self._first_step, self._due, self._turn = time.monotonic(), -1, 0, 0
        self.taken = 0
        """Blocks brought to the disk so far."""

    def tick(self, step: int, blocks: Blocks) -> None:
        """Between steps, `step` of them taken: take the next layer if its time has come and the last one is done."""
        if not self._groups or (self._busy is not None and not self._busy.is_done()):
            return
        due = self._turns_due(step)
        if due <= self._due:
            return
        self._due = due  # a slow disk skips turns, it does not save them up
        self._finish()
        group = self._groups[self._turn % len(self._groups)]
        self._turn += 1
        self.taken += len(group)
        self._stream = self._stream or Stream("snapshot", 1)
        copies = self._copy(group, blocks)

        def write() -> None:
            for block, version, data in copies:
                self._write(block, version, data)

        self._busy = self._stream.submit(write)

    def wait(self) -> None:
        """Until the snapshot under way is on the disk. Before the blocks are flushed by somebody else."""
        if self._busy is not None:
            self._finish()

    def mend(self) -> None:
        """After anything was broken off: nothing is being written any more."""
        if self._stream is not None:
            self._stream.drain()
        self._busy = None

    def close(self) -> None:
        """Safe to call twice. Raises nothing: a snapshot that fails costs a longer replay."""
        self.mend()
        if self._stream is not None:
            self._stream.close()
        if self._files is not None and self._files is not self._tier:
            self._files.close()
        self._staging = None

    def _turns_due(self, step: int) -> int:
        """Turns that have come since the run was opened, by time or by steps."""
        count = len(self._groups)
        if self._steps is not None:
            if self._first_step < 0:
                self._first_step = step - 1
            return (step - self._first_step) * count // self._steps
        if self._seconds is None:
            return 0
        return int((time.monotonic() - self._begin) * count / self._seconds)

    def _copy(self, group: Sequence[int], blocks: Blocks) -> list[tuple[int, int | None, Tensor | None]]:
        """(block, version, copy) of each block of a group, the last two None where it need not be copied."""
        sizes = [[self._layout.block_bytes[b] for b in g if blocks.is_in_memory(b)] for g in self._groups]
        if self._staging is None and any(sizes):
            self._staging = self._alloc(max(map(sum, sizes)))
        copies: list[tuple[int, int | None, Tensor | None]] = []
        start = 0
        for block in group:
            if not blocks.is_in_memory(block):
                copies.append((block, None, None))
                continue
            assert self._staging is not None
            data = self._staging[start : start + self._layout.block_bytes[block]]
            copies.append((block, blocks.copy_block(block, data), data))
            start += data.numel()
        return copies

    def _write(self, block: int, version: int | None, data: Tensor | None) -> None:
        if self._files is None:
            self._files = self._open()
        if version is not None and data is not None:
            fresh = block in self._files.torn
            spans = ((0, data.numel()),) if fresh else self._layout.spans[block]
            self._files.flush(block, data, spans, version)
        self._files.seal(block, drop=self._files is not self._tier)

    def _finish(self) -> None:
        busy, self._busy = self._busy, None
        if busy is None:
            return
        try:
            busy.wait()
        except (StorageError, BudgetError) as error:
            _log.warning("no snapshot: %s", error)
