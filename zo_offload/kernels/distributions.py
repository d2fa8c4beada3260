"""The distributions of z: one row of a table each, which contains all that Python needs.

A distribution is computed from Philox's words alone (the layout is in `noise.py`), by exactly rounded float32
operations, so that every implementation gives the same bits. A distribution that the native library or the CUDA kernels
do not implement has no `code` or no `warp`: passes then use the reference, and a GPU is refused.

Layouts: the meaning of a name may change with a new layout of the noise, and a run keeps the layout that it began with.
DISTRIBUTIONS is the newest; `kind_of` also knows the earlier ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..errors import ConfigError
from .float32 import F32, fma
from .philox import TAG_BOX_MULLER, TAG_GAUSSIAN, TAG_RADEMACHER, U32, chunks, gaussian_pair, words

GAUSSIAN_ROWS = (
    (0x40852F59, 0xB5A7C401, 0x00000000, 0x00000000),
    (0x40865178, 0xB5FD03EB, 0x2C26BBC4, 0xA1C4D05B),
    (0x4081421C, 0xB5843F17, 0x2B2ECB71, 0xA04EDBA2),
    (0x40781814, 0xB50B0308, 0x2A389800, 0x9EDBA83A),
    (0x406D2E55, 0xB491CCC2, 0x29412698, 0x9D65AC8C),
    (0x4061CC62, 0xB4197778, 0x284A9F5F, 0x9BF0CE7C),
    (0x4055E2D9, 0xB3A23D7E, 0x27552375, 0x9A7D0FF8),
    (0x40496114, 0xB32C8389, 0x266118F5, 0x990576AB),
    (0x403C3196, 0xB2B8CFE9, 0x256EECEC, 0x978D7314),
    (0x402E3926, 0xB247E644, 0x247F1F4D, 0x9616CC30),
    (0x401F5525, 0xB1DAF261, 0x23891930, 0x94A1E263),
    (0x400F5A04, 0xB173DF55, 0x229439EC, 0x932F5721),
    (0x3FFC28DF, 0xB10B0F35, 0x21A0B0B3, 0x91C1AE4D),
    (0x3FD72E34, 0xB0A5C336, 0x20B2C865, 0x9079C0B8),
    (0x408D1D9C, 0x00000000, 0x00000000, 0x00000000),
    (0x4082928C, 0x00000000, 0x00000000, 0x00000000),
)
"""Coefficients 0..3 of |z|, as float32 bits, by the lower four bits of its argument's exponent: see `gaussian_table`.
Found by `benchmarks/noise_table.py`; csrc/noise.h has the same."""


@functools.cache
def gaussian_table() -> F32:
    """z of each of the 65,536 half-words, float32 [65536]: the whole Gaussian.

    Bit 15 is the sign. The other bits, m, count 2**15 equally likely values of |z| from the largest down: a cubic in
    a = (2 m + 1) * 2**15, with its own coefficients for each octave of a.
    """
    h = np.arange(1 << 16, dtype=np.uint32)
    a = ((h & np.uint32(0x7FFF)) << np.uint32(16) | np.uint32(0x8000)).astype(np.float32)
    c = np.array(GAUSSIAN_ROWS, np.uint32).view(np.float32)[a.view(np.uint32) >> np.uint32(23) & np.uint32(15)].T
    z = fma(fma(fma(c[3], a, c[2]), a, c[1]), a, c[0])
    signed: F32 = (z.view(np.uint32) ^ (h & np.uint32(0x8000)) << np.uint32(16)).view(np.float32)
    signed.flags.writeable = False  # shared by all callers
    return signed


@dataclass(frozen=True)
class Distribution:
    """One kind of noise."""

    name: str
    """Without an underscore: kernels are named after the format and this."""
    tag: int
    """Word 3 of Philox's counter."""
    block: int
    """Elements per Philox block."""
    values: Callable[[U32], F32]
    """Words of n blocks, uint32 [n, 4] -> their z, float32 [n * block]."""
    largest: float
    """The largest |z|: an update whose coefficient times this overflows a format is refused."""
    fold_every: int
    """Default `fold_every` if blocks are flushed; see `storage.choose_fold_every`."""
    code: int | None = None
    """Its integer in the native library (csrc/noise.h); None: not implemented there."""
    warp: int | None = None
    """Elements per iteration of a warp in the CUDA kernels (csrc/cuda_kernels.h); None: not implemented there."""

    def into(self, out: F32, rounds: int, seed: int, param_id: int, offset: int) -> None:
        """z of elements [offset, offset + len(out)) of a parameter, the slow way."""
        for start, end in chunks(len(out), offset):
            first, last = (offset + start) // self.block, -(-(offset + end) // self.block)
            z = self.values(words(seed, param_id, self.tag, rounds, first, last - first))
            out[start:end] = z[offset + start - self.block * first :][: end - start]


def _gaussian(w: U32) -> F32:
    """One half-word per element: the low halves of words 1, 0, 3, 2, then the high ones."""
    w = w[:, [1, 0, 3, 2]]
    z: F32 = gaussian_table()[np.concatenate([w & np.uint32(0xFFFF), w >> np.uint32(16)], axis=1)].reshape(-1)
    return z


def _box_muller(w: U32) -> F32:
    """Box-Muller on word pairs (0, 1) and (2, 3)."""
    pairs = [*gaussian_pair(w[:, 0], w[:, 1]), *gaussian_pair(w[:, 2], w[:, 3])]
    return np.stack(pairs, axis=1).reshape(-1)


def _rademacher(w: U32) -> F32:
    """One sign per bit, the lowest of a word first; a set bit means -1."""
    signs: F32 = np.unpackbits(w.view(np.uint8).reshape(-1), bitorder="little").astype(np.float32)
    return 1.0 - 2.0 * signs


_ALL = (
    Distribution("gaussian", TAG_GAUSSIAN, 8, _gaussian, largest=4.41, fold_every=4, code=2, warp=512),
    Distribution("rademacher", TAG_RADEMACHER, 128, _rademacher, largest=1.0, fold_every=8, code=1, warp=1024),
)
DISTRIBUTIONS: dict[str, Distribution] = {distribution.name: distribution for distribution in _ALL}
"""By the names that a method may use."""

_BOUND_1 = 6.6  # in layout 1, for all distributions: a run must still refuse the same updates
BOX_MULLER = Distribution("boxmuller", TAG_BOX_MULLER, 4, _box_muller, _BOUND_1, fold_every=4, code=0, warp=512)
"""The "gaussian" of layout 1: Box-Muller, twice as expensive."""


def all_kinds() -> tuple[Distribution, ...]:
    """The distributions of all layouts, each once."""
    return (*DISTRIBUTIONS.values(), BOX_MULLER)


def kind_of(name: str, layout: int) -> Distribution:
    """The distribution of a name in that layout of the noise. ConfigError lists the known names."""
    kind = get_distribution(name)
    if layout > 1:
        return kind
    return BOX_MULLER if name == "gaussian" else replace(kind, largest=_BOUND_1)


def get_distribution(name: str) -> Distribution:
    """The distribution of that name in the newest layout; ConfigError lists the known names."""
    try:
        return DISTRIBUTIONS[name]
    except KeyError:
        raise ConfigError(f"distribution={name!r}: choose one of {tuple(DISTRIBUTIONS)}") from None


def row(name: str) -> Distribution:
    """The row of `all_kinds` with that name; kernels are chosen by it."""
    return BOX_MULLER if name == BOX_MULLER.name else get_distribution(name)
