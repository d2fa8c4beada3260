"""Turns a step's losses into its update, its journal record and its log entry: at once, or (on a GPU) a step late.

    launch   losses -> coefficients -> the log. Blocks visited from here on get the update.
    settle   read the losses, build the record, write the journal. Raises the error that the method's policy asks for.

If the losses are on the host, the engine settles step t before step t + 1 begins, and `settle` also puts it in the log.
If they are not (`late.py`), the engine launches step t and then settles step t - 1 (so a halved eps is first used by
step t + 1). Any thread that is about to write bytes that contain a step settles the step first (`Origin.before_write`);
its losses are then on the host, or soon will be, since the GPU computed them before those bytes.

A step is taken once the log has it, which is the last action of `launch` (late) or `settle`. If anything raises before
that, the step is not taken; `mend` undoes what else was done for it.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..devices import Device, Later
from ..errors import ConfigError, DivergenceError
from ..journal.journal import Journal, StepRecord
from ..kernels.device_updates import UpdateTable, terms_on
from ..kernels.records import Gains, Perturbation, Update, sums_of, with_coefficients
from ..methods import Method
from ..numerics.updates import UpdateLog, with_folds
from . import late
from .late import LateLog, Launched
from .prepare import Prepared
from .remembered import after, remembered
from .tail import Tail

_NEVER = 1 << 62  # steps: local steps do not fold
MAX_HALVINGS = 10  # of eps, by on_nonfinite="halve_eps": with a thousandth of the given eps it is another method


class Stepper:
    """Takes the steps of one run, in order. limit: the largest value of the narrowest storage format."""

    def __init__(
        self,
        method: Method,
        run_seed: int,
        fold_every: int,
        log: UpdateLog,
        journal: Journal | None,
        device: Device,
        limit: float,
        *,
        halvings: int = 0,
        records: Sequence[StepRecord] = (),
        tail: Tail | None = None,
    ) -> None:
        """records: the records of the run's steps so far."""
        self.tail = tail
        self.method, self.run_seed, self.fold_every = method, run_seed, fold_every
        self.log, self.journal, self.device, self.limit = log, journal, device, limit
        self._halvings_before = halvings
        self._halved: set[int] = set()  # steps of this engine after which eps was halved
        self._open: deque[Launched] = deque()  # launched, not settled
        self._done: dict[int, StepRecord | DivergenceError] = {}  # settled, not yet returned
        self.memory = remembered(method, records)
        self._late_memory = self.memory.on(log.version, device.upload) if self.late else self.memory
        self._lane_terms: Tensor | None = None  # coefficients that the step's lanes were given, on the device
        self._apart_from: int | None = None  # version at which local steps began, which are not the run's
        self._lock = threading.RLock()  # reentrant: a write of blocks may settle during a settle

    @property
    def late(self) -> bool:
        """Whether losses stay on the device; only some devices want that."""
        return isinstance(self.log, LateLog)

    @property
    def halvings(self) -> int:
        """How often on_nonfinite="halve_eps" has halved eps so far."""
        return self._halvings_before + sum(step < self.log.version for step in self._halved)

    @property
    def current(self) -> Method:
        """The method with the eps of the next step."""
        return self.method.with_options(eps=self.method.eps * 0.5**self.halvings) if self.halvings else self.method

    def begin(self) -> None:
        """Call before the lanes of a step: settles unfinished launched steps, if their losses are on the host."""
        if not self.late:
            self.settle_before(self.log.version + 1)

    def bound(self, lanes: Sequence[Perturbation]) -> Sequence[Perturbation]:
        """A visit's lanes of the next step, with the coefficients of the sums that they are perturbed along.

        Raises ConfigError if the method gives other numbers of them than its lanes need.
        """
        sums = [terms for terms in sums_of(lanes) if not terms.is_known]
        if not sums:
            return lanes
        method, step = self.current, self.log.version
        values = method.term_values((self._late_memory if self.late else self.memory)[step])
        count = sum(len(terms.seeds) for terms in sums)
        if values.shape != (count,):
            raise ConfigError(
                f"method {method.name!r}: the lanes of step {step} are along sums of {count} noises whose coefficients "
                f"they do not have, and its term_coefficients gave a tensor of shape {tuple(values.shape)}"
            )
        if self.late:
            known = terms_on(self.device.torch_device, self.device.upload, sums, values)
            self._lane_terms = values
        else:
            known = with_coefficients(sums, values)
        of = dict(zip(sums, known, strict=True))
        return [replace(lane, terms=of[lane.terms]) if lane.terms in of else lane for lane in lanes]

    def launch(self, losses: Sequence[float] | Sequence[Tensor], lr: float, batch_crc: int) -> Launched:
        """Launch a step with its losses (float64 scalars on the device if `late`). The log has the step when this
        returns, unless the step must be settled first."""
        step = self.log.version
        if not self.late:
            launched = Launched(step, lr, batch_crc, self.current, losses=[float(x) for x in losses])
        else:
            assert isinstance(self.log, LateLog)
            stacked = torch.stack([x for x in losses if isinstance(x, Tensor)])
            method = self.current
            memory = self._late_memory[step]
            outcome = method.outcome(stacked, lr, memory if memory.numel() else None)
            unknown = [0.0] * len(outcome.coefficients)
            known = with_folds(method.updates(self.run_seed, step, unknown, lr), step, self.fold_every)
            terms, self._lane_terms = self._lane_terms, None
            count = 0 if terms is None else terms.numel()
            launched = Launched(step, lr, batch_crc, method, num_losses=len(losses), num_terms=count)

            def under_way(sent: Later, applies: Tensor) -> None:
                if memory.numel():
                    self._late_memory.put(step + 1, torch.where(applies, outcome.memory, outcome.skipped))
                launched.later = sent
                self._open.append(launched)

            largest = self.method.noise.largest
            late.launch(self.log, known, stacked, terms, outcome, self.limit, largest, self.device.later, under_way)
            return launched
        self._open.append(launched)
        return launched

    def adopt(self, record: StepRecord) -> Launched:
        """Launch a step that another process has decided, with that process's record."""
        assert not self.late and record.step == self.log.version
        launched = Launched(record.step, record.lr, record.batch_crc, self.current, losses=(), decided=record)
        self._open.append(launched)
        return launched

    def take(self, record: StepRecord) -> None:
        """Take, at once, a step that is known with its updates: losses are not needed, so they cannot be late."""
        assert record.step == self.log.version and self._apart_from is None
        self.settle_before(record.step)
        self.memory.put(record.step + 1, after(self.method, self.memory[record.step], record))
        self._write(record)
        self.log.append(record.updates)

    def apart(self, method: Method) -> Stepper:
        """A stepper for local steps of `method` after the run's. They are in no journal and fold nothing, so no stored
        weight changes. `take_back` ends them; until then this stepper takes no step."""
        self.settle_before(self.log.version)
        self._apart_from = self.log.version
        return Stepper(method, self.run_seed, _NEVER, self.log, None, self.device, self.limit)

    def take_back(self) -> None:
        """Forget all local steps, if there are any: lanes and evaluations see the run's weights again."""
        if self._apart_from is not None:
            self.log.cut(self._apart_from)
            self._apart_from = None

    def settle(self, launched: Launched) -> StepRecord:
        """Journal the step and return its record. Raises DivergenceError if the method stops at such a step."""
        self.settle_before(launched.step + 1)
        result = self._done.pop(launched.step, None)
        if result is None:
            raise ConfigError(
                f"step {launched.step} is not under way: it was finished before, or interrupted. {self.log.version} "
                "steps are taken; launch the next one"
            )
        if isinstance(result, DivergenceError):
            self._forget_after(launched.step)
            raise result
        return result

    def settle_before(self, version: int) -> None:
        """Settle every launched step below `version`, in order. Any thread may call this."""
        with self._lock:
            while self._open and self._open[0].step < version:
                launched = self._open[0]  # stays in the queue until settled: after an interruption it is settled again
                if launched.step not in self._done:
                    self._done[launched.step] = self._settle(launched)
                self._open.popleft()

    def _settle(self, launched: Launched) -> StepRecord | DivergenceError:
        step, lr = launched.step, launched.lr
        if launched.decided is not None:
            return self._apply(launched.decided)
        losses, terms, told, applies = launched.read()
        error: DivergenceError | None = None
        stop = False
        try:
            outcome = launched.method.update(self.run_seed, step, losses, lr, self.memory[step])
            self._check_update(step, outcome.updates)
            if self.tail is not None:
                self.tail.check(step)
            updates = with_folds(outcome.updates, step, self.fold_every)
            record = StepRecord(
                step, updates, outcome.loss, outcome.grad, lr, False, launched.batch_crc, scalars=outcome.scalars
            )
        except DivergenceError as divergence:
            updates, error = (), divergence
            halve = self.method.on_nonfinite == "halve_eps"
            others = self._halvings_before + len(self._halved - {step})
            stop = self.method.on_nonfinite == "stop" or (halve and others == MAX_HALVINGS)
            halve = halve and not stop
            record = StepRecord(step, (), math.nan, math.nan, lr, True, launched.batch_crc, halve)
            if halve:
                self._halved.add(step)
        if launched.later is None and error is not None and stop:
            return error
        self.memory.put(step + 1, after(self.method, self.memory[step], record))
        if launched.later is None:
            if self.tail is not None:
                self.tail.advance(record, self.journal)  # ahead of the journal: it cannot be rebuilt
            self._write(record)
            self.log.append(record.updates)
            return record
        assert isinstance(self.log, LateLog)
        late.check_same(step, updates, told, applies)
        if terms:
            late.check_terms(step, launched.method.term_values(self.memory[step]).tolist(), terms)
        if error is not None:  # the device has applied this step as one that changes nothing; the journal says the same
            record = replace(record, updates=late.nothing(self.log.steps[step - self.log.base]))
        self._write(replace(record, skipped=False))
        self.log.settle(step, record.updates)
        return error if error is not None and stop else record

    def _apply(self, record: StepRecord) -> StepRecord:
        if record.halved:
            self._halved.add(record.step)
        self.memory.put(record.step + 1, after(self.method, self.memory[record.step], record))
        self._write(record)
        self.log.append(record.updates)
        return record

    def _write(self, record: StepRecord) -> None:
        if self.journal is None:
            return
        if self.late and record.step < len(self.journal.steps):
            return  # settling is repeated after an interruption: the log may have the step already
        self.journal.append(record)

    def mend(self) -> None:
        """After an interruption: make journal, log and launched steps agree. Nothing else may be running.

        Settles the steps that were taken. Raises StorageError, and DivergenceError for a step whose result nobody waits
        for any more.
        """
        with self._lock:
            self.log.mend()
            self.take_back()
            version = self.log.version
            self.memory.cut(version)
            self._late_memory.cut(version)
            self._halved = {step for step in self._halved if step < version}
            if self.journal is not None:
                self.journal.mend(min(version, len(self.journal.steps)))
            while self._open and (self._open[-1].later is None or self._open[-1].step >= version):
                self._open.pop()
            self._done = {step: result for step, result in self._done.items() if step < version}
            for launched in list(self._open):
                self.settle_before(launched.step + 1)
                result = self._done[launched.step]
                if isinstance(result, DivergenceError):
                    self._forget_after(launched.step)
                    raise result

    def _forget_after(self, step: int) -> None:
        """Undo the step that was launched after a step at which the run stops. No block has its update."""
        if isinstance(self.log, LateLog):
            with self._lock:
                self.log.cut(step + 1)
                self._late_memory.cut(step + 1)
                self._open.clear()
                self._done.clear()

    def _check_update(self, step: int, updates: Sequence[Update]) -> None:
        """Raise if an update would overflow a 16-bit float format, before it reaches any weight."""
        largest = max((abs(update.coeff) for update in updates), default=0.0) * self.method.noise.largest
        if largest >= self.limit:
            raise DivergenceError(
                f"step {step}: an update of {largest:g} would overflow the storage format (largest value "
                f"{self.limit:g}). The weights are as after step {step - 1}. Lower lr or eps"
            )


def make_stepper(
    prepared: Prepared, device: Device, log: UpdateLog, journal: Journal | None, gains: Gains, *, waits: bool = False,
    tail: Tail | None = None,
) -> Stepper:  # fmt: skip
    """The stepper of a run with the steps of `log` and its journal. On a device with late losses, the log is late too.

    Exceptions: losses are not late if the method takes more lanes in a step depending on its losses, if each step waits
    for other processes, or if there is a tail, whose file is written before the journal.
    """
    if device.late and not prepared.method.comes_back and not waits and tail is None:
        factors = {gain.update for gain in gains.values()}
        log = LateLog(log, UpdateTable(device.torch_device, device.upload, factors, log.parts.names))
    formats = [place.fmt.torch_dtype for place in prepared.layout.places.values()]
    largest = min((torch.finfo(dtype).max for dtype in formats), default=math.inf)
    return Stepper(
        prepared.method, prepared.config.seed, prepared.fold_every, log, journal, device,
        largest / max((1.0, *(gain.update for gain in gains.values()))),
        halvings=sum(record.halved for record in journal.steps) if journal is not None else 0,
        records=() if journal is None else journal.steps, tail=tail,
    )  # fmt: skip
