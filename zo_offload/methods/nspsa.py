"""n-SPSA: MeZO along several directions a step, two-sided each, averaged.

    g_i = (L(w + eps z_i) - L(w - eps z_i)) / (2 eps), i = 1..n          w <- w - lr / n * sum_i g_i z_i

The step is MeZO's with n = 1, bit for bit. Source: Malladi et al. 2023, Algorithm 2, whose step has the same 1 / n.

**What lr means.** `lr` multiplies the mean. At MeZO's rate each direction moves the weights by an n-th of MeZO's step,
so n times the forwards buy the same progress with less noise. For as much progress a forward as MeZO makes, give n
times MeZO's rate: each direction then moves as far as one of MeZO's steps (n is far below the number of weights, so the
directions hardly overlap).

All 2 n lanes pass with a block while it is there: a step moves the bytes of one of MeZO's and computes n times as much.
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
    """Zeroth-order SGD with the mean of `directions` two-sided perturbations a step."""

    lr: float = 1e-6
    """Peak learning rate of the mean: MeZO's times `directions` moves as far along each direction as MeZO does."""
    directions: int = 8
    """Perturbations of a step, n, two forwards each."""

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
