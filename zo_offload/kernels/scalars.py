"""Arithmetic on a step's few float64 scalars, with the same bits on the host and on a GPU.

torch's elementwise add, subtract, multiply, divide of two tensors, compare, abs, sign, clamp, amax, minimum and where
have this property. Here are replacements for operations that do not: division by a number, a sum (a reduction kernel
may choose its order), and a square root (torch's vector library on the CPU rounds one in a hundred differently). Any
other operation (exp, log, pow) must be added here before a method may use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NEWTON = 32  # far from the root each step removes a tenth; from 1e30, 24 are enough


def divide(x: Tensor, by: float) -> Tensor:
    """x / by, rounded once. torch divides a CUDA tensor by a Python number by multiplying with its reciprocal."""
    return x / torch.full_like(x, by)


def added(values: Sequence[Any]) -> Any:
    """The sum of numbers or tensors from the first to the last, each sum rounded once. From Python 3.12 on, `sum` of
    floats is compensated: other bits than on a GPU, and than on Python 3.11."""
    found = values[0]
    for value in values[1:]:
        found = found + value
    return found


def total(x: Tensor) -> Tensor:
    """The sum of a vector from its first element on."""
    found = x[0]
    for value in x[1:].unbind():
        found = found + value
    return found


def sqrt(x: Tensor) -> Tensor:
    """The square root, rounded once (NaN below 0)."""
    if x.device.type != "cpu":
        return torch.sqrt(x)  # CUDA's of float64 is IEEE's
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.asarray(np.sqrt(x.numpy())))


def tenth_root(x: Tensor) -> Tensor:
    """x ** 0.1 of numbers from 1 to 1e30, to a few units in the last place, by a fixed number of Newton steps."""
    y = sqrt(sqrt(sqrt(x)))  # x ** 0.125: above the root, so the steps come down to it
    for _ in range(_NEWTON):
        square = y * y
        fourth = square * square
        y = divide(9.0 * y + x / (fourth * fourth * y), 10.0)
    return y
