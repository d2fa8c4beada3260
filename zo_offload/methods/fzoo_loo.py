"""FZOO that compares each direction with the mean of the others, so that no lane runs the unperturbed weights.

    w <- w - lr / (N s) * sum_i (l_i - mean of the l_j, j != i) u_i          s, u_i, l_i: as in `fzoo.py`

The mean of the others is a baseline that keeps the estimate unbiased (REINFORCE leave-one-out). N lanes instead of N +
1. In expectation the step is FZOO's; at the same rate and with few directions it is a little longer, since the l_i lie
on both sides of their mean. Source of the baseline: Seo et al. 2025 (LOREN), arXiv 2511.07971.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.records import Perturbation
from ..kernels.scalars import divide, total
from .fzoo import FZOO


@dataclass(frozen=True, kw_only=True)
class FZOOLeaveOneOut(FZOO, name="fzoo-loo"):
    """FZOO with a leave-one-out baseline: one forward per direction and no other."""

    def perturbations(self, run_seed: int, step: int) -> tuple[Perturbation, ...]:
        """Each direction."""
        return super().perturbations(run_seed, step)[1:]

    def coefficients(self, losses: Tensor, lr: float) -> Tensor:
        """lr (l_i - mean of the others) / (N s). If all losses are equal, only weight decay is applied."""
        spread = self._spread_of(losses)
        away = losses - divide(total(losses), self.directions)  # (N - 1) / N of the distance from the others' mean
        found = divide(lr * away, self.directions - 1) / spread
        found = torch.where(torch.isfinite(spread), found, torch.nan)
        return torch.where(spread == 0, 0.0, found)

    def summary(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the losses, and s / eps, about the length of the gradient."""
        return divide(total(losses), self.directions), divide(self._spread_of(losses), self.eps32)
