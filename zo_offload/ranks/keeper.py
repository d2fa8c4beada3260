"""The keeper of a pool: it has the run directory and the store, trains like the members, and decides each step.

A step is decided from the committed losses, in the order of one process, by the same code as in one process, and is in
the journal before anybody gets it. Other messages of members are for people, or are compared; a member can contribute
numbers only for lanes whose seeds it did not choose. Some of these numbers are recomputed (`audit`): a member that
differs is excluded by name, and the journal records from which step on its numbers may be in the run.

Keys of decided steps are deleted, so the store never holds more than a few steps.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..journal.format import StepRecord
from ..journal.journal import Journal
from .agree import between
from .decided import told
from .desk import Desk
from .line import Lost, over, quietly, served
from .pace import Patience, weighted
from .pool import Pool
from .sealed import ERA, Sealed, Unsealed
from .sharing import LOOK_S, Compute, Sharing, cells_of

_log = logging.getLogger(__name__)

ME = "0"
KEPT_STEPS, KEPT_RECORDS = 4, 64
"""Numbers of decided steps whose lanes, and whose records, stay in the store for members that are a little late."""
_NAME = 20  # longest name of a member; longer ones are cut
FAREWELL_S = 10.0
"""Seconds that the keeper waits at its end for members that still read the last records."""


class Keeper(Sharing):
    """Serves a pool from its creation to `leave`. Raises ConfigError if it cannot listen at the address."""

    leads = True

    def __init__(self, pool: Pool) -> None:
        super().__init__(ME, pool.patience)
        self._pool = pool
        self._store, self.port = served(pool.address)
        era = secrets.token_hex(8)
        line = over(self._store, "the store of this keeper")
        line.set(ERA, era.encode())
        self._room = Sealed(line, pool.token, era)
        self._desk = Desk(Sealed(over(self._store, "the store of this keeper"), pool.token, era))
        self._seen, self._weights = Patience(pool.patience), {ME: 1.0}
        self._chosen = random.SystemRandom()  # chooses the lanes to recompute; must be unpredictable
        self._seconds: dict[str, float] = {}  # spent by each member on lanes of this step
        self._joined: dict[str, int] = {}  # each member's first step with a lane
        self._journal: Journal | None = None
        self._out: dict[str, str] = {}
        self._is_told = False
        self._made: dict[int, list[str]] = {}  # names in the store, by step
        self._desk.start()

    # ---- members are admitted ----------------------------------------------------------------------------------------

    def welcome(self, journal: Journal | None, about: Mapping[str, Any]) -> None:
        assert journal is not None, "a keeper has a run directory"
        self._journal = journal
        quietly(lambda: self.room.line.delete("closed"))
        self._tell_state(len(journal.steps))
        self._desk.opens(journal, about)

    def same(self, at: str, values: Mapping[str, Any], hint: str = "") -> None:
        """Publish values that members compare with their own."""
        self.room.put(f"same/{at}", {"values": values})

    # ---- the lanes of a pass -----------------------------------------------------------------------------------------

    def _is_settled(self, count: int) -> bool:
        return self.room.line.has(cells_of(self._name(), count))

    def _outcome(self, count: int, compute: Compute) -> list[float]:
        turn, step, cells = self._name(), self._turn[0], cells_of(self._name(), count)
        made = [f"{turn}/next", f"losses/{turn}", *cells, *(f"{cell}/late" for cell in cells)]
        self._made.setdefault(step, []).extend(made)
        rows = [self._row(cell, row) for cell, row in enumerate(self.room.get_all(cells))]
        wrong = {cell for cell, row in enumerate(rows) if row is None or not self._is_of_this_step(row)}
        for row in rows:
            if row is not None and row["by"] != ME:
                self._joined.setdefault(row["by"], step)
        wrong |= self._audited(rows, wrong, compute)
        losses = dict(self._known)
        again = [cell for cell in wrong if cell not in losses]
        if again:
            losses |= dict(zip(again, compute(again), strict=True))
        found = [losses[cell] if cell in wrong or row is None else row["loss"] for cell, row in enumerate(rows)]
        self.room.put(f"losses/{turn}", {"losses": [loss.hex() for loss in found]})
        return found

    def _row(self, cell: int, row: dict[str, Any] | Unsealed) -> dict[str, Any] | None:
        """A committed loss; None if it is not from this pool, or from an excluded member."""
        if isinstance(row, Unsealed):
            _log.warning("%s: lane %d of step %d is computed again", row, cell, self._turn[0])
            return None
        try:
            by, loss = str(row["by"])[:_NAME], float.fromhex(row["loss"])
            return None if by in self._out else {"by": by, "loss": loss, "about": row.get("about")}
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            _log.warning("lane %d of step %d is no loss (%s): it is computed again", cell, self._turn[0], error)
            return None

    def _is_of_this_step(self, row: Mapping[str, Any]) -> bool:
        """Whether a loss is for the keeper's batch, rate and history; a member that differs is excluded."""
        if row["by"] == ME:
            return True
        if differ := list(between(self._about, row.get("about"), "the keeper", "it")):
            self._put_out(row["by"], f"it differs at step {self._turn[0]}: {'; '.join(differ)}")
        return not differ

    def _audited(self, rows: Sequence[Any], wrong: set[int], compute: Compute) -> set[int]:
        """Lanes whose committed loss differs from the keeper's own: checks a few random lanes and all not finite."""
        others = [cell for cell, row in enumerate(rows) if cell not in wrong and row["by"] != ME]
        chosen = {cell for cell in others if not math.isfinite(rows[cell]["loss"])}
        if others and self._chosen.random() < self._pool.audit * len(others):
            chosen.add(self._chosen.choice(others))
        cells = [cell for cell in chosen if cell not in self._known]
        mine = {**self._known, **(dict(zip(cells, compute(cells), strict=True)) if cells else {})}
        self._known |= mine
        cheats = set()
        for cell in chosen:
            told_loss = rows[cell]["loss"]
            if not self._are_alike(told_loss, mine[cell]):
                by = rows[cell]["by"]
                cheats.add(by)
                self._put_out(
                    by, f"lane {cell} of step {self._turn[0]} has loss {told_loss!r} from it, {mine[cell]!r} when it "
                    f"is computed again: beyond a tolerance of {self._pool.tolerance:g}",
                )  # fmt: skip
        return {cell for cell in others if rows[cell]["by"] in cheats}

    def _are_alike(self, one: float, other: float) -> bool:
        if not (math.isfinite(one) and math.isfinite(other)):
            return math.isfinite(one) == math.isfinite(other)
        return abs(one - other) <= self._pool.tolerance * abs(other)

    def _put_out(self, member: str, why: str) -> None:
        if member in self._out:
            return
        self._out[member] = why
        name, first = self._desk.name_of(member), self._joined.get(member, self._turn[0])
        text = f"member {member} ({name}) was put out: {why}"
        cut = f"`zo-offload journal cut RUN --to {first}` gives them up"
        since = f"steps from {first} on may have numbers of its own; {cut}"
        _log.warning("%s. Its lanes of this step are computed again; %s", text, since)
        if self._journal is not None:
            self._journal.note({"warning": f"{text}; {since}"})
        self._desk.forget(member)
        self._weights.pop(member, None)
        self._tell_state(self._state["steps"])

    def _look(self) -> None:
        if self._stop is not None:
            self._stop.look()

    def _took(self, seconds: float, lanes: int) -> None:
        if seconds:
            self._seconds[ME] = self._spent
            self._seen.see(seconds)
        self._desk.keeper = {"step": self._turn[0], "lanes": self._lanes, "rate": lanes / seconds if seconds else None}

    def _again(self, lost: Lost) -> None:
        raise lost

    # ---- a step is decided -------------------------------------------------------------------------------------------

    def publish(self, record: StepRecord, history: str) -> None:
        step = record.step
        self._follow(step)
        self.room.put(f"decided/{step}", {"record": told(record), "history": history})
        self._tell_state(step + 1)
        for old in [known for known in self._made if known <= step - KEPT_STEPS]:
            self.room.line.delete(*self._made.pop(old))
        self.room.line.delete(f"decided/{step - KEPT_RECORDS}")

    def _follow(self, step: int) -> None:
        """Update the members' shares from their messages about this step, and compare the audited block."""
        rows = self._desk.rows()
        active = {ME, *rows}
        for member, row in rows.items():
            self._weights.setdefault(member, 1.0)
            if row.get("step") == step and row.get("spent"):
                self._seconds[member] = float(row["spent"])
                self._seen.see(float(row["seconds"]))
            self._compare_block(member, row.get("audit"), row.get("step"))
        self._weights = weighted({m: w for m, w in self._weights.items() if m in active}, self._seconds)
        self._seconds = {}

    def _compare_block(self, member: str, theirs: Sequence[Any] | None, step: int | None) -> None:
        mine = self._audit
        if not (mine and theirs and step == self._turn[0] and list(theirs[:-1]) == mine[:-1]) or theirs[-1] == mine[-1]:
            return
        _, block, name, version, total = mine
        self._put_out(
            member, f"block {block} ({name}) is not the same after {version} steps: the keeper has {total}, it "
            f"{theirs[-1]}. The memory or the arithmetic of one of them is at fault",
        )  # fmt: skip

    def _tell_state(self, steps: int) -> None:
        last_out = dict(list(self._out.items())[-KEPT_RECORDS:])
        patience = round(self._seen.seconds, 3)
        self._state = {"steps": steps, "weights": self._weights, "patience": patience, "out": last_out}
        self.room.put("state", self._state)
        self._desk.state = {**self._state, "size": self.room.line.size()}

    # ---- the end -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """An error inside this context ends the pool, and its members get the reason."""
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            text = " ".join(str(error).split()) or type(error).__name__
            self._close("stopped" if stopped else "failed", text if stopped else f"{type(error).__name__}: {text}")
            raise

    @contextlib.contextmanager
    def together(self, at: str) -> Iterator[None]:
        with super().together(at):
            yield
        if at == "fit":
            self._close("done", "")

    def _close(self, kind: str, why: str) -> None:
        steps = self._state.get("steps", 0)
        quietly(lambda: self.room.put("closed", {"kind": kind, "why": why, "steps": steps}))
        self._desk.closed = f"the run has ended after {steps} steps{f' ({why})' if why else ''}"
        self._is_told = True

    def leave(self) -> None:
        if self._room is None:
            return
        if not self._is_told:
            self._close("stopped", "the keeper closed its engine")
        until = time.monotonic() + FAREWELL_S
        while self._desk.hears() and time.monotonic() < until:
            time.sleep(LOOK_S / 5)
        self._desk.stop()
        self._room.close()
        self._room = self._store = None
