"""QZO: MeZO on the scales of quantized weights; the codes are never touched.

theta = scale * code. Two forwards at (scale + eps z) and (scale - eps z), one z a group; the projected gradient is
clipped to [-clip, clip], and scale <- max(scale - lr grad z, 1e-7). Scales are under 4 % of the bytes, so what a fold
writes back is, too. Source: Shang et al. 2025, "Fine-tuning Quantized Neural Networks with Zeroth-order Optimization",
arXiv 2505.13430, Algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from .mezo import MeZO


@dataclass(frozen=True, kw_only=True)
class QZO(MeZO):
    """Zeroth-order SGD on group scales: for storage="int4", "nf4" or "int8"."""

    lr: float = 1e-5
    """The paper's, as is eps = 1e-3."""
    clip: float = 100.0
    """Largest projected gradient. Without it the paper's runs diverge early; from 75 up it changes little."""
    name: str = field(default="qzo", init=False)

    target: ClassVar[Literal["values", "scales"]] = "scales"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise ConfigError(f"clip={self.clip}: expected a positive number")

    def clipped(self, grad: float) -> float:
        return max(-self.clip, min(self.clip, grad)) if math.isfinite(grad) else grad

    def clipped_late(self, grad: Tensor) -> Tensor:
        return torch.where(torch.isfinite(grad), grad.clamp(-self.clip, self.clip), grad)
