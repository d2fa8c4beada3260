"""A method's memory of earlier steps (`Method.remember`): one vector of float64 numbers per step.

It is a function of the journal, so a resumed run has the same memory. If losses are read a step late there are two
copies, made by the same operations on the same numbers: the device's, used for the next step's coefficients, and the
host's, made as steps are settled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..journal.format import StepRecord
from ..methods import Method
from ..methods.outcome import Told

_KEPT = 8  # versions: more than the number of steps that may be taken back


class Remembered:
    """The memory by version, that is after that many steps. Only the last few are kept."""

    def __init__(self, version: int, memory: Tensor) -> None:
        self._after = {version: memory}
        self._nothing = None if memory.numel() else memory

    def __getitem__(self, version: int) -> Tensor:
        return self._after[version] if self._nothing is None else self._nothing

    def put(self, version: int, memory: Tensor) -> None:
        """Set a version's memory. Setting it again is allowed, with the same values."""
        if self._nothing is not None:
            return
        self._after[version] = memory
        self._after.pop(version - _KEPT, None)

    def cut(self, version: int) -> None:
        """Forget the memory of versions above `version`."""
        self._after = {known: memory for known, memory in self._after.items() if known <= version}

    def on(self, version: int, upload: Callable[[Tensor], Tensor]) -> Remembered:
        """A copy that starts at `version`, on a device; `upload` brings a tensor there."""
        return Remembered(version, upload(self[version]) if self._nothing is None else self._nothing)


def remembered(method: Method, records: Iterable[StepRecord]) -> Remembered:
    """The memory after a run's steps so far, on the host."""
    memory = torch.tensor(method.first_memory(), dtype=torch.float64, device="cpu")
    found = Remembered(0, memory)
    for record in records if memory.numel() else ():
        memory = after(method, memory, record)
        found.put(record.step + 1, memory)
    return found


def after(method: Method, memory: Tensor, record: StepRecord) -> Tensor:
    """The memory after a step."""
    if record.skipped or record.loss != record.loss:  # with late losses, a step that changes nothing has no loss
        return method.pass_over(memory)
    loss, grad = (torch.tensor(x, dtype=torch.float64, device="cpu") for x in (record.loss, record.grad))
    scalars = torch.tensor(record.scalars, dtype=torch.float64, device="cpu")
    return method.remember(memory, Told(loss, grad, scalars, record.lr))
