"""Conservative ZO-SGD: takes the step, its opposite, or no step, whichever has the least loss.

First visit: g = (L(w + eps z) - L(w - eps z)) / (2 eps). Second visit, on the same rows: L(w), L(w - lr g z) and
L(w + lr g z). w becomes the candidate with the least loss; among equal ones, the first in this order. Five forwards,
and twice the bytes of a MeZO step. Weight decay is applied after the comparison. 16-bit lanes round the candidates, and
enlarge their steps by the same factor as eps where a parameter is perturbed by more than eps (`gains.py`). Source:
"ZO-SGD-Cons" of Zhang et al. 2024, arXiv 2402.11592.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..kernels.records import STILL, Perturbation
from ..kernels.scalars import divide
from ..numerics.noise import step_seed
from .base import COEFF_LIMIT
from .mezo import MeZO


@dataclass(frozen=True, kw_only=True)
class Conservative(MeZO, name="conservative"):
    """Zeroth-order SGD that takes a step only if it lowers the loss of its own batch."""

    comes_back: ClassVar[bool] = True

    @property
    def most_lanes(self) -> int:
        return 3

    def next_lanes(self, run_seed: int, step: int, losses: Sequence[float], lr: float) -> tuple[Perturbation, ...]:
        """The present weights, those after the step, and those after the opposite step."""
        if len(losses) > 2:
            return ()
        length = float(lr * self.projected(torch.tensor(losses, dtype=torch.float64, device="cpu")))
        sound = math.isfinite(length) and abs(length) < COEFF_LIMIT
        scale = float(np.float32(length)) if sound else 0.0  # if not sound, no step is taken, whatever these lanes give
        seed = step_seed(run_seed, step)
        return STILL, Perturbation(seed, -scale), Perturbation(seed, scale)

    def coefficients(self, losses: Tensor, lr: float) -> Tensor:
        along = lr * self.projected(losses[:2])
        still, after, opposite = losses[2:].unbind()
        best = torch.where(after < still, along, 0.0 * along)
        best = torch.where(opposite < torch.minimum(still, after), -along, best)
        return torch.where(along.abs() < COEFF_LIMIT, best, torch.nan)

    def summary(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the first visit's losses, and the projected gradient; 0 if no step was taken."""
        taken = torch.minimum(losses[3], losses[4]) < losses[2]
        grad = self.projected(losses[:2])[0]
        return divide(losses[0] + losses[1], 2), torch.where(taken, grad, 0.0 * grad)
