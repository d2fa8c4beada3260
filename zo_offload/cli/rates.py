"""`zo-offload rate`: a few steps at each of several rates, from the same weights, on the same batches and noise.

A rate that is too high shows within some steps, and the trials can be compared step by step, since only the rate
differs. The best rate for a few steps is often a little above the best for many: a lower one is safe, twice as much
often is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine import Engine
from ..errors import ConfigError, DivergenceError
from ..methods import Method

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Factors of the method's own rate, used if no rates are given."""


@dataclass(frozen=True)
class Trial:
    """Some steps at one rate. first, last: mean losses of their first and second half; NaN: ended before: `what`."""

    lr: float
    first: float
    last: float
    what: str = ""


def try_rates(
    make: Callable[[Method], Engine], method: Method, fit: dict[str, Any], rates: Sequence[float], steps: int
) -> Iterator[Trial]:
    """One trial per rate, in this order. make: makes an engine with the run's settings. fit: arguments of `Engine.fit`.

    The rates are tried without the method's schedule, which is for a longer run.
    """
    if steps < 4:
        raise ConfigError(f"steps={steps}: expected at least 4, to compare rates")
    for lr in rates:
        changed = method.with_options(lr=lr, schedule="constant", warmup_steps=0, on_nonfinite="stop")
        losses: list[float] = []
        what = ""
        with make(changed) as engine:
            try:
                losses += engine.fit(**fit, steps=steps).losses
            except DivergenceError as error:
                what = str(error).partition(". ")[0]
        half = len(losses) // 2
        first, last = (_mean(part) for part in (losses[:half], losses[half:]))
        yield Trial(lr, first, math.nan if what else last, what)


def best(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the least loss in its second half; None if all ended before."""
    sound = [trial for trial in trials if math.isfinite(trial.last)]
    return min(sound, key=lambda trial: trial.last, default=None)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
