"""MeZO: two forwards at w + eps z and w - eps z, then w <- w - lr (grad z + weight_decay w).

grad = (L+ - L-) / (2 eps), the projected gradient (SPSA). Source: Malladi et al. 2023, "Fine-Tuning Language Models
with Just Forward Passes", Algorithm 1. Unlike the original, w is never perturbed in place, so nothing drifts, and a
step whose two losses tie still applies weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
from torch import Tensor

from ..errors import ConfigError, DivergenceError
from ..float32 import divide
from ..noise import NoiseSpec, step_seed
from ..records import Perturbation, Trains, Update


@dataclass(frozen=True)
class Step:
    """What a step's losses became: `updates` to apply, and the scalars to record."""

    updates: tuple[Update, ...]
    loss: float
    grad: float


@dataclass(frozen=True, kw_only=True)
class MeZO:
    """Zeroth-order SGD with one two-sided perturbation a step."""

    lr: float = 1e-6
    """Peak learning rate (MeZO's full-parameter OPT recipe: 1e-6 or 1e-7)."""
    eps: float = 1e-3
    """Perturbation scale."""
    weight_decay: float = 0.0
    """Decoupled: w is multiplied by 1 - lr * weight_decay. Biases and norms (1-D parameters) are left out."""
    schedule: str = "constant"
    """Any of transformers' schedule names that is a function of the step (linear, cosine, ...)."""
    warmup_steps: int = 0
    distribution: Literal["gaussian", "rademacher"] = "gaussian"
    rounds: Literal[7, 10] = 10
    """Philox rounds of the noise. Part of the run's identity."""
    on_nonfinite: Literal["stop", "skip", "halve_eps"] = "stop"
    """A NaN or infinite loss or update ends the run with an error; or skips the step; or skips it and halves eps from
    the next step on, ten times at most. Recorded in the journal, so a resumed run goes on with the same eps."""
    batch_size: int = 16
    """Default batch size of `fit`."""
    steps: int = 1000
    """Default number of steps of `fit`."""
    tunes: Literal["all", "lora", "prefix"] | None = None
    """What a preset's rates are for; checked against what trains."""
    name: str = field(default="mezo", init=False)

    target: ClassVar[Trains] = "values"
    """What of the stored weights is perturbed and updated."""
    unit_scales: ClassVar[bool] = False
    """Whether scales are moved in units of the weights they scale: see `gains.py`."""

    def __post_init__(self) -> None:
        for what in ("warmup_steps", "steps", "batch_size"):
            if not isinstance(getattr(self, what), int):
                raise ConfigError(f"{what}={getattr(self, what)!r}: expected a whole number")
        for what in ("lr", "eps", "weight_decay"):
            if not isinstance(getattr(self, what), (int, float)):
                raise ConfigError(f"{what}={getattr(self, what)!r}: expected a number")
        if self.tunes not in (None, "all", "lora", "prefix"):
            raise ConfigError(f"tunes={self.tunes!r}: expected None, 'all', 'lora' or 'prefix'")
        for what in ("lr", "eps"):
            value = getattr(self, what)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{what}={value}: expected a positive number")
        if not 2.0**-126 <= self.eps <= 2.0**64:
            raise ConfigError(
                f"eps={self.eps}: no float32 between 1.2e-38 and 1.8e19; published recipes have 1e-4 to 0.1"
            )
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"weight_decay={self.weight_decay}: expected zero or a positive number")
        if self.lr * self.weight_decay >= 1:
            product = self.lr * self.weight_decay
            raise ConfigError(f"lr * weight_decay = {product:g} would erase the weights; keep it below 1")
        if self.warmup_steps < 0 or self.steps < 1 or self.batch_size < 1:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps}, steps={self.steps}, batch_size={self.batch_size}: "
                "expected >= 0, >= 1, >= 1"
            )
        if self.on_nonfinite not in ("stop", "skip", "halve_eps"):
            raise ConfigError(f"on_nonfinite={self.on_nonfinite!r}: expected 'stop', 'skip' or 'halve_eps'")
        NoiseSpec(self.distribution, self.rounds)  # checks both
        lr_schedule(self.schedule, self.warmup_steps, max(self.steps, self.warmup_steps))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """A published recipe of this method by name (`presets.py`), with any field changed."""
        from .presets import preset

        return preset(cls, name, changes)

    @property
    def noise(self) -> NoiseSpec:
        return NoiseSpec(self.distribution, self.rounds)

    @property
    def noises(self) -> int:
        """Different noises of one step, each with an update of its own."""
        return 1

    def with_options(self, **changes: Any) -> MeZO:
        return replace(self, **changes)

    def perturbations(self, run_seed: int, step: int) -> tuple[Perturbation, ...]:
        """The step's lanes: the same noise, added and subtracted."""
        seed, eps = step_seed(run_seed, step), float(np.float32(self.eps))
        return Perturbation(seed, eps), Perturbation(seed, -eps)

    def coefficients(self, losses: Tensor, lr: float) -> Tensor:
        """lr * grad from the losses, both float64 [n] on any device: `update`'s arithmetic, operation for operation."""
        grad = divide(losses[:1] - losses[1:], 2 * float(np.float32(self.eps)))
        return lr * self.clipped_late(grad)

    def clipped(self, grad: float) -> float:
        """The projected gradient as it is used: MeZO does not clip."""
        return grad

    def clipped_late(self, grad: Tensor) -> Tensor:
        """`clipped` of a tensor on the device."""
        return grad

    def update(self, run_seed: int, step: int, losses: Sequence[float], lr: float) -> Step:
        """Losses at +eps and -eps -> the step's update. Raises DivergenceError if it is not finite."""
        plus, minus = losses
        grad = self.clipped((plus - minus) / (2 * float(np.float32(self.eps))))  # the eps that the lanes really used
        coeff = float(np.float32(lr * grad)) if abs(lr * grad) < 3e38 else math.inf
        seed = step_seed(run_seed, step)
        loss = (plus + minus) / 2
        if not (math.isfinite(loss) and math.isfinite(grad) and math.isfinite(coeff)):
            raise DivergenceError(
                f"step {step}: losses {plus:g} and {minus:g} give an update of {lr * grad:g} "
                f"(seed {seed}, lr {lr:g}, eps {self.eps:g}). The weights are as after step {step - 1}. "
                "Lower lr or eps, or set on_nonfinite='skip' or 'halve_eps'"
            )
        decay = float(np.float32(1 - lr * self.weight_decay))
        return Step((Update(seed, coeff, decay),), loss, grad)


def lr_schedule(name: str, warmup_steps: int, steps: int) -> Callable[[int], float]:
    """transformers' schedule of that name as a function: step -> factor of the peak learning rate."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"schedule {name!r} with {warmup_steps} warm-up steps: {error}") from None
    lambdas: list[Callable[[int], float]] | None = getattr(scheduler, "lr_lambdas", None)
    if not lambdas:
        raise ConfigError(f"schedule {name!r} depends on more than the step; use linear, cosine, constant, ...")
    return lambdas[0]
