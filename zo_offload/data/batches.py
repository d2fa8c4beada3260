"""Training data as batches that are functions of the step.

`make_batches` takes users' data: rows (a dataset, a DataFrame, a list of dicts, a file, see `files.py`), a stream of
rows, or ready batches; `sources.py` tells them apart. For data with random access the batch of step t is a pure
function of (seed, t): epoch e is a permutation keyed by (seed, e), so a resumed run sees the same batches as an
uninterrupted one, and every row is checked before the first step. Streams are read in order and restart at their end; a
resumed run reads them again up to its step; their rows are checked when read. The journal keeps each batch's
`fingerprint`, to notice a batch that differs.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import itertools
import warnings
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
from ..system.nearest import did_you_mean
from ..system.plain import is_whole, plain_value
from .digests import encoder_identity, legacy_rows_identity, rows_identity, stream_identity
from .encode import ENCODING, Batch, Encoder, Row
from .files import open_file
from .made import MadeBatch, batch_tokens, fingerprint, most_ids
from .measures import Keep, OptionsLoss, measure
from .metrics import Metrics
from .order import bucketed
from .packing import PackedRows
from .row_file import LONGEST_KEPT, RowFile, open_rows
from .sources import Chunks, as_tensor_batch, open_source, rows_of_texts, with_own_workers
from .tasks import Scoring, sampled

__all__ = [
    "Batch", "Batches", "Encoder", "RowBatches", "StreamBatches", "batch_tokens", "fingerprint", "make_batches",
    "most_ids", "open_rows",
]  # fmt: skip


class Batches:
    """Batches by step, and one epoch of them in order. Subclasses give `batch` and `epoch`."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.objective: Callable[[Any, Any], Any] | None = OptionsLoss(encoder) if encoder.loss == "options" else None
        """The objective that the data asks for, in place of the engine's."""
        self.metrics: Metrics | None = None
        """The caller's own metrics of an evaluation."""
        self.scoring: Scoring | None = None
        """How generated texts are scored, in an evaluation of a task that generates them."""

    def batch(self, step: int) -> Batch:
        """The batch of a training step, 0-based."""
        raise NotImplementedError

    def epoch(self) -> Iterator[Batch]:
        """All rows once, in the data's order, for evaluation; the last batch may be short."""
        raise NotImplementedError

    def first(self) -> Batch:
        """A batch as `epoch` yields it, to see its sizes; consumes nothing."""
        return next(iter(self.epoch()))

    def largest(self) -> Batch | None:
        """The largest training batch, to plan memory with; None if it is not known beforehand."""
        return None

    def identity(self) -> dict[str, Any] | None:
        """Describes the data, so that a run notices other data; None if it cannot be known beforehand."""
        return None

    def legacy_identity(self) -> dict[str, Any] | None:
        """The same in the earlier format of runs; None if that format has nothing for such data."""
        return None

    def steps_per_epoch(self) -> int | None:
        """Steps of an epoch; None if not known."""
        return None

    @property
    def is_read_once(self) -> bool:
        """Whether the data can be read only once."""
        return False

    def measure(
        self, model: Any, batch: Batch, loss: Callable[[Any, Batch], float], weight: float, options: Any = None,
        keep: Keep | None = None,
    ) -> dict[str, tuple[float, float]]:  # fmt: skip
        """name -> (value, weight) of one batch, from one forward; see `measures.measure`."""
        return measure(self.encoder, model, batch, loss, weight, options, keep)


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
        if not is_whole(batch_size := plain_value(batch_size), 1):
            raise DataError(f"batch_size={batch_size!r}: expected a whole number of at least 1")
        if len(rows) == 0:
            raise DataError(f"{name} is empty.")
        if shuffle and len(rows) < batch_size:
            warnings.warn(f"{name} has {len(rows)} rows, fewer than batch_size={batch_size}: each step takes them all",
                          stacklevel=2)  # fmt: skip
            batch_size = len(rows)
        self.rows, self.batch_size, self.seed, self.shuffle, self.name = rows, batch_size, seed, shuffle, name
        self._order = (-1, torch.empty(0, dtype=torch.int64, device="cpu"))  # an epoch and its permutation
        self._identity: dict[str, Any] | None = None
        self._row_sizes: Tensor | None = None
        self._longest = self._check_rows()
        encoder.tell_uncounted(len(rows))
        for i in self._longest:
            encoder(rows[i], f"{name} row {i}", "")

    def __len__(self) -> int:
        """Whole batches in an epoch."""
        return len(self.rows) // self.batch_size

    def steps_per_epoch(self) -> int | None:
        return len(self)

    def batch(self, step: int) -> Batch:
        if len(self) == 0:
            raise DataError(f"{self.name} has {len(self.rows)} rows, fewer than batch_size={self.batch_size}.")
        epoch, place = divmod(step, len(self))
        begin = place * self.batch_size
        if not self.shuffle:
            return self._collated(range(begin, begin + self.batch_size), step)
        return self._collated(self._shuffled(epoch)[begin : begin + self.batch_size].tolist(), step)

    def epoch(self) -> Iterator[Batch]:
        count, size = len(self.rows), self.batch_size
        batches = (self._collated(range(begin, min(begin + size, count))) for begin in range(0, count, size))
        return read_apart(lambda: batches, _mix(self.seed, -1))

    def identity(self) -> dict[str, Any] | None:
        """Number and digest of all rows, their batching and their encoding; see digests.py."""
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
        """A whole batch that contains the longest row; the other rows are padded to its length."""
        if not isinstance(self.rows, (RowFile, PackedRows)) and self._longest == [0]:
            return None
        others = (i for i in range(self.batch_size + len(self._longest)) if i not in self._longest)
        rows = itertools.islice(itertools.chain(self._longest, others), self.batch_size)
        return self._collated([i for i in rows if i < len(self.rows)])

    def _shuffled(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
            order = torch.randperm(len(self.rows), generator=generator, device="cpu")
            if self.encoder.length_buckets:
                order = bucketed(order, self._sizes(), self.batch_size, generator)
            self._order = (epoch, order)
        return self._order[1]

    def _sizes(self) -> Tensor:
        """Each row's size: bytes of text, or tokens."""
        if self._row_sizes is None:
            found = (self.encoder.check(self.rows[i], f"{self.name} row {i}") for i in range(len(self.rows)))
            self._row_sizes = torch.tensor(list(found), device="cpu")
        return self._row_sizes

    def _collated(self, indices: Iterable[int], step: int | None = None) -> Batch:
        """The rows as a batch. step: random masks are drawn for it; None in an evaluation, where they stay the same."""
        indices = list(indices)
        rows = [self.encoder(self.rows[i], f"{self.name} row {i}", f"{self.seed} {step} {i}") for i in indices]
        options = [self.encoder.options_of(self.rows[i], f"{self.name} row {i}") for i in indices]
        own = [its for its in options if its is not None]
        return MadeBatch(
            self.encoder.collate(rows, f"{self.name} rows {indices[0]}, ..."), of_rows=True, options=own or None
        )

    def _check_rows(self) -> list[int]:
        """Raise now any error that a row would raise later; return the places of the longest rows if cheap to find.

        In a dataset that computes its rows (a torch Dataset), only the first is checked now, the others when drawn.
        """
        name, rows = self.name, self.rows
        if isinstance(rows, (RowFile, PackedRows)):  # checked when it was opened
            return rows.longest
        if not isinstance(rows, Sequence) and not hasattr(rows, "column_names"):
            return [0]
        sizes = ((self.encoder.check(row, f"{name} row {i}"), -i) for i, row in enumerate(rows))
        return [-place for _, place in heapq.nlargest(LONGEST_KEPT, sizes)]


class StreamBatches(Batches):
    """A DataLoader or another iterable of ready batches, or of rows in order: `Chunks`.

    Steps must be requested in rising order, or from the start again. While an epoch of a DataLoader begins, torch's
    default generator is seeded from (seed, epoch), so its shuffling is the same in a resumed run, with any number of
    workers. A generator that was given to the DataLoader, and randomness inside the dataset, must be repeated by the
    caller.
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
        self._last: Batch | None = None

    @property
    def is_read_once(self) -> bool:
        """Whether the data is an iterator, which can be read only once."""
        return self._once

    def steps_per_epoch(self) -> int | None:
        return len(self.batches) if hasattr(self.batches, "__len__") else None

    def batch(self, step: int) -> Batch:
        if self._once and self._last is not None and step == self._next_step - 1:
            return self._last  # a run reads its first batch once before it takes the step
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
                self._last = self._checked(batch, f"{self.name} batch of step {step}", f"{self.seed} {step}")
                return self._last

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
        """A digest of all batches of a list; a loader's own attributes."""
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
            torch.empty((), dtype=torch.int64, device="cpu").random_()  # as a loader draws when it starts its workers
        return iter(self.batches)

    def _is_short(self, batch: Any) -> bool:
        """Whether these are a stream's last rows, fewer than a batch; training skips them if there are others."""
        return isinstance(self.batches, Chunks) and len(batch) < self.batches.size

    def _checked(self, batch: Any, where: str, draw: str) -> Batch:
        """A ready batch unchanged; rows, or a loader's columns of texts, encoded."""
        whole = isinstance(batch, (list, tuple)) and self.encoder.own_objective  # which takes it as it is
        rows = batch if isinstance(self.batches, Chunks) else None if whole else rows_of_texts(batch)
        if rows is None:
            self.encoder.forms.add("batch")
            return MadeBatch(as_tensor_batch(batch, where, own_objective=self.encoder.own_objective))
        encoded = [self.encoder(row, f"{where} row {i}", f"{draw} {i}") for i, row in enumerate(rows)]
        return MadeBatch(self.encoder.collate(encoded, where), of_rows=True)


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
    rows: int | None = None,
    name: str | None = None,
    **encoding: Any,
) -> Batches:
    """Batches from a path, a dataset, DataFrame or list of dicts, a stream of them, or an iterable of ready batches.

    kind: the kind of the model that gets the batches; without it, only labels that are given or that `task` asks for
    are used. batched: whether the elements are ready batches, if `sources.py` cannot tell. rows: the number of rows to
    use, chosen by the seed. name: for messages. encoding: fields of `Encoder` (tokenizer, template, verbalizers,
    max_length, ...), for rows. Ready batches keep their own size. `Batches` are returned unchanged. Raises DataError.
    """
    if isinstance(data, Batches):
        return data
    check_options(encoding)
    encoder = Encoder(kind, own_objective, version, **encoding)
    if isinstance(data, (str, Path)):
        name, numbers = Path(data).name, itertools.count()
        # a text that is packed may be of any length
        check = (lambda row: 0) if encoder.packing else lambda row: encoder.check(row, f"{name} row {next(numbers)}")
        found = open_file(data, check)
        chosen = _packed(sampled(found, rows, seed, f"rows of {name}"), encoder, name)
        return RowBatches(chosen, encoder, batch_size=batch_size, seed=seed, shuffle=shuffle, name=name)
    # an element that is read now is used later: it must draw the same random numbers as then
    with contextlib.nullcontext() if isinstance(data, Iterator) else own_random_numbers(_mix(seed, -1)):
        source = open_source(data, kind, own_objective=own_objective, batched=batched, version=version)
        name = name or source.name
        if source.form == "rows":
            chosen = _packed(sampled(source.data, rows, seed, f"rows of {name}"), encoder, name)
            return RowBatches(chosen, encoder, batch_size=batch_size, seed=seed, shuffle=shuffle, name=name)
    if encoder.packing or encoder.length_buckets:
        raise DataError(f"{name} is read in order: packing and length_buckets are for a file, a list or a dataset.")
    if rows is not None:
        raise DataError(f"rows={rows}: {name} is read in order, and rows cannot be chosen of it.")
    ready = source.data if source.form == "batches" else Chunks(source.data, batch_size)
    return StreamBatches(ready, encoder, seed=seed, name=source.name)


def _packed(rows: Any, encoder: Encoder, name: str) -> Any:
    return PackedRows((rows[i] for i in range(len(rows))), encoder, name) if encoder.packing else rows


def check_options(given: Iterable[str], also: Iterable[str] = ()) -> None:
    """Raise DataError for a name that is not an option of the data. also: names of other valid options."""
    known = [f.name for f in fields(Encoder) if not f.name.startswith("_")]
    known = sorted({*known, *also} - {"kind", "own_objective", "version"})
    for name in sorted(set(given) - {f.name for f in fields(Encoder)}):
        hint = did_you_mean(name, known, "{}=") or f" There are {', '.join(known)}."
        raise DataError(f"{name}= is not an option of fit, evaluate or their data.{hint}")


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
