"""Whether a run's loss rises: the sign of a rate past its limit, told from the losses of its steps alone.

Means over windows of `WINDOW` steps. The loss rises if the present window's mean is above the best one's by a tenth of
it and 2.5 times what single losses deviate by (from differences of neighbours before this window, which a trend hardly
touches): five times and more what a mean of ten deviates by. So it is found within some ten steps of a divergence, and
not before the 20th step.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

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
    """Sees every step's record, in order. Steps that were skipped do not count."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._steps: deque[float] = deque([0.0], maxlen=WINDOW)  # squares of differences, of the window
        self._best, self._squares, self._seen = math.inf, 0.0, 0

    def see(self, record: StepRecord) -> Rise | None:
        """How far the loss has risen; None if it has not."""
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
        mean = sum(self._last) / WINDOW
        self._best = min(self._best, mean)
        before = self._seen - WINDOW
        if before < WINDOW:
            return None
        limit = self._best + SHARE * abs(self._best) + DEVIATIONS * math.sqrt(self._squares / (before - 1))
        return Rise(mean, self._best) if mean > limit else None


class Brake:
    """Halves the rate when the loss rises, and looks anew from there.

    A function of the records before, so a run that is resumed brakes where it would have.

    A step's rate depends on the records up to the one before the last: on a GPU the last one is not read yet.
    """

    def __init__(self, records: Sequence[StepRecord] = ()) -> None:
        self._watch = LossWatch()
        self.seen = 0
        """How many records it has seen."""
        self._from: list[int] = []  # steps from which on the rate is half of what it was
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
        """See those that were not seen yet: the journal has steps that nobody asked for."""
        for record in records[self.seen - records[0].step if records else 0 :]:
            if self.see(record) is not None:
                _log.info("step %d: the loss rises; a brake halves the rate from step %d", record.step, record.step + 2)

    def factor(self, step: int) -> float:
        """What a step's rate is to be multiplied by."""
        return float(0.5 ** sum(step >= begin for begin in self._from))
