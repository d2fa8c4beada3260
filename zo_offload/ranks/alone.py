"""What a run asks of the processes that train it, and the answers where there is one: this one.

`Team` (ranks that were launched together) and `Sharing` (those of a pool) answer for several.
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
    """Which of `count` lanes a rank computes: consecutive ones, as equal as can be, the first ranks one more.

    Consecutive, since the lanes of one perturbation are next to each other: a rank makes noise for as few of them as
    can be. Rank 0 always has some.
    """
    each, more = divmod(count, world)
    begin = rank * each + min(rank, more)
    return range(begin, begin + each + (rank < more))


class Alone:
    """One process: it has all lanes, and nobody to tell. Also what `Team` is to others."""

    rank, world, local_rank, local_world = 0, 1, 0, 1
    index = 0
    """Of the engine among those that this process has made with ranks."""
    tells = False
    """Whether there are others, or may be."""
    elastic = False
    """Whether they come and go (`pool.py`): one of them decides each step, and tells its record."""

    def __init__(self) -> None:
        self._stop: StopRequest | None = None

    @property
    def leads(self) -> bool:
        """Whether this rank writes the run directory, and prints."""
        return self.rank == 0

    def cells(self, count: int) -> range:
        """Which of so many lanes are mine; see the function."""
        return cells(count, self.rank, self.world)

    def gather(self, at: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The values of all ranks, by rank. at: where the run is; its first word is the kind of turn. JSON."""
        return [dict(values)]

    def first(self, at: str, make: Callable[[], _T]) -> _T:
        """What `make` gives on rank 0, on all ranks. Of JSON."""
        return make()

    def same(self, at: str, values: Mapping[str, Any], hint: str = "") -> None:
        """Raise RankError, with names, unless all ranks have these values."""

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """What is raised inside is raised on all ranks, at their next turn."""
        yield

    @contextlib.contextmanager
    def together(self, at: str) -> Iterator[None]:
        """As `telling`; and who comes to the end of the block waits there for the others."""
        yield

    def about(self, values: Mapping[str, Any], audit: Sequence[Any] | None = None) -> None:
        """What the next `losses` are of: must be the same on all ranks. audit: see `losses`."""

    def share(self, step: int, count: int, compute: Callable[[Sequence[int]], Sequence[Any]]) -> list[Any] | None:
        """The losses of `count` lanes of a step, in the order of one process. compute: those of some, by their numbers.

        None: the step was decided meanwhile, and nobody needs them. Raises as `losses` does.
        """
        return list(compute(range(count)))

    def losses(self, step: int, mine: Sequence[float]) -> list[float]:
        """The losses of all lanes, in the order of one process, from those of my cells.

        Raises RankError where ranks differ in what `about` said, or in the checksum of a block that two of them have
        at one version: audit = (kind, block, its name, version, checksum).
        """
        return list(mine)

    def welcome(self, journal: Journal | None, about: Mapping[str, Any]) -> None:
        """Others may join from here on, with this journal. about: what they have to know of the run, of JSON."""

    def follows(self, history: Callable[[], tuple[int, str]]) -> None:
        """How to ask for the steps that were taken here, and what names them."""

    def decided(self, step: int) -> StepRecord | None:
        """A step's record, where somebody else decides and has done so."""
        return None

    def decision(self, step: int) -> StepRecord | None:
        """A step's record, once it is there; None where this process decides itself."""
        return None

    def publish(self, record: StepRecord, history: str) -> None:
        """A step was taken, and led to this history."""

    def split(self, at: str, mine: Mapping[int, Any]) -> dict[int, Any] | None:
        """All items of something that was split by number, from mine. None if a stop was asked for meanwhile."""
        return dict(mine)

    def heed(self, stop: StopRequest | None) -> None:
        """Whose signals this rank tells the others; None: nobody's."""
        self._stop = stop

    def stopped_by(self) -> int | None:
        """The signal that ends the run after this step: on every rank the same."""
        return None if self._stop is None else self._stop.signum

    def after_a_stop(self, run_dir: Path | None) -> str:
        """What there is to do after a signal has ended this process's part, in words."""
        return "the run has no run_dir and cannot be resumed" if run_dir is None else f"resume it from {run_dir}"

    def is_stopping(self) -> bool:
        """Whether what is split now can be broken off: `split` will say so."""
        return False

    def leave(self) -> None:
        """The engine is closed: others need not wait for this rank. Safe to call twice."""
