"""FedKSeed's pool of seeds: MeZO whose noises are K fixed ones, of which each step takes one by chance.

    z_t = noise of seed k_t of K          g = (L(w + eps z_t) - L(w - eps z_t)) / (2 eps)          w <- w - lr g z_t

A whole run is then K numbers, the sum of lr g of each seed, whatever its number of steps, and several machines agree by
exchanging those. So the rate must be constant in what they exchange, and weight decay, which would weigh earlier steps
less, is refused; a step whose |L+ - L-| is above `grad_clip` changes nothing. To add up what a seed was used for is not
the same as to apply it step by step, to the last bit: the journal keeps the steps. Source: Qin et al. 2024, "Federated
Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18 Kilobytes", arXiv 2312.06353.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels.records import Perturbation
from ..numerics.noise import step_seed
from .mezo import MeZO

_POOL, _CHOICE = 1 << 20, 1 << 21  # indices of a step's noises that no method's own reach


@dataclass(frozen=True, kw_only=True)
class SeedPool(MeZO, name="seed-pool"):
    """MeZO along K fixed directions, one a step by chance."""

    lr: float = 3e-7
    """Peak learning rate."""
    pool: int = 4096
    """Seeds, K: the paper has 1024 to 4096."""
    grad_clip: float = 100.0
    """A step whose losses are further apart changes nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.pool <= _POOL or not self.grad_clip > 0:
            raise ConfigError(
                f"pool={self.pool}, grad_clip={self.grad_clip}: expected 1 to {_POOL} seeds, and a limit above 0"
            )
        if self.weight_decay:
            raise ConfigError(f"weight_decay={self.weight_decay}: a pool of seeds has no order of steps to decay by")

    def chosen(self, run_seed: int, step: int) -> int:
        """Which of the pool's seeds a step takes, 0 .. pool - 1."""
        return step_seed(run_seed, step, _CHOICE) % self.pool

    def perturbations(self, run_seed: int, step: int) -> tuple[Perturbation, ...]:
        """The chosen noise, added and subtracted."""
        seed = step_seed(run_seed, self.chosen(run_seed, step), _POOL)
        return Perturbation(seed, self.eps32), Perturbation(seed, -self.eps32)

    def coefficients(self, losses: Tensor, lr: float) -> Tensor:
        apart = (losses[:1] - losses[1:]).abs()
        return torch.where(apart > self.grad_clip, 0.0 * apart, lr * self.projected(losses))
