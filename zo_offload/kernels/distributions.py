"""What z may be drawn from: one row of a table each, which is all that Python knows of it.

A distribution is made of Philox's words alone (the layout is in `noise.py`), by exactly rounded float32 operations, so
that every implementation gives the same bits. One that the native library or the CUDA kernels do not make has no `code`
or no `warp`: passes then take the reference, and a GPU is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError
from .float32 import F32
from .philox import TAG_GAUSSIAN, TAG_RADEMACHER, U32, chunks, gaussian_pair, words


@dataclass(frozen=True)
class Distribution:
    """One kind of noise."""

    name: str
    tag: int
    """Word 3 of Philox's counter."""
    block: int
    """Elements a Philox block."""
    values: Callable[[U32], F32]
    """Words of some blocks, uint32 [n, 4] -> their z, float32 [n * block]."""
    fold_every: int
    """Default `fold_every` where blocks are flushed; `storage.choose_fold_every` says how it was chosen."""
    code: int | None = None
    """The integer that the native library knows it by (csrc/noise.h); None: it does not make it."""
    warp: int | None = None
    """Elements a warp of the CUDA kernels walks over at once (csrc/cuda_kernels.h); None: they do not make it."""

    def into(self, out: F32, rounds: int, seed: int, param_id: int, offset: int) -> None:
        """z of elements [offset, offset + len(out)) of a parameter, the slow way."""
        for start, end in chunks(len(out), offset):
            first, last = (offset + start) // self.block, -(-(offset + end) // self.block)
            z = self.values(words(seed, param_id, self.tag, rounds, first, last - first))
            out[start:end] = z[offset + start - self.block * first :][: end - start]


def _gaussian(w: U32) -> F32:
    """Box-Muller on word pairs (0, 1) and (2, 3)."""
    pairs = [*gaussian_pair(w[:, 0], w[:, 1]), *gaussian_pair(w[:, 2], w[:, 3])]
    return np.stack(pairs, axis=1).reshape(-1)


def _rademacher(w: U32) -> F32:
    """A sign a bit, the lowest of a word first; a set bit means -1."""
    signs: F32 = np.unpackbits(w.view(np.uint8).reshape(-1), bitorder="little").astype(np.float32)
    return 1.0 - 2.0 * signs


_ALL = (
    Distribution("gaussian", TAG_GAUSSIAN, 4, _gaussian, fold_every=4, code=0, warp=512),
    Distribution("rademacher", TAG_RADEMACHER, 128, _rademacher, fold_every=8, code=1, warp=1024),
)
DISTRIBUTIONS: dict[str, Distribution] = {distribution.name: distribution for distribution in _ALL}


def get_distribution(name: str) -> Distribution:
    """The distribution of that name; ConfigError names those there are."""
    try:
        return DISTRIBUTIONS[name]
    except KeyError:
        raise ConfigError(f"distribution={name!r}: choose one of {tuple(DISTRIBUTIONS)}") from None
