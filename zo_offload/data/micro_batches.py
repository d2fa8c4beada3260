"""A batch cut into micro-batches, and the weight of each micro-batch's loss.

The loss of a batch is a mean over its labels that count, or over its rows. So the loss of the whole is the mean of the
parts' losses, each weighted by the number of labels or rows that it holds; the loss of a data set follows from those of
its batches in the same way. A part in which nothing counts has weight 0: its loss would be a mean over nothing, and is
not computed.

The first dimension is the row. An entry without rows goes to every part whole. An entry that may or may not have rows
(weights of as many classes as there are rows, patches of all images in one run) is an error that names it, unless the
caller says which entries are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import ConfigError, DataError
from ..kernels.scalars import added
from ..system.nearest import did_you_mean
from .encode import IGNORED, Batch

_FIRST = ("input_ids", "inputs_embeds", "labels", "pixel_values", "input_features", "input_values")  # have rows
_ONE_A_ROW = ("labels", "label", "target", "targets", "y")  # by name, also as numbers of one dimension


# ---- weights -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weighing:
    """The weights of batches' losses relative to each other.

    counts(batch): by name, the number of things that its loss is a mean over; if that is not known, or if several means
    are added, each candidate. The first one is the weight. summed: the loss is a sum over it, not a mean. model: for
    messages.
    """

    counts: Callable[[Mapping[str, Any]], dict[str, float]]
    summed: bool = False
    model: str = "the model"

    def __call__(self, batch: Mapping[str, Any]) -> float:
        return next(iter(self.counts(batch).values()))

    def shares(self, parts: Sequence[Mapping[str, Any]]) -> list[float]:
        """The factor of each part's loss; the weighted sum is divided by their sum, or by 1 if losses are sums.

        Raises DataError if nothing counts in any part, and if several counts give different weights.
        """
        counts = [self.counts(part) for part in parts]
        weights = [next(iter(count.values())) for count in counts]
        if not any(weights):
            raise DataError(nothing_counts(parts))
        if not agree(counts):
            held = "; ".join(f"{name}: {[int(count[name]) for count in counts]}" for name in counts[0])
            raise DataError(
                f"micro_batches={len(parts)}: the loss of {self.model} may be a mean over one of several things, of "
                f"which the parts hold different shares ({held}), so their losses do not add up to the batch's. Use "
                "micro_batches=1, or an objective=(model, batch) -> loss with an attribute weight: batch -> number"
            )
        return weights

    def together(self, losses: Sequence[Any], weights: Sequence[float], divide: Callable[[Any, float], Any]) -> Any:
        """The loss of the whole from the losses of its parts."""
        if self.summed:
            return added(losses)
        total = added([w * loss for w, loss in zip(weights, losses, strict=True)])
        return divide(total, added(weights))


def agree(counts: Sequence[Mapping[str, float]]) -> bool:
    """Whether all counts give the parts the same shares."""
    names = list(counts[0])
    totals = {name: sum(count[name] for count in counts) for name in names}
    first = names[0]
    return all(count[n] * totals[first] == count[first] * totals[n] for count in counts for n in names[1:])


def nothing_counts(parts: Sequence[Mapping[str, Any]]) -> str:
    """The message for a batch without a label that counts."""
    labels = sum(part["labels"].numel() for part in parts if isinstance(part.get("labels"), Tensor))
    return (
        f"no label of the batch counts ({labels} labels; all that could are {IGNORED}), so its loss is a mean over "
        "nothing. max_length may have cut the labels off, or the rows have none; leave such rows out"
    )


def rows_weigh(batch: Mapping[str, Any]) -> dict[str, float]:
    """The number of rows of a batch, as a count."""
    return {"rows": float(batch_rows(batch))}


def label_counts(batch: Mapping[str, Any], shift: int = 0) -> dict[str, float]:
    """Labels that count, by name; the rows if there are none. shift: labels at a row's start that never count."""
    counts = {name: _count(value, shift) for name, value in batch.items() if is_labels(name, value)}
    if "shift_labels" in counts and "labels" in counts:  # made by a caller that shifts labels itself
        counts = {"shift_labels": _count(batch["shift_labels"], 0)}
    if not counts:
        counts = {name: float(n) for name, n in _inside(batch).items()}
    return dict(sorted(counts.items(), key=lambda item: item[0] != "labels")) if counts else rows_weigh(batch)


def is_labels(name: str, value: Any) -> bool:
    """Whether an entry of a batch is a table of classes, one or more per row."""
    named = name in ("labels", "label", "shift_labels") or name.endswith(("_label", "_labels"))
    return named and isinstance(value, Tensor) and value.dim() > 0 and not value.dtype.is_floating_point


def _count(labels: Tensor, shift: int) -> float:
    counted = labels[:, shift:] if labels.dim() > 1 and shift else labels
    return float((counted != IGNORED).sum())


def _inside(batch: Mapping[str, Any]) -> dict[str, int]:
    """Number of answer positions inside their rows, for questions. Others do not count, as in a row that was cut."""
    ids = batch.get("input_ids")
    width = ids.shape[1] if isinstance(ids, Tensor) and ids.dim() > 1 else None
    places = {name: batch.get(name) for name in ("start_positions", "end_positions")}
    if width is None:
        return {}
    return {name: int((at.clamp(min=0) < width).sum()) for name, at in places.items() if isinstance(at, Tensor)}


def batch_rows(batch: Mapping[str, Any], whole: Collection[str] | None = None) -> int:
    """Rows of a batch: the first dimension of its inputs or labels, else of its first table. Raises DataError."""
    of_rows = {name: value for name, value in batch.items() if name not in (whole or ())}
    entries = {name: value for name, value in of_rows.items() if isinstance(value, (Tensor, np.ndarray)) and value.ndim}
    tables = [name for name, value in entries.items() if value.ndim > 1]
    for name in (*_FIRST, *tables, *entries):
        if name in entries:
            return len(entries[name])
    for leaf in tree_leaves(of_rows):
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    raise DataError(f"a batch without tensors: {', '.join(batch) or 'empty'}.")


# ---- parts -------------------------------------------------------------------------------------------------------


def split_micro_batches(batch: Mapping[str, Any], parts: int, whole: Collection[str] | None = None) -> list[Batch]:
    """The batch cut along its rows into `parts`, sizes differing by one at most; entries without rows go to every part.

    Padding is kept, so that each row is computed as in the whole batch. whole: names of entries that go to every part;
    if given, all other entries that are as long as the batch are cut. Raises DataError for fewer rows than parts, and
    for entries that may or may not have rows.
    """
    if parts == 1:
        return [dict(batch)]
    rows = batch_rows(batch, whole)
    if rows < parts:
        raise DataError(
            f"a batch of {rows} rows cannot be cut into {parts} micro-batches. Use fewer, or larger batches."
        )
    if batch.get("num_items_in_batch") is not None:
        raise DataError(
            "num_items_in_batch is in the batch, so the loss of a part is not its mean. Leave it out: micro_batches "
            "weights each part by its labels that count"
        )
    if batch.get("return_loss") is not None and rows > 1:
        raise DataError(
            f"return_loss is in the batch: such a loss compares its {rows} rows with one another, so parts do not add "
            "up to it. Use micro_batches=1"
        )
    if getattr(batch, "of_rows", False):  # this package made it from rows
        whole = whole or ()
    return [
        {name: _part(name, value, rows, parts, i, whole) for name, value in batch.items()} for i in range(parts)
    ]  # fmt: skip


def check_whole(batch: Mapping[str, Any], whole: Collection[str] | None) -> None:
    """Raise ConfigError for a name in `whole` that no entry of the batch has."""
    known = _names(batch)
    if unknown := [name for name in whole or () if name not in known]:
        hint = did_you_mean(unknown[0], known, "{!r}") or " Leave it out."
        raise ConfigError(f"whole={list(whole or ())}: the batch has no {unknown[0]!r}, but {', '.join(known)}.{hint}")


def _names(entries: Mapping[str, Any], inside: str = "") -> list[str]:
    """The names of a batch's entries; those of a dict inside it are joined by a dot."""
    found = []
    for name, value in entries.items():
        found += [inside + name, *(_names(value, f"{inside}{name}.") if isinstance(value, Mapping) else ())]
    return found


def _part(name: str, value: Any, rows: int, parts: int, i: int, whole: Collection[str] | None) -> Any:
    """Part i of an entry."""
    if name in (whole or ()) or value is None or isinstance(value, (str, bytes, bool, int, float, np.generic)):
        return value
    if isinstance(value, Mapping):
        return {k: _part(f"{name}.{k}", v, rows, parts, i, whole) for k, v in value.items()}
    if isinstance(value, (Tensor, np.ndarray)):
        along = _row_dimension(name, value, rows, whole)
        if along is None:
            return value
        return value.tensor_split(parts, along)[i] if isinstance(value, Tensor) else np.array_split(value, parts)[i]
    if isinstance(value, (list, tuple)):
        _check_list(name, value, rows, whole)
        cut = [len(t) for t in np.array_split(np.empty(rows), parts)]
        return value[sum(cut[:i]) : sum(cut[: i + 1])] if len(value) == rows else value
    raise DataError(_unclear(name, f"is a {type(value).__name__}"))


def _row_dimension(name: str, value: Any, rows: int, whole: Collection[str] | None) -> int | None:
    """The row dimension; None if there is none. Raises DataError if it cannot be told."""
    shape = tuple(value.shape)
    if not shape:
        return None
    if name == "position_ids" and len(shape) == 3 and shape[1] == rows:  # positions of text, height and width
        return 1
    numbers = len(shape) == 1 and (value.is_floating_point() if isinstance(value, Tensor) else value.dtype.kind == "f")
    if shape[0] == rows:
        if numbers and whole is None and name not in _ONE_A_ROW:
            raise DataError(_unclear(name, f"holds {rows} numbers, as many as the batch has rows"))
        return 0
    if shape[0] == 1 or numbers or whole is not None:  # the same for every row: a mask, class weights
        return None
    raise DataError(_unclear(name, f"has shape {list(shape)}, and the batch has {rows} rows"))


def _check_list(name: str, value: Sequence[Any], rows: int, whole: Collection[str] | None) -> None:
    if whole is not None:
        return
    if len(value) == rows and all(type(x) is float for x in value) and name not in _ONE_A_ROW:
        raise DataError(_unclear(name, f"holds {rows} numbers, as many as the batch has rows"))
    if len(value) != rows and any(isinstance(leaf, Tensor) for leaf in tree_leaves(list(value))):
        raise DataError(_unclear(name, f"holds {len(value)} tensors, and the batch has {rows} rows"))


def _unclear(name: str, what: str) -> str:
    return (
        f"{name!r} {what}: it is unclear whether micro_batches should cut it. If it is the same for every row, "
        f"say so with whole=({name!r},); if each entry along its first dimension belongs to a row, with whole=(); if "
        "it holds what several rows share, use micro_batches=1"
    )
