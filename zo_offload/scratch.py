"""Scratch memory for perturbed weights: a few buffers, used again by one module after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# what matrix libraries look at: two weights of one alignment are computed with by the same kernel, wherever they lie
_ALIGN = 256
_MOST_CUTS = 256  # kept of a buffer: gathered rows are of another number every step


def padded(nbytes: int) -> int:
    """What a tensor takes in scratch."""
    return -(-nbytes // _ALIGN) * _ALIGN


@dataclass
class Scratch:
    """One owner's scratch: `tensors[perturbation][parameter]`, cut from `buffer`."""

    buffer: Tensor | None  # None: each tensor has its own
    tensors: list[list[Tensor]]


class ScratchPool:
    """Hands out scratch and takes it back; never holds more buffers than were out at once.

    Modules nest a few levels deep at most, so there are only as many buffers as levels; one that is too small is
    let go before a larger one is allocated, so the total stays at the sum of the largest scratch of each level.
    """

    def __init__(self, alloc: Callable[[int], Tensor]) -> None:
        self._alloc = alloc
        self._free: list[Tensor] = []
        self._out: dict[int, Scratch] = {}
        self._cut: dict[int, dict[Any, list[list[Tensor]]]] = {}  # of each buffer: what it was cut into before
        self.nbytes = 0  # free and handed out
        self.peak_bytes = 0

    def take(
        self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype], copies: int, *, fresh: bool = False
    ) -> Scratch:
        """`copies` sets of tensors of the given shapes and dtypes, uninitialised.

        fresh: each in memory of its own that is not used again, so that a view kept too long can be told apart.
        """
        if fresh:
            pairs = list(zip(shapes, dtypes, strict=True))
            # from `alloc`, not from the heap: these go back to the system at once, where the heap would keep them
            return Scratch(None, [[self._alone(shape, dtype) for shape, dtype in pairs] for _ in range(copies)])
        sizes = [_nbytes(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        stride = sum(padded(n) for n in sizes)
        buffer = self._buffer(max(_ALIGN, stride * copies))
        cuts, key = self._cut.setdefault(id(buffer), {}), (tuple(shapes), tuple(dtypes), copies)
        tensors = cuts.get(key)
        if tensors is None:  # views take microseconds each, and the same modules come again every step
            if len(cuts) >= _MOST_CUTS:
                cuts.clear()
            tensors = cuts[key] = _cut(buffer, shapes, dtypes, sizes, copies)
        scratch = Scratch(buffer, tensors)
        self._out[id(tensors)] = scratch
        return scratch

    def give(self, tensors: list[list[Tensor]]) -> None:
        """Take back what `take` handed out (its `tensors`)."""
        scratch = self._out.pop(id(tensors), None)
        if scratch is not None and scratch.buffer is not None:
            self._free.append(scratch.buffer)

    def clear(self) -> None:
        self._free, self._out, self._cut, self.nbytes = [], {}, {}, 0

    def _alone(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._alloc(_nbytes(shape, dtype)).view(dtype).view(shape)

    def _buffer(self, nbytes: int) -> Tensor:
        fitting = [i for i, buffer in enumerate(self._free) if buffer.numel() >= nbytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda i: self._free[i].numel()))
        if self._free:  # too small for this: its memory goes into the larger one
            largest = max(range(len(self._free)), key=lambda i: self._free[i].numel())
            dropped = self._free.pop(largest)
            self._cut.pop(id(dropped), None)
            self.nbytes -= dropped.numel()
            del dropped  # its memory is to be free before the larger one is asked for
        buffer = self._alloc(nbytes)
        self.nbytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.nbytes)
        return buffer


def _cut(
    buffer: Tensor, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype], sizes: Sequence[int], copies: int
) -> list[list[Tensor]]:
    """Tensors one after the other, each aligned."""
    tensors: list[list[Tensor]] = []
    offset = 0
    for _ in range(copies):
        tensors.append([])
        for shape, dtype, n in zip(shapes, dtypes, sizes, strict=True):
            tensors[-1].append(buffer[offset : offset + n].view(dtype).view(shape))
            offset += padded(n)
    return tensors


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    n = dtype.itemsize
    for size in shape:
        n *= size
    return n
