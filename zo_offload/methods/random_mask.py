"""MeZO on a fixed random subset of the weights: a baseline for other masks.

    m_i = 1 with chance 1 - sparsity, by (mask_seed, run's seed, parameter, i) alone, the same in every step
    grad = (L(w + eps m z) - L(w - eps m z)) / (2 eps)          w <- w - lr grad m z

Weights outside the mask are not decayed either. Nothing is stored: the mask is made together with the noise, from 16
random bits per weight, so the share is a multiple of 1/65,536. Sources: "R-MeZO", the baseline of Liu et al. 2024
(arXiv 2402.15751), at the same sparsity as theirs; Guo et al. 2024, "Zeroth-Order Fine-Tuning of LLMs with Extreme
Sparsity" (arXiv 2406.02913), where random subsets of a thousandth of the weights train.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..kernels.records import Mask, Smallest
from ..numerics.noise import step_seed
from .mezo import MeZO

_MASK = 1 << 22  # an index of noises that no method's own noises reach


@dataclass(frozen=True, kw_only=True)
class RandomMask(MeZO, name="random-mask"):
    """MeZO on a fixed random subset of the weights."""

    sparsity: float = 0.75
    """Share of the weights that stay unchanged."""
    mask_seed: int = 0
    """Chooses the subset."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity <= 1 - 2**-16:
            raise ConfigError(f"sparsity={self.sparsity}: expected 0 (all weights train) to {1 - 2**-16:.6f}")
        if not 0 <= self.mask_seed < 1 << 32:
            raise ConfigError(f"mask_seed={self.mask_seed}: expected 0 or more, and less than 2**32")

    def mask(self, run_seed: int, name: str, shape: torch.Size) -> Mask | Smallest | None:
        return Mask.random(1 - self.sparsity, step_seed(run_seed, self.mask_seed, _MASK)) if self.sparsity else None
