"""Where each parameter's bytes lie: blocks packed in execution order, aligned, in their storage formats. Pure.

    block    [ streamed part of each parameter | residual part of each split parameter ]
             0                      stream_bytes                             block_bytes

The streamed parts come first, so what every visit needs is one range from the block's start; the residual parts, which
only folds need, are one range behind it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .formats import Format
from .fused import Target
from .plan import ParamSpec, Plan

PARAM_ALIGN = 64  # a cache line, and the widest vector load
BLOCK_ALIGN = 4096  # a page


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


@dataclass(frozen=True)
class Place:
    """One parameter's bytes: `block[offset : offset + nbytes]` in format `fmt`, and its residual, of split formats."""

    block: int
    offset: int
    nbytes: int
    fmt: Format
    residual_offset: int = 0
    residual_nbytes: int = 0
    """0 unless split."""


@dataclass(frozen=True)
class Layout:
    """Places of all parameters and the size of each block in bytes.

    stream_bytes: per block, the bytes from its start that every visit needs. spans: per block, the (offset, nbytes)
    ranges that training writes; adjacent trainable parameters are one range, padding between them included. A frozen
    block has none and is never written back.
    """

    places: dict[str, Place]
    block_bytes: tuple[int, ...]
    stream_bytes: tuple[int, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]
    target: Target = "values"
    """"scales": the scales of trained parameters are what changes; `spans` are theirs."""

    @property
    def total_bytes(self) -> int:
        return sum(self.block_bytes)

    @property
    def written(self) -> frozenset[int]:
        """Blocks with a trainable parameter."""
        return frozenset(block for block, spans in enumerate(self.spans) if spans)

    def digest(self) -> str:
        """Identity of the byte layout: a run directory written under another one cannot be read."""
        text = "\n".join(
            f"{n} {p.block} {p.offset} {p.nbytes} {p.fmt.name} {p.residual_offset}"
            for n, p in sorted(self.places.items())
        )
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def make_layout(plan: Plan, format_of: Callable[[ParamSpec], Format], target: Target = "values") -> Layout:
    """Pack the plan's blocks, each parameter in the format that `format_of` names."""
    places: dict[str, Place] = {}
    sizes: list[int] = []
    streams: list[int] = []
    spans: list[tuple[tuple[int, int], ...]] = []
    for block in plan.blocks:
        ranges: list[tuple[int, int]] = []
        specs = [plan.params[name] for name in block.params]
        formats = [format_of(spec) for spec in specs]
        starts, end = _pack(specs, [f.nbytes(s.numel) for f, s in zip(formats, specs, strict=True)], 0, ranges)
        if target == "scales":
            ranges = [_scales(s, f, start) for s, f, start in zip(specs, formats, starts, strict=True) if s.trainable]
        stream = round_up(max(end, 1), BLOCK_ALIGN)
        wide = [f.residual_nbytes(s.numel) for f, s in zip(formats, specs, strict=True)]
        residuals, end = _pack(specs, wide, stream, ranges)
        for spec, fmt, start, residual, nbytes in zip(specs, formats, starts, residuals, wide, strict=True):
            places[spec.name] = Place(block.index, start, fmt.nbytes(spec.numel), fmt, residual, nbytes)
        streams.append(stream)
        sizes.append(round_up(end, BLOCK_ALIGN))
        spans.append(tuple(ranges))
    return Layout(places, tuple(sizes), tuple(streams), tuple(spans), target)


def _scales(spec: ParamSpec, fmt: Format, start: int) -> tuple[int, int]:
    offset, nbytes = fmt.scales_span(spec.numel)
    return start + offset, nbytes


def _pack(
    specs: Sequence[ParamSpec], sizes: Sequence[int], offset: int, ranges: list[tuple[int, int]]
) -> tuple[list[int], int]:
    """(offset of each parameter's part, end of the last), one part after another; trained ones are added to ranges."""
    starts: list[int] = []
    for spec, nbytes in zip(specs, sizes, strict=True):
        starts.append(offset)
        if not nbytes:
            continue
        if spec.trainable:
            if ranges and round_up(sum(ranges[-1]), PARAM_ALIGN) == offset:
                ranges[-1] = (ranges[-1][0], offset + nbytes - ranges[-1][0])
            else:
                ranges.append((offset, nbytes))
        offset = round_up(offset + nbytes, PARAM_ALIGN)
    return starts, offset
