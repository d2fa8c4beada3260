"""Directions of low rank: z = U V^T of a matrix, still a function of (seed, parameter, element).

For a parameter of m x n elements and a rank r, element (i, j) of z is

    z = U[i, 0] * V[j, 0];   then, for k = 1 .. r - 1:   z = fma(U[i, k], V[j, k], z)

    U[i, k]   the Gaussian of layout 2 of element i * r + k, tag 4, of the direction's seed
    V[j, k]   the Gaussian of element k * n + j, tag 6, of the seed whose upper 32 bits are the direction's, the lower 0

So seeds with the same upper half share V: a method that redraws V every few steps keeps that half as long
(`direction_seed`), and the records of updates and lanes have one seed, as for any noise. An element costs r
multiply-adds instead of a Philox word and a polynomial: U is m * r numbers, V n * r. The mean of z^2 is r. Source of
the idea: LOZO (Chen et al. 2024, arXiv 2410.07698). Slow and obvious: other implementations give the same bits.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .distributions import Distribution
from .float32 import F32, fma
from .philox import TAG_COLUMNS

MOST_RANK = 16
"""The largest rank."""
_UPPER = 0xFFFFFFFF00000000


def direction_seed(kept: int, fresh: int) -> int:
    """The seed of a direction: V is that of the seed `kept`, U is a new one for each pair."""
    return (kept << 32 | fresh & 0xFFFFFFFF) & (1 << 64) - 1


def low_rank_into(
    out: F32, kind: Distribution, rounds: int, seed: int, param_id: int, offset: int, rank: int, columns: int
) -> None:
    """z of elements [offset, offset + len(out)) of a matrix with `columns` columns."""
    first, last = offset // columns, -(-(offset + len(out)) // columns)
    u, v = np.empty((last - first, rank), np.float32), np.empty((rank, columns), np.float32)
    kind.into(u.reshape(-1), rounds, seed, param_id, first * rank)
    replace(kind, tag=TAG_COLUMNS).into(v.reshape(-1), rounds, seed & _UPPER, param_id, 0)
    z: F32 = u[:, :1] * v[0]
    for k in range(1, rank):
        z = fma(u[:, k : k + 1], v[k], z)
    out[:] = z.reshape(-1)[offset - first * columns :][: len(out)]
