"""FZOO-R: half of a step's directions are new, the other half are those of the previous step, with their old losses.

    d_i = l_i - l_0 of the step in which direction i was new, i = 1..N     s: the standard deviation of d_1..d_N
    w <- w - lr / (N s) * sum_i d_i u_i

N / 2 + 1 forwards per step. The first step, and a step after a skipped one, has only the N / 2 new directions. The
memory holds each loss's difference from its own l_0, since losses of different batches cannot be compared. Source:
"FZOO-R" of arXiv 2506.09034; the paper's repository keeps the losses of the previous step but never uses them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels.records import Perturbation
from ..kernels.scalars import divide, sqrt, total
from ..numerics.noise import step_seed
from .fzoo import FZOO
from .outcome import Told


@dataclass(frozen=True, kw_only=True)
class FZOOReuse(FZOO, name="fzoo-r"):
    """FZOO in which every direction is used in two steps."""

    directions: int = 8
    """Number of directions per step, N: half of them are new. Even, at least 4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.directions % 2 or self.directions < 4:
            raise ConfigError(f"directions={self.directions}: expected an even number, 4 or more: half of them are new")

    @property
    def _new(self) -> int:
        return self.directions // 2

    def perturbations(self, run_seed: int, step: int) -> tuple[Perturbation, ...]:
        """The weights themselves, and each new direction."""
        return super().perturbations(run_seed, step)[: 1 + self._new]

    def seeds(self, run_seed: int, step: int) -> tuple[int, ...]:
        """The new seeds, then those of the previous step; in step 0 these have the coefficient 0."""
        old = [
            step_seed(run_seed, step - 1, i) if step else step_seed(run_seed, 0, self._new + i)
            for i in range(self._new)
        ]
        return (*super().seeds(run_seed, step), *old)

    def first_memory(self) -> tuple[float, ...]:
        """The number of differences from the previous step, and these differences."""
        return (0.0,) * (1 + self._new)

    def scalars(self, losses: Tensor) -> Tensor:
        """The new differences."""
        return losses[1:] - losses[0]

    def remember(self, memory: Tensor, told: Told) -> Tensor:
        return torch.cat([torch.full_like(memory[:1], self._new), told.scalars])

    def pass_over(self, memory: Tensor) -> Tensor:
        return torch.zeros_like(memory)

    def coefficients_from(self, memory: Tensor, losses: Tensor, lr: float) -> Tensor:
        found, there, count = self._all(memory, losses)
        away = (found - total(found) / count) * there
        spread = sqrt(total(away * away) / (count - 1.0))
        along = (lr * found) / (count * spread)
        return torch.where(spread == 0, 0.0, torch.where(torch.isfinite(spread), along, torch.nan))

    def summary(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """l_0, and the standard deviation of the new losses / eps, about the length of the gradient."""
        away = losses[1:] - divide(total(losses[1:]), self._new)
        return losses[0], divide(sqrt(divide(total(away * away), self._new - 1)), self.eps32)

    def _all(self, memory: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All differences, a mask with 1 for each valid one, and the number of valid ones."""
        new = self.scalars(losses)
        there = torch.cat([torch.ones_like(new), torch.where(memory[0] > 0, torch.ones_like(new), 0.0 * memory[1:])])
        return torch.cat([new, memory[1:]]), there, memory[0] + float(self._new)
