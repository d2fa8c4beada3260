"""From a step's losses to its update, its journal record and the log: at once, or (on a GPU) a step late.

    launch   losses -> coefficients -> the log. Blocks visited from here on get the update.
    settle   read the losses, build the record, write the journal. Raises what the method's policy says.

Where the losses are on the host, both happen in `step`. Where they are not (`late.py`), the engine launches step t and
then settles step t - 1 (so a halved eps is first used by step t + 1). Whoever is about to write bytes that contain a
step settles it first (`Journal.settle`), on whatever thread that is; its losses are on the host by then or soon, since
the bytes came after them on the GPU.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import late
from .devices import CpuDevice
from .errors import DivergenceError
from .fused import Update
from .journal import Journal, StepRecord
from .late import LateLog, Launched
from .methods import MeZO
from .updates import UpdateLog, with_folds

MAX_HALVINGS = 10  # of eps, by on_nonfinite="halve_eps": a thousandth of what was asked is no longer the same method


class Stepper:
    """Steps of one run, in order. limit: the largest value of the narrowest storage format."""

    def __init__(
        self,
        method: MeZO,
        run_seed: int,
        fold_every: int,
        log: UpdateLog,
        journal: Journal | None,
        device: CpuDevice,
        limit: float,
        *,
        halvings: int = 0,
    ) -> None:
        self.method, self.run_seed, self.fold_every = method, run_seed, fold_every
        self.log, self.journal, self.device, self.limit = log, journal, device, limit
        self.halvings = halvings
        """Of eps so far, by on_nonfinite="halve_eps"."""
        self._open: deque[Launched] = deque()  # launched, not settled
        self._done: dict[int, StepRecord | DivergenceError] = {}  # settled, not asked for
        self._lock = threading.RLock()  # the journal may ask for what is being settled
        if journal is not None and self.late:
            journal.settle = self.settle_before

    @property
    def late(self) -> bool:
        """Whether losses stay on the device: it must want that, and the method must have it."""
        return isinstance(self.log, LateLog) and hasattr(self.method, "coefficients")

    @property
    def current(self) -> MeZO:
        """The method with the eps that the next step is taken with."""
        return self.method.with_options(eps=self.method.eps * 0.5**self.halvings) if self.halvings else self.method

    def launch(self, losses: Sequence[float] | Sequence[Tensor], lr: float, batch_crc: int) -> Launched:
        """Take a step's losses (float64 scalars on the device if `late`). The log has the step when this returns,
        unless it must be settled to know."""
        step = self.log.version
        if not self.late:
            launched = Launched(step, lr, batch_crc, self.current, losses=[float(x) for x in losses])
        else:
            assert isinstance(self.log, LateLog)
            stacked = torch.stack([x for x in losses if isinstance(x, Tensor)])
            # seeds, decays and folds do not depend on the losses, so any will do
            known = with_folds(
                self.current.update(self.run_seed, step, [0.0] * len(losses), lr).updates, step, self.fold_every
            )
            later = late.launch(
                self.log, known, stacked, self.current.coefficients(stacked, lr), self.limit, self.device.later
            )
            launched = Launched(step, lr, batch_crc, self.current, later=later, num_losses=len(losses))
        with self._lock:
            self._open.append(launched)
        return launched

    def settle(self, launched: Launched) -> StepRecord:
        """The step's record, journaled. Raises DivergenceError if the method stops at a step like this."""
        self.settle_before(launched.step + 1)
        result = self._done.pop(launched.step)
        if isinstance(result, DivergenceError):
            self._forget_after(launched.step)
            raise result
        return result

    def settle_before(self, version: int) -> None:
        """Settle every launched step below `version`, in order. Any thread may call this."""
        with self._lock:
            while self._open and self._open[0].step < version:
                launched = self._open.popleft()
                self._done[launched.step] = self._settle(launched)

    def _settle(self, launched: Launched) -> StepRecord | DivergenceError:
        step, lr = launched.step, launched.lr
        losses, told, applies = launched.read()
        error: DivergenceError | None = None
        stop = False
        try:
            outcome = launched.method.update(self.run_seed, step, losses, lr)
            self._check_update(step, outcome.updates)
            updates = with_folds(outcome.updates, step, self.fold_every)
            record = StepRecord(step, updates, outcome.loss, outcome.grad, lr, False, launched.batch_crc)
        except DivergenceError as divergence:
            updates, error = (), divergence
            halve = self.method.on_nonfinite == "halve_eps"
            stop = self.method.on_nonfinite == "stop" or (halve and self.halvings == MAX_HALVINGS)
            halve = halve and not stop
            record = StepRecord(step, (), math.nan, math.nan, lr, True, launched.batch_crc, halve)
            self.halvings += halve
        if launched.later is None:
            if error is not None and stop:
                return error
            self._write(record)
            self.log.append(record.updates)
            return record
        assert isinstance(self.log, LateLog)
        late.check_same(step, updates, told, applies)
        if error is not None:  # the device has this step already, as one that changes nothing: so says the journal
            record = replace(record, updates=late.nothing(self.log.steps[step - self.log.base]))
        self.log.settle(step, record.updates)
        self._write(replace(record, skipped=False))
        return error if error is not None and stop else record

    def _write(self, record: StepRecord) -> None:
        if self.journal is not None:
            self.journal.append(record)

    def _forget_after(self, step: int) -> None:
        """A run that stops at a step takes back the one that was launched after it. No block has its update."""
        if isinstance(self.log, LateLog):
            with self._lock:
                self._open.clear()
                self._done.clear()
                self.log.cut(step + 1)

    def _check_update(self, step: int, updates: Sequence[Update]) -> None:
        """An update that would overflow a 16-bit float format is refused before it reaches any weight."""
        largest = max((abs(update.coeff) for update in updates), default=0.0) * late.MAX_NOISE
        if largest >= self.limit:
            raise DivergenceError(
                f"step {step}: an update of {largest:g} would overflow the storage format (largest value "
                f"{self.limit:g}). The weights are as after step {step - 1}. Lower lr or eps"
            )
