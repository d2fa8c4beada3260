"""1.5-SPSA: many two-sided directions per step, each with a smaller step if the loss is curved along it.

    g_i = (L(w + eps z_i) - L(w - eps z_i)) / (2 eps)                  z_i in {-1, +1}^d, i = 1..n
    c_i = (L(w + eps z_i) - 2 L(w) + L(w - eps z_i)) / eps^2           the curvature along z_i
    w <- w - lr / n * sum_i g_i / max(1, |c_i|^0.1) z_i

The paper spends its forwards on large batches and many directions in few steps (OPT-13B: 70 steps of batch 128 and 160
directions), and has lr = eps. All 2 n + 1 lanes use a block in one visit, so a step moves as many bytes as a MeZO step.
The formulas are the paper's; its code was not found.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.distributions import DISTRIBUTIONS
from ..kernels.records import STILL, Perturbation
from ..kernels.scalars import divide, tenth_root
from .nspsa import NSPSA


@dataclass(frozen=True, kw_only=True)
class SPSA15(NSPSA, name="spsa-1.5"):
    """n-SPSA whose directions are weighted by the curvature along them."""

    lr: float = 1e-4
    """Peak learning rate of the mean over directions; the recipe has lr = eps."""
    eps: float = 1e-4
    """Perturbation scale."""
    distribution: str = field(default="rademacher", metadata={"choices": tuple(DISTRIBUTIONS)})
    """The noise's distribution: a name of `distributions.DISTRIBUTIONS`."""
    directions: int = 16
    """Number of perturbations per step, n, with two forwards each."""

    def perturbations(self, run_seed: int, step: int) -> tuple[Perturbation, ...]:
        """The weights themselves, and each noise added and subtracted."""
        return STILL, *super().perturbations(run_seed, step)

    def coefficients(self, losses: Tensor, lr: float) -> Tensor:
        still, plus, minus = losses[0], losses[1::2], losses[2::2]
        curvature = divide(divide((plus - still) + (minus - still), self.eps32), self.eps32)
        held = tenth_root(torch.clamp(curvature.abs(), min=1.0, max=1e30))
        return divide(lr * (self._projected(losses[1:]) / held), self.directions)

    def summary(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """L(w), and the root mean square of the g_i."""
        return losses[0], super().summary(losses[1:])[1]
