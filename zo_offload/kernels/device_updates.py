"""Updates whose coefficients are in device memory, for fused passes that run before the host knows them.

A step's seed, decay and fold are known when the step is launched; its coefficient is computed from the losses, on the
device. `UpdateTable` keeps one `zo_update` record (csrc/api.h) per step and update in device memory. The host enqueues
the record's known part before the forwards and the coefficient after them; the next pass finds both there.

Every record has copies with and without weight decay (biases and norms have none), with its coefficient times each of a
run's gains, and for each part of the model that steps may leave out, so that every pass reads a plain array. For a part
that a step leaves out, the step's records only fold pending updates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .float32 import scaled
from .records import UPDATE, Terms, Update

RECORD_BYTES = UPDATE.size
_COEFF, _DECAY = 2, 3  # indices of the record's six 32-bit words
_FIRST_CAPACITY = 1024


@dataclass(frozen=True)
class DeviceUpdates:
    """Records [first, first + len(folds)) of one copy of a table. folds: whether each rounds to the storage format."""

    records: Tensor  # uint8 [capacity, RECORD_BYTES] in device memory
    first: int
    folds: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.folds)

    @cached_property
    def address(self) -> int:
        return self.records.data_ptr() + RECORD_BYTES * self.first

    @cached_property
    def last_fold(self) -> int:
        """Index of the last update that folds, -1 if none does."""
        return max((i for i, fold in enumerate(self.folds) if fold), default=-1)

    def after(self, index: int) -> DeviceUpdates:
        """The records from `index` on."""
        return DeviceUpdates(self.records, self.first + index, self.folds[index:])

    def read(self) -> tuple[Update, ...]:
        """The updates on the host. Waits for the device."""
        data = self.records[self.first : self.first + len(self)].cpu().numpy().tobytes()
        return tuple(
            Update(seed, coeff, decay, bool(flags & 1), not flags & 2)
            for seed, coeff, decay, flags, _ in UPDATE.iter_unpack(data)
        )


def terms_on(
    device: torch.device, upload: Callable[[Tensor], Tensor], sums: Sequence[Terms], coefficients: Tensor
) -> list[Terms]:
    """Sums whose coefficients (float32, on the device, sum after sum) the host does not know."""
    records = torch.empty((coefficients.numel(), RECORD_BYTES), dtype=torch.uint8, device=device)
    packed = bytearray(b"".join(terms.packed for terms in sums))
    records.copy_(upload(torch.frombuffer(packed, dtype=torch.uint8)).view(-1, RECORD_BYTES))
    records.view(torch.float32)[:, _COEFF] = coefficients
    found, first = list[Terms](), 0
    for terms in sums:
        found.append(Terms(terms.seeds, records=records, first=first))
        first += len(terms.seeds)
    return found


class UpdateTable:
    """Update records of a run in device memory, in step order. Every write is enqueued on the current stream."""

    def __init__(
        self,
        device: torch.device,
        upload: Callable[[Tensor], Tensor] | None = None,
        gains: Iterable[float] = (),
        parts: Iterable[str] = (),
    ) -> None:
        """upload: copies a host tensor to the device without waiting; default `tensor.to(device)`. gains: those that
        `since` may be asked for, besides 1. parts: the parts that steps may leave out."""
        self.device = device
        self._parts: list[str | None] = [None, *parts]
        self._copies = [
            (gain, decay, part) for part in self._parts for gain in sorted({1.0, *gains}) for decay in (True, False)
        ]
        self._upload = upload if upload is not None else lambda tensor: tensor.to(device)
        self._always = None if len(self._copies) == 2 else self._factors(frozenset()).to(device)
        self._folds: list[list[bool]] = [[] for _ in self._parts]  # for each part's records
        self._trains: list[list[bool]] = [[] for _ in self._parts]
        self._records = self._empty(_FIRST_CAPACITY)  # [copies], [capacity], [RECORD_BYTES]

    def __len__(self) -> int:
        return len(self._folds[0])

    def _empty(self, capacity: int) -> Tensor:
        return torch.zeros((len(self._copies), capacity, RECORD_BYTES), dtype=torch.uint8, device=self.device)

    def _factors(self, chosen: Collection[str]) -> Tensor:
        """The factor of a step's coefficients in each copy, on the host: [copies, 1]."""
        factors = [[gain if part is None or part in chosen else 0.0] for gain, _, part in self._copies]
        return torch.tensor(factors, dtype=torch.float32, device="cpu")

    def _is_pending(self, part: int) -> bool:
        """Whether a part has updates that are not folded."""
        for fold, trains in zip(reversed(self._folds[0]), reversed(self._trains[part]), strict=True):
            if fold or trains:
                return not fold
        return False

    def _part_of_step(self, index: int, updates: Sequence[Update], chosen: Collection[str]) -> Sequence[Update]:
        """A step's updates for a part."""
        part = self._parts[index]
        if part is None or part in chosen:
            return updates
        pending = any(u.fold for u in updates) and self._is_pending(index)
        return [replace(u, coeff=0.0, decay=1.0, fold=u.fold and pending) for u in updates]

    def append(self, updates: Sequence[Update], chosen: Collection[str] = ()) -> int:
        """Add a step's records, with coefficients; returns the index of the first. chosen: the parts that it trains."""
        first, count = len(self), len(updates)
        capacity = self._records.shape[1]
        if first + count > capacity:
            while capacity < first + count:
                capacity *= 2
            grown = self._empty(capacity)
            grown[:, :first] = self._records[:, :first]
            self._records = grown
        of = [self._part_of_step(index, updates, chosen) for index in range(len(self._parts))]
        if count:
            packed = b"".join(
                UPDATE.pack(u.seed, scaled(u.coeff, gain), u.decay if decay else 1.0, u.flags, 0)
                for gain, decay, part in self._copies
                for u in of[self._parts.index(part)]
            )
            records = self._upload(torch.frombuffer(bytearray(packed), dtype=torch.uint8))
            self._records[:, first : first + count] = records.view(-1, count, RECORD_BYTES)
        for index, part in enumerate(self._parts):
            self._folds[index] += [u.fold for u in of[index]]
            self._trains[index] += [part is None or part in chosen] * count
        return first

    def set_coefficients(self, first: int, coefficients: Tensor, applies: Tensor, chosen: Collection[str] = ()) -> None:
        """Coefficients (float32, on the device) of records first, first + 1, ... of a step that trains these parts.

        Where `applies` (bool, one element) is false the records change nothing: coefficient 0, decay 1.
        """
        words = self._records[:, first : first + coefficients.numel()].view(torch.float32)
        coefficients = torch.where(applies, coefficients.reshape(-1), 0.0)
        factors = self._upload(self._factors(chosen)) if chosen else self._always
        words[..., _COEFF] = coefficients if factors is None else coefficients * factors
        words[..., _DECAY] = torch.where(applies, words[..., _DECAY], 1.0)

    def since(self, first: int, decay: bool, gain: float = 1.0, part: str | None = None) -> DeviceUpdates:
        """All records from `first` on for one of the table's parts, their coefficients times one of its gains."""
        copy, folds = self._copies.index((gain, decay, part)), self._folds[self._parts.index(part)]
        return DeviceUpdates(self._records[copy], first, tuple(folds[first:]))

    def cut(self, count: int) -> None:
        """Forget all records but the first `count`."""
        for told in (*self._folds, *self._trains):
            del told[count:]
