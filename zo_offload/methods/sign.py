"""ZO-signSGD, two-sided: MeZO's direction with the sign of the projected gradient, w <- w - lr (sign(grad) z + wd w).

A step's length depends neither on the loss nor on eps: `lr` is in the weights' own units, the root mean square of the
weights' changes in a step (with Rademacher noise each weight changes by exactly lr). So MeZO's rates do not apply: its
step changes weights by lr * |grad|. If the two losses are equal, only weight decay is applied. Source: Liu et al. 2019,
"signSGD via Zeroth-Order Oracle", with one direction; the two-sided form is from later papers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .mezo import MeZO


@dataclass(frozen=True, kw_only=True)
class SignSGD(MeZO, name="sign"):
    """Zeroth-order signSGD with one two-sided perturbation per step."""

    lr: float = 1e-5
    """Peak learning rate: the root mean square of the weights' changes in a step, for any eps and loss."""

    def coefficients(self, losses: Tensor, lr: float) -> Tensor:
        return lr * torch.sign(self.projected(losses))
