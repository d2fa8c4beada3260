"""What a run's steps are bound to beside its identity: their data, and a schedule's length if rates depend on it.

Neither is known when a run's weights are put in place (an evaluation, a generation, a step may come first), so they are
a note in the journal, written before the first step of the first `fit`:
    {"data": {"rows": 40, "digest": "...", "batch_size": 4, "micro_batches": 1, ...}, "horizon": 2000 or null}
A later `fit` must find the same data, or be told `new_data=True`: then a new note follows. The horizon stays: steps may
be added to a schedule that does not depend on their number, and no further than the horizon to one that does.
A run of the earlier format has its data in its header, or none, and no horizon.
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
    """Whether the method's learning rate at some step depends on how many steps there are in all."""
    steps = max(steps, method.warmup_steps + 2)
    one, other = (lr_schedule(method.schedule, method.warmup_steps, n) for n in (steps, 3 * steps))
    return any(one(step) != other(step) for step in {0, *range(0, steps, max(1, steps // 64)), steps - 1})


@dataclass(frozen=True)
class Binding:
    """What one call of `fit` would have a run's steps be of.

    data: `Batches.identity` and how it is cut; legacy: the same as the earlier format has it. steps: in all.
    """

    data: dict[str, Any]
    legacy: Callable[[], dict[str, Any] | None]
    steps: int
    horizon: int | None
    new_data: bool = False

    @classmethod
    def of(cls, batches: Batches, micro_batches: int, method: Method, steps: int, *, new_data: bool = False) -> Binding:
        """What a call's batches are, and its number of steps if the method's learning rate depends on it."""
        data = {**(batches.identity() or {}), "micro_batches": micro_batches}

        def legacy() -> dict[str, Any] | None:
            known = batches.legacy_identity()
            return known and {**known, "micro_batches": micro_batches}

        horizon = steps if depends_on_steps(method, steps) else None
        return cls(json.loads(json.dumps(data)), legacy, steps, horizon, new_data)

    def check(self, journal: Journal) -> None:
        """Raise JournalError unless a run may go on with this; a run without steps may go on with anything."""
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
        """Keep this with the run if it is not what it is bound to; the horizon that holds. StorageError."""
        bound = bound_to(journal) if journal.steps else None
        horizon = self.horizon if bound is None else bound.get("horizon")
        if bound is None or bound["data"] != self.data:
            journal.note({"data": self.data, "horizon": horizon})
        return horizon


def bound_to(journal: Journal) -> dict[str, Any] | None:
    """The last note of data, None if there is none."""
    notes = (note.values for note in reversed(journal.notes))
    return next((values for values in notes if isinstance(values.get("data"), dict)), None)


def bound_from(journal: Journal) -> int:
    """The first step that was taken on the data that the run is bound to now."""
    return next((note.step for note in reversed(journal.notes) if isinstance(note.values.get("data"), dict)), 0)


def check_same_data(batches: Batches, records: list[StepRecord]) -> None:
    """Raise JournalError unless the data gives the batches that the journal's first and last step were taken on."""
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
            f"Go on to at most {horizon}, or begin a new run (a constant schedule can be gone on with at will)"
        )


def _compare(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    found, wanted = ({**data, "encoder": dict(data.get("encoder") or {})} for data in (found, wanted))
    known = found["encoder"].keys() & wanted["encoder"].keys()  # another version's encoder may have an option more
    for data in (found, wanted):
        data["encoder"] = {key: data["encoder"][key] for key in known}
    differ = differences("data", found, wanted)
    if differ:
        raise JournalError(f"this run cannot be continued as asked; {'; '.join(differ)}. {NEW_DATA}")
