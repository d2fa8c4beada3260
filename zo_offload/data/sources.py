"""Recognises the form of users' data: rows with random access, a stream of rows, or ready batches.

The rule: a DataLoader, and any iterable whose elements are batches, gives batches. An element is a batch if the tensor
that its model knows has one dimension more than a row's (input_ids two, pixel_values four, ...). In a list of dicts
with other names, an element is a batch if all its tensors have the same first dimension and one of them has a second,
or is called "labels". `batched=True` or `False` overrides the rule.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import DataError
from ..modules.kind import ModelKind
from ..modules.trees import tensors_of

_BATCH_DIMS = {
    "input_ids": 2, "pixel_values": 4, "input_features": 3, "input_values": 2, "inputs_embeds": 3,
    "decoder_input_ids": 2, "attention_mask": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """form: "rows" (a sequence), "stream" (rows in order) or "batches" (ready, in order); name: for messages."""

    form: Literal["rows", "stream", "batches"]
    data: Any
    name: str


def open_source(data: Any, kind: ModelKind, *, own_objective: bool, batched: bool | None, version: int) -> Source:
    """The form of the data. Reads its first element; an iterator's is put back. Raises DataError for other data."""
    name = type(data).__name__
    if hasattr(data, "iloc") and not hasattr(data, "columns"):
        raise DataError(f"data is a {name}, one column: give it a name and pass the frame, data.to_frame('text').")
    if hasattr(data, "iloc") and hasattr(data, "to_dict"):  # pandas
        return Source("rows", data.to_dict("records"), name)
    if isinstance(data, Mapping):
        splits = [str(key) for key, value in data.items() if hasattr(value, "column_names") or _is_rows(value)]
        if splits:
            raise DataError(f"data is a {name} of {', '.join(splits)}: pass one of them, data[{splits[0]!r}].")
    if isinstance(data, (Mapping, str)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise DataError(f"data is a {name}; expected a path, a dataset or list of dicts, or an iterable of batches.")
    if isinstance(data, DataLoader):
        return Source("batches", data, name)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        if len(data) == 0:
            raise DataError(f"{name} is empty.")
        first = _first_of(data, name)
    else:
        first, data = _peeked(data)
    is_batch = batched if batched is not None else _is_batch(first, data, kind, own_objective, version)
    if is_batch:
        return Source("batches", data, name)
    if isinstance(first, (tuple, list)) and any(isinstance(value, Tensor) for value in first):
        raise DataError(f"{name} gives tuples, one per row: pass DataLoader(data, batch_size=...) and an objective=.")
    return Source("rows" if hasattr(data, "__len__") and hasattr(data, "__getitem__") else "stream", data, name)


def named_values(batch: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of everything in a batch; values inside dicts, lists and tuples of tensors are named "a.0.b"."""
    pairs = (
        batch.items() if isinstance(batch, Mapping) else enumerate(batch) if isinstance(batch, (list, tuple)) else ()
    )
    if not pairs and isinstance(batch, Tensor):
        yield prefix or "0", batch
    for key, value in pairs:
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, (Mapping, list, tuple)) and tensors_of(value):
            yield from named_values(value, name)
        else:
            yield name, value


def rows_of_texts(batch: Any) -> list[dict[str, Any]] | None:
    """The rows of a loader's batch, if it is a list of rows, or has texts in lists, like torch's default collation."""
    if isinstance(batch, (list, tuple)) and batch and all(isinstance(row, Mapping) for row in batch):
        return [dict(row) for row in batch]
    columns = batch if isinstance(batch, Mapping) else {}
    lists = [v for v in columns.values() if isinstance(v, (list, tuple)) and v and all(isinstance(t, str) for t in v)]
    if not lists or "input_ids" in columns or any(not hasattr(v, "__len__") for v in columns.values()):
        return None
    if len({len(value) for value in columns.values()}) > 1:
        return None
    return [{name: _plain(value[i]) for name, value in columns.items()} for i in range(len(lists[0]))]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.dim() == 0 else value


def with_own_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same loader with persistent workers of its own.

    Workers serve one epoch at a time: another reader of the given loader (an evaluation between two steps) would end
    the epoch that is being read.
    """
    own = copy.copy(loader)
    own._iterator = None
    return own


class Chunks:
    """Rows of a stream, `size` at a time in order; the last chunk may be short."""

    def __init__(self, rows: Iterable[Any], size: int):
        self.rows, self.size = rows, size

    def __iter__(self) -> Iterator[list[Any]]:
        rows = iter(self.rows)
        while chunk := list(itertools.islice(rows, self.size)):
            yield chunk


class _Again:
    """An iterator whose first element was read in advance."""

    def __init__(self, first: Any, rest: Iterator[Any]):
        self._all = itertools.chain([first], rest)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._all)


def _peeked(data: Any) -> tuple[Any, Any]:
    """The first element of an iterable, and the complete iterable."""
    iterator = iter(data)
    first = next(iterator, None)
    return first, (_Again(first, iterator) if iterator is data and first is not None else data)


def _first_of(data: Any, name: str) -> Any:
    try:
        return data[0]
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(f"{name} of {len(data)} does not give its first row as data[0]: {error!r}.") from error


def _is_batch(first: Any, data: Any, kind: ModelKind, own_objective: bool, version: int) -> bool:
    if version == 1:
        return _was_batch(first)
    found = tensors_of(first)
    if isinstance(first, (tuple, list)):
        return own_objective and bool(found) and _share_rows(found)
    if not isinstance(first, Mapping):
        return not _is_plain(first)
    for name, dims in _BATCH_DIMS.items():
        if isinstance(value := first.get(name), Tensor):
            return value.dim() >= dims + (kind.name == "choice" and name == "input_ids")
        if value is not None:
            return False  # a list of tokens
    plain = any(isinstance(value, (int, float, str)) and not isinstance(value, bool) for value in first.values())
    if plain or not found or not _share_rows(found):
        return not found and not isinstance(data, Sequence) and not plain and not _is_rows([first])
    return "labels" in first or (isinstance(data, Sequence) and any(t.dim() > 1 for t in found))


def _share_rows(tensors: list[Tensor]) -> bool:
    return all(t.dim() > 0 for t in tensors) and len({len(t) for t in tensors}) == 1


def _was_batch(value: Any) -> bool:
    """The rule that told batches from rows when encodings had no number."""
    if not isinstance(value, Mapping):
        return False
    ids = value.get("input_ids", value.get("labels"))
    return isinstance(ids, Tensor) and ids.dim() >= (2 if "input_ids" in value else 1)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (int, float, str, list))


def _is_rows(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], Mapping)


def as_tensor_batch(batch: Any, where: str, *, own_objective: bool) -> dict[str, Any]:
    """A ready batch as a dict; elements of a tuple, or a tensor alone, are named by position: see `as_given`."""
    if isinstance(batch, Mapping):
        if not tensors_of(batch):
            kinds = ", ".join(f"{key}: {type(value).__name__}" for key, value in batch.items())
            raise DataError(
                f"{where} holds no tensors ({kinds}). Collate rows into tensors, or pass the rows themselves: a "
                "dataset or list of dicts."
            )
        return dict(batch)
    if own_objective and isinstance(batch, (list, tuple)) and tensors_of(batch):
        return {str(i): value for i, value in enumerate(batch)}
    if own_objective and isinstance(batch, Tensor):
        return {"": batch}
    raise DataError(
        f"{where} is a {type(batch).__name__}; expected a dict of tensors named as the model's arguments. For tuples "
        "pass objective=(model, batch) -> loss."
    )


def as_given(objective: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The objective, called with a loader's own tuples and tensors if its batches are not dicts."""

    def given(batch: Mapping[str, Any]) -> Any:
        if list(batch) == [""]:
            return batch[""]
        places = [str(i) for i in range(len(batch))]
        return tuple(batch[place] for place in places) if list(batch) == places else batch

    @functools.wraps(objective)
    def called(model: Any, batch: Mapping[str, Any]) -> Any:
        return objective(model, given(batch))

    weight = getattr(objective, "weight", None)
    if weight is not None:
        called.weight = lambda batch: weight(given(batch))  # type: ignore[attr-defined]
    return called
