"""QZO: MeZO on the scales of quantized weights; the codes are never touched.

Two forwards at scale +- eps z / c, one z per group; the projected gradient d is clipped to [-clip, clip], and scale <-
max(scale - lr d z / c, 1e-7). c is the root mean square of the format's codes (`Format.code_rms`): a step of a group's
scale by eps / c changes its weights by eps, so eps, lr and clip are MeZO's, in units of weights, for any format. A
group is scaled about zero; in int4, which has a minimum, about its centre. Scales are under 4 % of the bytes, and so
are the bytes that a fold writes back. Source: Shang et al. 2025, "Fine-tuning Quantized Neural Networks with
Zeroth-order Optimization", arXiv 2505.13430, Algorithm 1, where c is 1: see `presets.SCALE_UNITS`.

`QZOShift` is another method on the same bytes: it trains int4's scales as stored, with each group's minimum fixed. Its
main effect on a group is then to shift it as a whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels.records import Trains
from .mezo import MeZO


@dataclass(frozen=True, kw_only=True)
class _OnScales(MeZO):
    """Zeroth-order SGD on group scales: for storage="int4", "nf4" or "int8"."""

    clip: float = 100.0
    """Largest projected gradient. Without it the paper's runs diverge early; above 75 of its units it does little."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise ConfigError(f"clip={self.clip}: expected a positive number")

    def clipped(self, grad: Tensor) -> Tensor:
        return torch.where(torch.isfinite(grad), grad.clamp(-self.clip, self.clip), grad)


@dataclass(frozen=True, kw_only=True)
class QZO(_OnScales, name="qzo"):
    """Zeroth-order SGD on group scales, in units of weights: for storage="int4", "nf4" or "int8".

    The defaults are the paper's lr 1e-5, eps 1e-3 and clip 100, converted to these units.
    """

    lr: float = 7.3e-5
    """Peak learning rate, in units of weights."""
    eps: float = 2.7e-3
    """Perturbation scale, in units of weights."""
    clip: float = 37.0
    """Largest projected gradient."""
    units: str = field(default="weights", init=False)
    """The units of eps and lr. A run's record without this field is one of `QZOShift`, which had this name before."""

    target: ClassVar[Trains] = "scales"
    unit_scales: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class QZOShift(_OnScales, name="qzo-shift"):
    """Zeroth-order SGD on group scales as stored: for storage="int4"; formerly named `QZO`.

    eps and lr are in units of scales, which differ a hundredfold between formats: with int8, whose scales are small,
    the defaults destroy a model. int4's minima stay fixed, so a scale moves its group away from its minimum: 87 % of a
    perturbation's effect is to shift whole groups.
    """

    lr: float = 1e-5
    """Peak learning rate, in units of scales."""
    eps: float = 1e-3
    """Perturbation scale, in units of scales."""

    target: ClassVar[Trains] = "shifts"
