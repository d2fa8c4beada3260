"""Callbacks of a run: functions that get a step's record, and transformers' unmodified `TrainerCallback`s.

A `TrainerCallback` is called as `Trainer` calls it, with `TrainingArguments`, `TrainerState` and `TrainerControl`, the
model and the tokenizer; optimizer, scheduler and loaders are None, since there are none. Actions that it requests
through the control (stop, evaluate, save, log) are done after the step. Trackers (TensorBoard, W&B, ...) are such
callbacks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import hf  # its trainer is loaded at its first use: that takes seconds
from ..errors import ConfigError
from ..journal.journal import StepRecord
from ..journal.selection import Selection, larger_is_better

_log = logging.getLogger(__name__)

LOG_EVERY = 10  # steps between two logs to trackers, if log_every is not given


@dataclass(frozen=True)
class About:
    """The facts of a run that callbacks get at its start."""

    model: Any
    tokenizer: Any
    output_dir: str
    steps: int
    batch_size: int
    steps_per_epoch: int | None
    lr: float
    weight_decay: float
    seed: int
    selection: Selection
    keep_best: bool = False
    eval_every: int | None = None
    save_every: int | None = None
    log_every: int | None = None


def trackers(report_to: str | None) -> list[Any]:
    """The callbacks of trackers named with commas between. Raises ConfigError if one is unknown or not installed."""
    names = [name.strip() for name in (report_to or "none").split(",") if name.strip() not in ("", "none")]
    if not names:
        return []
    try:
        found: Any = hf.get_reporting_integration_callbacks(names)  # type: ignore[no-untyped-call]
        return [kind() for kind in found]
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"report_to={report_to!r}: {error}") from error


def is_trainer_callback(callback: Any) -> bool:
    """Decides by the names of its base classes, so that transformers' trainer is loaded only for those who use it."""
    kind = callback if isinstance(callback, type) else type(callback)
    return any(base.__module__.startswith("transformers.trainer_callback") for base in kind.__mro__)


class Callbacks:
    """Calls all callbacks that were given; `wants` says, once, whether one of them asks for an action."""

    def __init__(self, given: Iterable[Any], about: About, evals: Sequence[Mapping[str, float]]) -> None:
        self._functions: list[Callable[[StepRecord], Any]] = []
        self._trainer: list[Any] = []
        for callback in given:
            if is_trainer_callback(callback):
                self._trainer.append(callback() if isinstance(callback, type) else callback)
            elif callable(callback):
                self._functions.append(callback)
            else:
                raise ConfigError(f"{callback!r} is no callback: give a function of a step's record, or a "
                                  "transformers TrainerCallback")  # fmt: skip
        self._about, self._evals = about, evals
        self._losses: list[float] = []
        self._told_epoch = -1
        if self._trainer:
            self._args = _arguments(about)
            self._state = hf.TrainerState(
                max_steps=about.steps, eval_steps=about.eval_every or 0, logging_steps=about.log_every or LOG_EVERY,
                save_steps=about.save_every or 0, train_batch_size=about.batch_size,
                num_train_epochs=math.ceil(about.steps / about.steps_per_epoch) if about.steps_per_epoch else 1,
            )  # fmt: skip
            self._control = hf.TrainerControl()

    def begin(self, step: int) -> None:
        """Training begins, after `step` steps."""
        if self._trainer:
            self._at(step)
            self._state.log_history = [{f"eval_{k}" if k != "step" else k: v for k, v in e.items()}
                                       for e in self._evals]  # fmt: skip
            self._note_best()
            self._tell("on_init_end")
            self._tell("on_train_begin")

    def end(self) -> None:
        if self._trainer:
            self._tell("on_train_end")

    def step(self, record: StepRecord, tokens: int) -> None:
        """A step is in the journal."""
        for function in self._functions:
            function(record)
        if not self._trainer:
            return
        self._at(record.step)
        if (epoch := int(self._state.epoch or 0)) != self._told_epoch:
            if self._told_epoch >= 0:
                self._tell("on_epoch_end")
            self._told_epoch = epoch
            self._tell("on_epoch_begin")
        self._tell("on_step_begin")
        self._at(record.step + 1)
        self._state.num_input_tokens_seen = tokens
        self._losses.append(record.loss)
        self._tell("on_step_end")
        every = self._about.log_every or LOG_EVERY
        if self._take("should_log") or (record.step + 1) % every == 0 or record.step + 1 == self._about.steps:
            mean = sum(self._losses) / len(self._losses)
            self._losses = []
            self._logged({"loss": mean, "grad_norm": abs(record.grad), "learning_rate": record.lr})

    def evaluated(self, values: Mapping[str, float]) -> None:
        """An evaluation; values: with its "step"."""
        if not self._trainer:
            return
        metrics = {f"eval_{name}": value for name, value in values.items() if name != "step"}
        self._logged(metrics)
        self._tell("on_evaluate", metrics={**metrics, "epoch": self._state.epoch})
        self._note_best()

    def saved(self) -> None:
        if self._trainer:
            self._tell("on_save")

    def wants(self, action: str) -> bool:
        """Whether a callback asks for "evaluate", "save" or "training_stop"; clears the request."""
        return bool(self._trainer) and self._take(f"should_{action}")

    # ---- transformers' state -----------------------------------------------------------------------------------------

    def _at(self, step: int) -> None:
        self._state.global_step = step
        self._state.epoch = step / self._about.steps_per_epoch if self._about.steps_per_epoch else 0.0

    def _logged(self, logs: dict[str, Any]) -> None:
        logs = {**logs, "epoch": self._state.epoch}
        self._state.log_history.append({**logs, "step": self._state.global_step})
        self._tell("on_log", logs=logs)

    def _note_best(self) -> None:
        best = self._about.selection.best(self._evals)
        if best is not None:
            self._state.best_metric = best[self._about.selection.name(best)]
            self._state.best_global_step = int(best["step"])

    def _take(self, flag: str) -> bool:
        asked = bool(getattr(self._control, flag))
        setattr(self._control, flag, False)
        return asked

    def _tell(self, event: str, **more: Any) -> None:
        about = self._about
        for callback in self._trainer:
            answer = getattr(callback, event)(
                self._args, self._state, self._control, model=about.model, processing_class=about.tokenizer,
                optimizer=None, lr_scheduler=None, train_dataloader=None, eval_dataloader=None, **more,
            )  # fmt: skip
            self._control = self._control if answer is None else answer
        if self._take("should_epoch_stop"):
            _log.warning("a callback asked to end the epoch early, which a run cannot: a step's batch is a function of "
                         "the step")  # fmt: skip


def _arguments(about: About) -> Any:
    """transformers' TrainingArguments, with those of the run's settings that they have fields for."""
    evaluates = about.eval_every is not None
    metric = about.selection.metric or "loss"
    schedule: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": about.eval_every} if evaluates else {}
    if evaluates:  # transformers wants these together
        schedule |= {"save_strategy": "steps", "save_steps": about.eval_every, "load_best_model_at_end": True}
    return hf.TrainingArguments(
        output_dir=about.output_dir, run_name=about.output_dir, use_cpu=True, report_to="none", disable_tqdm=True,
        max_steps=about.steps, per_device_train_batch_size=about.batch_size, learning_rate=about.lr,
        weight_decay=about.weight_decay, seed=about.seed % (1 << 32), logging_steps=about.log_every or LOG_EVERY,
        metric_for_best_model=metric, greater_is_better=larger_is_better(metric), **schedule,
    )  # fmt: skip
