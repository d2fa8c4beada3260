"""QZO: MeZO on the scales of quantized weights; the codes are never touched.

Two forwards at scale +- eps z / c, one z a group; the projected gradient d is clipped to [-clip, clip], and
scale <- max(scale - lr d z / c, 1e-7). c is the root mean square of the format's codes (`Format.code_rms`): a step of
a group's scale by eps / c changes its weights by eps, so eps, lr and clip are MeZO's, in units of weights, whatever the
format. A group is scaled about zero; one of int4, which has a minimum, about its centre. Scales are under 4 % of the
bytes, so what a fold writes back is, too. Source: Shang et al. 2025, "Fine-tuning Quantized Neural Networks with
Zeroth-order Optimization", arXiv 2505.13430, Algorithm 1, where c is 1: see `SCALE_UNITS`.

`QZOShift` is another method on the same bytes: int4's scales as they are kept, with each group's minimum held. Most
of what it does to a group is then to shift it as a whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..records import Trains
from .mezo import MeZO

SCALE_UNITS = 2.71
"""Root mean square of GPTQ's symmetric 4-bit codes of normal weights in groups of 128, which the paper trains: its eps
is SCALE_UNITS times as much in units of weights, its lr SCALE_UNITS squared times, its clip one SCALE_UNITS-th."""


@dataclass(frozen=True, kw_only=True)
class _OnScales(MeZO):
    """Zeroth-order SGD on group scales: for storage="int4", "nf4" or "int8"."""

    clip: float = 100.0
    """Largest projected gradient. Without it the paper's runs diverge early; from 75 of theirs up it changes little."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise ConfigError(f"clip={self.clip}: expected a positive number")

    def clipped(self, grad: float) -> float:
        return max(-self.clip, min(self.clip, grad)) if math.isfinite(grad) else grad

    def clipped_late(self, grad: Tensor) -> Tensor:
        return torch.where(torch.isfinite(grad), grad.clamp(-self.clip, self.clip), grad)


@dataclass(frozen=True, kw_only=True)
class QZO(_OnScales):
    """Zeroth-order SGD on group scales, in units of weights: for storage="int4", "nf4" or "int8".

    The defaults are the paper's lr 1e-5, eps 1e-3 and clip 100 in these units.
    """

    lr: float = 7.3e-5
    eps: float = 2.7e-3
    clip: float = 37.0
    name: str = field(default="qzo", init=False)
    units: str = field(default="weights", init=False)
    """Of eps and lr. A record of a run without it is one of `QZOShift`, which had this name before."""

    target: ClassVar[Trains] = "scales"
    unit_scales: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class QZOShift(_OnScales):
    """Zeroth-order SGD on group scales as the format keeps them: for storage="int4", and what `QZO` was.

    eps and lr are in units of scales, which differ a hundredfold between formats: with int8, whose scales are small,
    the defaults destroy a model. int4's minima stay, so a scale moves its group away from its minimum: 87 % of what
    a perturbation does is to shift whole groups.
    """

    lr: float = 1e-5
    eps: float = 1e-3
    name: str = field(default="qzo-shift", init=False)

    target: ClassVar[Trains] = "shifts"
