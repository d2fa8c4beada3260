"""LeZO: MeZO in which each step perturbs and updates a few randomly chosen layers of the model.

    A_t = round((1 - sparsity) * layers) of the layers, at least one, by (run's seed, t) alone; all outside layers
    grad = (L(w + eps z_A) - L(w - eps z_A)) / (2 eps)          w_A <- w_A - lr grad z_A        the rest stays as it is

Layers are the numbered modules: `model.layers.7.` is one. Embeddings, head and last norm are in no layer and train in
every step; exclude them by `trainable` if they should not train. A layer that a step leaves out gets no noise and no
weight decay, is decoded once for all lanes, and is not written back for that step: with sparsity 0.75 and one fold per
step, a quarter of MeZO's bytes is flushed. The chosen layers are not stored: a resumed or replayed run derives them
from its seed. Source: Wang et al. 2024, "Simultaneous Computation and Memory Efficient Zeroth-Order Optimizer for
Fine-Tuning Large Language Models", arXiv 2410.09823.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from ..numerics.noise import step_seed
from .mezo import MeZO

_CHOICE = 1 << 23  # first index of a step's noises for this choice; no method's own noises reach it


@dataclass(frozen=True, kw_only=True)
class LeZO(MeZO, name="lezo"):
    """MeZO on a few randomly chosen layers per step."""

    sparsity: float = 0.75
    """Share of the layers that a step leaves out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"sparsity={self.sparsity}: expected 0 (all layers train) or more, and less than 1")

    def part(self, name: str) -> str | None:
        """The parameter's layer: its name up to the first number."""
        words = name.split(".")
        numbers = [i for i, word in enumerate(words[:-1]) if word.isdecimal()]
        return ".".join(words[: numbers[0] + 1]) if numbers else None

    def trained_parts(self, run_seed: int, step: int, parts: Sequence[str]) -> Collection[str]:
        """The step's layers, drawn one after another."""
        if len(parts) < 2:
            raise ConfigError(
                f"method {self.name!r} chooses among the numbered layers that train (model.layers.0, ...), and there "
                f"{'is only ' + parts[0] if parts else 'are none'}. Use mezo, or let more layers train"
            )
        left, found = list(parts), list[str]()
        for draw in range(max(1, round((1 - self.sparsity) * len(parts)))):
            found.append(left.pop(step_seed(run_seed, step, _CHOICE + draw) % len(left)))
        return found
