"""FZOO: one-sided differences along several Rademacher directions; the step is scaled by their losses' deviation.

u_i in {-1, +1}^d, i = 1..N; l_i = loss(w + eps u_i), l_0 = loss(w); s = the standard deviation of l_1..l_N (by N - 1);

    w <- w - lr / (N s) * sum_i (l_i - l_0) u_i

s is about eps times the length of the gradient, so `lr` is a length in the weights' own units, for any eps and any
steepness of the loss. The paper's eta is lr * eps (its code uses this lr too, with a deviation by N: with the same lr
its step is sqrt(N / (N - 1)) times as long). All N + 1 lanes use a block in one visit: a step moves as many bytes as a
MeZO step and computes (N + 1) / 2 times as much, so if the link or the disk is the bottleneck, the lanes beyond the
second are free. Source: arXiv 2506.09034 (ICLR 2026).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels.distributions import DISTRIBUTIONS
from ..kernels.records import STILL, Perturbation
from ..kernels.scalars import divide, sqrt, total
from ..numerics.noise import step_seed
from .base import Method


@dataclass(frozen=True, kw_only=True)
class FZOO(Method, name="fzoo"):
    """Normalised zeroth-order SGD with `directions` one-sided perturbations per step."""

    lr: float = 5e-5
    """Peak learning rate; the paper's code has this lr and eps. A step changes each weight by about lr / sqrt(N)."""
    eps: float = 1e-4
    """Perturbation scale."""
    distribution: str = field(default="rademacher", metadata={"choices": tuple(DISTRIBUTIONS)})
    """The noise's distribution: a name of `distributions.DISTRIBUTIONS`."""
    directions: int = 8
    """Number of perturbations per step, N."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.directions <= 256:
            raise ConfigError(f"directions={self.directions}: expected 2 to 256, for their losses' deviation")

    def perturbations(self, run_seed: int, step: int) -> tuple[Perturbation, ...]:
        """The weights themselves, and each direction."""
        return STILL, *(Perturbation(step_seed(run_seed, step, i), self.eps32) for i in range(self.directions))

    def coefficients(self, losses: Tensor, lr: float) -> Tensor:
        """lr (l_i - l_0) / (N s). If all losses are equal, only weight decay is applied."""
        spread = self._spread(losses)
        found = (lr * (losses[1:] - losses[0])) / (self.directions * spread)
        found = torch.where(torch.isfinite(spread), found, torch.nan)  # for losses whose squares overflow
        return torch.where(spread == 0, 0.0, found)

    def summary(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """l_0, and s / eps, about the length of the gradient."""
        return losses[0], divide(self._spread(losses), self.eps32)

    def _spread(self, losses: Tensor) -> Tensor:
        return self._spread_of(losses[1:])

    def _spread_of(self, others: Tensor) -> Tensor:
        n = self.directions
        away = others - divide(total(others), n)
        return sqrt(divide(total(away * away), n - 1))
