"""Noise as a function: z(seed, parameter, element), never a state.

Philox4x32 (Salmon et al. 2011) is keyed by a 64-bit seed; its counter is

    word 0, 1   block index, 64 bits        word 2   parameter id        word 3   stream tag

so any slice of any parameter has the same z, in any order, at any time and on any device. Streams:

    tag 0  gaussian of layout 1   4 elements a block; Box-Muller on word pairs (0, 1) and (2, 3)
    tag 1  rademacher             128 signs a block: element i is bit i & 31 of word (i >> 5) & 3; a set bit means -1
    tag 2  rounding               8 x 16 random bits a block, low half of a word first
    tag 3  seeds                  the seed of a step, keyed by the run's seed
    tag 4  gaussian               8 elements a block: j = i & 7 is the low (j < 4) or high half of word (j & 3) ^ 1
    tag 5  masks                  as rounding
    tag 6  columns                as tag 4: the factor V of directions of low rank (`kernels/low_rank.py`)

Only integer operations, look-ups and IEEE-754 binary32 mul, add, fma, int -> float (and in layout 1 sqrt) are used
(csrc/noise.h), so every implementation gives the same bits; `philox.py` and `distributions.py` are the slow one.

Any change of z is a new layout, and the layout is part of a run's identity: a journal replayed with another z is
another model. New runs use LAYOUT_VERSION; a resumed or replayed run has the layout that it began with.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels import native, philox
from ..kernels.distributions import Distribution, get_distribution, kind_of
from ..kernels.float32 import F32
from ..kernels.low_rank import MOST_RANK, low_rank_into

Rounds = Literal[7, 10]
Layout = Literal[1, 2]

LAYOUT_VERSION: Layout = 2
"""The newest."""

_U64 = 1 << 64


@dataclass(frozen=True)
class NoiseSpec:
    """The law of z; part of a run's identity."""

    distribution: str = "gaussian"
    """A name of `distributions.DISTRIBUTIONS`. Gaussian (|z| <= 4.41; in layout 1 6.56) as in MeZO, or +-1 with equal
    probability (rademacher): as good a direction, and cheaper."""

    rounds: Rounds = 10
    """Philox rounds: 10 is the usual choice, 7 the fewest known to pass BigCrush and about a fifth faster."""

    layout: Layout = LAYOUT_VERSION
    """The layout of the streams. Layout 1 has a Box-Muller Gaussian of 32 bits per normal: another z, half as fast."""

    rank: int = 0
    """0: every element has a number of its own. Else matrices have directions of this rank: see `of`."""

    columns: int = 0
    """Of the matrix that this is the noise of; 0: of no particular one, or of what has no low rank."""

    def __post_init__(self) -> None:
        get_distribution(self.distribution)  # raises if not known
        if self.rounds not in get_args(Rounds):
            raise ConfigError(f"rounds={self.rounds!r}: choose one of {get_args(Rounds)}")
        if self.layout not in get_args(Layout):
            raise ConfigError(f"noise_layout={self.layout!r}: choose one of {get_args(Layout)}")
        if not 0 <= self.rank <= MOST_RANK:
            raise ConfigError(f"rank={self.rank}: expected 1 to {MOST_RANK}, or 0 for noise without a rank")
        if self.rank and (self.distribution, self.layout) != ("gaussian", 2):
            raise ConfigError(
                f"rank={self.rank}: directions of low rank are made of Gaussians of layout 2, not of "
                f"{self.distribution} of layout {self.layout}"
            )

    @property
    def kind(self) -> Distribution:
        """The distribution object in this layout."""
        return kind_of(self.distribution, self.layout)

    @property
    def largest(self) -> float:
        """The largest |z|."""
        return self.kind.largest if not self.rank else self.rank * self.kind.largest**2

    @property
    def fold_every(self) -> int:
        """Default `fold_every` if blocks are flushed; see `storage.choose_fold_every`."""
        return self.kind.fold_every if not self.rank else get_distribution("rademacher").fold_every

    def of(self, shape: Sequence[int]) -> NoiseSpec:
        """The noise of a parameter of this shape. With a rank: a matrix has its last dimension as columns, and all
        others together as rows; if it has no more rows or columns than the rank, and for vectors, noise without a
        rank."""
        if not self.rank:
            return self
        columns, rows = (shape[-1], math.prod(shape[:-1])) if len(shape) > 1 else (0, 0)
        return replace(self, columns=columns) if min(rows, columns) > self.rank else replace(self, rank=0)

    def into(self, out: F32, seed: int, param_id: int, offset: int) -> None:
        """z of elements [offset, offset + len(out)) of a parameter, the slow way."""
        if not self.rank:
            self.kind.into(out, self.rounds, seed, param_id, offset)
            return
        assert self.columns, "noise of low rank is that of a matrix: `of` its shape"
        low_rank_into(out, self.kind, self.rounds, seed, param_id, offset, self.rank, self.columns)


def param_id(name: str) -> int:
    """Stable 32-bit id of a parameter's canonical name. Two names may collide: see `assign_param_ids`."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def assign_param_ids(names: Sequence[str]) -> dict[str, int]:
    """Distinct ids for a model's parameters; a function of the set of names, not of their order.

    Each name gets `param_id(name)`. Where several share it, the alphabetically first keeps it and the others are
    hashed again with a counter until they meet a free id. Raises ConfigError if a name appears twice.
    """
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if list(names).count(name) > 1})
        raise ConfigError(f"parameter names appear more than once: {twice[:5]}; pass each canonical name once")
    first_choice = {name: param_id(name) for name in sorted(names)}
    taken = set(first_choice.values())
    owner: dict[int, str] = {}
    ids: dict[str, int] = {}
    for name, choice in first_choice.items():
        tries = 0
        while owner.get(choice) is not None or (tries and choice in taken):
            tries += 1
            choice = param_id(f"{name}\0{tries}")
        owner[choice] = name
        ids[name] = choice
    return {name: ids[name] for name in names}


def step_seed(run_seed: int, step: int, index: int = 0) -> int:
    """64-bit seed of noise `index` of a step: one Philox block of (run_seed, step, index)."""
    for what, value, limit in (("run_seed", run_seed, _U64), ("step", step, _U64), ("index", index, 1 << 32)):
        if not 0 <= value < limit:
            raise ConfigError(f"{what}={value}: must be >= 0 and < {limit}")
    words = philox.philox_block(run_seed, step, index, philox.TAG_SEED, rounds=10)
    return words[0] | words[1] << 32


def noise(spec: NoiseSpec, seed: int, param_id: int, n: int, offset: int = 0, *, threads: int | None = None) -> Tensor:
    """z of elements [offset, offset + n) of a parameter, float32 [n]; native if the library loads, else philox."""
    if not 0 <= seed < _U64:
        raise ConfigError(f"seed={seed}: must be >= 0 and < 2**64")
    if n < 0 or offset < 0 or offset + n > 1 << 62:
        raise ConfigError(f"noise of elements [{offset}, {offset} + {n}): need 0 <= offset and offset + n <= 2**62")
    out = torch.empty(n, dtype=torch.float32, device="cpu")
    library = native.library()
    if library is None or spec.kind.code is None or spec.rank:
        spec.into(out.numpy(), seed, param_id, offset)
    else:
        threads = torch.get_num_threads() if threads is None else threads
        library.noise(out.data_ptr(), spec.kind.name, spec.rounds, seed, param_id, n, offset, threads)
    return out
