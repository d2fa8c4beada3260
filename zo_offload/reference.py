"""The noise and the fused pass, slow and obvious: numpy integers and exactly rounded float32.

This is what the native kernels are compared with, bit for bit, and what runs where no compiler was found. Nothing
here is written for speed beyond working on chunks that fit a cache.

numpy has no fma. A product of two float32 is exact in float64, the sum is taken there rounded *to odd*, and the last
rounding to float32 is then the only one that counts (Boldo and Melquiond 2008).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zo_offload.formats.grouped import cut, paste, scales_plane

if TYPE_CHECKING:
    from zo_offload.formats import Format
    from zo_offload.fused import Perturbation, Update
    from zo_offload.noise import NoiseSpec

F32 = NDArray[np.float32]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]

TAG_GAUSSIAN, TAG_RADEMACHER, TAG_ROUNDING, TAG_SEED = range(4)

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
LEAST_TRAINED_SCALE = np.float32(1e-7)
_CHUNK = 1 << 15  # elements; a multiple of every block size, so only the first chunk starts inside a block


def philox(counter: Sequence[U64], key: tuple[int, int], rounds: int) -> list[U64]:
    """Philox4x32 of counter words given as uint64 arrays holding 32-bit values. Salmon et al. 2011, section 3.3."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    shift, low = np.uint64(32), np.uint64(_LOW)
    for _ in range(rounds):
        p0, p1 = c0 * np.uint64(_M0), c2 * np.uint64(_M1)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return [c0, c1, c2, c3]


def philox_block(seed: int, block: int, param_id: int, tag: int, rounds: int) -> tuple[int, int, int, int]:
    """The four words of one block, in plain integers."""
    c0, c1, c2, c3 = block & _LOW, block >> 32, param_id, tag
    k0, k1 = seed & _LOW, seed >> 32
    for _ in range(rounds):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def words(seed: int, param_id: int, tag: int, rounds: int, first_block: int, num_blocks: int) -> U32:
    """Philox output of consecutive blocks, uint32 [num_blocks, 4]."""
    blocks = np.arange(num_blocks, dtype=np.uint64) + np.uint64(first_block)
    same = np.ones_like(blocks)
    counter = [blocks & np.uint64(_LOW), blocks >> np.uint64(32), same * np.uint64(param_id), same * np.uint64(tag)]
    return np.stack(philox(counter, (seed & _LOW, seed >> 32), rounds), axis=1).astype(np.uint32)


def fma(a: F32 | np.float32, b: F32 | np.float32, c: F32 | np.float32) -> F32:
    """a * b + c with one rounding, as IEEE-754 binary32 fma."""
    with np.errstate(invalid="ignore", over="ignore"):
        product = np.asarray(a, np.float64) * np.asarray(b, np.float64)  # 24 x 24 bits: exact
        addend = np.asarray(c, np.float64)
        total = np.asarray(product + addend)
        # Knuth's TwoSum: what the float64 sum lost
        part = total - product
        lost = (product - (total - part)) + (addend - part)
        # round to odd: if anything was lost and the last bit is even, step to the neighbour on the lost side
        bits = total.view(np.int64)
        step = np.isfinite(lost) & (lost != 0) & (bits & 1 == 0)
        bits = bits + np.where(step, np.where((lost > 0) == (total > 0), 1, -1), 0)
        return bits.view(np.float64).astype(np.float32)


def _polynomial(x: F32, *coefficients: float) -> F32:
    """Horner in fma, highest power first."""
    value: F32 | np.float32 = np.float32(coefficients[0])
    for coefficient in coefficients[1:]:
        value = fma(value, x, np.float32(coefficient))
    return np.asarray(value)


def gaussian_pair(a: U32, b: U32) -> tuple[F32, F32]:
    """Box-Muller: two normals from two 32-bit words. The error of the transform is below 2e-6 of the radius."""
    # radius r = sqrt(-2 ln u), u = |f| * 2**-31 in [2**-31, 1]; f is odd before rounding, so never 0
    f = (a | np.uint32(0x80000001)).view(np.int32).astype(np.float32)
    bits = f.view(np.uint32)
    exponent = (bits - np.uint32((0x80000000 + 0x3F3504F3 + (31 << 23)) & _LOW)) & np.uint32(0xFF800000)
    # f is negative: f / 2**31 = -m * 2**e with m in [sqrt(1/2), sqrt(2)); t = m - 1
    t = fma((bits - exponent).view(np.float32), np.float32(-4.656612873e-10), np.float32(-1.0))
    q = _polynomial(
        t, -2.379220873e-01, 3.733570874e-01, -4.099265933e-01, 4.981948733e-01, -6.662901640e-01, 1.000022292e00,
        -2.000001907e00,
    )  # fmt: skip
    log_power = exponent.view(np.int32).astype(np.float32)
    r = np.sqrt(fma(log_power, np.float32(-1.652591664e-07), q * t))  # -2 ln(2) / 2**23 an exponent step
    # angle v * pi / 2, v in [-1, 1); the cosine's sign is a bit v does not use
    v = ((b >> np.uint32(9)) | np.uint32(0x40000000)).view(np.float32) + np.float32(-3.0)
    y = v * v
    sine = _polynomial(y, -4.362469073e-03, 7.948765159e-02, -6.459209919e-01, 1.570794821e00)
    cosine = _polynomial(y, 8.581906441e-04, -2.081062831e-02, 2.536507547e-01, -1.233698249e00, 9.999999404e-01)
    z0 = ((r * cosine).view(np.uint32) ^ (b << np.uint32(31))).view(np.float32)
    return z0, (r * v) * sine


def _chunks(n: int, offset: int) -> list[tuple[int, int]]:
    """[start, end) pairs covering n elements, cut at multiples of _CHUNK of the element index."""
    cuts = [0, *range(_CHUNK - offset % _CHUNK, n, _CHUNK), n]
    return [(start, end) for start, end in pairwise(cuts) if end > start]


def noise_into(out: F32, distribution: str, rounds: int, seed: int, param_id: int, offset: int) -> None:
    """z of elements [offset, offset + len(out)) of a parameter."""
    for start, end in _chunks(len(out), offset):
        first, last = offset + start, offset + end
        if distribution == "gaussian":
            block = first >> 2
            w = words(seed, param_id, TAG_GAUSSIAN, rounds, block, ((last + 3) >> 2) - block)
            z = np.stack([*gaussian_pair(w[:, 0], w[:, 1]), *gaussian_pair(w[:, 2], w[:, 3])], axis=1).reshape(-1)
            out[start:end] = z[first - 4 * block :][: end - start]
        else:
            block = first >> 7
            w = words(seed, param_id, TAG_RADEMACHER, rounds, block, ((last + 127) >> 7) - block)
            signs = np.unpackbits(w.view(np.uint8).reshape(-1), bitorder="little")[first - 128 * block :]
            out[start:end] = 1.0 - 2.0 * signs[: end - start].astype(np.float32)


def rounding_bits(rounds: int, seed: int, param_id: int, n: int, offset: int) -> Tensor:
    """16 random bits an element for stochastic rounding, int32 [n]."""
    block = offset >> 3
    w = words(seed, param_id, TAG_ROUNDING, rounds, block, ((offset + n + 7) >> 3) - block)
    halves = w.astype("<u4").view("<u2").reshape(-1)[offset - 8 * block :][:n]
    return torch.from_numpy(halves.astype(np.int32))


def _z(noise: NoiseSpec, seed: int, param_id: int, n: int, offset: int) -> F32:
    z = np.empty(n, np.float32)
    noise_into(z, noise.distribution, noise.rounds, seed, param_id, offset)
    return z


class _Weights:
    """One run of elements on its way through the pass: stored bytes, and the float32 values made from them."""

    def __init__(self, fmt: Format, stored: Tensor, residual: Tensor | None, numel: int) -> None:
        self.fmt, self.numel = fmt, numel
        self.stored, self.residual = stored, residual

    def read(self) -> F32:
        """What lanes see."""
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
    weights: _Weights, updates: Sequence[Update], noise: NoiseSpec, stochastic: bool, param_id: int, offset: int
) -> F32:
    """What lanes see after the updates in order; `weights` then holds the bytes of the last fold."""
    last_fold = max((k for k, update in enumerate(updates) if update.fold), default=-1)
    w = weights.read_master() if last_fold >= 0 else weights.read()
    for k, update in enumerate(updates):
        if update.decay != 1.0:
            with np.errstate(invalid="ignore", over="ignore"):
                w = w * np.float32(update.decay)
        if update.coeff != 0.0:
            w = fma(np.float32(-update.coeff), _z(noise, update.seed, param_id, len(w), offset), w)
        if update.fold:
            bits = rounding_bits(noise.rounds, update.seed, param_id, len(w), offset) if stochastic else None
            weights.fold(w, bits)
            w = weights.read() if k == last_fold else weights.read_master()
    return w


def _round_into(value: F32, out: Tensor) -> None:
    from zo_offload.formats import format_of

    rounded = format_of(out.dtype).encode(torch.from_numpy(np.ascontiguousarray(value)), None)
    out.copy_(rounded.view(out.dtype))


def _emit(
    w: F32, noise: NoiseSpec, param_id: int, offset: int, perturbations: Sequence[Perturbation], outs: Sequence[Tensor]
) -> None:
    """Each lane's values into its output."""
    for perturbation, out in zip(perturbations, outs, strict=True):
        _round_into(_perturbed(w, perturbation, noise, param_id, offset), out)


def _perturbed(w: F32, perturbation: Perturbation, noise: NoiseSpec, param_id: int, offset: int) -> F32:
    if perturbation.scale == 0.0:
        return w
    return fma(np.float32(perturbation.scale), _z(noise, perturbation.seed, param_id, len(w), offset), w)


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
    """The pass with the scales of the groups as what is updated and perturbed."""
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
) -> None:
    """`zo_offload.fused.fused_pass`, one idea a line. Arguments are checked there."""
    if target == "scales":
        _scales_pass(
            stored, fmt, param_id=param_id, numel=numel, offset=offset, updates=updates, write_back=write_back,
            noise=noise, perturbations=perturbations, outs=[out.view(-1) for out in outs],
        )  # fmt: skip
        return
    folds = any(update.fold for update in updates)
    for start, end in _chunks(numel, offset):
        count, r = end - start, fmt.residual_bytes
        rest = residual[r * start : r * end].clone() if residual is not None and folds else None
        weights = _Weights(fmt, cut(fmt, stored, numel, start, end), rest, count)
        w = _updated(weights, updates, noise, stochastic, param_id, offset + start)
        if write_back and folds:
            paste(fmt, stored, numel, start, weights.stored, count)
            if residual is not None and weights.residual is not None:
                residual[r * start : r * end] = weights.residual
        _emit(w, noise, param_id, offset + start, perturbations, [out.view(-1)[start:end] for out in outs])


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
) -> None:
    """`zo_offload.fused.fused_rows`: the fused pass of the whole groups a row touches, cut to the row."""
    unit, base = fmt.group or 1, first_row * row_numel
    for at, row in enumerate(rows.tolist()):
        start, end = (row - first_row) * row_numel, (row - first_row + 1) * row_numel  # in what is stored
        if start < 0 or end > numel:
            continue
        first, last = start // unit * unit, min(-(-end // unit) * unit, numel)
        wide = [torch.empty(last - first, dtype=out.dtype) for out in outs]
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
        )
        for out, piece in zip(outs, wide, strict=True):
            out[at].copy_(piece[start - first : end - first])
