"""The exact gradient of a tail alone, with one forward a step: nothing else trains, and no lane is perturbed.

What is still on the device when a visit of the weights ends, the last blocks and the head, is trained by
backpropagation through it (`tail=`, run/tail.py); the rest is only read, and may be int4. So a step moves each weight
once, and computes one forward. It is not a zeroth-order method: a journal of its steps rebuilds nothing, and the loss
must have a gradient. `lr` is the tail's rate (not `tail_lr`); eps and the distribution have no effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..kernels.records import STILL, Perturbation
from ..numerics.noise import step_seed
from .base import Method


@dataclass(frozen=True, kw_only=True)
class TailAlone(Method, name="tail-alone"):
    """The exact gradient of what is used last, with one forward per step; nothing else trains."""

    lr: float = 1e-3
    """Peak learning rate of the tail."""

    tail_alone: ClassVar[bool] = True

    def perturbations(self, run_seed: int, step: int) -> tuple[Perturbation, ...]:
        return (STILL,)

    def seeds(self, run_seed: int, step: int) -> tuple[int, ...]:
        return (step_seed(run_seed, step),)

    def coefficients(self, losses: Tensor, lr: float) -> Tensor:
        return losses.new_zeros(1)

    def summary(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        return losses[0], losses.new_ones(())  # the tail's gradient is no scalar
