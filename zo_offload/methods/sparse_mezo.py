"""Sparse-MeZO: MeZO on the small weights, since noise harms the large ones most.

    m_i = 1 where |w_i| <= h, else 0; h, one per parameter: a share 1 - sparsity of its weights in the base is under
    grad = (L(w + eps m z) - L(w - eps m z)) / (2 eps)          w <- w - lr grad m z

The thresholds h are found once, in the base, before the first step, and are kept with the run. The mask is read again
at every step, as in the paper, from the weight before that step's update, in float32, pending updates included: so it
is a function of the base and the updates alone, for any tier, window or device, and in float32 for any fold_every. A
step's lanes and its update have the same mask, except in split formats (bf16+16): lanes see the coarse part and a fold
sees the master, so the masks differ for the weights within 2**-9 of h, some hundredths of a percent. Weights outside
the mask are not decayed either. A parameter whose smallest weights are all 0 (a new bias) trains as a whole: they would
leave the mask with their first update. If most trained weights are in such parameters, it is an error.

Source: Liu et al. 2024, "Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning", arXiv
2402.15751 (NeurIPS 2025), whose best sparsities are 0.5 to 0.8 and which tolerates larger rates than MeZO. The paper
has one threshold per layer; here it is one per parameter, including biases and norms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..kernels.records import Mask, Smallest
from .mezo import MeZO


@dataclass(frozen=True, kw_only=True)
class SparseMeZO(MeZO, name="sparse-mezo"):
    """MeZO on the smallest weights of each parameter."""

    sparsity: float = 0.75
    """Share of a parameter's weights that stay unchanged: its largest in the base."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"sparsity={self.sparsity}: expected 0 (all weights train) or more, and less than 1")

    def mask(self, run_seed: int, name: str, shape: torch.Size) -> Mask | Smallest | None:
        return Smallest(1 - self.sparsity) if self.sparsity else None
