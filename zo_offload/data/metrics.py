"""`compute_metrics` as in transformers' Trainer: a function of an evaluation's predictions and labels.

The predictions depend on the data: for a prompt with verbalizers the options' scores (`[rows, options]`, and the index
of the right one), for classes their logits (`[rows, classes]`), for a model that finds answers in a text the pairs
(start logits, end logits) and (start, end), else the model's logits and labels; padded to the longest batch with -100.
Of an encoder-decoder they are the logits alone: Trainer has the encoder's states after them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .. import hf
from ..errors import ConfigError, DataError
from ..modules.kind import IGNORED
from ..system.plain import plain_value

ComputeMetrics = Callable[[Any], Any]
Seen = Tensor | tuple[Tensor, ...]
"""What a batch gave, or was right; two of each where an answer begins and ends."""

_OURS = frozenset({"step", "loss"})


class Metrics:
    """Collects an evaluation's predictions, on the host, and computes its metrics.

    preprocess: (logits, labels) -> the part of the logits to keep, such as their argmax; useful for vocabularies, whose
    logits are large.
    """

    def __init__(self, compute: ComputeMetrics, preprocess: Callable[[Any, Any], Any] | None = None) -> None:
        for name, function in (("compute_metrics", compute), ("preprocess_logits_for_metrics", preprocess)):
            if function is not None and not callable(function):
                raise ConfigError(f"{name}={function!r} is not a function. Pass one, such as lambda seen: "
                                  "{'f1': ...seen.predictions, seen.label_ids...}")  # fmt: skip
        self._compute, self._preprocess = compute, preprocess
        self._seen: list[tuple[Seen, Seen]] = []

    def begin(self) -> None:
        self._seen = []

    def see(self, scores: Seen, right: Seen) -> None:
        """Add one batch's predictions."""
        kept = scores if self._preprocess is None else self._preprocess(scores, right)
        self._seen.append((tree_map(_on_host, kept), tree_map(_on_host, right)))

    def values(self) -> dict[str, float]:
        """The metrics by name. Raises DataError if nothing was predicted, ConfigError if a metric is not a number."""
        if not self._seen:
            raise DataError("compute_metrics needs predictions, but the model gave no logits or the data has no labels")
        scores, right = (_all_joined([pair[i] for pair in self._seen]) for i in (0, 1))
        self._seen = []
        found = self._compute(hf.EvalPrediction(predictions=scores, label_ids=right))
        try:
            values = {str(name).removeprefix("eval_"): float(plain_value(value)) for name, value in found.items()}
        except (AttributeError, TypeError, ValueError):
            raise ConfigError(f"compute_metrics returned {found!r}; expected a dict of numbers") from None
        if taken := sorted(_OURS & set(values)):
            raise ConfigError(f"compute_metrics returned {', '.join(map(repr, taken))}, a name that every evaluation "
                              "uses itself. Give it another name")  # fmt: skip
        return values


def _on_host(value: Tensor) -> Tensor:
    return value.detach().float().cpu() if value.is_floating_point() else value.cpu()


def _all_joined(parts: Sequence[Seen]) -> Any:
    """All batches' as an array, or as a tuple of arrays where they are tuples."""
    if isinstance(parts[0], Tensor):
        return _joined([part for part in parts if isinstance(part, Tensor)]).numpy()
    return tuple(_all_joined(column) for column in zip(*parts, strict=True))


def _joined(parts: list[Tensor]) -> Tensor:
    """The batches concatenated; shorter ones are padded along the second dimension."""
    if parts[0].dim() < 2:
        return torch.cat(parts)
    width = max(part.shape[1] for part in parts)
    wide = [torch.cat([part, part.new_full((len(part), width - part.shape[1], *part.shape[2:]), IGNORED)], 1)
            for part in parts]  # fmt: skip
    return torch.cat(wide)
