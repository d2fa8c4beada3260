"""Turns a caller's data into batches for one model: with its tokenizer, for its objective, in its run's encoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.tokenizers import check_saves, has_tokenizer, load_tokenizer
from ..data.batches import Batches, RowBatches, StreamBatches, make_batches
from ..data.losses import Objective, model_loss
from ..data.measures import OptionsLoss
from ..data.metrics import ComputeMetrics, Metrics
from ..data.sources import as_given
from ..data.tasks import sampled, task_of
from ..errors import ConfigError
from .opening import Opened


@dataclass(frozen=True)
class Shots:
    """Demonstrations before each prompt: how many, from which rows, chosen by which seed."""

    count: int
    data: Any
    seed: int = 0


class Batching:
    """Makes batches from a caller's data. tokenizer: None for the checkpoint's own; encoding(): the run's
    encoding."""

    def __init__(self, opened: Opened, objective: Objective, tokenizer: Any, encoding: Callable[[], int]) -> None:
        self._opened, self._objective, self._encoding = opened, objective, encoding
        if isinstance(tokenizer, (str, Path)):
            trusted = opened.prepared.config.trust_remote_code
            tokenizer = load_tokenizer(tokenizer, trust_remote_code=trusted)
        self.given = tokenizer
        """The tokenizer that was passed; `tokenizer` falls back on the checkpoint's."""
        self._own: Any = None
        if tokenizer is not None:
            check_saves(tokenizer)

    def batches(
        self, data: Any, batch_size: int, options: Mapping[str, Any], shuffle: bool = True, *,
        rows: int | None = None, compute_metrics: ComputeMetrics | None = None, shots: Shots | None = None,
    ) -> Batches:  # fmt: skip
        """Data as batches; options: of `make_batches`. Text without a tokenizer given uses the checkpoint's.

        shuffle: True for training, on a task's train split; False for evaluation, on its dev split. rows: the number of
        rows, chosen by the run's seed. shots: demonstrations before each prompt.
        """
        options = {"tokenizer": self.tokenizer(), **options}
        preprocess, named = options.pop("preprocess_logits_for_metrics", None), options.get("task")
        task = task_of(named)
        seed = self._opened.prepared.config.seed
        if task is not None:
            options = {**task.prompt, **options, "task": "auto"}
            if isinstance(data, (str, Path)):
                data = task.rows(data, "train" if shuffle else "dev")
        own_objective = self._objective is not model_loss
        batches = make_batches(
            data, batch_size=batch_size, kind=self._opened.kind, own_objective=own_objective, version=self._encoding(),
            seed=seed, shuffle=shuffle, rows=rows, name=None if task is None else task.name, **options,
        )  # fmt: skip
        if shots is not None and shots.count:
            demonstrations = self._demonstrations(shots, {**options, "task": named or "auto"}, batches)
            options |= {
                "prefix": demonstrations + options.get("prefix", ""),
                "preprocess_logits_for_metrics": preprocess,
            }
            batches = self.batches(data, batch_size, options, shuffle, rows=rows, compute_metrics=compute_metrics)
        batches.scoring = None if task is None else task.scoring
        if own_objective and isinstance(batches, StreamBatches):  # it may give tuples
            batches.objective = as_given(self._objective)
        batches.metrics = None if compute_metrics is None else Metrics(compute_metrics, preprocess)
        return batches

    def _demonstrations(self, shots: Shots, options: dict[str, Any], batches: Batches) -> str:
        """`shots.count` rows with their answers, chosen by the seed among the rows that are not evaluated."""
        rows = shots.data
        if isinstance(rows, (str, Path)):
            known = self.batches(rows, 1, options)
            rows = known.rows if isinstance(known, RowBatches) else None
        if rows is None or not hasattr(rows, "__iter__"):
            raise ConfigError("shots need rows of other data: pass demonstrations=, a file or rows")
        evaluated = {repr(row) for row in batches.rows} if isinstance(batches, RowBatches) else set()
        others = [row for row in rows if repr(row) not in evaluated]
        chosen = sampled(others, shots.count, shots.seed, "demonstrations that are not evaluated themselves")
        return "".join(f"{batches.encoder.shown(row, f'demonstration {i}')}\n\n" for i, row in enumerate(chosen))

    def objective_of(self, batches: Batches) -> Objective:
        """The objective that the data asks for, else the run's. Raises ConfigError if both are given."""
        if batches.objective is None:
            return self._objective
        if self._objective is not model_loss and isinstance(batches.objective, OptionsLoss):
            raise ConfigError("loss='options' and objective= are two losses: leave one of them out")
        return batches.objective

    def tokenizer(self) -> Any:
        """The tokenizer that was given, else the checkpoint's own, if it has one."""
        path, checkpoint = self._opened.directory, self._opened.checkpoint
        if self.given is None and path is not None and not has_tokenizer(path) and checkpoint is not None:
            path = checkpoint.gguf
        if self.given is not None or path is None or (path.is_dir() and not has_tokenizer(path)):
            return self.given
        if self._own is None:
            trusted = self._opened.prepared.config.trust_remote_code
            self._own = load_tokenizer(path, trust_remote_code=trusted)
        return self._own
