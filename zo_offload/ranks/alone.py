"""The interface of a run to the processes that train it, implemented for a single process.

`Team` (ranks that were launched together) and `Sharing` (those of a pool) implement it for several processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..journal.format import StepRecord
from ..journal.journal import Journal
from ..system.signals import StopRequest

_T = TypeVar("_T")


def cells(count: int, rank: int, world: int) -> range:
    """The lanes, among `count`, that a rank computes: consecutive ones, in equal shares, the first ranks one more.

    Consecutive, since the lanes of one perturbation are next to each other: so a rank makes noise for as few
    perturbations as possible. Rank 0 always has some lanes.
    """
    each, more = divmod(count, world)
    begin = rank * each + min(rank, more)
    return range(begin, begin + each + (rank < more))


class Alone:
    """A single process: it has all lanes and no other ranks. Also the interface of `Team`."""

    rank, world, local_rank, local_world = 0, 1, 0, 1
    index = 0
    """Number of this engine among those that this process has made with ranks."""
    tells = False
    """Whether there are other processes, or may be."""
    elastic = False
    """Whether processes come and go (`pool.py`): one of them decides each step and publishes its record."""

    def __init__(self) -> None:
        self._stop: StopRequest | None = None

    @property
    def leads(self) -> bool:
        """Whether this rank writes the run directory, and prints."""
        return self.rank == 0

    def cells(self, count: int) -> range:
        """This rank's lanes among `count`; see the function `cells`."""
        return cells(count, self.rank, self.world)

    def gather(self, at: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The values of all ranks, by rank. at: the point of the run; its first word is the kind of turn. JSON."""
        return [dict(values)]

    def first(self, at: str, make: Callable[[], _T]) -> _T:
        """The result of `make` on rank 0, for all ranks. JSON."""
        return make()

    def same(self, at: str, values: Mapping[str, Any], hint: str = "") -> None:
        """Raise RankError, with the differences, unless all ranks have these values."""

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """An error inside this context is raised on all ranks, at their next turn."""
        yield

    @contextlib.contextmanager
    def together(self, at: str) -> Iterator[None]:
        """As `telling`; ranks also wait for each other at the end of the block."""
        yield

    def about(self, values: Mapping[str, Any], audit: Sequence[Any] | None = None) -> None:
        """Set the facts of the next `losses`, which must be the same on all ranks. audit: see `losses`."""

    def share(self, step: int, count: int, compute: Callable[[Sequence[int]], Sequence[Any]]) -> list[Any] | None:
        """The losses of `count` lanes of a step, in the order of one process. compute(lanes): the losses of some lanes.

        Returns None if the step was decided meanwhile. Raises as `losses` does.
        """
        return list(compute(range(count)))

    def losses(self, step: int, mine: Sequence[float]) -> list[float]:
        """The losses of all lanes, in the order of one process, from the losses of this rank's lanes.

        Raises RankError if ranks differ in the facts given to `about`, or in the checksum of a block that two of them
        have at one version: audit = (kind, block, its name, version, checksum).
        """
        return list(mine)

    def welcome(self, journal: Journal | None, about: Mapping[str, Any]) -> None:
        """From here on others may join, with this journal. about: the run's description for them, as JSON."""

    def follows(self, history: Callable[[], tuple[int, str]]) -> None:
        """Set the function that returns the number of steps taken here, and their history."""

    def decided(self, step: int) -> StepRecord | None:
        """A step's record, if another process decides steps and has decided this one."""
        return None

    def decision(self, step: int) -> StepRecord | None:
        """Wait for a step's record; None if this process decides itself."""
        return None

    def publish(self, record: StepRecord, history: str) -> None:
        """Call after a step was taken, with the history after it."""

    def split(self, at: str, mine: Mapping[int, Any]) -> dict[int, Any] | None:
        """All items of work that was split by number, given this rank's. None if a stop was requested."""
        return dict(mine)

    def heed(self, stop: StopRequest | None) -> None:
        """Set the stop request whose signals this rank sends to the others; None for none."""
        self._stop = stop

    def stopped_by(self) -> int | None:
        """The signal that ends the run after this step; the same on every rank."""
        return None if self._stop is None else self._stop.signum

    def after_a_stop(self, run_dir: Path | None) -> str:
        """Advice for the user after a signal has ended this process."""
        return "the run has no run_dir and cannot be resumed" if run_dir is None else f"resume it from {run_dir}"

    def is_stopping(self) -> bool:
        """Whether split work can stop early, because `split` will return None."""
        return False

    def leave(self) -> None:
        """Tell the others that the engine is closed, so that they do not wait. Safe to call twice."""
