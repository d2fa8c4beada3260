"""What a step's losses come to, on the host and where they are; and what is told of a step to what is remembered."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels.records import Update


@dataclass(frozen=True)
class Step:
    """What a step's losses became: `updates` to apply, and the scalars to record."""

    updates: tuple[Update, ...]
    loss: float
    grad: float
    scalars: tuple[float, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a step's losses came to, where the losses are.

    coefficients: float32, one a noise; 0 where float32 does not hold it. sound: 0-d bool, whether it is a step at all.
    memory: after the step, if it is one; else `skipped`.
    """

    coefficients: Tensor
    loss: Tensor
    grad: Tensor
    scalars: Tensor
    sound: Tensor
    memory: Tensor
    skipped: Tensor


@dataclass(frozen=True)
class Told:
    """What the journal tells of a step, where the losses are: 0-d float64 tensors, and `scalars` a vector."""

    loss: Tensor
    grad: Tensor
    scalars: Tensor
    lr: float
