"""MeZO on a fixed random subset of the weights: what a mask is worth by itself.

    m_i = 1 with chance 1 - sparsity, by (mask_seed, run's seed, parameter, i) alone, the same in every step
    grad = (L(w + eps m z) - L(w - eps m z)) / (2 eps)          w <- w - lr grad m z

Weights outside of the mask are not decayed either. Nothing is stored: the mask is made where the noise is, from 16
random bits a weight, so the share is one of 65,536 steps. Sources: "R-MeZO", the baseline of Liu et al. 2024 (arXiv
2402.15751), at the same sparsity as theirs; Guo et al. 2024, "Zeroth-Order Fine-Tuning of LLMs with Extreme Sparsity"
(arXiv 2406.02913), where random subsets of a thousandth of the weights train.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..kernels.records import Mask, Smallest
from ..numerics.noise import step_seed
from .mezo import MeZO

_MASK = 1 << 22  # index of a step's noises that no method's own reach


@dataclass(frozen=True, kw_only=True)
class RandomMask(MeZO, name="random-mask"):
    """MeZO on a fixed random subset of the weights."""

    sparsity: float = 0.75
    """Share of the weights that are left as they are."""
    mask_seed: int = 0
    """Another number: other weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity <= 1 - 2**-16:
            raise ConfigError(f"sparsity={self.sparsity}: expected 0 (all weights train) to {1 - 2**-16:.6f}")
        if not 0 <= self.mask_seed < 1 << 32:
            raise ConfigError(f"mask_seed={self.mask_seed}: expected 0 or more, and less than 2**32")

    def mask(self, run_seed: int, name: str, shape: torch.Size) -> Mask | Smallest | None:
        return Mask.random(1 - self.sparsity, step_seed(run_seed, self.mask_seed, _MASK)) if self.sparsity else None
