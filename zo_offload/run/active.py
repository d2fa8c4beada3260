"""The run under way: what an engine has once weights were read, from its first use to `close`.

Getting there, at the first use, in this order; each is undone if the next one fails, newest first (`closing.py`):

    session     the tier is filled or reopened, with journal, lock, stepper, snapshots    session.py
    the model   its parameters are hollow, what stays is on the device, a guard is on it   vacated.py
    parts       streamer, passes, learning watch                                           wiring.py

All later work on the parts is done inside `work()` (`whole.py`), on one thread (`Door`).
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
from ..data.micro_batches import split_micro_batches
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
"""Makes the session; given what raises, before weights are read, if a reopened journal cannot go on as asked."""


class Run:
    """What an engine has under way, or will have at its first use. See the module's docstring.

    begin: makes the session. resumes: run_dir is to hold a run already. replays: its weights are those of a journal,
    and no step is taken. last_fit: how `fit` was called before the run was resumed. Its public methods are the
    engine's, which says more of them.
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
        """The gains of parameters that have one other than 1, once they are decided: see `gains.py`."""
        self.memory: MemoryPlan = self._plan_memory(example)
        self._planned_bytes = 0  # of the largest part of a batch that the memory plan has seen
        self.log = UpdateLog()
        self.journal: Journal | None = None
        self.evals: list[dict[str, float]] = []
        self.evaluated_data: str | None = None  # which rows those are on, where that is known
        self.horizon: int | None = None  # steps that the rate was begun for, where it depends on them: `binding.py`
        self.at_once = False  # whether the end is left to the journal, without a flush
        self.door, self.closing, self.brake = Door(), Closing(), Brake()
        self.session: Session | None = None
        self.parts: Parts | None = None
        self._whole: Whole | None = None
        self._lookout = Lookout()
        self._vacated = Vacated(opened)
        self._restoring: dict[str, Tensor] | None = None  # read for `restore`, not put back yet
        self._session_closings = 0
        self.stopping: str | None = None  # why `fit` is to end after the step that is under way
        self._check_data = self.closed = False

    # ---- getting under way -------------------------------------------------------------------------------------------

    def start(
        self,
        batch: Batch | None = None,
        micro_batches: int = 1,
        *,
        objective: Objective | None = None,
        admit: Callable[[Journal], None] | None = None,
    ) -> Parts:
        """What takes steps; at the first use, fill or reopen the tier, hollow the model, and wire it all.

        batch: memory is planned for it. admit: raises if a run that is reopened cannot go on as is asked; called before
        weights are read.
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
        """`start` for steps: a batch that cannot be cut, or in which nothing counts, is named before that.

        largest: a batch as large as any that will come, if that is known: memory is planned for it.
        """
        if self.parts is None and self.method.on_nonfinite != "skip":
            weigh = weighing(self.opened.model, self._asked(objective))
            weigh.shares(split_micro_batches(batch, micro_batches, self.config.whole))
        planned = batch if largest is None else largest
        return self.start(planned, micro_batches, objective=objective, admit=admit)

    def _open_session(self, admit: Callable[[Journal], None]) -> None:
        """Fill or reopen the tier, hollow the model. If it is broken off nothing is left of it."""
        self._undo_session()  # that, too, may have been broken off
        try:
            session = self._begin_session(admit)
            self.closing.add(self.device.trim)  # the window is gone: what an allocator keeps of it is others' to use
            self.closing.add(session.close)
            self.door.pid = os.getpid()
            self._vacated.leave(self.closing)
            self._session_closings = len(self.closing)  # what is newer is of the parts
            self.log, self.journal, self.gains = session.stepper.log, session.journal, session.gains
            self._check_data = session.reopened
            self.brake = Brake(() if self.journal is None else self.journal.steps)
            if session.reopened and self.journal is not None:
                metrics = run_directory.read_metrics(self._path(run_directory.METRICS))
                found, self.evaluated_data = run_directory.evaluations(metrics), run_directory.evaluated_data(metrics)
                # the journal may have been cut since
                self.evals = [values for values in found if values["step"] <= self.log.version]
            self.session = session
            self._resumes = True  # from here on what run_dir holds is this run
        except BaseException:
            if self.session is None:
                self._undo_session()
            raise

    def _undo_session(self) -> None:
        self.closing.close()
        self._vacated.undo()

    def _make_parts(self) -> Parts:
        """Wire it all. If it is broken off it can be done again: the session has the weights."""
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
        """As it was made, or corrected by what passes showed."""
        return self.prepared.plan if self.parts is None else self.parts.passes.plan

    def _plan_memory(
        self, batch: Batch | None, micro_batches: int = 1, objective: Objective | None = None
    ) -> MemoryPlan:
        """Window and service order for lanes on a part of `batch`; without one, activations count as nothing."""
        return self.prepared.plan_memory(
            batch, objective=self._asked(objective), micro_batches=micro_batches, process=self.opened.process_bytes
        )

    def _asked(self, objective: Objective | None) -> Objective:
        """The run's objective where a call has none of its own."""
        return self.objective if objective is None else objective

    def _path(self, name: str) -> Path | None:
        return self.run_dir / name if self.run_dir is not None and self.ranks.leads else None

    # ---- what it is bound to -----------------------------------------------------------------------------------------

    def check_objective(self, journal: Journal | None) -> None:
        """Raise JournalError if the run's steps so far were computed with another objective."""
        if journal is not None:
            check_objective(objective_name(self.objective, model_loss), journal.header, str(self.run_dir))

    def encoding(self) -> int:
        """Number of the encoding of rows that the run was begun with; the present one where none was begun."""
        path = self._path(run_directory.JOURNAL)
        header = self.opened.header if self.journal is None else self.journal.header
        if header is None and path is not None and self._resumes and path.exists():
            header = load_header(path)
        return ENCODING if header is None else int(header.get("encoding", 1))

    def bind(self, binding: Binding, call: FitCall, batches: Batches) -> None:
        """Keep what a call of `fit` binds the run to, and how it was called. Raises JournalError, ConfigError."""
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
        """A step as far as it goes without looking at its losses: on a GPU, enqueued. `finish` each, in order.

        objective: in place of the run's. Raises DataError where no label of the batch counts, unless such steps are
        skipped (on_nonfinite="skip").
        """
        if self._replays:
            raise ConfigError("a replayed engine does not train: export this step, or resume its run")
        batch, lr = as_made(batch), self.method.lr if lr is None else lr
        parts = self.start_steps(batch, micro_batches, objective)
        self.check_objective(self.journal)
        self._keep_budget(parts, batch, micro_batches, objective)
        stepper = parts.stepper
        self._ranked.meet(parts.session)
        with self.work():
            stepper.begin()
            step, losses = self.log.version, list[Any]()
            if (record := self._ranked.decided(step, batch.fingerprint)) is None:
                self._ranked.before_step(parts, step, lr, batch.fingerprint, micro_batches)
                losses = parts.passes.of_step(
                    batch, stepper.current, lr, micro_batches, step=step, late=stepper.late, objective=objective
                )
                self._planned_bytes = max(self._planned_bytes, as_made(batch).nbytes // micro_batches)
                record = self._ranked.decision(step, batch.fingerprint)
            launched = stepper.launch(losses, lr, batch.fingerprint) if record is None else stepper.adopt(record)
            if parts.session.snapshots is not None:
                parts.session.snapshots.tick(self.log.version, parts.streamer.window)
        return launched

    @entry
    def finish(self, launched: Launched) -> StepRecord:
        """Read a launched step's losses and put it on record. Raises what `on_nonfinite` says."""
        with self.work() as parts:
            record = parts.stepper.settle(launched)
            parts.watch.see(record)
            self._ranked.after_step(record, parts.session)
            self.brake.follow([record] if self.journal is None else self.journal.steps)
            return record

    def _keep_budget(self, parts: Parts, batch: Batch, micro_batches: int, objective: Objective | None) -> None:
        """A batch larger than any before is within the memory budget, or BudgetError says so before its step."""
        if self.memory.budget is None or as_made(batch).nbytes // micro_batches <= self._planned_bytes:
            return
        if self.memory.unknown:
            return parts.passes.watch_next()
        self.prepared.check_batch(self.memory, batch, objective=self._asked(objective), micro_batches=micro_batches)

    # ---- looking at it -----------------------------------------------------------------------------------------------

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
            call = call or (lambda model, inputs: model(**inputs))
            return parts.passes.forward([Lane(STILL, batch)], call, exact=True)[0]

    @entry
    def read(self, name: str) -> Tensor:
        """A parameter's current value, in the storage dtype."""
        with self.work() as parts:
            return parts.streamer.reader.read(name)

    @property
    def streamer(self) -> Streamer:
        """Where weights come from and what it counts."""
        return self.start().streamer

    @property
    def learning(self) -> LearningWatch:
        """What watches whether the steps that were taken since this run was opened teach the model anything."""
        return self.start().watch

    # ---- the end -----------------------------------------------------------------------------------------------------

    def heed(self, stop: StopRequest | None) -> None:
        """Look at `stop` before each owner's weights are made, and end there if it says so; None: at nothing."""
        self._lookout.stop = stop
        self.ranks.heed(stop)

    def work(self) -> Whole:
        """`with run.work() as parts:` around all that is done with the parts, which are made first; see `whole.py`."""
        self.start()
        assert self._whole is not None
        return self._whole

    @entry
    def flush(self, *, closes: bool = False) -> None:
        """Every block to the last step, in its tier; the journal to the disk."""
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
        """End of a call of `fit`: flush and sync, or (at once) leave it all to the journal, now and in `close`."""
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
            self.flush()
            names = [name for name, _ in self.opened.model.named_parameters() if name in self.plan.params]
            self._restoring = {name: self.read(name) for name in names}
        self.close()
        self._vacated.bring_back(self._restoring)
        self._restoring = None
        return self._vacated.hand_back()

    def close(self) -> None:
        """Flush, and release everything, whatever fails on the way. In a forked process nothing: it is the parent's."""
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
        except TornError as torn:  # nothing that can be flushed; what can be done is done when it is reopened
            _log.warning("%s", torn)
        finally:
            self.closing.close(last=self.ranks.leave)
