"""The ranks of one run, as one of them sees them: in each turn every rank gives one row and gets all rows.

    team = find(...)                                    find.py; Alone() where there is one process
    with team.together("opening"):                      an error on one rank is raised on all, with its message
        rows = team.gather("opening", {"offload": "disk"})
    losses = team.losses(12, mine)                      of all lanes, in the order of one process

Every rank goes through the same turns in the same order, and names in its row the point where it is. A rank that fails
puts its error into its row of the next turn, whatever that turn is for, and continues with the turn after it; the
readers of that row raise RankError with the error's text. So all ranks count the same turns, also after an error that a
caller caught.

Losses are numbers in rows; the transport never adds them up. So no sum depends on which rank computed a lane, or on the
number of ranks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from ..errors import ConfigError, RankError
from ..system.signals import StopRequest
from .agree import of_ranks, unlike
from .alone import Alone
from .exchange import Exchange

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

SLICE_S = 0.5
"""Seconds between checks while a rank waits: whether the others live, and whether a signal came."""
FIRST_PATIENCE_S = 1800.0
"""Seconds to wait for the first turn of a kind: others may read the base, or evaluate."""
LEAST_PATIENCE_S, TIMES_SEEN = 120.0, 20.0
"""Wait for a turn of a known kind: at least these seconds, and this multiple of the longest such turn."""
MEETING_S = 300.0
"""Seconds to wait for all ranks to make their engine."""
FAREWELL_S = 10.0
"""Seconds that the rank that keeps the store waits at its end for ranks that still read from it."""


class Team(Alone):
    """Several processes. serves: whether this one keeps the store; patience: seconds; None: from measured turns.

    Each engine has its own team: its exchange starts at turn 0, in which each rank sends its process and host.
    """

    tells = True

    def __init__(self, exchange: Exchange, *, index: int = 0, serves: bool = False, patience: float | None = None):
        super().__init__()
        self._exchange, self._serves, self._patience = exchange, serves, patience
        self.rank, self.world, self.index = exchange.rank, exchange.world, index
        self._turn = 0
        self._told: BaseException | None = None  # the error already put in a row: not to be sent again
        self._longest: dict[str, float] = {}  # longest time of a turn in seconds, by kind
        self._since = time.monotonic()
        self._agreed: tuple[int, int] | None = None  # rank and signal
        self._about: dict[str, Any] = {}
        self._audit: list[Any] | None = None
        self._left = self._warned = False
        self._homes: list[dict[str, Any]] = []
        self._longest["meeting"] = MEETING_S / TIMES_SEEN
        self._homes = self.gather("meeting", {"home": _home()})
        homes = [row["home"] for row in self._homes]
        here = [rank for rank in range(self.world) if homes[rank]["host"] == homes[self.rank]["host"]]
        self.local_rank, self.local_world = here.index(self.rank), len(here)

    # ---- turns -------------------------------------------------------------------------------------------------------

    def gather(self, at: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        if self._left:
            raise ConfigError("this engine is closed; make another, or Engine.resume(run_dir)")
        self._put({"at": at, **values})
        self._wait(at)
        rows: list[dict[str, Any]] = [json.loads(row) for row in self._exchange.rows(self._turn)]
        self._next(at)
        self._check(at, rows)
        return rows

    def _put(self, row: Mapping[str, Any]) -> None:
        self._exchange.put(self._turn, json.dumps(row).encode())

    def _next(self, at: str) -> None:
        """Go to the next turn: all rows of this turn exist, so those of the turn before are not needed any more."""
        now = time.monotonic()
        kind = at.split()[0]
        self._longest[kind] = max(self._longest.get(kind, 0.0), now - self._since)
        self._since = now
        if self._turn > 0:
            self._exchange.drop(self._turn - 1)
        self._turn += 1

    def _wait(self, at: str) -> None:
        """Wait until all rows of the turn exist. Raises RankError if one will not come."""
        began = time.monotonic()
        seen = self._longest.get(at.split()[0])
        patience = FIRST_PATIENCE_S if seen is None else max(LEAST_PATIENCE_S, TIMES_SEEN * seen)
        patience = patience if self._patience is None else self._patience
        while missing := self._exchange.missing(self._turn, SLICE_S):
            if self._stop is not None:
                self._stop.look()
            gone = [rank for rank in missing if self._is_gone(rank)]
            gone = [rank for rank in gone if rank in self._exchange.missing(self._turn, 0.01)]  # its last word?
            if gone:
                raise RankError(self._says(f"{of_ranks(gone)} died ({self._who(gone)}); this one waited at {at!r}"))
            if (waited := time.monotonic() - began) > patience:
                raise RankError(
                    self._says(
                        f"{of_ranks(missing)} did not come to {at!r} within {waited:.0f} s ({self._who(missing)}). All "
                        "ranks make the same calls in the same order: engines, fit, step. Where one may be that slow, "
                        "wait longer: ranks=Group(patience=...), --patience"
                    )
                )

    def _check(self, at: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if failed := {rank: row["error"] for rank, row in enumerate(rows) if "error" in row}:
            rank, text = next(iter(failed.items()))
            raise RankError(self._says(f"rank {rank} failed: {text}"))
        if any(row["at"] != at for row in rows):
            places = "; ".join(unlike([row["at"] for row in rows], "they are at"))
            raise RankError(self._says(f"ranks do not make the same calls: {places}"))

    def _says(self, text: str) -> str:
        return f"rank {self.rank} of {self.world}: {text}"

    def _who(self, ranks: Sequence[int]) -> str:
        if not self._homes:
            return "it never came: are all started, and do all make an engine? ranks=None: this process alone"
        return ", ".join("process {pid} on {name}".format(**self._homes[rank]["home"]) for rank in ranks)

    def _is_gone(self, rank: int) -> bool:
        """Whether a rank's process on this host has ended."""
        if not self._homes:
            return False
        home, mine = self._homes[rank]["home"], self._homes[self.rank]["home"]
        if home["host"] != mine["host"]:
            return False
        try:
            process = psutil.Process(home["pid"])
            return bool(process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - home["began"]) > 1)
        except psutil.Error:
            return True

    # ---- errors of one rank are raised on all ------------------------------------------------------------------------

    def _tell(self, error: BaseException) -> None:
        """Put an error into this rank's row of this turn, unless the others have it or sent it."""
        if isinstance(error, RankError) or error is self._told or self._left:
            return
        self._told = error
        with contextlib.suppress(RankError):  # the store is gone: the others will notice
            self._put({"at": "an error", "error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
        self._turn += 1

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._tell(error)
            raise

    @contextlib.contextmanager
    def together(self, at: str) -> Iterator[None]:
        with self.telling():
            yield
            self.gather(f"{at}, its end", {})

    # ---- values ------------------------------------------------------------------------------------------------------

    def first(self, at: str, make: Callable[[], _T]) -> _T:
        rows = self.gather(at, {"value": make() if self.rank == 0 else None})
        value: _T = rows[0]["value"]
        return value

    def same(self, at: str, values: Mapping[str, Any], hint: str = "") -> None:
        rows = self.gather(at, {"values": values})
        if differ := list(unlike([row["values"] for row in rows])):
            raise RankError(self._says(f"ranks differ, at {at!r}: {'; '.join(differ)}.{hint and ' ' + hint}"))

    def about(self, values: Mapping[str, Any], audit: Sequence[Any] | None = None) -> None:
        self._about, self._audit = dict(values), None if audit is None else list(audit)

    def share(self, step: int, count: int, compute: Callable[[Sequence[int]], Sequence[Any]]) -> list[Any] | None:
        mine = self.cells(count)
        return self.losses(step, [float(loss) for loss in compute(mine)] if mine else [])

    def losses(self, step: int, mine: Sequence[float]) -> list[float]:
        values = {
            "about": self._about,
            "audit": self._audit,
            "stop": None if self._stop is None else self._stop.signum,
            "losses": [float(loss).hex() for loss in mine],
        }
        rows = self.gather(f"step {step}", values)
        self._about, self._audit = {}, None
        if differ := list(unlike([row["about"] for row in rows])):
            raise RankError(
                self._says(
                    f"ranks differ at step {step}: {'; '.join(differ)}. Each rank is given all of the data in one "
                    "order, without a DistributedSampler: ranks cut each batch themselves"
                )
            )
        self._compare_blocks(step, [row["audit"] for row in rows])
        self._agree_on_stop(rows)
        losses = [float.fromhex(loss) for row in rows for loss in row["losses"]]
        if len(losses) < self.world and not self._warned and self.leads:
            _log.warning(
                "%d lanes for %d ranks: %d are idle. More micro_batches, or a method with more directions (FZOO, "
                "NSPSA), gives them work", len(losses), self.world, self.world - len(losses),
            )  # fmt: skip
            self._warned = True
        return losses

    def _compare_blocks(self, step: int, audits: Sequence[Sequence[Any] | None]) -> None:
        found: dict[tuple[Any, ...], dict[int, str]] = {}
        for rank, audit in enumerate(audits):
            if audit is not None:
                *place, total = audit
                found.setdefault(tuple(place), {})[rank] = total
        for (_, block, name, version), sums in found.items():
            if len(set(sums.values())) > 1:
                told = ", ".join(f"rank {rank} has {total}" for rank, total in sums.items())
                raise RankError(
                    self._says(
                        f"block {block} ({name}) is not the same on all ranks, found at step {step}: after {version} "
                        f"steps {told}. The memory or the arithmetic of one of them is at fault. The journal is sound: "
                        "replay it, or resume without that machine"
                    )
                )

    def split(self, at: str, mine: Mapping[int, Any]) -> dict[int, Any] | None:
        stop = None if self._stop is None else self._stop.signum
        rows = self.gather(at, {"items": sorted(mine.items()), "stop": stop})
        self._agree_on_stop(rows)
        return None if self._agreed else {number: item for row in rows for number, item in row["items"]}

    # ---- signals -----------------------------------------------------------------------------------------------------

    def heed(self, stop: StopRequest | None) -> None:
        self._stop, self._agreed = stop, None if stop is not None else self._agreed

    def stopped_by(self) -> int | None:
        return None if self._agreed is None else self._agreed[1]

    def is_stopping(self) -> bool:
        if self._stop is not None and self._stop.signum is not None:
            self._exchange.flag(self._turn)
            return True
        return self._exchange.is_flagged(self._turn)

    def _agree_on_stop(self, rows: Sequence[Mapping[str, Any]]) -> None:
        asked = [(rank, row["stop"]) for rank, row in enumerate(rows) if row["stop"] is not None]
        if asked and self._agreed is None:
            self._agreed = asked[0]
            _log.warning("%s", self._says(f"rank {asked[0][0]} was sent signal {asked[0][1]}: all ranks end here"))

    # ---- the end -----------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        if self._left:
            return
        with contextlib.suppress(RankError):
            self._put({"at": "closed", "error": "it closed its engine"})
            until = time.monotonic() + FAREWELL_S
            while self._serves and time.monotonic() < until:
                missing = self._exchange.missing(self._turn, SLICE_S)
                if all(self._is_gone(rank) for rank in missing):
                    break
        self._left = True


def _home() -> dict[str, Any]:
    """This process and its host, so that another process on the same host can check whether it lives."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    process = psutil.Process()
    return {"host": " ".join(parts), "name": parts[0], "pid": process.pid, "began": process.create_time()}
