"""n-SPSA: MeZO with the mean of several two-sided directions per step.

    g_i = (L(w + eps z_i) - L(w - eps z_i)) / (2 eps), i = 1..n          w <- w - lr / n * sum_i g_i z_i

The step is MeZO's with n = 1, bit for bit. Source: Malladi et al. 2023, Algorithm 2, whose step has the same 1 / n.

**The meaning of lr.** `lr` multiplies the mean. At MeZO's rate each direction moves the weights by 1/n of MeZO's step,
so n times the forwards give the same progress with less noise. For the same progress per forward as MeZO, use n times
MeZO's rate: each direction then moves as far as a MeZO step (n is far below the number of weights, so the directions
hardly overlap).

All 2 n lanes use a block in one visit: a step moves as many bytes as a MeZO step and computes n times as much.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import ConfigError
from ..kernels.records import Perturbation
from ..kernels.scalars import divide, sqrt, total
from ..numerics.noise import step_seed
from .base import Method


@dataclass(frozen=True, kw_only=True)
class NSPSA(Method, name="nspsa"):
    """Zeroth-order SGD with the mean of `directions` two-sided perturbations per step."""

    lr: float = 1e-6
    """Peak learning rate of the mean: with MeZO's rate times `directions`, each direction moves as far as in MeZO."""
    directions: int = 8
    """Number of perturbations per step, n, with two forwards each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.directions <= 256:
            raise ConfigError(f"directions={self.directions}: expected 1 to 256")

    def perturbations(self, run_seed: int, step: int) -> tuple[Perturbation, ...]:
        """Each noise, added and subtracted."""
        seeds = (step_seed(run_seed, step, i) for i in range(self.directions))
        return tuple(Perturbation(seed, eps) for seed in seeds for eps in (self.eps32, -self.eps32))

    def coefficients(self, losses: Tensor, lr: float) -> Tensor:
        return divide(lr * self._projected(losses), self.directions)

    def summary(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of all losses, and the root mean square of the g_i, about the length of the gradient."""
        found = self._projected(losses)
        mean_square = divide(total(found * found), self.directions)
        return divide(total(losses), 2 * self.directions), sqrt(mean_square)

    def _projected(self, losses: Tensor) -> Tensor:
        return divide(losses[0::2] - losses[1::2], 2 * self.eps32)
