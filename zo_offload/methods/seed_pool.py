"""FedKSeed's pool of seeds: MeZO with K fixed noises, one of which each step draws at random.

    z_t = noise of seed k_t of K          g = (L(w + eps z_t) - L(w - eps z_t)) / (2 eps)          w <- w - lr g z_t

A whole run of any length is then K numbers, the sum of lr g for each seed, and several machines agree by exchanging
them. So the rate must be constant between exchanges, and weight decay, which would give earlier steps less weight, is
refused. A step whose |L+ - L-| is above `grad_clip` changes nothing. Applying a seed's sum is not bit-equal to applying
its steps one by one: the journal keeps the steps. Source: Qin et al. 2024, "Federated Full-Parameter Tuning of
Billion-Sized Language Models with Communication Cost under 18 Kilobytes", arXiv 2312.06353.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels.records import Perturbation
from ..numerics.noise import step_seed
from .mezo import MeZO

_POOL, _CHOICE = 1 << 20, 1 << 21  # indices of noises that no method's own noises reach


@dataclass(frozen=True, kw_only=True)
class SeedPool(MeZO, name="seed-pool"):
    """MeZO along K fixed directions, one random one per step."""

    lr: float = 3e-7
    """Peak learning rate."""
    pool: int = 4096
    """Number of seeds, K: the paper has 1024 to 4096."""
    grad_clip: float = 100.0
    """A step whose two losses differ by more changes nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.pool <= _POOL or not self.grad_clip > 0:
            raise ConfigError(
                f"pool={self.pool}, grad_clip={self.grad_clip}: expected 1 to {_POOL} seeds, and a limit above 0"
            )
        if self.weight_decay:
            raise ConfigError(f"weight_decay={self.weight_decay}: a pool of seeds has no order of steps to decay by")

    def chosen(self, run_seed: int, step: int) -> int:
        """The index of the step's seed in the pool, 0 .. pool - 1."""
        return step_seed(run_seed, step, _CHOICE) % self.pool

    def perturbations(self, run_seed: int, step: int) -> tuple[Perturbation, ...]:
        """The chosen noise, added and subtracted."""
        seed = step_seed(run_seed, self.chosen(run_seed, step), _POOL)
        return Perturbation(seed, self.eps32), Perturbation(seed, -self.eps32)

    def coefficients(self, losses: Tensor, lr: float) -> Tensor:
        apart = (losses[:1] - losses[1:]).abs()
        return torch.where(apart > self.grad_clip, 0.0 * apart, lr * self.projected(losses))
