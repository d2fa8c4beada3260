"""Exact values of stored parameters, for evaluation and exports.

A training lane reads the coarse plane of a split format; the weights of the run are its masters, both planes joined,
minus the pending updates. They are computed one tile at a time, so little memory is needed besides the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..formats import Format, decode_values, get_format
from ..formats.grouped import cut
from ..kernels.records import STILL, Mask, Update
from .fused import fused_pass
from .noise import NoiseSpec

_TILE = 1 << 20  # elements; a multiple of every group


def exact_values(
    stored: Tensor,
    residual: Tensor,
    fmt: Format,
    out: Tensor,
    *,
    param_id: int,
    numel: int,
    offset: int = 0,
    pending: Sequence[Update],
    noise: NoiseSpec,
    rows: Tensor | None = None,
    mask: Mask | None = None,
    threads: int | None = None,
) -> None:
    """out = join(stored, residual) less `pending`, in float32, rounded once to out's dtype; `pending` may not fold.

    stored, residual: of elements [offset, offset + numel) of the parameter. rows: int64 [U]; out is then [U, row], of
    which those rows are written that are among these elements.
    """
    assert not any(update.fold for update in pending), "folds come first: they change the stored bytes"
    flat, fp32 = out.view(-1), get_format("fp32")
    for start, end, at in _ranges(numel, offset, out, rows):
        values = _decode(stored, residual, fmt, numel, start, end)
        fused_pass(
            values.view(torch.uint8), fp32, param_id=param_id, numel=end - start, offset=offset + start,
            updates=pending,
            write_back=False, noise=noise, perturbations=[STILL], outs=[flat[at : at + end - start]], mask=mask,
            threads=threads,
        )  # fmt: skip


def _ranges(numel: int, offset: int, out: Tensor, rows: Tensor | None) -> Iterator[tuple[int, int, int]]:
    """(start, end, place in out) of the elements wanted, counted from `offset`."""
    if rows is None:
        for start in range(0, numel, _TILE):
            yield start, min(start + _TILE, numel), start
        return
    size = out[0].numel() if len(rows) else 0
    for at, row in enumerate(rows.tolist()):
        if offset <= row * size < offset + numel:
            yield row * size - offset, (row + 1) * size - offset, at * size


def _decode(stored: Tensor, residual: Tensor, fmt: Format, numel: int, start: int, end: int) -> Tensor:
    """Elements [start, end) as float32; decoded from the groups they lie in."""
    group, wide = fmt.group or 1, fmt.residual_bytes
    low, high = start // group * group, min(numel, -(-end // group) * group)
    values = decode_values(cut(fmt, stored, numel, low, high), residual[wide * low : wide * high], fmt, high - low)
    return values[start - low : end - low].contiguous()
