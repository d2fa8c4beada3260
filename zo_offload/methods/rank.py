"""ZO-RankSGD: only the order of the directions' losses counts, not their distances.

    E = the pairs (i, j) of which it is known that i is better than j           l_i = loss(w + eps z_i), i = 1..N
    w <- w - lr / |E| * sum over E of (z_j - z_i)

For an objective that only ranks (a person's preference, a comparison of samples): it may return any number that orders
the lanes, and any monotone function of it gives the same run. `top` = k: only the best k are ordered among themselves,
and the others are worse than those; 0: all are ordered. Equal losses form no pair. `lr` is in the weights' own units.
The paper's line search, which ranks candidates along the step, is left out: its lanes would need sums of noises.
Source: Tang et al. 2023, "Zeroth-Order Optimization Meets Human Feedback", arXiv 2303.03751 (ICLR 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels.records import Perturbation
from ..kernels.scalars import divide, total
from ..numerics.noise import step_seed
from .base import Method


@dataclass(frozen=True, kw_only=True)
class RankSGD(Method, name="rank"):
    """Zeroth-order SGD from the order of the losses alone."""

    lr: float = 1e-4
    """Peak learning rate, in the weights' own units, for any eps and loss."""
    directions: int = 8
    """Number of perturbations per step, N, with one forward each."""
    top: int = 0
    """Number of best directions whose order is used; 0: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.directions <= 256:
            raise ConfigError(f"directions={self.directions}: expected 2 to 256, to be ranked")
        if not 0 <= self.top <= self.directions:
            raise ConfigError(f"top={self.top}: expected 0 (all) to {self.directions}, the number of directions")

    def perturbations(self, run_seed: int, step: int) -> tuple[Perturbation, ...]:
        """Each direction."""
        return tuple(Perturbation(step_seed(run_seed, step, i), self.eps32) for i in range(self.directions))

    def coefficients(self, losses: Tensor, lr: float) -> Tensor:
        """lr / |E| times (the number of better directions minus the number of worse ones)."""
        n, top = self.directions, self.top or self.directions
        better = (losses[:, None] > losses).sum(1)  # [i]: number of directions better than i
        known = (better < top) & torch.isfinite(losses)
        pair = (losses[:, None] > losses) & known  # [j, i]: i is one of the best, and better than j
        found = (pair.sum(1) - pair.sum(0)).to(losses.dtype)
        return divide(lr * found, top * (top - 1) / 2 + top * (n - top))

    def summary(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the losses, and the distance from the best to the worst; 0: all are equal."""
        return divide(total(losses), self.directions), losses.amax() - losses.amin()
