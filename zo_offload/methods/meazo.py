"""MEAZO: n-SPSA whose rate is divided by a running root mean square of the slopes, one remembered number.

    g_i = (L(w + eps z_i) - L(w - eps z_i)) / (2 eps), i = 1..n            g = mean of the g_i
    v <- beta v + (1 - beta) g^2                                           v' = v / (1 - beta^t), t steps taken
    w <- w - lr / (sqrt(v') + floor) * 1 / n * sum_i g_i z_i

This is Adam's second moment, of the projected gradient instead of each weight: slopes along random directions do not
differ in scale between weights, and the paper finds that ZO-Adam is no better than a well-tuned ZO-SGD. So `lr` is in
the weights' own units (about each weight's change in a step), for any loss. A skipped step is not remembered. Source:
Dbouk et al. 2026, "On Adaptivity in Zeroth-Order Optimization", arXiv 2605.03869.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels.scalars import divide, sqrt, total
from .nspsa import NSPSA
from .outcome import Told


@dataclass(frozen=True, kw_only=True)
class MEAZO(NSPSA, name="meazo"):
    """Zeroth-order SGD with one adaptive rate for all weights."""

    lr: float = 1e-5
    """Peak learning rate: about each weight's change in a step, for any eps and loss."""
    directions: int = 1
    """Number of perturbations per step, n, with two forwards each."""
    beta: float = 0.99
    """The share of v that a step keeps."""
    floor: float = 1e-8
    """Added to the root of v, so that a slope of 0 gives no step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.beta < 1 and self.floor > 0):
            raise ConfigError(f"beta={self.beta}, floor={self.floor}: expected 0 <= beta < 1 and a positive floor")

    def first_memory(self) -> tuple[float, ...]:
        """v, and beta^t."""
        return 0.0, 1.0

    def remember(self, memory: Tensor, told: Told) -> Tensor:
        return self._moved(memory, told.scalars[0])

    def scalars(self, losses: Tensor) -> Tensor:
        """g."""
        return divide(total(self._projected(losses)), self.directions).reshape(1)

    def coefficients_from(self, memory: Tensor, losses: Tensor, lr: float) -> Tensor:
        v, power = self._moved(memory, self.scalars(losses)[0]).unbind()
        root = sqrt(v / (1.0 - power)) + self.floor
        return divide(torch.full_like(root, lr) / root * self._projected(losses), self.directions)

    def _moved(self, memory: Tensor, slope: Tensor) -> Tensor:
        v, power = memory.unbind()
        return torch.stack([self.beta * v + (1 - self.beta) * (slope * slope), self.beta * power])
