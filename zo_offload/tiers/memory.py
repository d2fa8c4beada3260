"""Blocks in memory: on the device itself (`none`, and `host` on a CPU), or in host memory behind a window (`host`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .lending import Fetched

UNKNOWN = -1
"""Version of a block whose bytes are being written: neither the old version nor the new one."""


class HostTier(Fetched):
    """Blocks in host memory, one exact allocation each; fetch and flush are copies through the window."""

    in_memory = True

    def __init__(self, block_bytes: Sequence[int], alloc: Callable[[int], Tensor]) -> None:
        self._blocks = [alloc(nbytes) for nbytes in block_bytes]
        self._versions = [0] * len(self._blocks)

    @property
    def slabs(self) -> list[Tensor]:
        """The blocks' memory, for a device that copies it in its own way."""
        return self._blocks

    def set_version(self, block: int, version: int) -> None:
        self._versions[block] = version

    def fetch(self, block: int, out: Tensor, start: int = 0) -> None:
        out.copy_(self._blocks[block][start : start + out.numel()])

    def flush(self, block: int, data: Tensor, spans: tuple[tuple[int, int], ...], version: int) -> None:
        self._versions[block] = UNKNOWN
        for offset, nbytes in spans:
            self._blocks[block][offset : offset + nbytes].copy_(data[offset : offset + nbytes])
        self._versions[block] = version

    def version(self, block: int) -> int:
        return self._versions[block]

    def view(self, block: int) -> Tensor | None:
        return None

    def close(self) -> None:
        self._blocks = []


class ResidentTier(HostTier):
    """Blocks in the memory where they are computed, for the whole run: nothing moves, updates happen in place."""

    def view(self, block: int) -> Tensor | None:
        return self._blocks[block]

    def flush(self, block: int, data: Tensor, spans: tuple[tuple[int, int], ...], version: int) -> None:
        assert data.data_ptr() == self._blocks[block].data_ptr(), "a resident block is its own window"
        self._versions[block] = version
