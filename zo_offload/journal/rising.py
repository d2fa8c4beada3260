"""Detects a rising loss, the sign of a rate that is too high, from the losses of a run's steps alone.

It compares means over windows of `WINDOW` steps. The loss rises if the present window's mean is above the best window's
by a tenth of it and by 2.5 times the deviation of single losses (from differences of neighbours before this window,
which a trend hardly affects): at least five times the deviation of a mean of ten. So a divergence is found within some
ten steps, and not before the 20th step.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..kernels.scalars import added
from .format import StepRecord

_log = logging.getLogger(__name__)

WINDOW = 10
SHARE, DEVIATIONS = 0.1, 2.5


@dataclass(frozen=True)
class Rise:
    """The mean of the last losses, and of the best ones in a row."""

    now: float
    best: float


class LossWatch:
    """Gets every step's record, in order. Skipped steps do not count."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._steps: deque[float] = deque([0.0], maxlen=WINDOW)  # squared differences in the window
        self._best, self._squares, self._seen = math.inf, 0.0, 0

    def see(self, record: StepRecord) -> Rise | None:
        """Add a record; return how far the loss has risen, None if it has not."""
        if record.skipped or not math.isfinite(record.loss):
            return None
        if len(self._last) == WINDOW:
            self._squares += self._steps[0]
        if self._last:
            self._steps.append((record.loss - self._last[-1]) ** 2 / 2)
        self._last.append(record.loss)
        self._seen += 1
        if len(self._last) < WINDOW:
            return None
        mean = added(list(self._last)) / WINDOW
        self._best = min(self._best, mean)
        before = self._seen - WINDOW
        if before < WINDOW:
            return None
        limit = self._best + SHARE * abs(self._best) + DEVIATIONS * math.sqrt(self._squares / (before - 1))
        return Rise(mean, self._best) if mean > limit else None


class Brake:
    """Halves the rate when the loss rises, and then starts watching again.

    A function of the earlier records, so a resumed run brakes at the same steps.

    A step's rate depends on the records up to the one before the last: on a GPU the last one is not read yet.
    """

    def __init__(self, records: Sequence[StepRecord] = ()) -> None:
        self._watch = LossWatch()
        self.seen = 0
        """Number of records seen."""
        self._from: list[int] = []  # steps from which the rate is halved once more
        self.follow(records)

    def see(self, record: StepRecord) -> Rise | None:
        """A step's record, in order."""
        rise = self._watch.see(record)
        self.seen = record.step + 1
        if rise is not None:
            self._from.append(record.step + 2)
            self._watch = LossWatch()
        return rise

    def follow(self, records: Sequence[StepRecord]) -> None:
        """See the records that were not seen yet."""
        for record in records[self.seen - records[0].step if records else 0 :]:
            if self.see(record) is not None:
                _log.info("step %d: the loss rises; a brake halves the rate from step %d", record.step, record.step + 2)

    def factor(self, step: int) -> float:
        """The factor of a step's rate."""
        return float(0.5 ** sum(step >= begin for begin in self._from))
