"""The fused pass, slow and obvious, in exactly rounded float32 (`float32.py`) and with `philox.py`'s noise.

The native kernels are compared with this, bit for bit, and it runs if no compiler was found. Its only optimisation is
to work on chunks that fit a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..formats import Format, format_of
from ..formats.grouped import cut, paste, scales_plane
from ..kernels.float32 import F32, fma
from ..kernels.philox import CHUNK, TAG_MASK, chunks, half_words, rounding_bits
from ..kernels.records import UPDATE, Mask, Perturbation, Update
from .noise import NoiseSpec

LEAST_TRAINED_SCALE = np.float32(1e-7)


def _z(noise: NoiseSpec, seed: int, param_id: int, n: int, offset: int) -> F32:
    z = np.empty(n, np.float32)
    noise.into(z, seed, param_id, offset)
    return z


def _kept(mask: Mask | None, w: F32, noise: NoiseSpec, param_id: int, offset: int) -> np.ndarray[Any, Any] | None:
    """The elements in the mask; None: all."""
    if mask is None:
        return None
    if mask.kind == "magnitude":
        kept: np.ndarray[Any, Any] = (w.view(np.uint32) & np.uint32(0x7FFFFFFF)) <= np.uint32(mask.limit)
        return kept
    if mask.kind == "listed":
        at = mask.indices.numpy()
        kept = np.zeros(len(w), bool)
        kept[at[(at >= offset) & (at < offset + len(w))] - offset] = True
        return kept
    return half_words(noise.rounds, mask.seed, param_id, TAG_MASK, len(w), offset) < mask.limit


def _where(kept: np.ndarray[Any, Any] | None, changed: F32, w: F32) -> F32:
    return changed if kept is None else np.where(kept, changed, w)


class _Weights:
    """A range of elements during the pass: stored bytes, and the float32 values made from them."""

    def __init__(self, fmt: Format, stored: Tensor, residual: Tensor | None, numel: int) -> None:
        self.fmt, self.numel = fmt, numel
        self.stored, self.residual = stored, residual

    def read(self) -> F32:
        """The values that lanes see."""
        return self.fmt.decode(self.stored, self.numel).numpy()

    def read_master(self) -> F32:
        if self.residual is None:
            return self.read()
        return self.fmt.join(self.stored, self.residual, self.numel).numpy()

    def fold(self, w: F32, sr_bits: Tensor | None) -> None:
        values = torch.from_numpy(w)
        if self.residual is None:
            self.stored = self.fmt.encode(values, sr_bits, like=self.stored)
        else:
            self.stored, self.residual = self.fmt.split(values, sr_bits, like=self.stored)


def _updated(
    weights: _Weights,
    updates: Sequence[Update],
    noise: NoiseSpec,
    stochastic: bool,
    param_id: int,
    offset: int,
    mask: Mask | None,
) -> F32:
    """The values that lanes see after the updates in order; `weights` then holds the bytes of the last fold."""
    last_fold = max((k for k, update in enumerate(updates) if update.fold), default=-1)
    w = weights.read_master() if last_fold >= 0 else weights.read()
    kept = _kept(mask, w, noise, param_id, offset)
    for k, update in enumerate(updates):
        if k and update.begins:
            kept = _kept(mask, w, noise, param_id, offset)
        was = w
        if update.decay != 1.0:
            with np.errstate(invalid="ignore", over="ignore"):
                w = w * np.float32(update.decay)
        if update.coeff != 0.0:
            w = fma(np.float32(-update.coeff), _z(noise, update.seed, param_id, len(w), offset), w)
        w = _where(kept, w, was)
        if update.fold:
            bits = rounding_bits(noise.rounds, update.seed, param_id, len(w), offset) if stochastic else None
            weights.fold(w, bits)
            w = weights.read() if k == last_fold else weights.read_master()
    return w


def _round_into(value: F32, out: Tensor) -> None:
    rounded = format_of(out.dtype).encode(torch.from_numpy(np.ascontiguousarray(value)), None)
    out.copy_(rounded.view(out.dtype))


def _emit(
    w: F32,
    noise: NoiseSpec,
    param_id: int,
    offset: int,
    mask: Mask | None,
    perturbations: Sequence[Perturbation],
    outs: Sequence[Tensor],
) -> None:
    """Each lane's values into its output."""
    kept = _kept(mask, w, noise, param_id, offset)
    for perturbation, out in zip(perturbations, outs, strict=True):
        _round_into(_where(kept, _perturbed(w, perturbation, noise, param_id, offset), w), out)


def _perturbed(w: F32, perturbation: Perturbation, noise: NoiseSpec, param_id: int, offset: int) -> F32:
    if perturbation.scale == 0.0:
        return w
    if perturbation.terms is None:
        along = _z(noise, perturbation.seed, param_id, len(w), offset)
    else:
        along = np.zeros(len(w), np.float32)
        for seed, coeff, *_ in UPDATE.iter_unpack(perturbation.terms.read()):
            if coeff != 0.0:
                along = fma(np.float32(coeff), _z(noise, seed, param_id, len(w), offset), along)
    return fma(np.float32(perturbation.scale), along, w)


def _bytes(values: F32) -> Tensor:
    return torch.from_numpy(np.frombuffer(values.tobytes(), np.uint8).copy())


def _scales_pass(
    stored: Tensor,
    fmt: Format,
    *,
    param_id: int,
    numel: int,
    offset: int,
    updates: Sequence[Update],
    write_back: bool,
    noise: NoiseSpec,
    perturbations: Sequence[Perturbation],
    outs: Sequence[Tensor],
) -> None:
    """The pass that updates and perturbs the scales of the groups."""
    plane = scales_plane(fmt, stored, numel)
    scales: F32 = plane.clone().view(torch.float32).numpy()
    first = offset // fmt.group
    for update in updates:
        if update.decay != 1.0:
            scales = scales * np.float32(update.decay)
        if update.coeff != 0.0:
            scales = fma(np.float32(-update.coeff), _z(noise, update.seed, param_id, len(scales), first), scales)
        scales = np.where(scales < LEAST_TRAINED_SCALE, LEAST_TRAINED_SCALE, scales)
        scales = np.where(np.isnan(scales), np.float32(np.nan), scales)  # the one quiet NaN
        if update.fold and write_back:
            plane.copy_(_bytes(scales))
    for perturbation, out in zip(perturbations, outs, strict=True):
        moved = stored.clone()
        scales_plane(fmt, moved, numel).copy_(_bytes(_perturbed(scales, perturbation, noise, param_id, first)))
        _round_into(fmt.decode(moved, numel).numpy(), out)


def fused_pass(
    stored: Tensor,
    fmt: Format,
    *,
    param_id: int,
    numel: int,
    offset: int,
    updates: Sequence[Update],
    write_back: bool,
    stochastic: bool,
    noise: NoiseSpec,
    perturbations: Sequence[Perturbation],
    outs: Sequence[Tensor],
    residual: Tensor | None = None,
    target: str = "values",
    mask: Mask | None = None,
) -> None:
    """`zo_offload.numerics.fused.fused_pass`, one idea per line. Arguments are checked there."""
    if target == "scales":
        _scales_pass(
            stored, fmt, param_id=param_id, numel=numel, offset=offset, updates=updates, write_back=write_back,
            noise=noise, perturbations=perturbations, outs=[out.view(-1) for out in outs],
        )  # fmt: skip
        return
    folds = any(update.fold for update in updates)
    whole = bool(fmt.group) and CHUNK % fmt.group != 0  # a chunk would end inside of a group
    for start, end in [(0, numel)] if whole else chunks(numel, offset):
        count, r = end - start, fmt.residual_bytes
        rest = residual[r * start : r * end].clone() if residual is not None and folds else None
        weights = _Weights(fmt, cut(fmt, stored, numel, start, end), rest, count)
        w = _updated(weights, updates, noise, stochastic, param_id, offset + start, mask)
        if write_back and folds:
            paste(fmt, stored, numel, start, weights.stored, count)
            if residual is not None and weights.residual is not None:
                residual[r * start : r * end] = weights.residual
        _emit(w, noise, param_id, offset + start, mask, perturbations, [out.view(-1)[start:end] for out in outs])


def fused_rows(
    stored: Tensor,
    fmt: Format,
    *,
    param_id: int,
    numel: int,
    row_numel: int,
    rows: Tensor,
    first_row: int,
    updates: Sequence[Update],
    stochastic: bool,
    noise: NoiseSpec,
    perturbations: Sequence[Perturbation],
    outs: Sequence[Tensor],
    residual: Tensor | None = None,
    target: str = "values",
    mask: Mask | None = None,
) -> None:
    """`zo_offload.numerics.fused.fused_rows`: the fused pass of the whole groups a row touches, cut to the row."""
    unit, base = fmt.group or 1, first_row * row_numel
    for at, row in enumerate(rows.tolist()):
        start, end = (row - first_row) * row_numel, (row - first_row + 1) * row_numel  # in the stored rows
        if start < 0 or end > numel:
            continue
        first, last = start // unit * unit, min(-(-end // unit) * unit, numel)
        wide = [torch.empty(last - first, dtype=out.dtype, device="cpu") for out in outs]
        r = fmt.residual_bytes
        fused_pass(
            cut(fmt, stored, numel, first, last),
            fmt,
            param_id=param_id,
            numel=last - first,
            offset=base + first,
            updates=updates,
            write_back=False,
            stochastic=stochastic,
            noise=noise,
            perturbations=perturbations,
            outs=wide,
            residual=None if residual is None else residual[r * first : r * last],
            target=target,
            mask=mask,
        )
        for out, piece in zip(outs, wide, strict=True):
            out[at].copy_(piece[start - first : end - first])
