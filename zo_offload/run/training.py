"""The loop of `Engine.fit`: steps, evaluations and metrics in order, and an end after which the run can be resumed.

Whatever ends the loop (the last step, a callback, an error, a signal, an exception in user code), the blocks are
flushed and the journal is synced, unless a second signal asked for an immediate end: then only the journal holds the
last steps. Signals are checked between steps, a second signal also between blocks.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..data.batches import Batches
from ..data.idle import check_idle
from ..data.losses import Batch
from ..data.made import as_made
from ..data.metrics import ComputeMetrics
from ..errors import ConfigError
from ..journal import run_directory
from ..journal.binding import Binding
from ..journal.calls import FitCall
from ..journal.journal import StepRecord
from ..journal.selection import Selection
from ..methods import lr_schedule
from ..ranks.member import Over
from ..stream.slots import Traffic
from ..system.host_memory import peak_bytes
from ..system.signals import Stopped, StopRequest, stop_signals
from ..tiers.disk import shapes_of
from .active import Run
from .batching import Batching
from .callbacks import About, Callbacks, is_trainer_callback, trackers
from .evaluation import evaluated, with_defaults
from .joining import admit_members
from .late import Launched
from .progress import Progress
from .result import FitResult
from .saving import dir_of_saves, save
from .timed import FILE as TIMELINE
from .timed import TimedStep

_log = logging.getLogger(__name__)

ECHO_S = 5.0
"""Launchers of ranks repeat a terminal's signal, seconds after the terminal has sent it to all processes."""


def train(
    run: Run,
    batching: Batching,
    call: FitCall,
    *,
    new_data: bool = False,
    progress: bool = False,
    callbacks: Iterable[Any] = (),
    compute_metrics: ComputeMetrics | None = None,
) -> FitResult:
    """One call of `fit`; arguments that it leaves out are those of the run's last call. See `Engine.fit`."""
    with run.ranks.together("fit"):
        return _train(run, batching, call, new_data, progress, list(callbacks), compute_metrics)


def _train(
    run: Run, batching: Batching, call: FitCall, new_data: bool, progress: bool, callbacks: list[Any],
    compute_metrics: ComputeMetrics | None,
) -> FitResult:  # fmt: skip
    call, method = with_defaults(call.after(run.last_fit), run), run.method
    if run.ranks.world > 1 and (compute_metrics is not None or any(map(is_trainer_callback, callbacks))):
        raise ConfigError(
            f"compute_metrics and TrainerCallbacks do not work with several ranks ({run.ranks.world}) yet. Use "
            "callbacks that are functions, report_to, or engine.evaluate(..., compute_metrics=...) on one of them"
        )
    call.check()
    save_dir = dir_of_saves(run, call)
    told = [*callbacks, *(trackers(call.report_to) if run.ranks.leads else [])]
    rows, micro_batches = call.batch_size or method.batch_size, call.micro_batches or 1
    batches = batching.batches(call.data, rows, call.options, rows=call.train_rows)
    evaluation = None
    if compute_metrics is not None and call.eval_data is None:
        raise ConfigError("compute_metrics needs an evaluation, and there is none: pass eval_data=")
    if call.eval_data is not None:
        evaluation = batching.batches(
            call.eval_data, rows, call.options, shuffle=False, rows=call.eval_rows, compute_metrics=compute_metrics
        )
    first = batches.batch(0)
    data = [batches] if evaluation is None else [batches, evaluation]
    check_idle(data, call.options, call.batch_size, first, goes_on=run.last_fit is not None)
    steps = _steps(call, batches, method.steps)
    if evaluation is not None and evaluation.is_read_once and call.eval_every is not None and call.eval_every < steps:
        raise ConfigError(
            f"eval_data is an iterator, which can be read once, but eval_every={call.eval_every} reads it several "
            "times: pass a list, or a DataLoader"
        )
    shown = Progress(progress and run.ranks.leads, run.log.version, steps, call.log_every)
    shown.found(batches)
    if run.opened.prepared.offload == "disk" and run.journal is None and run.run_dir is not None:
        shown.will_write(_file_bytes(run), run.run_dir / run_directory.BLOCKS)
    binding = Binding.of(batches, micro_batches, method, steps, new_data=new_data)
    if run.journal is not None:
        binding.check(run.journal)
    run.start_steps(
        first, micro_batches, batching.objective_of(batches), largest=batches.largest(), admit=binding.check
    )
    run.bind(binding, replace(call, steps=steps, batch_size=rows), batches)
    if run.ranks.world > 1:
        ends = {"metric": call.metric, "early_stopping": call.early_stopping, "callbacks": len(callbacks)}
        asked = {"data": binding.data, "steps": steps, "eval_every": call.eval_every, **ends}
        run.ranks.same("fit", {**asked, "eval_data": evaluation and evaluation.identity()})
    if run.ranks.elastic:
        admit_members(run, {"data": binding.data, "steps": steps})
    _compare_alike(run, evaluation)
    run.evals[:] = run.ranks.first("fit, its evaluations", lambda: run.evals)
    factor = lr_schedule(method.schedule, method.warmup_steps, run.horizon or steps)
    brake = run.brake.factor if call.brake else lambda step: 1.0
    selection = Selection(call.metric, call.early_stopping or 0, call.eval_every or 1)
    about = About(
        run.opened.model, batching.tokenizer() if any(map(is_trainer_callback, told)) else None,
        str(run.run_dir or "trainer_output"), steps, rows, batches.steps_per_epoch(), method.lr, method.weight_decay,
        run.config.seed, selection, bool(call.keep_best), call.eval_every, call.save_every, call.log_every,
    )  # fmt: skip
    return Training(
        run, batches, evaluation, steps, lambda step: method.lr * factor(step) * brake(step), micro_batches, call,
        selection,
        Callbacks(told, about, run.evals), save_dir,
        None if save_dir is None else batching.given, batching.tokenizer, shown,
        agrees=run.ranks.world > 1 and bool(callbacks),
    ).run_steps()  # fmt: skip


def _file_bytes(run: Run) -> int:
    """Bytes of the block files that a new run makes."""
    layout = run.opened.prepared.layout
    return sum(shape.file_bytes for shape in shapes_of(layout.block_bytes, layout.spans, layout.stream_bytes))


def _compare_alike(run: Run, evaluation: Batches | None) -> None:
    """Set evaluations on other rows aside: a best step over different rows has no meaning."""
    known = {} if evaluation is None else evaluation.identity() or {}
    if not known.get("digest"):
        return  # rows that are not known beforehand
    data = f"{known['rows']} rows, {known['digest']}"
    if run.evaluated_data not in (None, data) and run.evals:
        _log.warning(
            "eval_data differs from the run's earlier evaluations (%s, now %s): its %d evaluations so far stay in "
            "metrics.jsonl and are not compared with later ones", run.evaluated_data, data, len(run.evals),
        )  # fmt: skip
        run.evals.clear()
    run.evaluated_data = data


def _steps(call: FitCall, batches: Batches, default: int) -> int:
    """Total number of steps, computed from epochs if they are given."""
    if call.epochs is None:
        return default if call.steps is None else call.steps
    an_epoch = batches.steps_per_epoch()
    if not an_epoch:
        raise ConfigError(f"epochs={call.epochs}: the steps in an epoch of this data are not known; pass steps=")
    return max(1, math.ceil(call.epochs * an_epoch))


@dataclass(frozen=True)
class Training:
    """One call of `fit`. lr(step): the learning rate; evaluation: None for none; save_dir: None if nothing is exported
    during training; see `Engine.fit` for the others."""

    run: Run
    batches: Batches
    evaluation: Batches | None
    steps: int
    lr: Callable[[int], float]
    micro_batches: int
    call: FitCall
    selection: Selection
    callbacks: Callbacks
    save_dir: Path | None = None
    given_tokenizer: Any = None
    tokenizer: Callable[[], Any] = lambda: None
    progress: Progress = field(default_factory=lambda: Progress(False, 0, 0))
    agrees: bool = False
    """Whether ranks ask rank 0 before each step whether its callbacks want to end."""

    def run_steps(self) -> FitResult:
        run, parts = self.run, self.run.start()
        streamer = parts.streamer
        history: list[dict[str, float]] = []
        tokens, begin, first = 0, time.perf_counter(), run.log.version
        traffic = streamer.count_anew()
        path = None if run.run_dir is None or not run.ranks.leads else run.run_dir / run_directory.METRICS
        with (
            self.progress.begun(first) as shown,
            run_directory.Metrics(path) as metrics,
            stop_signals(ECHO_S if run.ranks.world > 1 else 0.0) as stop,
        ):
            look = _Look(self, metrics, shown, stop, history)
            try:
                run.heed(stop)
                run.stopping = None
                look.at_missed_evaluation(first)
                self._consider_end()
                self.callbacks.begin(first)
                timed = self._timed(traffic, first)
                for record, batch in self._take_steps(first, timed):
                    tokens += as_made(batch).tokens
                    seconds = time.perf_counter() - begin
                    wait = parts.wait_share(traffic, seconds)
                    done = record.step + 1 - first
                    history.append(_kept(record))
                    metrics.write(
                        **history[-1], tokens=tokens, seconds=round(seconds, 3), wait_share=round(wait, 4),
                        fetch_bytes=traffic.fetch_bytes, flush_bytes=traffic.flush_bytes, peak_bytes=peak_bytes(),
                        **(self._planned() if done == 1 else {}),
                    )  # fmt: skip
                    shown.step(
                        record.loss, record.lr, tokens / seconds, wait, traffic.fetch_bytes / done,
                        traffic.flush_bytes / done, record.step + 1, parts.watch.short,
                    )  # fmt: skip
                    self.callbacks.step(record, tokens)
                    self.check_stop(stop)
                    look.after_step(record.step + 1)
                look.at_the_end()
                self.check_stop(stop)
                parts.watch.finish()
                found = parts.watch.warnings
            finally:
                run.settle(at_once=stop.at_once)
                run.heed(None)
        self.callbacks.end()
        seconds = time.perf_counter() - begin
        losses = [row["loss"] for row in history if "grad" in row]
        return FitResult(
            steps=len(losses), losses=losses, evals=list(run.evals), tokens_per_s=tokens / seconds, seconds=seconds,
            wait_share=parts.wait_share(traffic, seconds), resident_bytes=streamer.resident_bytes,
            model_bytes=run.prepared.layout.total_bytes, fetch_bytes=traffic.fetch_bytes,
            flush_bytes=traffic.flush_bytes, warnings=found, history=history, last_step=run.log.version,
            best=self.selection.best(run.evals), metric=self.call.metric, stopped=run.stopping,
        )  # fmt: skip

    def _planned(self) -> dict[str, Any]:
        """Facts of a call of `fit` that do not change, for its first line of metrics: memory by term, formats."""
        return {"memory": dict(self.run.memory.rows()), "formats": list(self.run.prepared.layout.format_names())}

    def _timed(self, traffic: Traffic, first: int) -> TimedStep:
        """Times one step, if the times show the host's own work."""
        run = self.run
        shows = (
            run.run_dir is not None and run.ranks.leads and run.prepared.offload != "none" and not run.device.own_memory
        )
        path = run.run_dir / TIMELINE if shows and run.run_dir is not None else None
        return TimedStep(path, traffic, [block.name for block in run.plan.blocks], first, self.steps)

    def _take_steps(self, first: int, timed: TimedStep) -> Iterator[tuple[StepRecord, Batch]]:
        """Take steps from `first` on; yields (record, batch) of settled steps, on a GPU after the next step's launch.

        All launched steps are settled before an evaluation, and at an early end.
        """
        waiting: deque[tuple[Launched, Any]] = deque()
        late = self.run.start().stepper.late
        for step in range(first, self.steps):
            if self._is_to_stop(step):
                break
            batch: Batch = self.batches.batch(step)
            timed.begins(step)
            try:
                launched = self.run.launch(
                    batch, self.lr(step), micro_batches=self.micro_batches, objective=self.batches.objective
                )
            except Over as over:
                self.run.stopping = str(over)
                break
            waiting.append((launched, batch))
            ahead = 1 if late and step + 1 < self.steps and not self._is_looked_at(step + 1) else 0
            while len(waiting) > ahead:
                launched, its_batch = waiting.popleft()
                record = self.run.finish(launched)
                timed.ended(record.step)
                yield record, its_batch
        for launched, its_batch in waiting:
            yield self.run.finish(launched), its_batch

    def _is_to_stop(self, step: int) -> bool:
        if self.agrees:
            self.run.stopping = self.run.ranks.first(f"stopping before step {step}", lambda: self.run.stopping)
        return self.run.stopping is not None

    def is_due(self, step: int) -> bool:
        """Whether an evaluation is due after `step` steps, before the next one; the last evaluation is not counted."""
        every = self.call.eval_every
        due = self.evaluation is not None and every is not None and step % every == 0
        return due and 0 < step < self.steps

    def is_saved(self, step: int) -> bool:
        return self.call.save_every is not None and step % self.call.save_every == 0

    def _is_looked_at(self, step: int) -> bool:
        return self.is_due(step) or self.is_saved(step)

    def _consider_end(self) -> None:
        """Ask for the end if the evaluations call for early stopping."""
        self.run.stopping = self.run.stopping or self.selection.why_over(self.run.evals) or None

    def check_stop(self, stop: StopRequest) -> None:
        """Raise Stopped, on all ranks after the same step, if one of them got a signal."""
        stop.look()
        signum = self.run.ranks.stopped_by()
        if signum is not None:
            where = self.run.ranks.after_a_stop(self.run.run_dir)
            raise Stopped(signum, self.run.log.version, where)


@dataclass(frozen=True)
class _Look:
    """Work between steps: evaluations, exports, and requests of callbacks."""

    training: Training
    metrics: run_directory.Metrics
    shown: Progress
    stop: StopRequest
    history: list[dict[str, float]]

    def at_missed_evaluation(self, first: int) -> None:
        """Do the evaluation that is missing if the run ended between a step and its evaluation."""
        if self.training.is_due(first) and all(values["step"] != first for values in self.training.run.evals):
            self._evaluate()

    def after_step(self, step: int) -> None:
        """Call after `step` steps are done."""
        training, callbacks = self.training, self.training.callbacks
        asked = callbacks.wants("evaluate") and training.evaluation is not None
        if training.is_due(step) or asked:
            self._evaluate()
            training._consider_end()
        if training.is_saved(step):
            self._save(f"step-{step}")
        if callbacks.wants("save"):
            training.run.flush()
            callbacks.saved()
        if callbacks.wants("training_stop"):
            training.run.stopping = training.run.stopping or "a callback asked for it"

    def at_the_end(self) -> None:
        training = self.training
        known = {values["step"] for values in training.run.evals} if training.run.stopping is not None else set()
        if training.evaluation is not None and training.run.log.version not in known:
            self._evaluate()

    def _evaluate(self) -> None:
        training, run = self.training, self.training.run
        assert training.evaluation is not None
        step = run.log.version
        between = partial(training.check_stop, self.stop)
        found = evaluated(run, training.evaluation, training.tokenizer, between, at=f"after {step} steps")
        if found is None:  # a stop that all ranks have agreed on
            training.check_stop(self.stop)
            return
        values = {"step": step, **found}
        run.evals[:] = [known for known in run.evals if known["step"] != step] + [values]
        named = {("step" if k == "step" else f"eval_{k}"): v for k, v in values.items()}
        self.metrics.write(**named, **({} if run.evaluated_data is None else {"data": run.evaluated_data}))
        self.history.append(named)
        best = training.selection.best(run.evals)
        is_best = best is not None and best["step"] == step
        self.shown.evaluated(values, is_best)
        training.callbacks.evaluated(values)
        if is_best and training.call.keep_best and run.opened.name is None:
            self._save("best")

    def _save(self, name: str) -> None:
        training = self.training
        assert training.save_dir is not None
        path = training.save_dir / name
        if not training.run.ranks.leads:
            return
        if name == "best" or not path.exists():  # a step that was exported before a resume has the same weights
            training.save_dir.mkdir(parents=True, exist_ok=True)
            save(training.run, path, training.given_tokenizer, overwrite=name == "best")
        training.callbacks.saved()


def _kept(record: StepRecord) -> dict[str, float]:
    return {"step": record.step, "loss": record.loss, "grad": record.grad, "lr": record.lr, "skipped": record.skipped}
