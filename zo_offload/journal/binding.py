"""Binds a run's steps to their data, and to a schedule's length if rates depend on it.

Neither is known when a run's weights are stored (an evaluation, a generation or a step may come first), so they are a
note in the journal, written before the first step of the first `fit`:
    {"data": {"rows": 40, "digest": "...", "batch_size": 4, "micro_batches": 1, ...}, "horizon": 2000 or null}
A later `fit` must have the same data, or `new_data=True`: then a new note follows. The horizon stays: a schedule that
does not depend on the number of steps can be continued at will, another one only up to the horizon. A run of the
earlier format has its data in its header, or none, and no horizon.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..data.batches import Batches
from ..data.made import as_made
from ..errors import ConfigError, JournalError
from ..methods import Method, lr_schedule
from .identity import differences
from .journal import Journal, StepRecord

NEW_DATA = "To go on with other data on purpose, pass new_data=True (--new-data)"


def depends_on_steps(method: Method, steps: int) -> bool:
    """Whether the method's learning rate at some step depends on the total number of steps."""
    steps = max(steps, method.warmup_steps + 2)
    one, other = (lr_schedule(method.schedule, method.warmup_steps, n) for n in (steps, 3 * steps))
    return any(one(step) != other(step) for step in {0, *range(0, steps, max(1, steps // 64)), steps - 1})


@dataclass(frozen=True)
class Binding:
    """The data and number of steps of one call of `fit`.

    data: `Batches.identity` and the number of micro-batches; legacy: the same in the earlier format. steps: the total.
    """

    data: dict[str, Any]
    legacy: Callable[[], dict[str, Any] | None]
    steps: int
    horizon: int | None
    new_data: bool = False

    @classmethod
    def of(cls, batches: Batches, micro_batches: int, method: Method, steps: int, *, new_data: bool = False) -> Binding:
        """The binding of a call: its data, and its number of steps if the method's learning rate depends on it."""
        data = {**(batches.identity() or {}), "micro_batches": micro_batches}

        def legacy() -> dict[str, Any] | None:
            known = batches.legacy_identity()
            return known and {**known, "micro_batches": micro_batches}

        horizon = steps if depends_on_steps(method, steps) else None
        return cls(json.loads(json.dumps(data)), legacy, steps, horizon, new_data)

    def check(self, journal: Journal) -> None:
        """Raise JournalError unless the run may go on with this binding; a run without steps may go on with any."""
        if not journal.steps:
            return
        if not journal.takes_notes:
            found, data = journal.header.get("data"), None if self.new_data else self.legacy()
            if found is not None and data is not None:
                _compare(found, data)
            return
        bound = bound_to(journal)
        if bound is None:
            return
        if not self.new_data:
            _compare(bound["data"], self.data)
        check_horizon(bound.get("horizon"), self.steps)

    def bind(self, journal: Journal) -> int | None:
        """Note this binding in the journal if it is new; return the horizon in force. Raises StorageError."""
        bound = bound_to(journal) if journal.steps else None
        horizon = self.horizon if bound is None else bound.get("horizon")
        if bound is None or bound["data"] != self.data:
            journal.note({"data": self.data, "horizon": horizon})
        return horizon


def bound_to(journal: Journal) -> dict[str, Any] | None:
    """The data of the last such note, None if there is none."""
    notes = (note.values for note in reversed(journal.notes))
    return next((values for values in notes if isinstance(values.get("data"), dict)), None)


def bound_from(journal: Journal) -> int:
    """The first step on the data that the run is bound to now."""
    return next((note.step for note in reversed(journal.notes) if isinstance(note.values.get("data"), dict)), 0)


def check_same_data(batches: Batches, records: list[StepRecord]) -> None:
    """Raise JournalError unless the data yields the batches of the journal's first and last step."""
    for record in (records[0], records[-1]) if records else ():
        if not record.batch_crc:
            continue
        found = as_made(batches.batch(record.step)).fingerprint
        if found != record.batch_crc:
            raise JournalError(
                f"the data is not the run's: the batch of step {record.step} has fingerprint {found:08x}, the journal "
                f"has {record.batch_crc:08x}. Give the same data, batch size, tokenizer and template; to go on with "
                "other data on purpose, pass new_data=True (--new-data)"
            )


def check_horizon(horizon: int | None, steps: int) -> None:
    if horizon is not None and steps > horizon:
        raise ConfigError(
            f"steps={steps}: the run's learning rate depends on the number of steps, and it was begun for {horizon}. "
            f"Go on to at most {horizon}, or begin a new run (a constant schedule has no such limit)"
        )


def _compare(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    found, wanted = ({**data, "encoder": dict(data.get("encoder") or {})} for data in (found, wanted))
    known = found["encoder"].keys() & wanted["encoder"].keys()  # another version's encoder may have an option more
    for data in (found, wanted):
        data["encoder"] = {key: data["encoder"][key] for key in known}
    differ = differences("data", found, wanted)
    if differ:
        raise JournalError(f"this run cannot be continued as asked; {'; '.join(differ)}. {NEW_DATA}")
