"""ZO-SGD with momentum, rebuilt from the slopes of the last steps instead of kept as a copy of the weights.

    g_t = (L(w + eps z_t) - L(w - eps z_t)) / (2 eps)
    w <- w - lr * sum_{k < window} beta^k g_{t-k} z_{t-k}

This is SGD with momentum (m <- beta m + g z, w <- w - lr m) without the terms older than `window` steps, which are
beta^window of a direction's total effect. No plane of momenta is stored or moved; a step applies the noises of `window`
steps, which costs CPU time (each is made again) but no bytes on the link. Multiply MeZO's rate by 1 - beta. Source:
"ZO-SGD-MMT" of Zhang et al. 2024, arXiv 2402.11592, whose beta is 0.9.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..numerics.noise import step_seed
from .mezo import MeZO
from .outcome import Told


@dataclass(frozen=True, kw_only=True)
class Momentum(MeZO, name="momentum"):
    """Zeroth-order SGD with momentum, one two-sided perturbation per step."""

    lr: float = 1e-7
    """Peak learning rate: MeZO's rate times 1 - beta moves the weights equally far in total."""
    beta: float = 0.9
    """The share of the momentum that a step keeps."""
    window: int = 16
    """Number of steps in the momentum, including the present one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.beta < 1 and 1 <= self.window <= 256):
            raise ConfigError(f"beta={self.beta}, window={self.window}: expected 0 <= beta < 1, and 1 to 256 steps")

    def seeds(self, run_seed: int, step: int) -> tuple[int, ...]:
        """The seeds of this step and of earlier steps; those before step 0 have the coefficient 0."""
        before = range(step - 1, step - self.window, -1)
        return (
            step_seed(run_seed, step), *(step_seed(run_seed, max(t, 0), 0 if t >= 0 else -t) for t in before)
        )  # fmt: skip

    def first_memory(self) -> tuple[float, ...]:
        """The slopes of earlier steps, the last one first."""
        return (0.0,) * (self.window - 1)

    def remember(self, memory: Tensor, told: Told) -> Tensor:
        return torch.cat([told.grad.reshape(1), memory])[: self.window - 1]

    def pass_over(self, memory: Tensor) -> Tensor:
        return torch.cat([memory.new_zeros(1), memory])[: self.window - 1]

    def coefficients_from(self, memory: Tensor, losses: Tensor, lr: float) -> Tensor:
        found, share = [], 1.0
        for slope in torch.cat([self.projected(losses), memory]).unbind():
            found.append(lr * (share * slope))
            share *= self.beta
        return torch.stack(found)
