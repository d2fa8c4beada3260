"""FZOO: one-sided differences along several Rademacher directions, and a step scaled by how much their losses differ.

u_i in {-1, +1}^d, i = 1..N; l_i = loss(w + eps u_i), l_0 = loss(w); s = the standard deviation of l_1..l_N (by N - 1);

    w <- w - lr / (N s) * sum_i (l_i - l_0) u_i

s is about eps times the length of the gradient, so `lr` is a length in the weights' own units, whatever eps and however
steep the loss; the paper's eta is lr * eps (its code uses this lr too, with a deviation by N: from the same lr its step
is sqrt(N / (N - 1)) times as long). All N + 1 lanes pass with a block while it is
there: a step moves the bytes of one of MeZO's and computes (N + 1) / 2 times as much, so where the link or the disk
binds, the lanes beyond the second are free. Source: arXiv 2506.09034 (ICLR 2026).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DivergenceError
from ..float32 import divide
from ..noise import step_seed
from ..records import STILL, Perturbation, Update
from .mezo import MeZO, Step


@dataclass(frozen=True, kw_only=True)
class FZOO(MeZO):
    """Normalised zeroth-order SGD with `directions` one-sided perturbations a step."""

    lr: float = 5e-5
    """Of the paper's code, as is eps. About what a step changes each weight by, times sqrt(N), whatever eps."""
    eps: float = 1e-4
    distribution: Literal["gaussian", "rademacher"] = "rademacher"
    directions: int = 8
    """N."""
    name: str = field(default="fzoo", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.directions <= 256:
            raise ConfigError(f"directions={self.directions}: their losses' deviation needs 2 to 256 of them")

    @property
    def noises(self) -> int:
        return self.directions

    def perturbations(self, run_seed: int, step: int) -> tuple[Perturbation, ...]:
        """The weights themselves, and each direction."""
        eps = float(np.float32(self.eps))
        return STILL, *(Perturbation(step_seed(run_seed, step, i), eps) for i in range(self.directions))

    def coefficients(self, losses: Tensor, lr: float) -> Tensor:
        """lr (l_i - l_0) / (N s), float64 [N] on any device: `update`'s arithmetic, operation for operation."""
        first, others = losses[0], losses[1:]
        n = self.directions
        mean = divide(_in_order(others), n)
        squares = (others - mean) * (others - mean)
        spread = torch.sqrt(divide(_in_order(squares), n - 1))
        found = (lr * (others - first)) / (n * spread)
        found = torch.where(torch.isfinite(spread), found, torch.nan)  # of losses whose squares overflow
        return torch.where(spread == 0, 0.0, found)

    def update(self, run_seed: int, step: int, losses: Sequence[float], lr: float) -> Step:
        """Losses of the lanes -> the step's updates, one a direction. Raises DivergenceError if one is not finite.

        loss: l_0. grad: s / eps, about the length of the gradient. Losses that are all the same change nothing but
        weight decay.
        """
        first, others, n = losses[0], losses[1:], self.directions
        mean = sum(others) / n
        spread = math.sqrt(sum((x - mean) * (x - mean) for x in others) / (n - 1)) if math.isfinite(mean) else math.nan
        found = [0.0] * n if spread == 0 else [(lr * (x - first)) / (n * spread) for x in others]
        if not (math.isfinite(first) and math.isfinite(spread) and all(abs(x) < 3e38 for x in found)):
            raise DivergenceError(
                f"step {step}: loss {first:g} at the weights and {', '.join(f'{x:g}' for x in others)} around them "
                f"(lr {lr:g}, eps {self.eps:g}). The weights are as after step {step - 1}. "
                "Lower lr or eps, or set on_nonfinite='skip' or 'halve_eps'"
            )
        decay = float(np.float32(1 - lr * self.weight_decay))
        updates = tuple(
            Update(step_seed(run_seed, step, i), float(np.float32(x)), 1.0 if i else decay) for i, x in enumerate(found)
        )
        return Step(updates, first, spread / float(np.float32(self.eps)))


def _in_order(x: Tensor) -> Tensor:
    """The sum of a vector from its first element on, as Python's `sum` takes it; 0 + x[0] is x[0]."""
    total = x[0]
    for value in x[1:].unbind():
        total = total + value
    return total
