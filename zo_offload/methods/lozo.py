"""LOZO: MeZO along directions of low rank, one factor of which is kept for some steps.

    z_t = U_t V_k^T of each matrix: U_t, m x r, is new in each step, V_k, n x r, in each `interval` steps
    grad = (L(w + eps z_t) - L(w - eps z_t)) / (2 eps)          w <- w - lr grad z_t / r

Parameters that are no matrices (biases, norms), and matrices with no more rows or columns than the rank, have MeZO's z
and its update, w <- w - lr grad z. With 1 / r the mean step is lr times the gradient for both, as in MeZO, so `lr`
has MeZO's meaning. A matrix is perturbed by sqrt(r) eps, root mean square. Columns are the last dimension, rows all
others together: stacked experts share V. Source: Chen et al. 2024, "Enhancing Zeroth-order Fine-tuning for Language
Models with Low-rank Structures", arXiv 2410.07698 (ICLR 2025). The paper's code has no 1 / r, so its rate at rank r is
r times as much; and in steps that redraw V its update has another U than its lanes. The paper's LOZO-M, with momentum
on U, is not here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..errors import ConfigError
from ..kernels.low_rank import direction_seed
from ..kernels.records import ONE, Gain, Perturbation
from ..numerics.noise import NoiseSpec, step_seed
from .mezo import MeZO

_KEPT = 1 << 24  # an index of noises that no method's own noises reach


@dataclass(frozen=True, kw_only=True)
class LOZO(MeZO, name="lozo"):
    """MeZO along directions of low rank."""

    rank: int = 2
    """Rank of the directions, 1 to 16: the paper has 1 to 4."""
    interval: int = 50
    """Number of steps with the same V: the paper has 50 or 100."""

    def __post_init__(self) -> None:
        if not all(isinstance(n, int) and n >= 1 for n in (self.rank, self.interval)):
            raise ConfigError(f"rank={self.rank!r}, interval={self.interval!r}: expected whole numbers, 1 or more")
        super().__post_init__()

    @property
    def noise(self) -> NoiseSpec:
        return replace(super().noise, rank=self.rank)

    def gain(self, name: str, shape: torch.Size) -> Gain:
        """1 / r of the update, where the direction has low rank."""
        return Gain(1.0, float(np.float32(1 / self.rank))) if self.noise.of(shape).rank else ONE

    def perturbations(self, run_seed: int, step: int) -> tuple[Perturbation, ...]:
        """The same direction, added and subtracted."""
        seed = direction_seed(step_seed(run_seed, step // self.interval, _KEPT), step_seed(run_seed, step))
        return Perturbation(seed, self.eps32), Perturbation(seed, -self.eps32)
