"""Where each parameter's bytes lie: blocks packed in execution order, aligned, in their storage formats. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from .formats import Format
from .plan import ParamSpec, Plan

PARAM_ALIGN = 64  # a cache line, and the widest vector load
BLOCK_ALIGN = 4096  # a page


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


@dataclass(frozen=True)
class Place:
    """One parameter's bytes: `block[offset : offset + nbytes]` in format `fmt`."""

    block: int
    offset: int
    nbytes: int
    fmt: Format


@dataclass(frozen=True)
class Layout:
    """Places of all parameters and the size of each block in bytes.

    spans: per block, the (offset, nbytes) ranges that training writes; adjacent trainable parameters are one range,
    padding between them included. A frozen block has none and is never written back.
    """

    places: dict[str, Place]
    block_bytes: tuple[int, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def total_bytes(self) -> int:
        return sum(self.block_bytes)

    @property
    def written(self) -> frozenset[int]:
        """Blocks with a trainable parameter."""
        return frozenset(block for block, spans in enumerate(self.spans) if spans)

    def digest(self) -> str:
        """Identity of the byte layout: a run directory written under another one cannot be read."""
        text = "\n".join(f"{n} {p.block} {p.offset} {p.nbytes} {p.fmt.name}" for n, p in sorted(self.places.items()))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def make_layout(plan: Plan, format_of: Callable[[ParamSpec], Format]) -> Layout:
    """Pack the plan's blocks, each parameter in the format that `format_of` names."""
    places: dict[str, Place] = {}
    sizes: list[int] = []
    spans: list[tuple[tuple[int, int], ...]] = []
    for block in plan.blocks:
        offset = 0
        ranges: list[tuple[int, int]] = []
        for name in block.params:
            spec = plan.params[name]
            fmt = format_of(spec)
            nbytes = fmt.nbytes(spec.numel)
            places[name] = Place(block.index, offset, nbytes, fmt)
            if spec.trainable:
                if ranges and round_up(sum(ranges[-1]), PARAM_ALIGN) == offset:
                    ranges[-1] = (ranges[-1][0], offset + nbytes - ranges[-1][0])
                else:
                    ranges.append((offset, nbytes))
            offset = round_up(offset + nbytes, PARAM_ALIGN)
        sizes.append(round_up(max(offset, 1), BLOCK_ALIGN))
        spans.append(tuple(ranges))
    return Layout(places, tuple(sizes), tuple(spans))
