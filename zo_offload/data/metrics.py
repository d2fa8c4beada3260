"""`compute_metrics` as transformers' Trainer has it: a function of an evaluation's predictions and labels.

What a prediction is goes by the data: scores of the options for a prompt with verbalizers (`[rows, options]`, and the
index of the right one), logits of the classes (`[rows, classes]`), else the model's logits and labels as they are,
padded to the longest batch with -100.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import hf
from ..errors import ConfigError, DataError
from ..modules.kind import IGNORED
from ..system.plain import plain_value

ComputeMetrics = Callable[[Any], Any]

_OURS = frozenset({"step", "loss"})


class Metrics:
    """Collects an evaluation's predictions, on the host, and computes its metrics.

    preprocess: (logits, labels) -> what is kept of the logits, such as their argmax; for vocabularies, whose logits are
    large.
    """

    def __init__(self, compute: ComputeMetrics, preprocess: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        for name, function in (("compute_metrics", compute), ("preprocess_logits_for_metrics", preprocess)):
            if function is not None and not callable(function):
                raise ConfigError(f"{name}={function!r} is no function. Pass one, such as lambda seen: "
                                  "{'f1': ...seen.predictions, seen.label_ids...}")  # fmt: skip
        self._compute, self._preprocess = compute, preprocess
        self._seen: list[tuple[Tensor, Tensor]] = []

    def begin(self) -> None:
        self._seen = []

    def see(self, scores: Tensor, right: Tensor) -> None:
        """One batch's."""
        kept = scores if self._preprocess is None else self._preprocess(scores, right)
        self._seen.append((kept.detach().float().cpu() if kept.is_floating_point() else kept.cpu(), right.cpu()))

    def values(self) -> dict[str, float]:
        """The metrics by name. Raises DataError where nothing was predicted, ConfigError for what is no number."""
        if not self._seen:
            raise DataError("compute_metrics needs predictions, and the model gave no logits, or the data no labels")
        scores, right = (_joined([pair[i] for pair in self._seen]) for i in (0, 1))
        self._seen = []
        found = self._compute(hf.EvalPrediction(predictions=scores.numpy(), label_ids=right.numpy()))
        try:
            values = {str(name).removeprefix("eval_"): float(plain_value(value)) for name, value in found.items()}
        except (AttributeError, TypeError, ValueError):
            raise ConfigError(f"compute_metrics returned {found!r}; expected a dict of numbers") from None
        if taken := sorted(_OURS & set(values)):
            raise ConfigError(f"compute_metrics returned {', '.join(map(repr, taken))}, which an evaluation has of its "
                              "own. Give it another name")  # fmt: skip
        return values


def _joined(parts: list[Tensor]) -> Tensor:
    """Batches one after another, those that are shorter padded along the second dimension."""
    if parts[0].dim() < 2:
        return torch.cat(parts)
    width = max(part.shape[1] for part in parts)
    wide = [torch.cat([part, part.new_full((len(part), width - part.shape[1], *part.shape[2:]), IGNORED)], 1)
            for part in parts]  # fmt: skip
    return torch.cat(wide)
