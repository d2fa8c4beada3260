"""Training data as batches that are functions of the step.

`make_batches` takes what users have: a DataLoader or other iterable of dicts of tensors, a dataset or list of dicts
(text or tokenised), or a path to .jsonl or .csv, whose rows are read when they are needed (`row_file.py`). For data
with random access the batch of step t is a pure function of (seed, t): epoch e is a permutation keyed by (seed, e), so
a resumed run sees what an uninterrupted one would. Other iterables are read in order and started over at their end;
resuming reads up to the step again. `fingerprint` of the batch is what the journal keeps to tell when that went wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .encode import Batch, Encoder, Row
from .errors import DataError
from .measures import OptionsLoss, measure
from .micro_batches import RowBatch, batch_rows
from .model_kind import ModelKind
from .row_file import LONGEST_KEPT, RowFile, open_rows

__all__ = [
    "Batch", "Batches", "Encoder", "RowBatches", "StreamBatches", "batch_tokens", "fingerprint", "make_batches",
    "most_ids", "open_rows",
]  # fmt: skip

DIGESTED = 4096  # rows that a data set is told by


class Batches:
    """Batches by step, and one epoch of them in order. Subclasses give `batch` and `epoch`."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.objective = OptionsLoss(encoder) if encoder.loss == "options" else None
        """In place of the engine's."""

    def batch(self, step: int) -> Batch:
        """The batch of a training step, 0-based."""
        raise NotImplementedError

    def epoch(self) -> Iterator[Batch]:
        """Everything once, in the data's order, the last batch short if it must be; for evaluation."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any] | None:
        """What these batches are made of, for a run to tell other data by; None if that cannot be known beforehand."""
        return None

    def measure(
        self, model: Any, batch: Batch, loss: Callable[[Any, Batch], float], weight: float
    ) -> dict[str, tuple[float, float]]:
        """name -> (value, weight) of one batch, from one forward; see `measures.measure`."""
        return measure(self.encoder, model, batch, loss, weight)


class RowBatches(Batches):
    """Rows with random access. batch(step) is a function of (rows, batch_size, seed, shuffle, step) alone."""

    def __init__(
        self, rows: Sequence[Row] | Any, encoder: Encoder, *, batch_size: int, seed: int, shuffle: bool, name: str
    ):
        super().__init__(encoder)
        if batch_size < 1:
            raise DataError(f"batch_size={batch_size}: expected at least 1")
        if len(rows) == 0:
            raise DataError(f"{name} is empty.")
        if shuffle and len(rows) < batch_size:
            raise DataError(f"{name} has {len(rows)} rows, fewer than batch_size={batch_size}. Lower batch_size.")
        self.rows, self.batch_size, self.seed, self.shuffle, self.name = rows, batch_size, seed, shuffle, name
        self._order = (-1, torch.empty(0, dtype=torch.int64))  # an epoch and its permutation
        self._try_rows()

    def __len__(self) -> int:
        """Whole batches in an epoch."""
        return len(self.rows) // self.batch_size

    def batch(self, step: int) -> Batch:
        if len(self) == 0:
            raise DataError(f"{self.name} has {len(self.rows)} rows, fewer than batch_size={self.batch_size}.")
        epoch, place = divmod(step, len(self))
        begin = place * self.batch_size
        if not self.shuffle:
            return self._collated(range(begin, begin + self.batch_size))
        return self._collated(self._shuffled(epoch)[begin : begin + self.batch_size].tolist())

    def epoch(self) -> Iterator[Batch]:
        for begin in range(0, len(self.rows), self.batch_size):
            yield self._collated(range(begin, min(begin + self.batch_size, len(self.rows))))

    def identity(self) -> dict[str, Any] | None:
        """Number and digest of the rows (of at most DIGESTED of them, evenly spaced), and how they are cut."""
        digest, count = hashlib.blake2b(digest_size=8), min(DIGESTED, len(self.rows))
        for i in (k * len(self.rows) // count for k in range(count)):
            row = self.rows[i]
            digest.update(f"{i} {fingerprint(row) if isinstance(row, Mapping) else repr(row)}\n".encode())
        return {
            "rows": len(self.rows), "digest": digest.hexdigest(), "batch_size": self.batch_size,
            "shuffle": self.shuffle,
        }  # fmt: skip

    def _shuffled(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
            self._order = (epoch, torch.randperm(len(self.rows), generator=generator))
        return self._order[1]

    def _collated(self, indices: Iterable[int]) -> Batch:
        indices = list(indices)
        rows = [self.encoder(self.rows[i], f"{self.name} row {i}") for i in indices]
        return RowBatch(self.encoder.collate(rows, f"{self.name} rows {indices[0]}, ..."))

    def _try_rows(self) -> None:
        """Raises now what the first and the longest rows would raise at some step."""
        self.encoder(self.rows[0], f"{self.name} row 0")
        longest: list[int] = []
        if isinstance(self.rows, RowFile):
            longest = self.rows.longest
        elif isinstance(self.rows, (list, tuple)) and all(isinstance(row, Mapping) for row in self.rows):
            by_size = sorted(range(len(self.rows)), key=lambda i: -self.encoder.size_of(self.rows[i]))
            longest = by_size[:LONGEST_KEPT]
        for i in longest:
            self.encoder(self.rows[i], f"{self.name} row {i}")


class StreamBatches(Batches):
    """A DataLoader or another iterable of ready batches.

    Steps must be asked for in rising order, or from the start again. While an epoch of a DataLoader begins, torch's
    default generator is seeded from (seed, epoch), so its shuffling is the same in a resumed run; a generator given to
    the DataLoader, or randomness inside the dataset, is the caller's to repeat.
    """

    def __init__(self, batches: Iterable[Any], encoder: Encoder, *, seed: int, name: str):
        super().__init__(encoder)
        self.batches, self.seed, self.name = batches, seed, name
        self._epoch, self._next_step = -1, 0
        self._iterator: Iterator[Any] | None = None

    def batch(self, step: int) -> Batch:
        if self._iterator is None or step < self._next_step:
            if self._iterator is not None and iter(self.batches) is self.batches:
                raise DataError(f"{self.name} cannot be read again from step {step}; pass a list or a DataLoader.")
            self._epoch, self._next_step = -1, 0
            self._iterator, first = self._begin()
        else:
            first = None
        while True:
            batch = first if first is not None else next(self._iterator, None)
            first = None
            if batch is None:
                self._iterator, first = self._begin()
                continue
            self._next_step += 1
            if self._next_step > step:
                return self._checked(batch, f"{self.name} batch of step {step}")

    def epoch(self) -> Iterator[Batch]:
        empty = True
        for index, batch in enumerate(self.batches):
            empty = False
            yield self._checked(batch, f"{self.name} batch {index}")
        if empty:
            raise DataError(
                f"{self.name} gave no batches. If it is an iterator it was used up; pass a list or a DataLoader."
            )

    def _begin(self) -> tuple[Iterator[Any], Any]:
        """A new epoch's iterator and its first batch."""
        self._epoch += 1
        with _seeded(_mix(self.seed, self._epoch)):
            iterator = iter(self.batches)
            first = next(iterator, None)
        if first is None:
            raise DataError(
                f"{self.name} gave no batches in epoch {self._epoch} (after {self._next_step} in all). An empty "
                "dataset, drop_last with fewer rows than a batch, or an iterator that can be read only once."
            )
        return iterator, first

    def _checked(self, batch: Any, where: str) -> Batch:
        if not isinstance(batch, Mapping):
            raise DataError(
                f"{where} is a {type(batch).__name__}; expected a dict of tensors named as the model's arguments."
            )
        if not any(isinstance(value, Tensor) for value in batch.values()):
            kinds = ", ".join(f"{key}: {type(value).__name__}" for key, value in batch.items())
            raise DataError(f"{where} holds no tensors ({kinds}). Collate rows into tensors, or pass the dataset.")
        return dict(batch)


def make_batches(
    data: Any,
    *,
    batch_size: int,
    kind: ModelKind,
    seed: int = 0,
    shuffle: bool = True,
    **encoding: Any,
) -> Batches:
    """Batches from a path (.jsonl, .csv), a dataset or list of dicts, a DataLoader or other iterable of dicts.

    kind: of the model that is to have them. encoding: fields of `Encoder` (tokenizer, template, verbalizers,
    max_length, ...), for rows. Batches from a DataLoader or iterable keep their own size. `Batches` given as such are
    returned. Raises DataError.
    """
    if isinstance(data, Batches):
        return data
    encoder = Encoder(kind, **encoding)
    if isinstance(data, (str, Path)):
        name = Path(data).name
        return RowBatches(
            open_rows(data, encoder.size_of), encoder, batch_size=batch_size, seed=seed, shuffle=shuffle, name=name
        )
    name = type(data).__name__
    if isinstance(data, Mapping) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise DataError(f"data is a {name}; expected a path, a dataset or list of dicts, or an iterable of batches.")
    has_rows = not isinstance(data, DataLoader) and hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if has_rows and (len(data) == 0 or not _is_batch(data[0])):
        return RowBatches(data, encoder, batch_size=batch_size, seed=seed, shuffle=shuffle, name=name)
    return StreamBatches(data, encoder, seed=seed, name=name)


def fingerprint(batch: Mapping[str, Any]) -> int:
    """crc32 over a batch's names, dtypes, shapes and contents."""
    crc = 0
    for key in sorted(batch):
        value = batch[key]
        if isinstance(value, Tensor):
            crc = zlib.crc32(f"{key} {value.dtype} {list(value.shape)}".encode(), crc)
            crc = zlib.crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
        else:
            crc = zlib.crc32(f"{key} {value!r}".encode(), crc)
    return crc


def batch_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens a batch makes the model read: attended ones, else input ids; rows where there are none."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, Tensor):
        return int((mask != 0).sum())
    return ids.numel() if isinstance(ids, Tensor) else batch_rows(batch)


def most_ids(batch: Mapping[str, Any]) -> int:
    """Most rows of an embedding that a batch can ask for: padding is looked up too."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    return max((t.numel() for t in tensors if not t.is_floating_point()), default=0) or batch_rows(batch)


def _is_batch(value: Any) -> bool:
    """A dict of tensors with a row dimension, as opposed to one row."""
    if not isinstance(value, Mapping):
        return False
    ids = value.get("input_ids", value.get("labels"))
    return isinstance(ids, Tensor) and ids.dim() >= (2 if "input_ids" in value else 1)


def _mix(seed: int, epoch: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"data {seed} {epoch}".encode(), digest_size=8).digest(), "little") >> 1


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's default generator at `seed` inside, untouched outside."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
