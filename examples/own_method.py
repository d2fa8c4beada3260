"""A method of one's own: directions a step, each judged against the mean of the others, so that no lane is spent on w.

l_i = loss(w + eps z_i), i = 1..n        w <- w - lr / n * sum_i (l_i - mean of the other l_j) / eps * z_i

zo-offload fit base/ --data train.jsonl --run-dir run --method examples/own_method.py:LeaveOneOut --directions 4
zo-offload fit run --resume --method examples/own_method.py:LeaveOneOut
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zo_offload.methods import Method, Perturbation, divide, step_seed, total


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut(Method, name="leave-one-out"):
    """One-sided SPSA with the leave-one-out mean as baseline."""

    lr: float = 1e-6
    """Peak learning rate of the mean over directions."""
    directions: int = 4
    """Perturbations of a step, a forward each; 2 or more."""

    def perturbations(self, run_seed: int, step: int) -> tuple[Perturbation, ...]:
        return tuple(Perturbation(step_seed(run_seed, step, i), self.eps32) for i in range(self.directions))

    def coefficients(self, losses: Tensor, lr: float) -> Tensor:
        away = losses - divide(total(losses), self.directions)  # (n - 1) / n of the distance from the others' mean
        return divide(lr * away, self.eps32 * (self.directions - 1))

    def summary(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        return divide(total(losses), self.directions), self.coefficients(losses, 1.0).abs().amax()
