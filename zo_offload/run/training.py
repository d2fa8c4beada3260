"""The loop of `Engine.fit`: steps, evaluations and metrics in order, and an end that leaves a run that can go on.

Whatever ends the loop (the last step, an error, a signal, an exception in user code) the blocks are flushed and the
journal is synced, unless a second signal asked for an end at once: then the journal alone holds the last steps. Signals
are looked at between steps, and the second one between blocks too.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ..data.batches import Batches, batch_tokens
from ..data.losses import Batch
from ..journal import run_directory
from ..journal.binding import Binding
from ..journal.calls import FitCall
from ..journal.journal import StepRecord
from ..methods import lr_schedule
from ..system.signals import Stopped, StopRequest, stop_signals
from .active import Run
from .batching import Batching
from .late import Launched
from .progress import Progress

ECHO_S = 5.0
"""Launchers of ranks pass a terminal's signal on, seconds after the terminal has sent it to all."""


@dataclass(frozen=True)
class FitResult:
    """What `fit` did: losses of the steps it ran, evaluations by step, and the run's rates."""

    steps: int
    losses: list[float]
    evals: list[dict[str, float]] = field(default_factory=list)
    """All evaluations of the run, those before it was resumed included."""
    tokens_per_s: float = 0.0
    seconds: float = 0.0
    wait_share: float = 0.0
    """Share of the time that compute waited for blocks: near 0, compute binds; near 1, fetches do. On a GPU, the share
    of the time that the measured link needs for the bytes that were moved."""
    resident_bytes: int = 0
    model_bytes: int = 0
    fetch_bytes: int = 0
    """Bytes of weights that came into the window, in all of this call's steps and evaluations."""
    flush_bytes: int = 0
    """Bytes of weights that were written back: about 1 / fold_every of what is trained, a step."""
    warnings: list[str] = field(default_factory=list)
    """Where the steps taught the model nothing: most of them skipped, lanes that do not differ, a constant loss,
    updates that vanish in the storage format (`learning_watch.py`)."""


def train(
    run: Run,
    batching: Batching,
    call: FitCall,
    *,
    new_data: bool = False,
    progress: bool = False,
    callback: Callable[[StepRecord], None] | None = None,
) -> FitResult:
    """One call of `fit`; what it leaves out is as it was in the run's last one. See `Engine.fit`."""
    with run.ranks.together("fit"):
        return _train(run, batching, call, new_data, progress, callback)


def _train(
    run: Run,
    batching: Batching,
    call: FitCall,
    new_data: bool,
    progress: bool,
    callback: Callable[[StepRecord], None] | None,
) -> FitResult:
    call, method = call.after(run.last_fit), run.method
    call.check()
    steps = method.steps if call.steps is None else call.steps
    rows, micro_batches = call.batch_size or method.batch_size, call.micro_batches or 1
    batches = batching.batches(call.data, rows, dict(call.options))
    evaluation = None
    if call.eval_data is not None:
        evaluation = batching.batches(call.eval_data, rows, dict(call.options), shuffle=False)
    binding = Binding.of(batches, micro_batches, method, steps, new_data=new_data)
    if run.journal is not None:
        binding.check(run.journal)
    run.start_steps(
        batches.batch(0), micro_batches, batching.objective_of(batches), largest=batches.largest(), admit=binding.check
    )
    run.bind(binding, replace(call, steps=steps, batch_size=rows), batches)
    if run.ranks.world > 1:
        asked = {"data": binding.data, "steps": steps, "eval_every": call.eval_every}
        run.ranks.same("fit", {**asked, "eval_data": evaluation and evaluation.identity()})
    run.evals[:] = run.ranks.first("fit, its evaluations", lambda: run.evals)
    factor = lr_schedule(method.schedule, method.warmup_steps, run.horizon or steps)
    brake = run.brake.factor if call.brake else lambda step: 1.0
    return Training(
        run, batches, evaluation, steps, lambda step: method.lr * factor(step) * brake(step), micro_batches,
        call.eval_every, progress, callback,
    ).run_steps()  # fmt: skip


@dataclass(frozen=True)
class Training:
    """One call of `fit`. lr(step): the learning rate; evaluation: None for none; see `Engine.fit` for the others."""

    run: Run
    batches: Batches
    evaluation: Batches | None
    steps: int
    lr: Callable[[int], float]
    micro_batches: int = 1
    eval_every: int | None = None
    progress: bool = False
    callback: Callable[[StepRecord], None] | None = None

    def run_steps(self) -> FitResult:
        run, parts = self.run, self.run.start()
        streamer = parts.streamer
        losses: list[float] = []
        tokens, begin, first = 0, time.perf_counter(), run.log.version
        traffic = streamer.count_anew()
        path = None if run.run_dir is None or not run.ranks.leads else run.run_dir / run_directory.METRICS
        with (
            Progress(self.progress and run.ranks.leads, first, self.steps) as bar,
            run_directory.Metrics(path) as metrics,
            stop_signals(ECHO_S if run.ranks.world > 1 else 0.0) as stop,
        ):
            try:
                run.heed(stop)
                self._evaluate_what_was_missed(first, metrics, stop)
                for record, batch in self._take_steps(first):
                    step = record.step
                    losses.append(record.loss)
                    tokens += batch_tokens(batch)
                    seconds = time.perf_counter() - begin
                    wait = parts.wait_share(traffic, seconds)
                    metrics.write(
                        step=step, loss=record.loss, grad=record.grad, lr=record.lr, skipped=record.skipped,
                        tokens=tokens, seconds=round(seconds, 3), wait_share=round(wait, 4),
                        fetch_bytes=traffic.fetch_bytes, flush_bytes=traffic.flush_bytes,
                    )  # fmt: skip
                    done = step + 1 - first
                    bar.step(
                        record.loss, tokens / seconds, wait, traffic.fetch_bytes / done, traffic.flush_bytes / done,
                        parts.watch.short,
                    )  # fmt: skip
                    if self.callback is not None:
                        self.callback(record)
                    self._check_stop(stop)
                    if self._is_due(step + 1):
                        self._evaluate(metrics, stop)
                if self.evaluation is not None:
                    self._evaluate(metrics, stop)
                self._check_stop(stop)
                parts.watch.finish()
                found = parts.watch.warnings
            finally:
                run.settle(at_once=stop.at_once)
                run.heed(None)
        seconds = time.perf_counter() - begin
        return FitResult(
            steps=len(losses), losses=losses, evals=list(run.evals), tokens_per_s=tokens / seconds, seconds=seconds,
            wait_share=parts.wait_share(traffic, seconds), resident_bytes=streamer.resident_bytes,
            model_bytes=run.prepared.layout.total_bytes, fetch_bytes=traffic.fetch_bytes,
            flush_bytes=traffic.flush_bytes, warnings=found,
        )  # fmt: skip

    def _take_steps(self, first: int) -> Iterator[tuple[StepRecord, Batch]]:
        """Steps from `first` on: records and batches as they are settled; on a GPU, each after the next one's launch.

        Before an evaluation all that was launched is settled.
        """
        waiting: deque[tuple[Launched, Any]] = deque()
        late = self.run.start().stepper.late
        for step in range(first, self.steps):
            batch: Batch = self.batches.batch(step)
            launched = self.run.launch(
                batch, self.lr(step), micro_batches=self.micro_batches, objective=self.batches.objective
            )
            waiting.append((launched, batch))
            ahead = 1 if late and step + 1 < self.steps and not self._is_due(step + 1) else 0
            while len(waiting) > ahead:
                launched, its_batch = waiting.popleft()
                yield self.run.finish(launched), its_batch

    def _is_due(self, step: int) -> bool:
        """Whether `step` steps in, an evaluation comes before the next one. The one at the end is not counted here."""
        due = self.evaluation is not None and self.eval_every is not None and step % self.eval_every == 0
        return due and 0 < step < self.steps

    def _evaluate_what_was_missed(self, first: int, metrics: run_directory.Metrics, stop: StopRequest) -> None:
        """A run that ended between a step and its evaluation makes up for it, so that the schedule is the same."""
        if self._is_due(first) and all(values["step"] != first for values in self.run.evals):
            self._evaluate(metrics, stop)

    def _evaluate(self, metrics: run_directory.Metrics, stop: StopRequest) -> None:
        assert self.evaluation is not None
        step = self.run.log.version
        found = self.run.measure(self.evaluation, between=lambda: self._check_stop(stop), at=f"after {step} steps")
        if found is None:  # a stop that all ranks have agreed on
            self._check_stop(stop)
            return
        values = {"step": step, **found}
        self.run.evals[:] = [known for known in self.run.evals if known["step"] != step] + [values]
        metrics.write(**{("step" if k == "step" else f"eval_{k}"): v for k, v in values.items()})

    def _check_stop(self, stop: StopRequest) -> None:
        """Raise Stopped, on all ranks after the same step, where one of them was sent a signal."""
        stop.look()
        signum = self.run.ranks.stopped_by()
        if signum is not None:
            run_dir = self.run.run_dir
            where = "the run has no run_dir and cannot be resumed" if run_dir is None else f"resume it from {run_dir}"
            raise Stopped(signum, self.run.log.version, where)
