"""Updates whose coefficients live in device memory: what a fused pass reads when the host does not know them yet.

A step's seed, decay and fold are known when the step is launched; its coefficient comes out of the losses, on the
device. `UpdateTable` keeps one `zo_update` record (csrc/api.h) a step and update in device memory. The host enqueues
the record's known part before the forwards and the coefficient after them; the next pass finds both there.

There are copies of every record, with and without weight decay (biases and norms have none) and with its coefficient
times each of a run's gains, so that a pass is given a plain array whoever runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .float32 import scaled
from .records import UPDATE, Update

RECORD_BYTES = UPDATE.size
_COEFF, _DECAY = 2, 3  # places among the record's six 32-bit words
_FIRST_CAPACITY = 1024


@dataclass(frozen=True)
class DeviceUpdates:
    """Records [first, first + len(folds)) of one copy of a table. folds: which of them round to the storage format."""

    records: Tensor  # uint8 [capacity, RECORD_BYTES] in device memory
    first: int
    folds: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.folds)

    @property
    def address(self) -> int:
        return self.records.data_ptr() + RECORD_BYTES * self.first

    @property
    def last_fold(self) -> int:
        """Index of the last update that folds, -1 if none does."""
        return max((i for i, fold in enumerate(self.folds) if fold), default=-1)

    def after(self, index: int) -> DeviceUpdates:
        """Those from `index` on."""
        return DeviceUpdates(self.records, self.first + index, self.folds[index:])

    def read(self) -> tuple[Update, ...]:
        """The updates as the host knows them. Waits for the device."""
        data = self.records[self.first : self.first + len(self)].cpu().numpy().tobytes()
        return tuple(
            Update(seed, coeff, decay, bool(flags & 1), not flags & 2)
            for seed, coeff, decay, flags, _ in UPDATE.iter_unpack(data)
        )


class UpdateTable:
    """Update records of a run in device memory, in step order. Every write is enqueued on the current stream."""

    def __init__(
        self,
        device: torch.device,
        upload: Callable[[Tensor], Tensor] | None = None,
        gains: Iterable[float] = (),
    ) -> None:
        """upload: brings a host tensor to the device without waiting for it; default `tensor.to(device)`. gains: of
        `since`, besides 1."""
        self.device = device
        self._copies = [(gain, decay) for gain in sorted({1.0, *gains}) for decay in (True, False)]
        factors = torch.tensor([[gain] for gain, _ in self._copies], dtype=torch.float32, device="cpu")
        self._factors = None if len(self._copies) == 2 else factors.to(device)
        self._upload = upload if upload is not None else lambda tensor: tensor.to(device)
        self._folds: list[bool] = []
        self._records = self._empty(_FIRST_CAPACITY)  # [copies], [capacity], [RECORD_BYTES]

    def __len__(self) -> int:
        return len(self._folds)

    def _empty(self, capacity: int) -> Tensor:
        return torch.zeros((len(self._copies), capacity, RECORD_BYTES), dtype=torch.uint8, device=self.device)

    def append(self, updates: Sequence[Update]) -> int:
        """Add records, coefficients included; the index of the first."""
        first, count = len(self), len(updates)
        capacity = self._records.shape[1]
        if first + count > capacity:
            while capacity < first + count:
                capacity *= 2
            grown = self._empty(capacity)
            grown[:, :first] = self._records[:, :first]
            self._records = grown
        if count:
            packed = b"".join(
                UPDATE.pack(u.seed, scaled(u.coeff, gain), u.decay if decay else 1.0, u.flags, 0)
                for gain, decay in self._copies
                for u in updates
            )
            records = self._upload(torch.frombuffer(bytearray(packed), dtype=torch.uint8))
            self._records[:, first : first + count] = records.view(-1, count, RECORD_BYTES)
        self._folds += [u.fold for u in updates]
        return first

    def set_coefficients(self, first: int, coefficients: Tensor, applies: Tensor) -> None:
        """Coefficients (float32, on the device) of records first, first + 1, ...

        Where `applies` (bool, one element) is false the records change nothing: coefficient 0, decay 1.
        """
        words = self._records[:, first : first + coefficients.numel()].view(torch.float32)
        coefficients = torch.where(applies, coefficients.reshape(-1), 0.0)
        words[..., _COEFF] = coefficients if self._factors is None else coefficients * self._factors
        words[..., _DECAY] = torch.where(applies, words[..., _DECAY], 1.0)

    def since(self, first: int, decay: bool, gain: float = 1.0) -> DeviceUpdates:
        """All records from `first` on, with their coefficients times one of the table's gains."""
        return DeviceUpdates(self._records[self._copies.index((gain, decay))], first, tuple(self._folds[first:]))

    def cut(self, count: int) -> None:
        """Forget all records but the first `count`."""
        del self._folds[count:]
