"""The updates that blocks may still lack: one tuple of `Update`s a step, in step order.

A block at version v is brought to version t by the updates of steps v..t-1, alone, on any device. The log in memory
mirrors the journal; the journal is the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from .errors import JournalError
from .fused import Update


class UpdateLog:
    """Updates of steps `base`..`version - 1`. Version t is the state after t steps."""

    def __init__(self, base: int = 0) -> None:
        self.base = base
        self._steps: list[tuple[Update, ...]] = []
        self._since = lru_cache(maxsize=64)(self._collect)

    @property
    def version(self) -> int:
        return self.base + len(self._steps)

    def append(self, updates: Sequence[Update]) -> None:
        """Add one step; an empty sequence is a step that changed nothing (skipped)."""
        self._steps.append(tuple(updates))
        self._since.cache_clear()

    def since(self, version: int, decay: bool) -> tuple[Update, ...]:
        """Updates a parameter at `version` still lacks; decay=False leaves weight decay out (biases, norms)."""
        if version < self.base:
            raise JournalError(f"updates before step {self.base} are not in memory; a block is at version {version}")
        return self._since(version, decay)

    def _collect(self, version: int, decay: bool) -> tuple[Update, ...]:
        flat = [update for step in self._steps[version - self.base :] for update in step]
        return tuple(flat) if decay else tuple(replace(update, decay=1.0) for update in flat)
