"""A member of a pool: it has the base, leases lanes of the current step, and applies decided steps.

    member = Member.join("10.0.0.7:29400", token)       # waits until it is admitted
    member.about_run, member.journal                    # the run's description, and its steps so far

A member that was away (stopped or disconnected, or its keeper was) finds its step decided: it discards its losses,
reads the missing records, and continues at the run's present step. If the keeper is gone, the member tries its
addresses, one after another, for `wait_s`; a restarted keeper, or another one in its place, has another store, and the
member asks at its door with its own number of steps. If that is a step or two more than the keeper has, which was not
told the last ones, the member waits until they are taken again.
"""

from __future__ import annotations

import contextlib
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .. import __version__
from ..errors import RankError
from ..journal.format import StepRecord
from ..system.signals import Stopped
from .agree import between
from .decided import heard
from .line import SILENT_S, Lost, dialled, parse, quietly
from .pool import WAIT_S, check_patience, check_token, here
from .sealed import ERA, Sealed, Unsealed
from .sharing import LONGEST_NAP_S, LOOK_S, Compute, Sharing, cells_of

_T = TypeVar("_T")
NAP_S, BEAT_S = 0.5, 1.0
"""Seconds between two tries to reach a keeper, and between two beats of a member's pulse."""
UNCOUNTED = 4
"""Number of decided steps without a share after which a member announces itself again."""


class Over(RankError):
    """The keeper has ended the run before all its steps."""


class Gone(RankError):
    """No keeper answers at any address."""


class Parted(RankError):
    """The run's history differs from this member's: it must join again, from the base."""


class Member(Sharing):
    """A process that joined. address: HOST:PORT, or several with commas between them, where a keeper may be. wait_s:
    seconds to look for a keeper that does not answer."""

    leads = False

    def __init__(self, address: str, token: str, *, patience: float | None = None, wait_s: float = WAIT_S) -> None:
        self._places = [place.strip() for place in address.split(",")]
        for place in self._places:
            parse(place)
        check_token(token)
        check_patience(patience)
        super().__init__("", patience)
        self._token, self._wait = token, wait_s
        self._beats, self._felt = -1, time.monotonic()
        self._history: Callable[[], tuple[int, str]] | None = None  # number and history of the applied steps
        self._lacked: dict[int, StepRecord] = {}
        self._said: dict[str, Any] = {"name": here(), "step": None}
        self._its_history: tuple[int, str] | None = None  # of the last record read: its step, and the history after it
        self._uncounted = 0
        self._left = False
        self._ends = threading.Event()
        self._beater = threading.Thread(target=self._beat, name="zo_offload:beat", daemon=True)

    @classmethod
    def join(
        cls, address: str, token: str, *, patience: float | None = None, wait_s: float = WAIT_S,
        look: Callable[[], None] = lambda: None,
    ) -> Member:  # fmt: skip
        """Join the pool. Raises RankError if nobody answers for `wait_s`, or the keeper refuses (with its reason)."""
        member = cls(address, token, patience=patience, wait_s=wait_s)
        member._knocks = {"version": __version__, "name": here()}
        welcome = member._until_reached(member._enter)
        member.me, member.about_run = welcome["member"], welcome["about"]
        member.journal = b64decode(welcome["journal"])
        member._beater.start()
        return member

    @property
    def address(self) -> str:
        """The address that was tried last: the keeper's, while there is one."""
        return self._places[0]

    about_run: dict[str, Any]
    """The run's description: settings, method, and the arguments of `fit`."""
    journal: bytes
    """The run's journal so far."""
    _knocks: dict[str, Any]

    # ---- the keeper's door -------------------------------------------------------------------------------------------

    def _until_reached(self, do: Callable[[], _T]) -> _T:
        began = time.monotonic()
        while True:
            try:
                return do()
            except Lost as lost:
                if self._room is not None:
                    self._room.close()
                    self._room = None
                self._heed_stop()
                if (waited := time.monotonic() - began) > self._wait:
                    raise Gone(
                        f"the keeper at {', '.join(self._places)} is gone, for {waited:.0f} s now: {lost}. Where it is "
                        "started again (zo-offload fit RUN --resume --serve ...), members that wait join by "
                        "themselves: --wait"
                    ) from None
                self._places = self._places[1:] + self._places[:1]
                time.sleep(min(NAP_S, self._wait / 10))

    def _enter(self) -> dict[str, Any]:
        """Connect to the present keeper; returns the answer at its door."""
        line = dialled(self.address, min(SILENT_S, max(1.0, self._wait)))
        began = time.monotonic()
        while (era := line.get(ERA)) is None:
            if time.monotonic() - began > SILENT_S:
                raise RankError(f"{self.address} is a store, but no pool's keeper serves it")
            time.sleep(LONGEST_NAP_S)
        self._room = Sealed(line, self._token, era.decode())
        self._felt = time.monotonic()
        return self._knock()

    def _knock(self) -> dict[str, Any]:
        """Ask to join, and wait while the keeper is not ready. Raises RankError if it refuses."""
        name = f"door/{self.room.line.add('door', 1) - 1}"
        self.room.put(name, self._knocks)
        while True:
            if (no := self.room.line.get(f"{name}/no")) is not None:
                raise RankError(f"the keeper at {self.address} does not let this member in: {no.decode()}")
            if (yes := self.room.receive(f"{name}/yes")) is not None:
                return yes
            with contextlib.suppress(Unsealed):  # tokens differ: the keeper will say so
                self._feel()
            if time.monotonic() - self._felt > SILENT_S:
                raise Lost(f"the keeper at {self.address} does not answer at its door")
            time.sleep(LONGEST_NAP_S)

    def _feel(self) -> None:
        """Raise Lost if the keeper's pulse has stopped."""
        self._heed_stop()
        pulse = self.room.get("pulse") or {"beats": -1}
        now = time.monotonic()
        if pulse["beats"] != self._beats:
            self._beats, self._felt = pulse["beats"], now
        elif now - self._felt > SILENT_S:
            raise Lost(f"the keeper at {self.address} shows no sign of life since {now - self._felt:.0f} s")

    def _heed_stop(self) -> None:
        """While this member waits, a signal ends it at once: the run goes on without it."""
        if (signum := self.stopped_by()) is not None:
            steps = 0 if self._history is None else self._history()[0]
            raise Stopped(signum, steps, self.after_a_stop(None))

    def after_a_stop(self, run_dir: Path | None) -> str:
        return f"the run goes on at {self.address}"

    def _again(self, lost: Lost) -> None:
        self._until_reached(self._return)

    def _return(self) -> None:
        """Rejoin the run in its present state, with the steps that were applied here."""
        assert self._history is not None
        steps, history = self._history()
        self._knocks = {
            "version": __version__, "name": here(), "member": self.me, "steps": steps, "history": history
        }  # fmt: skip
        answer = self._enter() if self._room is None else self._knock()
        while "ahead" in answer:
            self._see_end()
            time.sleep(NAP_S)
            answer = self._knock()
        if "parted" in answer:
            raise Parted(
                f"this member has {steps} steps of another history than the run, which has {answer['parted']} steps: "
                "the keeper's host lost some, or its journal was cut. Join again"
            )
        records = [heard(values) for values in answer["records"]]
        self._lacked |= {record.step: record for record in records}
        self._say({})

    def _asked(self, do: Callable[[], _T]) -> _T:
        """A call on the store; after a loss it is repeated with the next keeper's store."""
        while True:
            try:
                return do()
            except Lost as lost:
                self._again(lost)

    # ---- before the first step ---------------------------------------------------------------------------------------

    def follows(self, history: Callable[[], tuple[int, str]]) -> None:
        """history(): the number of steps applied here, and their history."""
        self._history = history

    def same(self, at: str, values: Mapping[str, Any], hint: str = "") -> None:
        def ask() -> dict[str, Any]:
            while (theirs := self.room.get(f"same/{at}")) is None:
                self._feel()
                self._see_end()
                time.sleep(LONGEST_NAP_S)
            return theirs

        theirs = self._asked(ask)["values"]
        if differ := list(between(theirs, {**values}, "the keeper", "this member")):
            raise RankError(f"this member is not like the keeper, at {at!r}: {'; '.join(differ)}.{hint and ' ' + hint}")

    def _beat(self) -> None:
        """A thread that sends this member's pulse, also during long passes."""
        beats, room = 0, None
        while not self._ends.wait(BEAT_S):
            try:
                if room is None or self._room is None or room.era != self._room.era:
                    era = None if self._room is None else self._room.era
                    room = None if era is None else Sealed(dialled(self.address), self._token, era)
                if room is not None:
                    beats += 1
                    room.put(f"beat/{self.me}", {"beats": beats})
            except Lost:
                room = None
        if room is not None:
            room.close()

    # ---- what is decided ---------------------------------------------------------------------------------------------

    def decided(self, step: int) -> StepRecord | None:
        return self._asked(lambda: self._record(step))

    def decision(self, step: int) -> StepRecord | None:
        """Wait for the step's record. Raises Over if there will be none."""

        def wait() -> StepRecord:
            began = looked = time.monotonic()
            while (record := self._record(step)) is None:
                if (now := time.monotonic()) - looked > LOOK_S:
                    looked = now
                    self._look()
                time.sleep(min(LONGEST_NAP_S, 1e-3 + (now - began) / 10))
            return record

        return self._asked(wait)

    def _record(self, step: int) -> StepRecord | None:
        """A step's record, if decided: from those fetched, the store, or for an older step the keeper."""
        if step in self._lacked:
            return self._lacked.pop(step)
        if (found := self.room.get(f"decided/{step}")) is not None:
            record, self._its_history = heard(found["record"]), (step, found["history"])
            self._uncounted = 0 if self.me in self._state.get("weights", {}) else self._uncounted + 1
            if self._uncounted > UNCOUNTED:
                self._uncounted = 0
                self._return()
            return record
        self._refresh()
        if step >= self._state.get("steps", 0):
            return None
        if self.room.line.has([f"decided/{step}"]):  # since we looked
            return self._record(step)
        self._return()
        return self._lacked.pop(step, None)

    def publish(self, record: StepRecord, history: str) -> None:
        """The step was applied here. Raises Parted if the history differs from the keeper's."""
        if self._its_history is not None and self._its_history != (record.step, history):
            raise Parted(
                f"after step {record.step} this member has history {history}, the run {self._its_history}. Join again"
            )
        self._its_history = None

    # ---- lanes -------------------------------------------------------------------------------------------------------

    def about(self, values: Mapping[str, Any], audit: Sequence[Any] | None = None) -> None:
        super().about(values, audit)
        self._asked(self._refresh)

    def _refresh(self) -> None:
        """Read the run's state. Raises RankError if this member was excluded."""
        self._state = self.room.get("state") or self._state
        if (why := self._state.get("out", {}).get(self.me)) is not None:
            raise RankError(f"the keeper at {self.address} has put this member ({self.me}) out: {why}")

    def _share(self, count: int, compute: Compute) -> list[float] | None:
        self._say({"step": self._turn[0], "spent": None})
        return super()._share(count, compute)

    def _is_settled(self, count: int) -> bool:
        name = f"losses/{self._name()}"
        # one or the other; the second only where the step was decided long ago, or by one that is gone
        return self.room.line.has([name]) or self.room.line.has([f"decided/{self._turn[0]}"]) or self._is_past()

    def _is_past(self) -> bool:
        return bool(self._turn[0] in self._lacked)

    def _outcome(self, count: int, compute: Compute) -> list[float] | None:
        turn, step = self._name(), self._turn[0]
        found = self.room.get(f"losses/{turn}")
        if found is None:
            newest = (self.room.get("state") or {}).get("steps", 0)
            if newest > step + 1:  # deleted, or soon: losses written meanwhile are not used
                self.room.line.delete(f"{turn}/next", *cells_of(turn, count))
            return None
        return [float.fromhex(loss) for loss in found["losses"]]

    def _took(self, seconds: float, lanes: int) -> None:
        if seconds:
            self._say({
                "seconds": round(seconds, 4), "spent": round(self._spent, 4), "rate": round(lanes / seconds, 3),
                "lanes": self._lanes,
            })  # fmt: skip

    def _say(self, values: Mapping[str, Any]) -> None:
        """Send the keeper a message about this member."""
        self._said |= {**values, "audit": self._audit}
        quietly(lambda: self.room.put(f"member/{self.me}", self._said))

    def _look(self) -> None:
        self._feel()
        self._refresh()
        self._see_end()
        step = self._turn[0]
        is_decided = step < self._state.get("steps", 0) and step not in self._lacked
        if is_decided and not self.room.line.has([f"decided/{step}"]):  # long ago
            self._return()

    def _see_end(self) -> None:
        closed = self.room.get("closed")
        if closed is None or (self._history is not None and self._history()[0] < closed["steps"]):
            return  # records that it lacks come first
        why = f"{closed['kind']}{': ' * bool(closed['why'])}{closed['why']}"
        if closed["kind"] == "failed":
            raise RankError(f"the keeper at {self.address} failed after {closed['steps']} steps: {closed['why']}")
        raise Over(f"the keeper has ended the run after {closed['steps']} steps ({why})")

    # ---- the end -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """If an error ends this member, the keeper gets the reason; the other processes go on."""
        try:
            yield
        except (Over, KeyboardInterrupt):
            raise
        except BaseException as error:
            self.leave(f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])
            raise

    def leave(self, why: str = "") -> None:
        if self._left or self._room is None:
            return
        self._left = True
        self._ends.set()
        if self._beater.is_alive():
            self._beater.join(BEAT_S)
        room, self._room = self._room, None
        quietly(lambda: room.put(f"member/{self.me}", {**self._said, "gone": why}))
        room.close()
