"""Background snapshots: every trained block is written to the disk once per `minutes` (or `steps`), layer by layer.

A snapshot is not one moment of the run: each block has its own state (bytes and version), and replay brings it to any
later step. So the blocks of one layer are taken at a time, between two steps, and the layers are spread over the whole
interval:

    a block in memory (tiers none and host, pinned blocks)    copied to one staging buffer, written and synced
    a block that streams from disk                            synced: its next flush goes to its other generation

Memory: one buffer of the largest layer, never a second copy of the model. Disk: one layer's bytes per (interval /
number of layers). The run's own thread only copies one layer now and then. A snapshot that fails (disk full) only makes
the next replay longer: it is logged, and tried again at its next turn.
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
    """The window as snapshots use it."""

    def is_in_memory(self, block: int) -> bool:
        """Whether a block lives in memory for the whole run: its tier is memory, or it is pinned."""
        ...

    def copy_block(self, block: int, out: Tensor) -> int:
        """Copy such a block, between steps; return its version."""
        ...


class Snapshots:
    """Call `tick` between steps.

    open_files: returns the block files; a run in memory makes them at its first snapshot. groups: the trained blocks,
    grouped by the turn that takes them.
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
        """Number of blocks written to the disk so far."""

    def tick(self, step: int, blocks: Blocks) -> None:
        """Call after `step` steps: takes the next layer if its turn has come and the last layer is written."""
        if not self._groups or (self._busy is not None and not self._busy.is_done()):
            return
        due = self._turns_due(step)
        if due <= self._due:
            return
        self._due = due  # a slow disk skips turns; they do not accumulate
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
        """Wait until the current snapshot is on the disk. Call this before anything else flushes the blocks."""
        if self._busy is not None:
            self._finish()

    def mend(self) -> None:
        """After an interruption: wait until nothing is being written any more."""
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
        """Number of turns that are due since the run was opened, by time or by steps."""
        count = len(self._groups)
        if self._steps is not None:
            if self._first_step < 0:
                self._first_step = step - 1
            return (step - self._first_step) * count // self._steps
        if self._seconds is None:
            return 0
        return int((time.monotonic() - self._begin) * count / self._seconds)

    def _copy(self, group: Sequence[int], blocks: Blocks) -> list[tuple[int, int | None, Tensor | None]]:
        """(block, version, copy) of each block of a group; version and copy are None if it need not be copied."""
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
