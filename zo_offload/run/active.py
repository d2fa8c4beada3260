"""The current run: an engine's state from its first use, when weights are read, to `close`.

The first use does the following in this order. If one fails, those before it are undone, newest first (`closing.py`):

    session     the tier is filled or reopened, with journal, lock, stepper, snapshots      session.py
    the model   its parameters are hollow, its buffers are on the device, a guard is on it  vacated.py
    parts       streamer, passes, learning watch                                            wiring.py

All later work on the parts happens inside `work()` (`whole.py`), on one thread (`Door`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..data.batches import Batches
from ..data.encode import ENCODING
from ..data.losses import Batch, Objective, model_loss, plain_forward, weighing
from ..data.made import as_made
from ..data.micro_batches import check_whole, split_micro_batches
from ..errors import ConfigError, TornError
from ..journal import run_directory
from ..journal.binding import Binding, bound_from, check_horizon, check_same_data
from ..journal.calls import FitCall
from ..journal.format import load_header
from ..journal.identity import check_objective, objective_name
from ..journal.journal import Journal, StepRecord
from ..journal.learning_watch import LearningWatch
from ..journal.rising import Brake
from ..kernels.records import STILL, Gains
from ..lanes.hub import Lane
from ..numerics.updates import UpdateLog
from ..plan.plan import Plan
from ..stream.ingest import ModuleBase
from ..stream.streamer import Streamer
from ..system.closing import Closing
from ..system.signals import Lookout, StopRequest
from .late import Launched
from .memory import MemoryPlan
from .opening import Opened
from .ranked import Ranked
from .session import Session
from .vacated import Vacated
from .whole import Door, Parts, Whole, entry
from .wiring import wire

_log = logging.getLogger(__name__)

Begin = Callable[[Callable[[Journal], None]], Session]
"""Makes the session. Its argument is called before weights are read; it raises if a reopened journal cannot go on."""


class Run:
    """An engine's current run, or the one that starts at its first use. See the module's docstring.

    begin: makes the session. resumes: run_dir must already hold a run. replays: the weights come from a journal, and no
    step is taken. last_fit: how `fit` was called before the run was resumed. `Engine` documents its public methods.
    """

    def __init__(
        self,
        opened: Opened,
        objective: Objective,
        begin: Begin,
        *,
        example: Batch | None = None,
        resumes: bool = False,
        replays: bool = False,
        last_fit: dict[str, Any] | None = None,
    ) -> None:
        self.opened, self.prepared, self.objective = opened, opened.prepared, objective
        self.method, self.config, self.device = self.prepared.method, self.prepared.config, opened.device
        self.run_dir, self.last_fit, self.ranks = opened.run_dir, last_fit, opened.ranks
        self._ranked = Ranked(opened.ranks, [block.name for block in self.prepared.plan.blocks])
        self._begin_session, self._resumes, self._replays = begin, resumes, replays
        self.gains: Gains | None = opened.gains
        """The gains of all parameters whose gain is not 1, once they are decided: see `gains.py`."""
        self.memory: MemoryPlan = self._plan_memory(example)
        self._planned_bytes = 0  # the largest part of a batch that memory was planned for
        self.log = UpdateLog()
        self.journal: Journal | None = None
        self.evals: list[dict[str, float]] = []
        self.evaluated_data: str | None = None  # the rows that `evals` are on, if known
        self.horizon: int | None = None  # number of steps in the rate's schedule, if it has one: `binding.py`
        self.at_once = False  # whether the run ends without a flush, with the last steps only in the journal
        self.door, self.closing, self.brake = Door(), Closing(), Brake()
        self.session: Session | None = None
        self.parts: Parts | None = None
        self._whole: Whole | None = None
        self._lookout = Lookout()
        self._vacated = Vacated(opened)
        self._restoring: dict[str, Tensor] | None = None  # read for `restore`, not put back yet
        self._session_closings = 0
        self.stopping: str | None = None  # why `fit` must end after the current step
        self._check_data = self.closed = False

    # ---- starting ----------------------------------------------------------------------------------------------------

    def start(
        self,
        batch: Batch | None = None,
        micro_batches: int = 1,
        *,
        objective: Objective | None = None,
        admit: Callable[[Journal], None] | None = None,
    ) -> Parts:
        """The parts that take steps. At the first use: fill or reopen the tier, hollow the model, and wire the parts.

        batch: memory is planned for it. admit: raises if a reopened run cannot go on with these arguments; called
        before weights are read.
        """

        def admit_all(journal: Journal) -> None:
            if admit is not None:
                self.check_objective(journal)
                admit(journal)

        if self.closed:
            raise ConfigError("this engine is closed; make another, or Engine.resume(run_dir)")
        if self.parts is not None:
            return self.parts
        if batch is not None:
            self.memory = self._plan_memory(batch, micro_batches, objective)
            self._planned_bytes = as_made(batch).nbytes // micro_batches
        else:
            self.memory = self.prepared.plan_blindly(process=self.opened.process_bytes)
        if self.session is None:
            self._open_session(admit_all)
        self.parts = self._make_parts()
        return self.parts

    def start_steps(
        self,
        batch: Batch,
        micro_batches: int,
        objective: Objective | None,
        *,
        largest: Batch | None = None,
        admit: Callable[[Journal], None] | None = None,
    ) -> Parts:
        """`start` for steps. First raises for a batch that cannot be cut, or in which nothing counts.

        largest: the largest batch of the run, if known: memory is planned for it.
        """
        self.opened.check_trains(self._asked(objective))
        check_whole(batch, None if (self.log.version if self.parts else self._resumes) else self.config.whole)
        if self.parts is None and self.method.on_nonfinite != "skip":
            weigh = weighing(self.opened.model, self._asked(objective))
            weigh.shares(split_micro_batches(batch, micro_batches, self.config.whole))
        return self.start(batch if largest is None else largest, micro_batches, objective=objective, admit=admit)

    def _open_session(self, admit: Callable[[Journal], None]) -> None:
        """Fill or reopen the tier, hollow the model. If it is interrupted, everything is undone."""
        self._undo_session()  # an earlier call may have been interrupted
        try:
            session = self._begin_session(admit)
            self.closing.add(self.device.trim)  # the window is gone: the allocator gives its memory back
            self.closing.add(session.close)
            self.door.pid = os.getpid()
            self._vacated.leave(self.closing)
            self._session_closings = len(self.closing)  # later ones belong to the parts
            self.log, self.journal, self.gains = session.stepper.log, session.journal, session.gains
            self._check_data = session.reopened
            self.brake = Brake(() if self.journal is None else self.journal.steps)
            if session.reopened and self.journal is not None:
                metrics = run_directory.read_metrics(self._path(run_directory.METRICS))
                found, self.evaluated_data = run_directory.evaluations(metrics), run_directory.evaluated_data(metrics)
                # the journal may have been cut since
                self.evals = [values for values in found if values["step"] <= self.log.version]
            self.session = session
            self._resumes = True  # from here on run_dir holds this run
        except BaseException:
            if self.session is None:
                self._undo_session()
            raise

    def _undo_session(self) -> None:
        self.closing.close()
        self._vacated.undo()

    def _make_parts(self) -> Parts:
        """Wire the parts. If it is interrupted it can be called again: the session has the weights."""
        assert self.session is not None
        self.closing.close(down_to=self._session_closings)
        if isinstance(self.opened.base, ModuleBase) and not self._replays:
            self.opened.base.let_go()
        try:
            parts = wire(self.opened, self.session, self.memory, self.objective, self._lookout.look, self.closing)
            self._whole = Whole(parts, [block.name for block in self.prepared.plan.blocks], self.run_dir)
            return parts
        except BaseException:
            self.closing.close(down_to=self._session_closings)
            raise

    @property
    def plan(self) -> Plan:
        """The plan as it was made, or as passes have corrected it."""
        return self.prepared.plan if self.parts is None else self.parts.passes.plan

    def _plan_memory(
        self, batch: Batch | None, micro_batches: int = 1, objective: Objective | None = None
    ) -> MemoryPlan:
        """Window and service order for lanes on a part of `batch`; without a batch, activations count as 0 bytes."""
        return self.prepared.plan_memory(
            batch, objective=self._asked(objective), micro_batches=micro_batches, process=self.opened.process_bytes
        )

    def _asked(self, objective: Objective | None) -> Objective:
        """`objective`, or the run's objective if it is None."""
        return self.objective if objective is None else objective

    def _path(self, name: str) -> Path | None:
        return self.run_dir / name if self.run_dir is not None and self.ranks.leads else None

    # ---- binding -----------------------------------------------------------------------------------------------------

    def check_objective(self, journal: Journal | None) -> None:
        """Raise JournalError if the run's steps so far were computed with another objective."""
        if journal is not None:
            check_objective(objective_name(self.objective, model_loss), journal.header, str(self.run_dir))

    def encoding(self) -> int:
        """Number of the row encoding that the run began with; the present one if no run has begun."""
        path = self._path(run_directory.JOURNAL)
        header = self.opened.header if self.journal is None else self.journal.header
        if header is None and path is not None and self._resumes and path.exists():
            header = load_header(path)
        return ENCODING if header is None else int(header.get("encoding", 1))

    def bind(self, binding: Binding, call: FitCall, batches: Batches) -> None:
        """Record the binding of a call of `fit`, and its arguments. Raises JournalError, ConfigError."""
        check_horizon(self.horizon, binding.steps)
        self.horizon = binding.horizon if self.horizon is None else self.horizon
        if self.journal is not None and self.run_dir is not None:
            self.horizon = binding.bind(self.journal)
            if self.ranks.leads:
                run_directory.save_fit(self.run_dir, call.record())
        self.last_fit = call.record()
        if self._check_data and not binding.new_data:
            assert self.journal is not None
            check_same_data(batches, self.journal.steps[bound_from(self.journal) :])
        self._check_data = False

    # ---- steps -------------------------------------------------------------------------------------------------------

    @entry
    def launch(
        self, batch: Batch, lr: float | None = None, *, micro_batches: int = 1, objective: Objective | None = None
    ) -> Launched:
        """Do the part of a step that needs no losses on the host; on a GPU, enqueue it. `finish` each step, in order.

        objective: used in place of the run's. Raises DataError if no label of the batch counts, unless such steps are
        skipped (on_nonfinite="skip").
        """
        if self._replays:
            raise ConfigError("a replayed engine does not train: export this step, or resume its run")
        batch, lr = as_made(batch), self.method.lr if lr is None else lr
        parts = self.start_steps(batch, micro_batches, objective)
        self.check_objective(self.journal)
        self.keep_budget(parts, batch, micro_batches, objective)
        stepper = parts.stepper
        self._ranked.meet(parts.session)
        with self.work():
            stepper.begin()
            step, late, losses = self.log.version, stepper.late, list[Any]()
            if (record := self._ranked.decided(step, batch.fingerprint)) is None:
                self._ranked.before_step(parts, step, lr, batch.fingerprint, micro_batches)
                losses = parts.passes.of_step(
                    batch, stepper.current, stepper.bound, lr, micro_batches, step=step, late=late, objective=objective
                )
                self._planned_bytes = max(self._planned_bytes, as_made(batch).nbytes // micro_batches)
                record = self._ranked.decision(step, batch.fingerprint)
            launched = stepper.launch(losses, lr, batch.fingerprint) if record is None else stepper.adopt(record)
            if parts.session.snapshots is not None:
                parts.session.snapshots.tick(self.log.version, parts.streamer.window)
        return launched

    @entry
    def finish(self, launched: Launched) -> StepRecord:
        """Read a launched step's losses and record the step. Raises the error that `on_nonfinite` asks for."""
        with self.work() as parts:
            record = parts.stepper.settle(launched)
            parts.watch.see(record)
            self._ranked.after_step(record, parts.session)
            self.brake.follow([record] if self.journal is None else self.journal.steps)
            return record

    def keep_budget(self, parts: Parts, batch: Batch, micro_batches: int, objective: Objective | None) -> None:
        """Raise BudgetError, before its step, if a batch larger than all before exceeds the memory budget."""
        if self.memory.budget is None or as_made(batch).nbytes // micro_batches <= self._planned_bytes:
            return
        if self.memory.unknown:
            return parts.passes.watch_next()
        self.prepared.check_batch(self.memory, batch, objective=self._asked(objective), micro_batches=micro_batches)

    # ---- reading it --------------------------------------------------------------------------------------------------

    @entry
    def measure(self, batches: Batches, **options: Any) -> dict[str, float] | None:
        """Means over `batches` at the current weights; options: of `Passes.measure`."""
        with self.work() as parts:
            return parts.passes.measure(batches, **options)

    @entry
    def forward(self, batch: Batch, call: Callable[[nn.Module, Batch], Any] | None = None) -> Any:
        """`call(model, batch)` at the current weights, default `model(**batch)`."""
        self.start(batch, objective=plain_forward)  # no loss is asked for
        with self.work() as parts:
            return parts.passes.forward([Lane(STILL, batch)], call or (lambda m, inputs: m(**inputs)), exact=True)[0]

    @entry
    def read(self, name: str) -> Tensor:
        """A parameter's current value, in the storage dtype."""
        with self.work() as parts:
            return parts.streamer.reader.read(name)

    @property
    def streamer(self) -> Streamer:
        """The source of weights, with its counters."""
        return self.start().streamer

    @property
    def learning(self) -> LearningWatch:
        """The watch on whether the model learns from the steps taken since this run was opened."""
        return self.start().watch

    # ---- the end -----------------------------------------------------------------------------------------------------

    def heed(self, stop: StopRequest | None) -> None:
        """Check `stop` before each owner's weights are emitted, and end there if it says so; None: no check."""
        self._lookout.stop = stop
        self.ranks.heed(stop)

    def work(self) -> Whole:
        """`with run.work() as parts:` must surround all work on the parts; it makes them first. See `whole.py`."""
        self.start()
        assert self._whole is not None
        return self._whole

    @entry
    def flush(self, *, closes: bool = False) -> None:
        """Bring every block in its tier to the last step, and the journal to the disk."""
        if not closes:
            self.start()
        assert self._whole is not None
        with self._whole as parts:
            parts.stepper.settle_before(self.log.version)
            parts.session.settle()
            parts.streamer.flush_all()
            if self.journal is not None:
                self.journal.make_durable(self.log.version)

    @entry
    def settle(self, *, at_once: bool = False) -> None:
        """End a call of `fit`: flush and sync, or (at_once) rely on the journal alone, now and in `close`."""
        self.at_once = at_once
        if self.parts is None or self.closed:
            return
        if at_once:
            with self.work() as parts:
                parts.stepper.settle_before(self.log.version)
        else:
            self.flush()

    @entry
    def restore(self) -> nn.Module:
        """The module as it was given, with the current weights; the run is closed."""
        if self._restoring is None:
            self._vacated.check_room()
            self.flush()
            names = [name for name, _ in self.opened.model.named_parameters() if name in self.plan.params]
            self._restoring = {name: self.read(name) for name in names}
        self.close()
        self._vacated.bring_back(self._restoring)
        self._restoring = None
        return self._vacated.hand_back()

    def close(self) -> None:
        """Flush, and release everything, even if a part fails. Does nothing in a forked process."""
        if not self.door.is_forked:
            self._close()

    @entry
    def _close(self) -> None:
        if self.parts is not None and self.parts.passes.is_inside():
            raise ConfigError("the engine cannot be closed from within one of its own passes")
        first, self.closed = not self.closed, True
        try:
            if first and not self.at_once and self.parts is not None:
                self.flush(closes=True)
        except TornError as torn:  # nothing can be flushed; reopening the run rebuilds the blocks
            _log.warning("%s", torn)
        finally:
            self.closing.close(last=self.ranks.leave)
