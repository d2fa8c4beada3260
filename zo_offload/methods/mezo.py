"""MeZO: two forwards at w + eps z and w - eps z, then w <- w - lr (grad z + weight_decay w).

grad = (L+ - L-) / (2 eps), the projected gradient (SPSA). Source: Malladi et al. 2023, "Fine-Tuning Language Models
with Just Forward Passes", Algorithm 1. Unlike the original, w is never perturbed in place, so nothing drifts, and a
step whose two losses tie still applies weight decay.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels.records import Perturbation
from ..kernels.scalars import divide
from ..numerics.noise import step_seed
from .base import Method


@dataclass(frozen=True, kw_only=True)
class MeZO(Method, name="mezo"):
    """Zeroth-order SGD with one two-sided perturbation per step."""

    lr: float = 1e-6
    """Peak learning rate (MeZO's full-parameter OPT recipe: 1e-6 or 1e-7)."""

    def perturbations(self, run_seed: int, step: int) -> tuple[Perturbation, ...]:
        """The same noise, added and subtracted."""
        seed = step_seed(run_seed, step)
        return Perturbation(seed, self.eps32), Perturbation(seed, -self.eps32)

    def projected(self, losses: Tensor) -> Tensor:
        """(L+ - L-) / (2 eps), [1], with the eps that the lanes used."""
        return self.clipped(divide(losses[:1] - losses[1:], 2 * self.eps32))

    def clipped(self, grad: Tensor) -> Tensor:
        """The projected gradient after clipping; MeZO does not clip."""
        return grad

    def coefficients(self, losses: Tensor, lr: float) -> Tensor:
        return lr * self.projected(losses)

    def summary(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of both losses, and the projected gradient."""
        return divide(losses[0] + losses[1], 2), self.projected(losses)[0]
