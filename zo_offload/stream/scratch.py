"""Scratch memory for perturbed weights: a buffer that is reused by one module after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# what matrix libraries look at: two weights of one alignment are computed with by the same kernel, wherever they lie
_ALIGN = 256
_MOST_CUTS = 256  # kept a buffer: the number of gathered rows differs from step to step


def padded(nbytes: int) -> int:
    """The bytes of a tensor in scratch, with padding."""
    return -(-nbytes // _ALIGN) * _ALIGN


@dataclass
class Scratch:
    """One owner's scratch: `tensors[perturbation][parameter]`, cut from `buffer`; some are the same in all lists."""

    buffer: Tensor | None  # None: each tensor has its own
    tensors: list[list[Tensor]]
    place: tuple[int, int] = (0, 0)
    """The range of bytes in the buffer."""
    kept: dict[Any, Any] = field(default_factory=dict)
    """What was worked out of these tensors' addresses; scratch that is handed out again brings it along."""


@dataclass(eq=False)
class _Kind:
    """Scratch of some shapes: bytes of each tensor, and of all."""

    sizes: list[int]
    nbytes: int


@dataclass
class _Buffer:
    memory: Tensor
    taken: list[tuple[int, int]] = field(default_factory=list)  # in order
    cuts: dict[Any, Scratch] = field(default_factory=dict)  # what it was cut into before

    def gap(self, nbytes: int) -> tuple[int, int] | None:
        """The first free range of that size."""
        start = 0
        for low, high in self.taken:
            if start + nbytes <= low:
                break
            start = high
        return (start, start + nbytes) if start + nbytes <= self.memory.numel() else None


class ScratchPool:
    """Hands out scratch and takes it back; after the largest request, all scratch comes from one buffer.

    Owners nest a few levels deep: inner ones use the space that outer ones leave. Unused buffers are freed before a
    larger one is allocated, so the total is the most that was in use at once, as `memory.scratch_bytes` predicts.
    """

    def __init__(self, alloc: Callable[[int], Tensor]) -> None:
        self._alloc = alloc
        self._buffers: list[_Buffer] = []
        self._out: dict[int, tuple[_Buffer, Scratch]] = {}
        self._kinds: dict[Any, _Kind] = {}
        self.peak_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, free and handed out."""
        return sum(buffer.memory.numel() for buffer in self._buffers)

    def take(
        self,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[torch.dtype],
        copies: int,
        *,
        once: Sequence[bool] = (),
        fresh: bool = False,
    ) -> Scratch:
        """`copies` sets of tensors of the given shapes and dtypes, uninitialised.

        once: of each tensor, whether all sets have the same one; none given: each set has its own.
        fresh: each in memory of its own that is not used again, so that a view kept too long can be told apart.
        """
        once = once or [False] * len(shapes)
        if fresh:
            # from `alloc`, not from the heap: these go back to the system at once, where the heap would keep them
            kinds = list(zip(shapes, dtypes, strict=True))
            return Scratch(None, _sets(copies, once, lambda i: self._alone(*kinds[i])))
        asked = tuple(shapes), tuple(dtypes), copies, tuple(once)
        kind = self._kinds.get(asked) or self._kind(asked)
        buffer, place = self._place(kind.nbytes)
        scratch = buffer.cuts.get((place, kind))
        if scratch is None:  # views take microseconds each, and the same modules come again every step
            if len(buffer.cuts) >= _MOST_CUTS:
                buffer.cuts.clear()
            tensors = _cut(buffer.memory[slice(*place)], shapes, dtypes, kind.sizes, copies, once)
            scratch = buffer.cuts[place, kind] = Scratch(buffer.memory, tensors, place)
        buffer.taken = sorted([*buffer.taken, place])
        self._out[id(scratch.tensors)] = buffer, scratch
        return scratch

    def _kind(self, asked: tuple[Any, ...]) -> _Kind:
        shapes, dtypes, copies, once = asked
        sizes = [_nbytes(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        total = sum(padded(n) * (1 if shared else copies) for n, shared in zip(sizes, once, strict=True))
        if len(self._kinds) >= _MOST_CUTS:
            self._kinds.clear()
        kind = self._kinds[asked] = _Kind(sizes, max(_ALIGN, total))
        return kind

    def give(self, tensors: list[list[Tensor]]) -> None:
        """Take back what `take` handed out (its `tensors`)."""
        if id(tensors) in self._out:
            buffer, scratch = self._out.pop(id(tensors))
            buffer.taken.remove(scratch.place)

    def take_all_back(self) -> None:
        """Take back everything that an interrupted run holds."""
        self._out = {}
        for buffer in self._buffers:
            buffer.taken = []

    def clear(self) -> None:
        self._buffers, self._out, self._kinds = [], {}, {}

    def _alone(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._alloc(_nbytes(shape, dtype)).view(dtype).view(shape)

    def _place(self, nbytes: int) -> tuple[_Buffer, tuple[int, int]]:
        for buffer in self._buffers:
            place = buffer.gap(nbytes)
            if place is not None:
                return buffer, place
        # all too small for this; their memory is to be free before the larger one is asked for
        self._buffers = [buffer for buffer in self._buffers if buffer.taken]
        self._buffers.append(_Buffer(self._alloc(nbytes)))
        self.peak_bytes = max(self.peak_bytes, self.nbytes)
        return self._buffers[-1], (0, nbytes)


def _cut(
    buffer: Tensor,
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[torch.dtype],
    sizes: Sequence[int],
    copies: int,
    once: Sequence[bool],
) -> list[list[Tensor]]:
    """Cut a buffer into consecutive aligned tensors."""
    offset = 0

    def piece(i: int) -> Tensor:
        nonlocal offset
        start, offset = offset, offset + padded(sizes[i])
        return buffer[start : start + sizes[i]].view(dtypes[i]).view(shapes[i])

    return _sets(copies, once, piece)


def _sets(copies: int, once: Sequence[bool], make: Callable[[int], Tensor]) -> list[list[Tensor]]:
    """`copies` lists of what `make` gives for each place; where `once` says so, all have the first one's."""
    sets: list[list[Tensor]] = []
    for _ in range(copies):
        sets.append([sets[0][i] if shared and sets else make(i) for i, shared in enumerate(once)])
    return sets


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    n = dtype.itemsize
    for size in shape:
        n *= size
    return n
