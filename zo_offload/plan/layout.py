"""The place of each piece's bytes: blocks packed in execution order, aligned, in their storage formats. Pure.

    block    [ streamed part of each piece | residual part of each piece of a split parameter ]
             0                   stream_bytes                                    block_bytes

The streamed parts come first, so every visit needs one range from the block's start; the residual parts, which only
folds need, are one range after it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..formats import Format
from ..kernels.records import Target
from .blocks import ParamSpec, Piece
from .plan import Plan

PARAM_ALIGN = 64  # a cache line, and the widest vector load
BLOCK_ALIGN = 4096  # a page


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


@dataclass(frozen=True)
class Place:
    """One piece's bytes: `block[offset : offset + nbytes]` in format `fmt`, and its residual in split formats."""

    block: int
    offset: int
    nbytes: int
    fmt: Format
    residual_offset: int = 0
    residual_nbytes: int = 0
    """0 unless split."""


@dataclass(frozen=True)
class Layout:
    """Places of all pieces and the size of each block in bytes.

    stream_bytes: per block, the bytes from its start that every visit needs. spans: per block, the (offset, nbytes)
    ranges that training writes; adjacent trainable pieces are one range, padding between them included. A frozen
    block has none and is never written back.
    """

    places: dict[Piece, Place]
    block_bytes: tuple[int, ...]
    stream_bytes: tuple[int, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]
    target: Target = "values"
    """"scales": only the scales of trained parameters change; `spans` are theirs."""

    @cached_property
    def formats(self) -> dict[str, Format]:
        """Each parameter's storage format, by canonical name."""
        return {piece.name: place.fmt for piece, place in self.places.items()}

    def format_names(self) -> list[str]:
        """Names of the formats in use, the one with the most bytes first."""
        nbytes: Counter[str] = Counter()
        for place in self.places.values():
            nbytes[place.fmt.name] += place.nbytes + place.residual_nbytes
        return [name for name, _ in nbytes.most_common()]

    @property
    def total_bytes(self) -> int:
        return sum(self.block_bytes)

    @cached_property
    def used_bytes(self) -> tuple[tuple[int, int], ...]:
        """Per block, the ends of the last piece's streamed part and of the last residual; padding follows them."""
        ends = [[0, 0] for _ in self.block_bytes]
        for place in self.places.values():
            end = ends[place.block]
            end[0] = max(end[0], place.offset + place.nbytes)
            if place.residual_nbytes:
                end[1] = max(end[1], place.residual_offset + place.residual_nbytes)
        return tuple((streamed, max(streamed, whole)) for streamed, whole in ends)

    @cached_property
    def written(self) -> frozenset[int]:
        """Blocks with a trainable parameter."""
        return frozenset(block for block, spans in enumerate(self.spans) if spans)

    def digest(self) -> str:
        """Identity of the byte layout: a run directory with another layout cannot be read."""
        text = "\n".join(
            f"{piece.name}{f'[{piece.start}]' if piece.index else ''} {p.block} {p.offset} {p.nbytes} {p.fmt.name} "
            f"{p.residual_offset}"
            for piece, p in sorted(self.places.items(), key=lambda item: (item[0].name, item[0].index))
        )
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def make_layout(plan: Plan, format_of: Callable[[ParamSpec], Format], target: Target = "values") -> Layout:
    """Pack the plan's blocks, each parameter in the format that `format_of` names."""
    places: dict[Piece, Place] = {}
    sizes: list[int] = []
    streams: list[int] = []
    spans: list[tuple[tuple[int, int], ...]] = []
    for block in plan.blocks:
        ranges: list[tuple[int, int]] = []
        specs = [plan.params[piece.name] for piece in block.pieces]
        trained, formats = [spec.trainable for spec in specs], [format_of(spec) for spec in specs]
        pieces = list(zip(block.pieces, formats, strict=True))
        starts, end = _pack(trained, [fmt.nbytes(piece.numel) for piece, fmt in pieces], 0, ranges)
        if target == "scales":
            parts = zip(pieces, starts, trained, strict=True)
            ranges = [_scales(piece, fmt, start) for (piece, fmt), start, trains in parts if trains]
        stream = round_up(max(end, 1), BLOCK_ALIGN)
        wide = [fmt.residual_nbytes(piece.numel) for piece, fmt in pieces]
        residuals, end = _pack(trained, wide, stream, ranges)
        for (piece, fmt), start, residual, nbytes in zip(pieces, starts, residuals, wide, strict=True):
            places[piece] = Place(block.index, start, fmt.nbytes(piece.numel), fmt, residual, nbytes)
        streams.append(stream)
        sizes.append(round_up(end, BLOCK_ALIGN))
        spans.append(tuple(ranges))
    return Layout(places, tuple(sizes), tuple(streams), tuple(spans), target)


def _scales(piece: Piece, fmt: Format, start: int) -> tuple[int, int]:
    offset, nbytes = fmt.scales_span(piece.numel)
    return start + offset, nbytes


def _pack(
    trained: Sequence[bool], sizes: Sequence[int], offset: int, ranges: list[tuple[int, int]]
) -> tuple[list[int], int]:
    """(offset of each piece's part, end of the last), one part after another; trained ones are added to ranges."""
    starts: list[int] = []
    for trains, nbytes in zip(trained, sizes, strict=True):
        starts.append(offset)
        if not nbytes:
            continue
        if trains:
            if ranges and round_up(sum(ranges[-1]), PARAM_ALIGN) == offset:
                ranges[-1] = (ranges[-1][0], offset + nbytes - ranges[-1][0])
            else:
                ranges.append((offset, nbytes))
        offset = round_up(offset + nbytes, PARAM_ALIGN)
    return starts, offset
