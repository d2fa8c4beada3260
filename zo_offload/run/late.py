"""Steps whose losses the host reads one step late; the device that has the losses computes the coefficients.

On a GPU, reading a loss would make the host wait for the GPU, and would stop the prefetch too. So a step is only
*launched*: its losses, as tensors, become coefficients in the update table (`device_updates.py`) that the next fused
pass reads, and are sent to the host. One step later the host *settles* it: it computes the same coefficients from the
same numbers in the same order (IEEE double, then one rounding to float32), checks that the device got the same bits,
and writes the journal.

A step whose losses or coefficients are not finite, or whose update would overflow the storage format, gets coefficient
0 and decay 1 from the device itself, before the host knows. The journal records it like that: as an update that changes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..devices import Later
from ..errors import ZOError
from ..journal.format import StepRecord
from ..kernels.device_updates import DeviceUpdates, UpdateTable
from ..kernels.records import Update
from ..methods import Method
from ..methods.outcome import Outcome
from ..numerics.updates import UpdateLog


@dataclass
class Launched:
    """A launched step: its facts, and its losses, on the host or still being sent."""

    step: int
    lr: float
    batch_crc: int
    method: Method
    """The method with the step's eps, which may have been halved since."""
    losses: Sequence[float] | None = None
    """None: the losses are in `later`."""
    later: Later | None = None
    """Losses, coefficients of its lanes' terms, then those the device applies, then 1.0 if it applies them."""
    num_losses: int = 0
    num_terms: int = 0
    decided: StepRecord | None = None
    """The step's record, if another process has decided it."""

    def read(self) -> tuple[list[float], list[float], list[float], bool]:
        """(losses, the device's coefficients of terms, and of updates, whether it applies those). Waits for them."""
        if self.losses is not None:
            return list(self.losses), [], [], True
        assert self.later is not None
        values, first = self.later.get(), self.num_losses + self.num_terms
        return values[: self.num_losses], values[self.num_losses : first], values[first:-1], values[-1] == 1.0


class LateLog(UpdateLog):
    """An update log whose last steps may not be settled: blocks get their records from device memory."""

    def __init__(self, log: UpdateLog, table: UpdateTable) -> None:
        super().__init__(log.base, log.parts)
        self.table = table
        self._first: list[int] = []  # for each step, the index of its first record
        for updates in log.steps:
            self.append(updates)

    def append(self, updates: Sequence[Update]) -> None:
        self._add(updates, self.table.append(updates, self.parts.chosen(self.version)))

    def _add(self, updates: Sequence[Update], first: int) -> None:
        self._first.append(first)
        super().append(updates)

    def launch(
        self,
        updates: Sequence[Update],
        coefficients: Tensor,
        applies: Tensor,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Add a step whose coefficients only the device knows; the coefficients in `updates` are ignored.

        before: called just before the step itself is added, which is the last action.
        """
        chosen = self.parts.chosen(self.version)
        first = self.table.append(updates, chosen)
        self.table.set_coefficients(first, coefficients, applies, chosen)
        before()
        self._add(updates, first)

    def settle(self, step: int, updates: Sequence[Update]) -> None:
        """The host's copy of a launched step."""
        self._steps[step - self.base] = tuple(updates)

    def mend(self) -> None:
        del self._first[len(self._steps) :]
        self.table.cut(self._first[-1] + len(self._steps[-1]) if self._steps else 0)
        super().mend()

    def _collect(  # type: ignore[override]
        self, version: int, decay: bool, gain: float, part: str | None
    ) -> DeviceUpdates:
        at = version - self.base
        return self.table.since(self._first[at] if at < len(self._first) else len(self.table), decay, gain, part)


def launch(
    log: LateLog,
    updates: Sequence[Update],
    losses: Tensor,
    terms: Tensor | None,
    outcome: Outcome,
    limit: float,
    largest: float,
    later: Callable[[Tensor], Later],
    before: Callable[[Later, Tensor], None],
) -> None:
    """Send losses and coefficients to the host, and give a step's coefficients to the log.

    updates: the step's updates without their coefficients. losses: float64, on the device; terms: float32 there, the
    coefficients of the sums that lanes were perturbed along; outcome: the method's result from the losses, on the
    device. limit: |coefficient| * max |z| must stay below it, so that the storage formats can hold the update; largest:
    max |z|. before: called with the sent values, and with whether the step applies (0-d bool, on the device), before
    the log has the step.
    """
    exact = outcome.coefficients.double()
    applies = outcome.sound & (exact.abs() * largest < limit).all()
    lanes = [] if terms is None else [terms.double()]
    sent = later(torch.cat([losses, *lanes, exact, applies.double().reshape(1)]))
    log.launch(updates, outcome.coefficients, applies, lambda: before(sent, applies))


def check_same(step: int, updates: Sequence[Update], coefficients: Sequence[float], applies: bool) -> None:
    """Raise unless device and host computed the same update; otherwise the journal would describe another run."""
    found = [u.coeff for u in updates] if applies else []
    told = list(coefficients) if applies else []
    if found != told or applies != bool(updates):
        raise ZOError(
            f"step {step}: the device applied coefficients {told}; from the same losses the host computes {found}. "
            "This is a fault in zo_offload or in the device; the run cannot be journaled"
        )


def check_terms(step: int, found: Sequence[float], told: Sequence[float]) -> None:
    """The same of what lanes were perturbed along."""
    if list(found) != list(told):
        raise ZOError(
            f"step {step}: the device perturbed lanes along sums with coefficients {list(told)}, the host computes "
            f"{list(found)}. This is a fault in zo_offload or in the device; the run cannot be journaled"
        )


def nothing(updates: Sequence[Update]) -> tuple[Update, ...]:
    """The updates that the device applies for a step that is not finite."""
    return tuple(replace(update, coeff=0.0, decay=1.0) for update in updates)
