"""Finds a run's best evaluation, and decides early stopping: functions of the evaluations alone.

So a resumed run has the same best step, and stops at the same step, as a run that was never interrupted.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError

_SMALLER = ("loss", "perplexity", "error", "wer", "cer", "mse", "rmse", "mae")  # endings of names
_SMALLER_WORDS = frozenset((*_SMALLER, "ppl", "nll", "bpb", "bpc", "bits", "ece", "brier", "ter", "mape", "distance"))

Values = Mapping[str, float]


@dataclass(frozen=True)
class Selection:
    """metric: its name, with or without "eval_"; None: accuracy if there is one, else loss. patience: evaluations
    without improvement until `why_over` asks to stop; 0: never. every: steps between two evaluations; evaluations in
    between,
    from an early end of `fit`, do not count for patience."""

    metric: str | None = None
    patience: int = 0
    every: int = 1

    def name(self, values: Values) -> str:
        """The metric's name in an evaluation. Raises ConfigError if the evaluation lacks it."""
        names = [name for name in values if name != "step"]
        wanted = None if self.metric is None else self.metric.removeprefix("eval_")
        if wanted is None:
            return "accuracy" if "accuracy" in names else "loss"
        if wanted not in names:
            near = difflib.get_close_matches(wanted, names, 1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"metric={self.metric!r}: an evaluation gives {', '.join(names)}. {hint}The run can be "
                              "resumed with another metric")  # fmt: skip
        return wanted

    def best(self, evals: Sequence[Values]) -> Values | None:
        """The best evaluation, among equal ones the first; None if none has a finite value."""
        best: Values | None = None
        for values in evals:
            name = self.name(values)
            if values[name] == values[name] and (best is None or self.is_better(name, values, best)):
                best = values
        return best

    @staticmethod
    def is_better(name: str, values: Values, than: Values) -> bool:
        larger = larger_is_better(name)
        return values[name] > than[name] if larger else values[name] < than[name]

    def why_over(self, evals: Sequence[Values]) -> str:
        """Why the run should stop now; "" if it should not."""
        evals = [values for values in evals if values["step"] % self.every == 0]
        best = self.best(evals)
        if not self.patience or best is None:
            return ""
        since = sum(values["step"] > best["step"] for values in evals)
        if since < self.patience:
            return ""
        name = self.name(best)
        return f"no {name} better than {best[name]:.4g}, of step {int(best['step'])}, in {since} evaluations"


def larger_is_better(name: str) -> bool:
    """Whether a larger value is better, by the words of the name: for "error_rate" and "val/nll" smaller is better."""
    words = re.split(r"[\W_]+", name.lower())
    return not (name.lower().endswith(_SMALLER) or _SMALLER_WORDS & set(words))
