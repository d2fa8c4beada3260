"""Training data as batches that are functions of the step.

`make_batches` takes what users have: rows (a dataset, a DataFrame, a list of dicts, a file, see `files.py`), a
stream of rows, or batches that are ready; `sources.py` tells them apart. For data with random access the batch of step
t is a pure function of (seed, t): epoch e is a permutation keyed by (seed, e), so a resumed run sees what an
uninterrupted one would, and every row is looked at before the first step. Streams are read in order and started over at
their end; resuming reads up to the step again; their rows are checked as they come. `fingerprint` of the batch is what
the journal keeps to tell when that went wrong.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import heapq
import itertools
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import DataError
from ..modules.generators import own_random_numbers, read_apart
from ..modules.kind import UNKNOWN, ModelKind
from .digests import encoder_identity, legacy_rows_identity, rows_identity, stream_identity
from .encode import ENCODING, Batch, Encoder, Row
from .files import open_file
from .measures import OptionsLoss, measure
from .micro_batches import RowBatch, batch_rows
from .row_file import LONGEST_KEPT, RowFile, open_rows
from .sources import Chunks, as_tensor_batch, named_values, open_source, rows_of_texts, with_own_workers

__all__ = [
    "Batch", "Batches", "Encoder", "RowBatches", "StreamBatches", "batch_tokens", "fingerprint", "make_batches",
    "most_ids", "open_rows",
]  # fmt: skip


class Batches:
    """Batches by step, and one epoch of them in order. Subclasses give `batch` and `epoch`."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.objective: Callable[[Any, Any], Any] | None = OptionsLoss(encoder) if encoder.loss == "options" else None
        """In place of the engine's."""

    def batch(self, step: int) -> Batch:
        """The batch of a training step, 0-based."""
        raise NotImplementedError

    def epoch(self) -> Iterator[Batch]:
        """Everything once, in the data's order, the last batch short if it must be; for evaluation."""
        raise NotImplementedError

    def first(self) -> Batch:
        """A batch such as `epoch` gives, to see its sizes; nothing is used up by it."""
        return next(iter(self.epoch()))

    def largest(self) -> Batch | None:
        """A training batch as large as any, to plan memory with; None if that is not known beforehand."""
        return None

    def identity(self) -> dict[str, Any] | None:
        """What these batches are made of, for a run to tell other data by; None if that cannot be known beforehand."""
        return None

    def legacy_identity(self) -> dict[str, Any] | None:
        """The same as runs of the earlier format have it; None where those know nothing."""
        return None

    def measure(
        self, model: Any, batch: Batch, loss: Callable[[Any, Batch], float], weight: float, options: Any = None
    ) -> dict[str, tuple[float, float]]:
        """name -> (value, weight) of one batch, from one forward; see `measures.measure`."""
        return measure(self.encoder, model, batch, loss, weight, options)


class RowBatches(Batches):
    """Rows with random access. batch(step) is a function of (rows, batch_size, seed, shuffle, step) alone."""

    def __init__(
        self,
        rows: Sequence[Row] | Any,
        encoder: Encoder,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        name: str,
    ):
        super().__init__(encoder)
        if batch_size < 1:
            raise DataError(f"batch_size={batch_size}: expected at least 1")
        if len(rows) == 0:
            raise DataError(f"{name} is empty.")
        if shuffle and len(rows) < batch_size:
            warnings.warn(f"{name} has {len(rows)} rows, fewer than batch_size={batch_size}: each step takes them all",
                          stacklevel=2)  # fmt: skip
            batch_size = len(rows)
        self.rows, self.batch_size, self.seed, self.shuffle, self.name = rows, batch_size, seed, shuffle, name
        self._order = (-1, torch.empty(0, dtype=torch.int64, device="cpu"))  # an epoch and its permutation
        self._identity: dict[str, Any] | None = None
        self._longest = self._check_rows()
        for i in self._longest:
            encoder(rows[i], f"{name} row {i}", "")

    def __len__(self) -> int:
        """Whole batches in an epoch."""
        return len(self.rows) // self.batch_size

    def batch(self, step: int) -> Batch:
        if len(self) == 0:
            raise DataError(f"{self.name} has {len(self.rows)} rows, fewer than batch_size={self.batch_size}.")
        epoch, place = divmod(step, len(self))
        begin = place * self.batch_size
        if not self.shuffle:
            return self._collated(range(begin, begin + self.batch_size), step)
        return self._collated(self._shuffled(epoch)[begin : begin + self.batch_size].tolist(), step)

    def epoch(self) -> Iterator[Batch]:
        begins = range(0, len(self.rows), self.batch_size)
        batches = (self._collated(range(begin, min(begin + self.batch_size, len(self.rows)))) for begin in begins)
        return read_apart(lambda: batches, _mix(self.seed, -1))

    def identity(self) -> dict[str, Any] | None:
        """Number and digest of all rows, how they are cut, and how they are encoded; see digests.py."""
        if self._identity is None:
            with own_random_numbers(_mix(self.seed, -1)):
                self._identity = {
                    **rows_identity(self.rows), "batch_size": self.batch_size, "shuffle": self.shuffle,
                    "encoder": encoder_identity(self.encoder, self.rows),
                }  # fmt: skip
        return self._identity

    def legacy_identity(self) -> dict[str, Any] | None:
        known = legacy_rows_identity(self.rows, fingerprint)
        return {**known, "batch_size": self.batch_size, "shuffle": self.shuffle}

    def largest(self) -> Batch | None:
        """The longest row among as many others as a batch has: what is padded to its length."""
        if not isinstance(self.rows, RowFile) and self._longest == [0]:
            return None
        others = (i for i in range(self.batch_size + len(self._longest)) if i not in self._longest)
        rows = itertools.islice(itertools.chain(self._longest, others), self.batch_size)
        return self._collated([i for i in rows if i < len(self.rows)])

    def _shuffled(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
            self._order = (epoch, torch.randperm(len(self.rows), generator=generator, device="cpu"))
        return self._order[1]

    def _collated(self, indices: Iterable[int], step: int | None = None) -> Batch:
        """The rows as a batch; step: what random masks are drawn for, None for evaluation, where they stay the same."""
        indices = list(indices)
        rows = [self.encoder(self.rows[i], f"{self.name} row {i}", f"{self.seed} {step} {i}") for i in indices]
        options = [self.encoder.options_of(self.rows[i], f"{self.name} row {i}") for i in indices]
        own = [its for its in options if its is not None]
        return RowBatch(self.encoder.collate(rows, f"{self.name} rows {indices[0]}, ..."), own or None)

    def _check_rows(self) -> list[int]:
        """Raise now what a row would raise at some step; the places of the longest rows, where they are cheap to read.

        Of a dataset that computes its rows (a torch Dataset), the first is looked at; the others when they are drawn.
        """
        name, rows = self.name, self.rows
        if isinstance(rows, RowFile):  # looked at when it was opened
            return rows.longest
        if not isinstance(rows, Sequence) and not hasattr(rows, "column_names"):
            return [0]
        sizes = ((self.encoder.check(row, f"{name} row {i}"), -i) for i, row in enumerate(rows))
        return [-place for _, place in heapq.nlargest(LONGEST_KEPT, sizes)]


class StreamBatches(Batches):
    """A DataLoader or another iterable of ready batches, or of rows in order: `Chunks`.

    Steps must be asked for in rising order, or from the start again. While an epoch of a DataLoader begins, torch's
    default generator is seeded from (seed, epoch), so its shuffling is the same in a resumed run, whatever workers it
    has; in training, a generator given to the DataLoader, or randomness inside the dataset, is the caller's to repeat.
    """

    def __init__(self, batches: Iterable[Any], encoder: Encoder, *, seed: int, name: str):
        super().__init__(encoder)
        self._persistent = False
        if isinstance(batches, DataLoader) and batches.persistent_workers:
            self._persistent, batches = True, with_own_workers(batches)
        if self._persistent or (encoder.version == 1 and isinstance(batches, DataLoader)):
            with own_random_numbers(_mix(seed, -1)):
                iter(batches)  # starts its workers; in runs of the earlier format, draws from its own generator
        self.batches: Any = batches
        self.seed, self.name = seed, name
        self._once = isinstance(batches.rows if isinstance(batches, Chunks) else batches, Iterator)
        self._epoch, self._next_step = -1, 0
        self._iterator: Iterator[Any] | None = None

    def batch(self, step: int) -> Batch:
        if self._iterator is None or step < self._next_step:
            if self._iterator is not None and self._once:
                raise DataError(f"{self.name} cannot be read again from step {step}; pass a list or a DataLoader.")
            self._epoch, self._next_step = -1, 0
            self._iterator, first = self._begin()
        else:
            first = None
        while True:
            batch, begins = (first, True) if first is not None else (next(self._iterator, None), False)
            first = None
            if batch is None or (self._is_short(batch) and not begins):
                self._iterator, first = self._begin()
                continue
            self._next_step += 1
            if self._next_step > step:
                return self._checked(batch, f"{self.name} batch of step {step}", f"{self.seed} {step}")

    def first(self) -> Batch:
        if not self._once:
            return super().first()
        iterator = iter(self.batches)
        batch = next(iterator, None)
        self.batches = itertools.chain([] if batch is None else [batch], iterator)
        if batch is None:
            raise DataError(f"{self.name} gave no batches: it was used up. Pass a list or a DataLoader.")
        return self._checked(batch, f"{self.name} batch 0", f"{self.seed} None 0")

    def epoch(self) -> Iterator[Batch]:
        empty = True
        for index, batch in enumerate(read_apart(self._open, _mix(self.seed, -1))):
            empty = False
            yield self._checked(batch, f"{self.name} batch {index}", f"{self.seed} None {index}")
        if empty:
            raise DataError(
                f"{self.name} gave no batches. If it is an iterator it was used up; pass a list or a DataLoader."
            )

    def identity(self) -> dict[str, Any] | None:
        """All batches of a list; of a loader what it says of itself."""
        return stream_identity(self.batches)

    def _begin(self) -> tuple[Iterator[Any], Any]:
        """A new epoch's iterator and its first batch."""
        self._epoch += 1
        with _seeded(_mix(self.seed, self._epoch)):
            iterator = self._open()
            first = next(iterator, None)
        if first is None:
            raise DataError(
                f"{self.name} gave no batches in epoch {self._epoch} (after {self._next_step} in all). An empty "
                "dataset, drop_last with fewer rows than a batch, or an iterator that can be read only once."
            )
        return iterator, first

    def _open(self) -> Iterator[Any]:
        """The batches from the first on."""
        if self._persistent and self.encoder.version > 1 and self.batches.generator is None:
            torch.empty(
                (), dtype=torch.int64, device="cpu"
            ).random_()  # as a loader draws for its workers where it starts them
        return iter(self.batches)

    def _is_short(self, batch: Any) -> bool:
        """A stream's last rows, fewer than a batch: left out of training unless there are no others."""
        return isinstance(self.batches, Chunks) and len(batch) < self.batches.size

    def _checked(self, batch: Any, where: str, draw: str) -> Batch:
        """A ready batch as it is; rows, or a loader's columns of texts, encoded."""
        rows = batch if isinstance(self.batches, Chunks) else rows_of_texts(batch)
        if rows is None:
            return as_tensor_batch(batch, where, own_objective=self.encoder.own_objective)
        encoded = [self.encoder(row, f"{where} row {i}", f"{draw} {i}") for i, row in enumerate(rows)]
        return RowBatch(self.encoder.collate(encoded, where))


def make_batches(
    data: Any,
    *,
    batch_size: int,
    kind: ModelKind = UNKNOWN,
    own_objective: bool = False,
    version: int = ENCODING,
    seed: int = 0,
    shuffle: bool = True,
    batched: bool | None = None,
    **encoding: Any,
) -> Batches:
    """Batches from a path, a dataset, DataFrame or list of dicts, a stream of them, or an iterable of ready batches.

    kind: of the model that is to have them; where it is not said, only labels that are given or asked for by `task` are
    taken. batched: whether the elements are ready batches, where `sources.py` would not see it. encoding: fields of
    `Encoder` (tokenizer, template, verbalizers, max_length, ...), for rows. Ready batches keep their own size.
    `Batches` given as such are returned. Raises DataError.
    """
    if isinstance(data, Batches):
        return data
    known = {f.name for f in fields(Encoder) if not f.name.startswith("_")} - {"kind", "own_objective", "version"}
    for name in encoding.keys() - known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean {near[0]}=?" if near else f"There are {', '.join(sorted(known))}."
        raise DataError(f"{name}= is no option of fit, evaluate or their data. {hint}")
    encoder = Encoder(kind, own_objective, version, **encoding)
    if isinstance(data, (str, Path)):
        name, numbers = Path(data).name, itertools.count()
        rows = open_file(data, lambda row: encoder.check(row, f"{name} row {next(numbers)}"))
        return RowBatches(rows, encoder, batch_size=batch_size, seed=seed, shuffle=shuffle, name=name)
    # what an iterator gives now is used later: it draws what it would draw then
    with contextlib.nullcontext() if isinstance(data, Iterator) else own_random_numbers(_mix(seed, -1)):
        source = open_source(data, kind, own_objective=own_objective, batched=batched, version=version)
        if source.form == "rows":
            return RowBatches(source.data, encoder, batch_size=batch_size, seed=seed, shuffle=shuffle, name=source.name)
    ready = source.data if source.form == "batches" else Chunks(source.data, batch_size)
    return StreamBatches(ready, encoder, seed=seed, name=source.name)


def fingerprint(batch: Any) -> int:
    """crc32 over a batch's names, dtypes, shapes and contents."""
    crc = 0
    for key, value in sorted(named_values(batch), key=lambda pair: pair[0]):
        if isinstance(value, Tensor):
            crc = zlib.crc32(f"{key} {value.dtype} {list(value.shape)}".encode(), crc)
            crc = zlib.crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
        else:
            crc = zlib.crc32(f"{key} {value!r}".encode(), crc)
    return crc


def batch_tokens(batch: Any) -> int:
    """Tokens a batch makes the model read: attended ones, else input ids; rows where there are none."""
    named = dict(named_values(batch))
    mask, ids = named.get("attention_mask"), named.get("input_ids")
    if isinstance(mask, Tensor):
        return int((mask != 0).sum())
    return ids.numel() if isinstance(ids, Tensor) else batch_rows(named)


def most_ids(batch: Any) -> int:
    """Most rows of an embedding that a batch can ask for: padding is looked up too."""
    named = dict(named_values(batch))
    tensors = [value for value in named.values() if isinstance(value, Tensor)]
    return max((t.numel() for t in tensors if not t.is_floating_point()), default=0) or batch_rows(named)


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
