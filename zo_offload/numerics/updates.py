"""The updates that blocks may still lack: one tuple of `Update`s per step, in step order.

A block at version v is brought to version t by the updates of steps v..t-1, alone, on any device. The log in memory
mirrors the journal; the journal is the run.

Folding: an update with `fold` set rounds the sum so far into the stored bytes; later updates stay pending, and are
applied in float32 registers wherever the weights are used. Stored bytes only hold whole folds, so a block is brought to
the version of the last fold (`UpdateLog.folded`), not of the last step.

Parts: a step may leave parameters out (`Parts`). In such a step a parameter gets no noise and no decay. If the step
folds, the parameter's pending updates are folded, by an update that does nothing else; if it has none, its bytes are
already those of that version, and need not be written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from ..errors import JournalError
from ..kernels.float32 import scaled
from ..kernels.records import Update, Updates


def with_folds(updates: Sequence[Update], step: int, fold_every: int) -> tuple[Update, ...]:
    """A step's updates with their folds set: its last update folds iff fold_every divides step + 1, no other does. The
    first update always begins the step, even if the user's method says otherwise: the journal does not store this.

    Folds depend on the step's number alone, so stops and evaluations do not change a run. A skipped step has no update,
    so nothing folds there and the sum stays pending until the next step that folds.
    """
    last = len(updates) - 1
    due = (step + 1) % fold_every == 0
    return tuple(replace(update, fold=due and i == last, begins=i == 0) for i, update in enumerate(updates))


@dataclass(frozen=True)
class Parts:
    """Parts of a model, some of which a step trains. of: parameter -> part; a parameter that is not in it always
    trains. chosen(step): the parts that a step trains, a function of its number alone."""

    of: Mapping[str, str] = field(default_factory=dict)
    chosen: Callable[[int], frozenset[str]] = lambda step: frozenset()

    def trains(self, part: str | None, step: int) -> bool:
        """Whether a step trains a part; None: parameters in no part."""
        return part is None or part in self.chosen(step)

    @property
    def names(self) -> list[str]:
        """The parts."""
        return sorted(set(self.of.values()))


def left_out(updates: Sequence[Update], pending: bool) -> tuple[Update, ...]:
    """A step's updates for a parameter that it leaves out. pending: whether the parameter has unfolded updates."""
    folds = pending and any(update.fold for update in updates)
    return (replace(updates[-1], coeff=0.0, decay=1.0, begins=True),) if folds else ()


class UpdateLog:
    """Updates of steps `base`..`version - 1`. Version t is the state after t steps.

    parts: what single steps leave out.
    """

    def __init__(self, base: int = 0, parts: Parts | None = None) -> None:
        self.base = base
        self.parts = Parts() if parts is None else parts
        self.folded = base
        """The version that blocks are brought to: all steps up to and including the last one that folds."""
        self._steps: list[tuple[Update, ...]] = []
        self._since = lru_cache(maxsize=64 + 8 * len(self.parts.names))(self._collect)
        self._needed: dict[tuple[str | None, int], int] = {}  # results of `needed`

    @property
    def steps(self) -> Sequence[tuple[Update, ...]]:
        """Updates of each step from `base` on."""
        return self._steps

    @property
    def version(self) -> int:
        return self.base + len(self._steps)

    def append(self, updates: Sequence[Update]) -> None:
        """Add one step; an empty sequence is a step that changed nothing (skipped).

        The step counts once it is in the list: `mend` makes everything else agree with the list.
        """
        self._steps.append(tuple(updates))
        self._follow()

    def _follow(self) -> None:
        """Derive the rest from the list of steps, after a step was added."""
        if any(update.fold for update in self._steps[-1]):
            self.folded = self.version
        self._since.cache_clear()
        self._needed.clear()

    def cut(self, version: int) -> None:
        """Forget the steps from `version` on. No block may have them."""
        del self._steps[max(0, version - self.base) :]
        self.mend()

    def mend(self) -> None:
        """After an interrupted `append` or `cut`: derive everything from the list of steps."""
        last = next((i for i in reversed(range(len(self._steps))) if any(u.fold for u in self._steps[i])), -1)
        self.folded = self.base + last + 1
        self._since.cache_clear()
        self._needed.clear()

    def since(self, version: int, decay: bool, gain: float = 1.0, part: str | None = None) -> Updates:
        """Updates that a parameter at `version` lacks; decay=False leaves weight decay out (biases, norms).

        gain: a factor of each coefficient, rounded to float32. part: the parameter's. version: of a fold, as for all
        stored bytes.
        """
        if version < self.base:
            raise JournalError(f"updates before step {self.base} are not in memory; a block is at version {version}")
        return self._since(version, decay, gain, part)

    def needed(self, part: str | None, fold: int) -> int:
        """The version from which on a part's bytes are those of a fold: after the last step that trains it."""
        found = self._needed.get((part, fold))
        if found is None:
            trains = (step + 1 for step in range(fold - 1, -1, -1) if self.parts.trains(part, step))
            found = self._needed[part, fold] = next(trains, 0)
        return found

    def lacks(self, version: int, part: str | None) -> bool:
        """Whether a part's stored bytes at `version` are not those of the last fold."""
        return version < self.needed(part, self.folded)

    def _collect(self, version: int, decay: bool, gain: float, part: str | None) -> Updates:
        flat, pending = list[Update](), False
        for step, updates in enumerate(self._steps[version - self.base :], version):
            trains = self.parts.trains(part, step)
            flat += updates if trains else left_out(updates, pending)
            pending = (pending or (trains and bool(updates))) and not any(update.fold for update in updates)
        if gain != 1.0:
            flat = [replace(update, coeff=scaled(update.coeff, gain)) for update in flat]
        return Updates(flat if decay else (u if u.decay == 1.0 else replace(u, decay=1.0) for u in flat))
