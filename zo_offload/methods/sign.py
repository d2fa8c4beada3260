"""ZO-signSGD, two-sided: MeZO's direction with the sign of the projected gradient, w <- w - lr (sign(grad) z + wd w).

A step's length does not depend on the loss, nor on eps: `lr` is in the weights' own units, the root mean square of what
a step changes each weight by (with Rademacher noise each weight changes by exactly lr). So MeZO's rates do not
fit: its step changes weights by lr * |grad|. Two losses that tie change nothing but weight decay. Source: Liu et
al. 2019, "signSGD via Zeroth-Order Oracle", with one direction; its two-sided form is that of the papers after it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .mezo import MeZO


@dataclass(frozen=True, kw_only=True)
class SignSGD(MeZO, name="sign"):
    """Zeroth-order signSGD with one two-sided perturbation a step."""

    lr: float = 1e-5
    """What a step changes each weight by, root mean square, whatever eps and the loss."""

    def coefficients(self, losses: Tensor, lr: float) -> Tensor:
        return lr * torch.sign(self.projected(losses))
