"""Leasing and committing the lanes of one pass: the code that keeper and members share.

A process takes its share of the next lanes from a counter, computes them in one pass and commits each loss: the first
number that is written counts. If no lanes are left it waits; lanes that are not committed after `patience` it claims
and computes itself. So a member that died, stopped or is slow costs the current step that patience once, and nothing
else. A claim names the process that has a lane now; other processes then wait for it again.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from .alone import Alone
from .line import Lost
from .pace import FIRST_PATIENCE_S, lanes_of
from .sealed import Sealed

FIRST_NAP_S, LONGEST_NAP_S = 1e-3, 0.02
LOOK_S = 0.25
"""Seconds between checks while waiting: whether the others live, a signal came, or this process was excluded."""

Compute = Callable[[Sequence[int]], Sequence[float]]


class Sharing(Alone):
    """One process of a pool. me: its name in the store."""

    tells, elastic = True, True

    def __init__(self, me: str, patience: float | None) -> None:
        super().__init__()
        self.me, self._patience = me, patience
        self._room: Sealed | None = None
        self._state: dict[str, Any] = {}
        self._about: dict[str, Any] = {}
        self._audit: list[Any] | None = None
        self._turn = (-1, -1)  # step, and number of the pass in it
        self._known: dict[int, float] = {}  # losses of this turn computed here
        self._claims = itertools.count()
        self._passes = self._lanes = 0
        self._spent = 0.0  # seconds in this turn's passes

    @property
    def room(self) -> Sealed:
        if self._room is None:
            raise Lost("this pool was left")
        return self._room

    @contextlib.contextmanager
    def together(self, at: str) -> Iterator[None]:
        try:
            with self.telling():
                yield
        except BaseException:
            if at != "fit":  # there is no engine that will leave
                self.leave()
            raise

    # ---- turns -------------------------------------------------------------------------------------------------------

    def about(self, values: Mapping[str, Any], audit: Sequence[Any] | None = None) -> None:
        self._about, self._audit = dict(values), None if audit is None else list(audit)

    def share(self, step: int, count: int, compute: Callable[[Sequence[int]], Sequence[Any]]) -> list[Any] | None:
        number = self._turn[1] + 1 if self._turn[0] == step else 0
        self._turn, self._known, self._spent = (step, number), {}, 0.0

        def timed(cells: Sequence[int]) -> list[float]:
            return self._computed(cells, compute)

        while True:
            try:
                return self._share(count, timed)
            except Lost as lost:
                self._again(lost)

    def _share(self, count: int, compute: Compute) -> list[float] | None:
        turn = self._name()
        self._commit(turn, self._known)  # losses computed for a keeper that is gone
        while not self._is_settled(count) and (cells := self._lease(turn, count)):
            self._do(turn, cells, compute)
        began = looked = time.monotonic()
        claims: dict[int, tuple[str, float]] = {}
        while not self._is_settled(count):
            now = time.monotonic()
            if now - looked > LOOK_S:
                looked = now
                self._look()
                if late := self._late(turn, count, claims, began):
                    self._do(turn, late, compute)
            time.sleep(min(LONGEST_NAP_S, FIRST_NAP_S + (now - began) / 10))
        return self._outcome(count, compute)

    def _name(self) -> str:
        return "{}.{}".format(*self._turn)

    def _lease(self, turn: str, count: int) -> list[int]:
        lanes = lanes_of(count, self._state.get("weights", {}), self.me)
        end = self.room.line.add(f"{turn}/next", lanes)
        return [cell for cell in range(end - lanes, min(end, count)) if cell not in self._known]

    def _do(self, turn: str, cells: Sequence[int], compute: Compute) -> None:
        self._known |= dict(zip(cells, compute(cells), strict=True))
        self._commit(turn, cells)

    def _commit(self, turn: str, cells: Iterable[int]) -> None:
        more = {"by": self.me, "about": self._about}
        self.room.first({f"{turn}/{cell}": {"loss": float(self._known[cell]).hex(), **more} for cell in cells})

    def _computed(self, cells: Sequence[int], compute: Callable[[Sequence[int]], Sequence[Any]]) -> list[float]:
        """Compute the losses of lanes in one pass, and report its time."""
        begin = time.monotonic()
        found = [float(loss) for loss in compute(cells)]
        self._passes, self._lanes = self._passes + 1, self._lanes + len(cells)
        took = time.monotonic() - begin
        self._spent += took
        # the first pass is watched, and blocks are brought up to date: it says nothing of the next
        self._took(took if self._passes > 1 else 0.0, len(cells))
        return found

    def _late(self, turn: str, count: int, claims: dict[int, tuple[str, float]], began: float) -> list[int]:
        """Claim and return the lanes that are overdue."""
        now, patience = time.monotonic(), self._wait_s()
        if now - began < patience:
            return []
        mine: list[int] = []
        at_most = lanes_of(count, self._state.get("weights", {}), self.me)
        for cell in range(count):
            if cell in self._known or self.room.line.has([f"{turn}/{cell}"]):
                continue
            seen, since = claims.setdefault(cell, ("", began))
            if now - since < patience:
                continue
            claim = f"{self.me}/{next(self._claims)}"
            word = self.room.line.first(f"{turn}/{cell}/late", claim.encode(), seen.encode()).decode()
            claims[cell] = (word, now)
            if word == claim:
                mine.append(cell)
            if len(mine) == at_most:
                break
        return mine

    def _wait_s(self) -> float:
        return self._patience if self._patience is not None else self._state.get("patience", FIRST_PATIENCE_S)

    # ---- what differs ------------------------------------------------------------------------------------------------

    @abstractmethod
    def _is_settled(self, count: int) -> bool:
        """Whether all lanes of this pass are computed."""

    @abstractmethod
    def _outcome(self, count: int, compute: Compute) -> list[float] | None:
        """The losses of the pass, in the order of one process; None if its step was decided meanwhile."""

    @abstractmethod
    def _look(self) -> None:
        """Raise if waiting has no purpose any more."""

    @abstractmethod
    def _took(self, seconds: float, lanes: int) -> None:
        """Report the time of a pass; 0: it does not count."""

    @abstractmethod
    def _again(self, lost: Lost) -> None:
        """The store is lost: connect to a new one, or raise."""


def cells_of(turn: str, count: int) -> list[str]:
    return [f"{turn}/{cell}" for cell in range(count)]
