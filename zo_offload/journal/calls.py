"""The arguments of `fit`, kept in a run's config.json, so that a resumed run repeats arguments that are not given.

Absolute paths, numbers and plain options are kept; data in memory, a tokenizer object and the like are not, and must be
given again.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from ..system.plain import is_whole, plain_option, plain_value, user_path

_PATHS = ("data", "eval_data", "save_dir")
_COUNTS = ("steps", "batch_size", "micro_batches", "eval_every", "save_every", "log_every", "early_stopping",
           "train_rows", "eval_rows")  # fmt: skip
_OF_EVALUATIONS = ("eval_every", "eval_rows", "metric", "keep_best", "early_stopping")
IN_MEMORY = True
"""In the record of a call, stands for evaluation data that was not a file."""


@dataclass(frozen=True)
class FitCall:
    """The arguments of one call of `fit`; None: not given. Each is an option of the command line and a key of a config
    file, with the first sentence under it as its help. eval_data=False: none, whatever there was before."""

    data: Any = None
    """Training data: a file or folder (docs/data_and_tasks.md); for a resumed run, the data that it began with."""
    eval_data: Any = None
    """Evaluation data, of the same form."""
    steps: int | None = None
    """Total number of steps, including those before a resume. Default: the method's."""
    epochs: float | None = None
    """Total number of passes over the data, in place of steps."""
    batch_size: int | None = None
    """Rows per step. Default: the method's."""
    train_rows: int | None = None
    """Number of rows of the data to use, chosen by the seed. Default: all."""
    eval_rows: int | None = None
    """Number of rows of the evaluation data to use, chosen by the seed. Default: all."""
    micro_batches: int | None = None
    """Number of parts that a batch is cut into, each with its own lanes. Default: 1."""
    eval_every: int | None = None
    """Steps between two evaluations; there is always one at the end."""
    brake: bool | None = None
    """Halve the learning rate whenever the loss rises."""
    metric: str | None = None
    """The metric that compares evaluations: loss, accuracy, or one of compute_metrics. Default: accuracy, else loss."""
    keep_best: bool | None = None
    """Make the best evaluated step by `metric` the run's result, in place of the last: --out exports it. Nothing is
    copied, since the journal rebuilds any step. A model that was given in memory is exported to save_dir/best when it
    improves."""
    early_stopping: int | None = None
    """Stop after this many evaluations in a row without a better `metric`; 0: never. Default: never."""
    save_every: int | None = None
    """Steps between two exports, to save_dir/step-N. (The journal rebuilds any step later; exports cost disk.)"""
    save_dir: str | None = None
    """Directory for the exports of save_every, and of keep_best for a model in memory. Default: RUN_DIR/saved."""
    log_every: int | None = None
    """Steps between two lines of the log. Default: a progress bar on a terminal, else one line per half minute."""
    report_to: str | None = None
    """Trackers that get losses and metrics: tensorboard, wandb, ... (transformers' names, with commas between)."""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make values plain, as in the record: a resumed run must repeat exactly this call."""
        for name in (*_COUNTS, "epochs"):
            object.__setattr__(self, name, plain_value(getattr(self, name)))
        options = {name: plain_option(value) for name, value in self.options.items()}
        object.__setattr__(self, "options", options)

    def after(self, record: Mapping[str, Any] | None) -> FitCall:
        """This call, with missing arguments taken from an earlier call's `record`. Raises DataError for a file of that
        call that is not there any more."""
        known = record if isinstance(record, Mapping) else {}
        options = known.get("options")
        call = replace(self, options={**(options if isinstance(options, Mapping) else {}), **self.options})
        left_out = _OF_EVALUATIONS if self.eval_data is False else ()
        missing: dict[str, Any] = {
            f.name: known.get(f.name) for f in fields(self) if getattr(self, f.name) is None and f.name not in left_out
        }
        if self.epochs is not None:
            missing["steps"] = self.steps  # the earlier call's steps do not apply
        if missing.get("eval_data") is IN_MEMORY:
            missing["eval_data"] = None
            warnings.warn(
                "eval_data was in memory in the call before, and a run remembers only files: there are no evaluations "
                "now. Pass eval_data= again, or eval_data=False",
                stacklevel=2,
            )
        for name in ("data", "eval_data"):
            if isinstance(path := missing.get(name), str) and not Path(path).exists():
                raise DataError(
                    f"the run's {name}, {path}, does not exist. If it was moved, give its new path: "
                    f"{'train_data' if name == 'data' else name}= (--{name.replace('_', '-')})"
                )
        call = replace(call, **missing)
        if call.eval_data is not False:
            return call
        return replace(call, eval_data=None, eval_every=None, eval_rows=None, metric=None)

    def record(self) -> dict[str, Any]:
        """The part of this call that can be kept, as JSON. Epochs were converted to steps before."""
        kept = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in _PATHS:
            path = kept[name]
            kept[name] = str(user_path(path).absolute()) if isinstance(path, (str, Path)) else None
            if name == "eval_data" and path is not None and kept[name] is None:
                kept[name] = IN_MEMORY
        kept["options"] = {name: value for name, value in self.options.items() if _is_json(value)}
        kept["epochs"] = None
        return {name: value for name, value in kept.items() if value is not None or name in _ALWAYS}

    def check(self) -> None:
        """Raise ConfigError for impossible values, or if there is no data."""
        for name in _COUNTS:
            value, least = getattr(self, name), 0 if name == "early_stopping" else 1
            if value is not None and not is_whole(value, least):
                raise ConfigError(f"{name}={value!r}: expected a whole number of at least {least}")
        epochs = self.epochs
        number = isinstance(epochs, (int, float)) and not isinstance(epochs, bool)
        if epochs is not None and not (number and 0 < epochs < math.inf):
            raise ConfigError(f"epochs={epochs!r}: expected more than 0, and an end")
        if epochs is not None and self.steps is not None:
            raise ConfigError(f"steps={self.steps} and epochs={epochs}: give one of them")
        for name in ("metric", "report_to"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected a name")
        if self.data is None:
            raise ConfigError("fit needs train_data: a run remembers only files that it was given by their path")
        if (self.keep_best or self.early_stopping) and self.eval_data is None:
            wants = "keep_best" if self.keep_best else "early_stopping"
            raise ConfigError(f"{wants} compares evaluations: pass eval_data= (--eval-data)")
        for name in ("eval_every", "eval_rows", "metric"):
            if self.eval_data is None and (value := getattr(self, name)) is not None:
                raise ConfigError(f"{name}={value!r} is of evaluations, and there is none: pass eval_data= "
                                  "(--eval-data)")  # fmt: skip
        if self.early_stopping and self.eval_every is None:
            raise ConfigError(f"early_stopping={self.early_stopping} counts evaluations: pass eval_every= too")


OPTIONS = ("train_data", *(f.name for f in fields(FitCall)[1:-1]), "progress", "callback", "callbacks",
           "compute_metrics", "preprocess_logits_for_metrics", "new_data")  # fmt: skip
"""Keywords of `fit` besides those of the data."""

_ALWAYS = ("data", "eval_data", "steps", "batch_size", "micro_batches", "eval_every", "options")


def _is_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError, RecursionError):
        return False
