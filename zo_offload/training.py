"""The loop of `Engine.fit`: steps, evaluations and metrics in order, and an end that leaves a run that can go on.

Whatever ends the loop (the last step, an error, a signal, an exception in user code) the blocks are flushed and the
journal is synced, unless a second signal asked for an end at once: then the journal alone holds the last steps. Signals
are looked at between steps, and the second one between blocks too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import runs
from .data import Batches, batch_tokens, fingerprint
from .errors import JournalError
from .journal import StepRecord
from .progress import Progress
from .signals import Stopped, StopRequest, stop_signals
from .streamer import Streamer

if TYPE_CHECKING:
    from .engine import Engine


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


@dataclass(frozen=True)
class Training:
    """One call of `fit`. lr(step): the learning rate; evaluation: None for none; see `Engine.fit` for the others."""

    engine: Engine
    streamer: Streamer
    batches: Batches
    evaluation: Batches | None
    steps: int
    lr: Callable[[int], float]
    micro_batches: int = 1
    eval_every: int | None = None
    progress: bool = False
    callback: Callable[[StepRecord], None] | None = None

    def run(self) -> FitResult:
        engine, streamer = self.engine, self.streamer
        losses: list[float] = []
        tokens, begin, first = 0, time.perf_counter(), engine.log.version
        traffic = streamer.count_anew()
        path = None if engine.run_dir is None else engine.run_dir / runs.METRICS
        with Progress(self.progress, first, self.steps) as bar, runs.Metrics(path) as metrics, stop_signals() as stop:
            try:
                streamer.set_look(stop.look)
                self._evaluate_what_was_missed(first, metrics, stop)
                for record, batch in engine.take_steps(
                    self.batches, range(first, self.steps), self.lr, self.micro_batches, self._is_due
                ):
                    step = record.step
                    losses.append(record.loss)
                    tokens += batch_tokens(batch)
                    seconds = time.perf_counter() - begin
                    wait = engine.wait_share(traffic, seconds)
                    metrics.write(
                        step=step, loss=record.loss, grad=record.grad, lr=record.lr, skipped=record.skipped,
                        tokens=tokens, seconds=round(seconds, 3), wait_share=round(wait, 4),
                        fetch_bytes=traffic.fetch_bytes, flush_bytes=traffic.flush_bytes,
                    )  # fmt: skip
                    done = step + 1 - first
                    bar.step(
                        record.loss, tokens / seconds, wait, traffic.fetch_bytes / done, traffic.flush_bytes / done,
                        engine.learning.short,
                    )  # fmt: skip
                    if self.callback is not None:
                        self.callback(record)
                    self._check_stop(stop)
                    if self._is_due(step + 1):
                        self._evaluate(metrics, stop)
                if self.evaluation is not None:
                    self._evaluate(metrics, stop)
                self._check_stop(stop)
                engine.learning.finish()
                found = engine.learning.warnings
            finally:
                engine.settle(at_once=stop.at_once)
                streamer.set_look(None)
        seconds = time.perf_counter() - begin
        return FitResult(
            steps=len(losses), losses=losses, evals=list(engine.evals), tokens_per_s=tokens / seconds, seconds=seconds,
            wait_share=engine.wait_share(traffic, seconds), resident_bytes=streamer.resident_bytes,
            model_bytes=engine.layout.total_bytes, fetch_bytes=traffic.fetch_bytes, flush_bytes=traffic.flush_bytes,
            warnings=found,
        )  # fmt: skip

    def _is_due(self, step: int) -> bool:
        """Whether `step` steps in, an evaluation comes before the next one. The one at the end is not counted here."""
        due = self.evaluation is not None and self.eval_every is not None and step % self.eval_every == 0
        return due and 0 < step < self.steps

    def _evaluate_what_was_missed(self, first: int, metrics: runs.Metrics, stop: StopRequest) -> None:
        """A run that ended between a step and its evaluation makes up for it, so that the schedule is the same."""
        if self._is_due(first) and all(values["step"] != first for values in self.engine.evals):
            self._evaluate(metrics, stop)

    def _evaluate(self, metrics: runs.Metrics, stop: StopRequest) -> None:
        assert self.evaluation is not None
        step = self.engine.log.version
        values = {"step": step, **self.engine.measure(self.evaluation, lambda: self._check_stop(stop))}
        self.engine.evals[:] = [known for known in self.engine.evals if known["step"] != step] + [values]
        metrics.write(**{("step" if k == "step" else f"eval_{k}"): v for k, v in values.items()})

    def _check_stop(self, stop: StopRequest) -> None:
        stop.look()
        if stop.signum is not None:
            run_dir = self.engine.run_dir
            where = "the run has no run_dir and cannot be resumed" if run_dir is None else f"resume it from {run_dir}"
            raise Stopped(stop.signum, self.engine.log.version, where)


def check_same_data(batches: Batches, records: list[StepRecord]) -> None:
    """Raise JournalError unless the data gives the batches that the journal's first and last step were taken on."""
    for record in (records[0], records[-1]) if records else ():
        if not record.batch_crc:
            continue
        found = fingerprint(batches.batch(record.step))
        if found != record.batch_crc:
            raise JournalError(
                f"the data is not the run's: the batch of step {record.step} has fingerprint {found:08x}, the journal "
                f"has {record.batch_crc:08x}. Give the same data, batch size, tokenizer and template; to go on with "
                "other data on purpose, pass new_data=True (--new-data)"
            )
