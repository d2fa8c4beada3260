"""Tiers hold the blocks between visits. A block is bytes plus a version, the number of steps folded into it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .disk import DiskTier
from .lending import Fetched, Lent
from .memory import UNKNOWN, HostTier, ResidentTier

Spans = tuple[tuple[int, int], ...]


class Tier(Protocol):
    """The streamer's interface of a tier. fetch and flush may run on worker threads, one op per block at a time."""

    in_memory: bool
    """Whether blocks live in memory for the whole run."""

    def fetch(self, block: int, out: Tensor, start: int = 0) -> None:
        """Read bytes [start, start + len(out)) of the block into out: the whole block, or one of its two parts."""
        ...

    def flush(self, block: int, data: Tensor, spans: Spans, version: int) -> None:
        """Write the ranges `spans` of data back; the block then has `version` steps folded in."""
        ...

    def version(self, block: int) -> int:
        """The block's version; UNKNOWN if a write of its only copy failed."""
        ...

    def view(self, block: int) -> Tensor | None:
        """The block's bytes in place, if the tier is the device's own memory, else None."""
        ...

    def lend(self, block: int, nbytes: int) -> Lent | None:
        """The first `nbytes` of the block in place, readable until they are given back, and only before the block's
        next flush; None if they must be fetched."""
        ...

    def close(self) -> None: ...


__all__ = ["UNKNOWN", "DiskTier", "Fetched", "HostTier", "Lent", "ResidentTier", "Spans", "Tier"]
