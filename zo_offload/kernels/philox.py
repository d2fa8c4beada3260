"""Philox4x32 (Salmon et al. 2011) and the values made from its words, in numpy integers and exactly rounded float32.

The layout of the counter, and the words of each element, are in `noise.py`. Slow and obvious: the native kernels
(csrc/noise.h) are compared with this, bit for bit, and it runs if there are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .float32 import F32, fma, polynomial

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]

TAG_BOX_MULLER, TAG_RADEMACHER, TAG_ROUNDING, TAG_SEED, TAG_GAUSSIAN, TAG_MASK, TAG_COLUMNS = range(7)

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
CHUNK = 1 << 15  # elements; a multiple of every block size, so only the first chunk starts inside a block


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


def gaussian_pair(a: U32, b: U32) -> tuple[F32, F32]:
    """Box-Muller, the Gaussian of layout 1: two normals from two 32-bit words. The error of the transform is below 2e-6
    of the radius."""
    # radius r = sqrt(-2 ln u), u = |f| * 2**-31 in [2**-31, 1]; f is odd before rounding, so never 0
    f = (a | np.uint32(0x80000001)).view(np.int32).astype(np.float32)
    bits = f.view(np.uint32)
    exponent = (bits - np.uint32((0x80000000 + 0x3F3504F3 + (31 << 23)) & _LOW)) & np.uint32(0xFF800000)
    # f is negative: f / 2**31 = -m * 2**e with m in [sqrt(1/2), sqrt(2)); t = m - 1
    t = fma((bits - exponent).view(np.float32), np.float32(-4.656612873e-10), np.float32(-1.0))
    q = polynomial(
        t, -2.379220873e-01, 3.733570874e-01, -4.099265933e-01, 4.981948733e-01, -6.662901640e-01, 1.000022292e00,
        -2.000001907e00,
    )  # fmt: skip
    log_power = exponent.view(np.int32).astype(np.float32)
    r = np.sqrt(fma(log_power, np.float32(-1.652591664e-07), q * t))  # -2 ln(2) / 2**23 per exponent step
    # angle v * pi / 2, v in [-1, 1); the cosine's sign is a bit that v does not use
    v = ((b >> np.uint32(9)) | np.uint32(0x40000000)).view(np.float32) + np.float32(-3.0)
    y = v * v
    sine = polynomial(y, -4.362469073e-03, 7.948765159e-02, -6.459209919e-01, 1.570794821e00)
    cosine = polynomial(y, 8.581906441e-04, -2.081062831e-02, 2.536507547e-01, -1.233698249e00, 9.999999404e-01)
    z0 = ((r * cosine).view(np.uint32) ^ (b << np.uint32(31))).view(np.float32)
    return z0, (r * v) * sine


def chunks(n: int, offset: int) -> list[tuple[int, int]]:
    """[start, end) pairs covering n elements, cut at multiples of CHUNK of the element index."""
    cuts = [0, *range(CHUNK - offset % CHUNK, n, CHUNK), n]
    return [(start, end) for start, end in pairwise(cuts) if end > start]


def half_words(rounds: int, seed: int, param_id: int, tag: int, n: int, offset: int) -> NDArray[np.int32]:
    """16 random bits per element of a stream, [n]."""
    block = offset >> 3
    w = words(seed, param_id, tag, rounds, block, ((offset + n + 7) >> 3) - block)
    return w.astype("<u4").view("<u2").reshape(-1)[offset - 8 * block :][:n].astype(np.int32)


def rounding_bits(rounds: int, seed: int, param_id: int, n: int, offset: int) -> Tensor:
    """16 random bits per element for stochastic rounding, int32 [n]."""
    return torch.from_numpy(half_words(rounds, seed, param_id, TAG_ROUNDING, n, offset))
