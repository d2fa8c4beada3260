"""Comparison of a run between ranks: a difference raises an error that names it. Before the first step, and in each.

Once: the code's version, the run's identity with the digest of its base, and its number of steps. In each step: the
batch, the learning rate, the history of the weights so far, and the checksum of one block (`audit.py`).
"""

from __future__ import annotations

from typing import Any

from .. import __version__
from ..errors import RankError
from ..journal.format import history_after, history_start
from ..journal.journal import StepRecord
from ..ranks.alone import Alone
from .audit import audit
from .session import Session
from .whole import Parts

_NOT_COMPARED = frozenset({"created", "settings", "model", "model_class", "versions"})
"""Header fields that are not compared: they may differ, or the identity has them more exactly."""
HINT = "Give all ranks the same model, method, data and settings; fold_every too, where their tiers differ"


class Ranked:
    """One run among its ranks; does nothing if there is only one rank. names: the blocks' names."""

    def __init__(self, ranks: Alone, names: list[str]) -> None:
        self._ranks, self._names = ranks, names
        self._has_met = not ranks.tells
        self._history: int | None = None  # for a run without a journal

    def meet(self, session: Session) -> None:
        """Raise RankError unless all ranks are about to take the same step of the same run. Once."""
        if self._has_met:
            return
        journal, known = session.journal, session.identity
        if known is None:
            assert journal is not None
            known = {key: value for key, value in journal.header.items() if key not in _NOT_COMPARED}
        if journal is None and self._history is None:
            self._history = history_start(known)
        values: dict[str, Any] = {"zo_offload": __version__, "run": known}
        if not self._ranks.elastic:  # a member that joins later may be behind
            values |= {"steps": session.stepper.log.version, "history": self._told(session)}
        self._ranks.same("the first step", values, HINT)
        self._has_met = True

    def before_step(self, parts: Parts, step: int, lr: float, batch_crc: int, micro_batches: int) -> None:
        """Tell the other ranks what the coming losses are computed from."""
        if not self._ranks.tells:
            return
        values = {
            "batch": f"{batch_crc:08x}", "micro_batches": micro_batches, "lr": float(lr).hex(),
            "history": self._told(parts.session),
        }  # fmt: skip
        tier, window, layout = parts.session.tier, parts.streamer.window, parts.streamer.layout
        self._ranks.about(values, audit(step, self._names, layout, tier, window))

    def decided(self, step: int, batch_crc: int) -> StepRecord | None:
        """A step's record, if another process decides steps and has decided this one. Raises RankError if it used
        another batch than this process."""
        return _of_batch(self._ranks.decided(step), batch_crc)

    def decision(self, step: int, batch_crc: int) -> StepRecord | None:
        """Wait for that record; None if this process decides."""
        return _of_batch(self._ranks.decision(step), batch_crc)

    def after_step(self, record: StepRecord, session: Session) -> None:
        if self._history is not None:
            self._history = history_after(self._history, record)
        if self._ranks.elastic:
            self._ranks.publish(record, self._told(session))

    def _told(self, session: Session) -> str:
        journal = session.journal
        history: Any = self._history if journal is None else journal.history(len(journal.steps))
        return f"{history:016x}"


def _of_batch(record: StepRecord | None, batch_crc: int) -> StepRecord | None:
    if record is not None and record.batch_crc != batch_crc:
        raise RankError(
            f"step {record.step} was taken on a batch with fingerprint {record.batch_crc:08x}, this process has "
            f"{batch_crc:08x}: the data differs"
        )
    return record
