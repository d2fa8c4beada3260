"""Warns, with numbers, if a run's records show that it learns nothing.

    skipped     more than half of the steps were skipped
    lanes       the losses of a step's lanes were equal: the perturbation does not reach the loss
    constant    the loss was the same, step after step
    rising      the mean loss is far above what it was (`rising.py`)
    vanishing   updates were folded, but next to none of the stored values changed (`FoldSample`)

All but the last follow from a journal's records, so `journal show` and `journal check` report them too. Each is
reported once, when it is found in the last `WINDOW` steps; results and progress lines keep counting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from ..methods.base import LOOK_FOR_NAN
from ..stream.fold_sample import FoldSample
from .journal import StepRecord
from .rising import WINDOW as RISING
from .rising import LossWatch, Rise

WINDOW = 20  # number of steps that are watched
LEAST = 4  # steps of a shorter run that are enough for a warning
VANISHED = 0.01
"""Updates vanish if a smaller share of the updated stored values changed."""
LEAST_SAMPLE = 1000  # values


class LearningWatch:
    """Gets every step's record. sample: a sample of the folds, if available; read now and then. tell: called once per
    warning, with its kind and text."""

    def __init__(
        self, sample: FoldSample | None = None, tell: Callable[[str, str], None] = lambda kind, text: None
    ) -> None:
        self._sample, self._tell = sample, tell
        self._last: deque[StepRecord] = deque(maxlen=WINDOW)
        self._steps = self._skipped = self._equal = self._same = self._most_same = 0
        self._loss = LossWatch()
        self._rise: Rise | None = None
        self._rise_at = 0
        self._found: list[str] = []  # kinds of warnings, in order

    def see(self, record: StepRecord) -> None:
        """One step, in order."""
        before = self._last[-1] if self._last else None
        self._last.append(record)
        self._steps += 1
        self._skipped += is_skipped(record)
        self._equal += _lanes_were_equal(record)
        self._same = self._same + 1 if before is not None and record.loss == before.loss else 1
        self._most_same = max(self._most_same, self._same)
        rise = self._loss.see(record)
        if rise is not None and self._rise is None:
            self._rise, self._rise_at = rise, record.step
            self._find("rising")
        if len(self._last) == WINDOW:
            self._look(self._steps % WINDOW == 0)

    def finish(self) -> None:
        """Call at the end of a run or of a part of it, so that short runs are checked too."""
        if self._steps >= LEAST:
            self._look(True)

    @property
    def warnings(self) -> list[str]:
        """The warnings so far, with their present numbers."""
        return [self._text(kind) for kind in self._found]

    @property
    def short(self) -> str:
        """A few words for a progress line; "" if nothing was found."""
        return self._text(self._found[0]).partition(":")[0] if self._found else ""

    def _look(self, at_folds: bool) -> None:
        last = self._last
        kinds = {
            "skipped": 2 * sum(map(is_skipped, last)) > len(last),
            "lanes": 2 * sum(map(_lanes_were_equal, last)) > len(last),
            "constant": self._same >= len(last),
            "vanishing": at_folds and self._vanishes(),
        }
        for kind, found in kinds.items():
            if found:
                self._find(kind)

    def _find(self, kind: str) -> None:
        if kind not in self._found:
            self._found.append(kind)
            self._tell(kind, self._text(kind))

    def _vanishes(self) -> bool:
        updated = sum(any(update.coeff != 0.0 for update in record.updates) for record in self._last)
        if self._sample is None or 2 * updated < len(self._last):  # no updates: that is another warning
            return False
        least = 0.0 if self._sample.stochastic else VANISHED
        return self._sample.looked >= LEAST_SAMPLE and self._sample.share() <= least

    def _text(self, kind: str) -> str:
        n = self._steps
        if kind == "skipped":
            text = f"{self._skipped} of {n} steps were skipped: losses or updates were not finite. Lower lr or eps"
            if self._skipped < n or self._last[-1].step >= n:  # some step was taken, here or before
                return text
            return f"{text}. If all were NaN from the first step on, lr is not the cause. {LOOK_FOR_NAN}"
        if kind == "rising":
            assert self._rise is not None
            return (
                f"the loss rises: {self._rise.now:.4g} in the {RISING} steps up to {self._rise_at}, and "
                f"{self._rise.best:.4g} at best: the rate is past its limit. Begin again with half of it or less, or "
                "with a schedule that decays; brake=True (--brake) halves it whenever this happens"
            )
        if kind == "lanes":
            return (
                f"{self._equal} of {n} steps had equal losses in all lanes: the perturbation does not reach the loss, "
                "and nothing is learned. Raise eps, compute in more bits, or look at what the loss depends on"
            )
        if kind == "constant":
            return (
                f"the loss was the same in {self._most_same} steps in a row: nothing is learned. Look at the labels "
                "and at what the loss depends on"
            )
        assert self._sample is not None
        return (
            f"{self._sample.share():.2%} of a sample of {self._sample.looked:,} stored values changed where updates "
            f"were folded into {' and '.join(sorted(self._sample.formats))}: updates vanish. Choose storage='int8+8' "
            "or 'bf16+16', rounding='stochastic', a larger fold_every or a larger lr"
        )


def is_skipped(record: StepRecord) -> bool:
    """Whether a step changed nothing because its losses or updates were not finite."""
    return record.skipped or record.loss != record.loss


def _lanes_were_equal(record: StepRecord) -> bool:
    return not is_skipped(record) and record.grad == 0.0


def warnings_of(records: Sequence[StepRecord]) -> list[str]:
    """The warnings that follow from a journal's records."""
    watch = LearningWatch()
    for record in records:
        watch.see(record)
    watch.finish()
    return watch.warnings
