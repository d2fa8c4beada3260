"""The keeper's desk: a thread that admits members and tracks them while the keeper trains.

It answers requests at the door with the journal, or with the records that a member lacks; sends a pulse, so that
members can distinguish a computing keeper from a dead one; and keeps the roster. Of the run it only reads the list of
the journal's records, which only grows.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..journal.format import StepRecord
from ..journal.journal import Journal
from ..system import diskio
from .decided import told
from .line import Lost
from .pool import here
from .sealed import Sealed, Unsealed

_log = logging.getLogger(__name__)

NAP_S, PULSE_S = 0.03, 1.0
GONE_S, THERE_S = 15.0, 3.0
"""Seconds without a pulse after which a member counts as gone; seconds within which it is present."""
UNREAD_S, LATE_S = 120.0, 30.0
"""Seconds after which an unread answer is deleted; seconds to wait for the request of a member that took a number."""
RECORDS_AT_ONCE = 20_000
AHEAD = 4
"""A member with so many steps more than a new keeper waits for it to take them again, with the same losses."""
_MOST = float(1 << 53)


class Desk:
    """See the module. state, keeper: the roster's facts about run and keeper; closed: why no member is admitted. The
    keeper's thread replaces these as a whole."""

    def __init__(self, room: Sealed) -> None:
        self._room = room
        self.state: dict[str, Any] = {}
        self.keeper: dict[str, Any] = {}
        self.closed: str | None = None
        self._journal: Journal | None = None
        self._about: dict[str, Any] = {}
        self._answered, self._asking = 0, dict[int, float]()
        self._members: dict[str, dict[str, Any]] = {}  # their last messages
        self._beats: dict[str, tuple[Any, float]] = {}  # their pulse, and when it last changed
        self._names: dict[str, str] = {}  # members that were admitted and have not left
        self._left: list[str] = []  # members whose keys must be deleted
        self._sent: list[tuple[float, list[str]]] = []  # time, and names in the store
        self._pulse, self._felt = 0, 0.0
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="zo_offload:desk", daemon=True)

    # ---- for the keeper's thread -------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def opens(self, journal: Journal, about: Mapping[str, Any]) -> None:
        """Admit members from here on."""
        self._about, self._journal, self.closed = dict(about), journal, None

    def rows(self) -> dict[str, dict[str, Any]]:
        """The last messages of present members, by name."""
        with self._lock:
            return dict(self._members)

    def name_of(self, member: str) -> str:
        return self._names.get(member, "it never said who it is")

    def hears(self) -> bool:
        """Whether any member is alive."""
        now = time.monotonic()
        with self._lock:
            return any(now - felt < THERE_S for member, (_, felt) in self._beats.items() if member in self._names)

    def forget(self, member: str) -> None:
        """Stop tracking a member that was excluded."""
        with self._lock:
            self._gone(member, "was put out")

    def stop(self) -> None:
        self._ends.set()
        self._thread.join(5)
        self._room.close()

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while not self._ends.wait(NAP_S):
            try:
                self._answer_all()
                if time.monotonic() - self._felt >= PULSE_S or self._ends.is_set():
                    self._beat()
                    self._feel()
                self._hear()
            except Lost as lost:
                if not self._ends.is_set():
                    _log.warning("%s: nobody can join this run any more", lost)
                return

    def _beat(self) -> None:
        self._felt, self._pulse = time.monotonic(), self._pulse + 1
        self._room.put("pulse", {"beats": self._pulse})
        rows = [{"name": here(), "member": "0", **self.keeper}]
        rows += [{"name": self.name_of(member), "member": member, **row} for member, row in self.rows().items()]
        self._room.put("roster", {**self.state, "closed": self.closed, "members": rows})
        while self._sent and time.monotonic() - self._sent[0][0] > UNREAD_S:
            self._room.line.delete(*self._sent.pop(0)[1])

    def _answer_all(self) -> None:
        asked = self._room.line.add("door", 0)
        for number in range(self._answered, asked):
            self._asking.setdefault(number, time.monotonic())
        self._answered = asked
        for number, since in list(self._asking.items()):
            if self._answer(number, time.monotonic() - since > LATE_S):
                del self._asking[number]

    def _answer(self, number: int, is_late: bool) -> bool:
        """Answer the request with this number, if there is one; return whether it is done."""
        name = f"door/{number}"
        try:
            row = self._room.get(name)
        except Unsealed:
            _log.warning("somebody asked to join with another token")
            return self._refuse(number, "its token is not the keeper's")
        if row is None:
            return is_late
        member = str(row.get("member") or number + 1)
        if self.closed is not None and "steps" not in row:  # a former member may lack the last records
            return self._refuse(number, self.closed)
        if row.get("version") != __version__:
            return self._refuse(number, f"it is zo_offload {row.get('version')}, the keeper {__version__}")
        if self._journal is None:
            return False  # it waits: the base is being read
        with self._lock:  # counted as present from now on, before its first pulse
            self._names[member], self._beats[member] = str(row.get("name")), (None, time.monotonic())
        self._room.line.delete(name)
        try:
            answer = self._lacking(int(row["steps"]), str(row["history"])) if "steps" in row else self._whole(member)
        except (OSError, KeyError, TypeError, ValueError) as error:
            return self._refuse(number, f"what it asked for cannot be told: {error}")
        self._sent.append((time.monotonic(), self._room.send(f"{name}/yes", answer)))
        return True

    def _refuse(self, number: int, why: str) -> bool:
        self._room.line.set(f"door/{number}/no", why.encode())  # not sealed: readable without the token too
        self._room.line.delete(f"door/{number}")
        self._sent.append((time.monotonic(), [f"door/{number}/no"]))
        return True

    def _whole(self, member: str) -> dict[str, Any]:
        assert self._journal is not None
        data = base64.b64encode(diskio.read_file(self._journal.path)).decode()
        _log.info("member %s (%s) joins after %d steps", member, self.name_of(member), len(self._journal.steps))
        return {"member": member, "about": self._about, "journal": data}

    def _lacking(self, steps: int, history: str) -> dict[str, Any]:
        """The records from a step on; none if the member's steps so far differ from the journal's, or are a few more
        (then their histories are compared later)."""
        assert self._journal is not None
        known: list[StepRecord] = self._journal.steps
        last = len(known)
        if last < steps <= last + AHEAD:
            return {"ahead": last}
        if steps > last or f"{self._journal.history(steps):016x}" != history:
            return {"parted": last}
        return {"records": [told(record) for record in known[steps : min(last, steps + RECORDS_AT_ONCE)]]}

    def _hear(self) -> None:
        """Read the members' messages about themselves: each rewrites its own row."""
        for member in list(self._names):
            try:
                row = self._room.get(f"member/{member}")
            except Unsealed:
                continue
            with self._lock:
                if row is not None and row.get("gone") is not None:
                    self._gone(member, f"left{': ' * bool(row['gone'])}{str(row['gone'])[:500]}")
                elif row is not None and row.get("step") is not None and member in self._names:
                    self._members[member] = _numbers(row)

        while self._left:
            member = self._left.pop()
            self._room.line.delete(f"member/{member}", f"beat/{member}")

    def _feel(self) -> None:
        """Mark members without a pulse as gone; a member that comes back counts again, and this is logged."""
        now = time.monotonic()
        for member in list(self._names):
            with contextlib.suppress(Unsealed):
                beat = self._room.get(f"beat/{member}")
                with self._lock:
                    known, felt = self._beats.get(member, (None, now))
                    self._beats[member] = (beat, now if beat != known else felt)
                    if now - self._beats[member][1] > GONE_S:
                        self._gone(member, "shows no sign of life any more")

    def _gone(self, member: str, how: str) -> None:
        """Remove a member. Call under the lock."""
        _log.info("member %s (%s) %s", member, self.name_of(member), how)
        self._members.pop(member, None)
        self._beats.pop(member, None)
        if self._names.pop(member, None) is not None:
            self._left.append(member)


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """The valid part of a member's message about itself: anyone with the token may write anything."""
    found: dict[str, Any] = {
        name: value
        for name in ("step", "seconds", "spent", "rate", "lanes")
        if isinstance(value := row.get(name), (int, float)) and 0 <= value < _MOST
    }
    audit = row.get("audit")
    return {**found, "audit": audit if isinstance(audit, list) and audit else None}
