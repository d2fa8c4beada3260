"""ConMeZO: MeZO with directions from a cone around the momentum of earlier steps.

    d_t = cos(theta) sqrt(dim) m_t / |m_t| + sin(theta) z_t           d_0 = z_0, while there is no momentum
    g_t = (L(w + eps d_t) - L(w - eps d_t)) / (2 eps)
    w <- w - lr g_t d_t                  m_{t+1} = beta m_t + (1 - beta) g_t d_t

Each m_t, and so each d_t, is a sum of the noises z of the steps before. Their coefficients follow from the slopes in
the journal, so no plane of momenta is stored or moved: a lane is perturbed along a sum of `window` noises, and a step's
update has as many. Noises older than `window` steps are left out; a direction's share in m has then decayed to about
beta^window of its first value. |m_t|^2 is computed as dim times the sum of the squared coefficients, without the
products of different noises: about 1 / sqrt(dim) of it. Until a slope other than 0 is known, steps are MeZO's. cos and
sin are rounded to float32, so that all machines have the same values. The cost besides MeZO's is noise: `window` noises
in each lane and in the update, where MeZO makes one each; the bytes moved are the same.

Source: Behric, Zhang, Li and Thekumparampil 2025, "ConMeZO: Adaptive Descent-Direction Sampling for Gradient-Free
Finetuning of Large Language Models", arXiv 2511.02757 (AISTATS 2026): theta 1.35, and for OPT-1.3B on SST-2 beta 0.95,
lr 1e-7, eps 1e-3 and 8 rows a step; its scripts' own default is beta 0.99. The paper keeps the whole momentum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels.records import Perturbation, Terms
from ..kernels.scalars import sqrt, total
from .momentum import Momentum
from .outcome import Told


@dataclass(frozen=True, kw_only=True)
class ConMeZO(Momentum, name="conmezo"):
    """MeZO along directions near its momentum, rebuilt from the journal."""

    lr: float = 1e-7
    """Peak learning rate; MeZO's transfers."""
    beta: float = 0.95
    """How much of the momentum a step keeps."""
    window: int = 32
    """Noises in a direction: this step's, and those of the window - 1 steps before."""
    theta: float = 1.35
    """Half the cone's angle, in radians: at pi / 2 a direction is this step's noise alone, as in MeZO."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 2:
            raise ConfigError(f"window={self.window}: expected 2 to 256 noises; with one there is no momentum")
        if not 0 < self.theta <= math.pi / 2:
            raise ConfigError(f"theta={self.theta}: expected more than 0, and at most pi / 2 = 1.5708")

    def perturbations(self, run_seed: int, step: int) -> tuple[Perturbation, ...]:
        terms = Terms(self.seeds(run_seed, step))
        return Perturbation.along(terms, self.eps32), Perturbation.along(terms, -self.eps32)

    def term_coefficients(self, memory: Tensor) -> Tensor:
        """The direction's: for this step's noise, then for earlier ones. memory: the momentum's, the latest first."""
        length = sqrt(total(memory * memory))
        known = length > 0
        share = torch.where(known, float(np.float32(math.sin(self.theta))), torch.ones_like(length))
        towards = torch.where(known, float(np.float32(math.cos(self.theta))) * (memory / length), 0.0)
        return torch.cat([share.reshape(1), towards])

    def remember(self, memory: Tensor, told: Told) -> Tensor:
        gained = (1 - self.beta) * (told.grad * self.term_coefficients(memory))
        return (torch.cat([memory.new_zeros(1), self.beta * memory]) + gained)[: self.window - 1]

    def coefficients_from(self, memory: Tensor, losses: Tensor, lr: float) -> Tensor:
        return lr * (self.projected(losses) * self.term_coefficients(memory))
