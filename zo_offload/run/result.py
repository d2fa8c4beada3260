"""The result of a call of `fit`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..journal.selection import Selection


@dataclass(frozen=True, repr=False)
class FitResult:
    """The result of a call of `fit`: the losses of its steps, evaluations by step, and the run's rates."""

    steps: int
    """Steps of this call; `last_step` counts earlier steps too."""
    losses: list[float]
    evals: list[dict[str, float]] = field(default_factory=list)
    """All evaluations of the run, including those before it was resumed."""
    tokens_per_s: float = 0.0
    seconds: float = 0.0
    wait_share: float = 0.0
    """Share of the time that compute waited for blocks: near 0, compute is the limit; near 1, fetches are. On a GPU:
    the share of the time that the measured link needs for the moved bytes."""
    resident_bytes: int = 0
    model_bytes: int = 0
    fetch_bytes: int = 0
    """Bytes of weights fetched into the window, in all of this call's steps and evaluations."""
    flush_bytes: int = 0
    """Bytes of weights written back: per step about 1 / fold_every of the trained bytes."""
    warnings: list[str] = field(default_factory=list)
    """Signs that the model learned nothing: most steps skipped, lanes that do not differ, a constant loss, updates that
    vanish in the storage format (`learning_watch.py`)."""
    history: list[dict[str, float]] = field(default_factory=list)
    """This call's steps (step, loss, grad, lr, skipped) and evaluations (step, eval_loss, ...) in order, for a
    DataFrame or a plot. Steps are counted from 0; an evaluation's "step" is the number of steps done."""
    last_step: int = 0
    best: Mapping[str, float] | None = None
    """The best of `evals` by `metric`; `Engine.at("best")` has its weights."""
    metric: str | None = None
    stopped: str | None = None
    """Why `fit` ended before its last step, if it did."""

    def __repr__(self) -> str:
        parts = [f"{self.steps} steps to step {self.last_step} in {self.seconds:.1f} s"]
        if self.losses:
            parts.append(f"loss {self.losses[0]:.4f} -> {self.losses[-1]:.4f}")
        if self.evals:
            parts.append(f"evaluated: {_named(self.evals[-1])}")
        if self.best is not None and len(self.evals) > 1:
            name = Selection(self.metric).name(self.best)
            parts.append(f"best {name} {self.best[name]:.4f} at step {int(self.best['step'])}")
        if self.stopped:
            parts.append(f"stopped: {self.stopped}")
        parts += [f"warning: {warning}" for warning in self.warnings]
        return f"FitResult({'; '.join(parts)})"


def _named(values: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.4f}" for name, value in values.items() if name != "step")
