"""Encoded rows into one batch: sequences padded on the right, equal shapes stacked, flags kept as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import DataError
from ..modules.kind import IGNORED

Batch = dict[str, Any]

# anything else that is a sequence of integers is padded with the padding token
_PAD_WITH = {
    "labels": IGNORED, "attention_mask": 0, "decoder_attention_mask": 0, "token_type_ids": 0, "position_ids": 0
}  # fmt: skip


@dataclass(frozen=True)
class Collator:
    """Turns rows into a batch. multiple: lengths are rounded up to it, not above limit; flags: kept as truth values."""

    pad_token: int
    multiple: int = 1
    limit: int | None = None
    flags: frozenset[str] = frozenset()
    alone: bool = False
    """The model takes single rows only, since it cannot recognise padding."""

    def __call__(self, rows: Sequence[Mapping[str, Any]], where: str) -> Batch:
        if self.alone and len(rows) > 1:
            raise DataError(
                f"{where}: the model classifies by a row's last token, and without config.pad_token_id it cannot tell "
                "padding from it. Set model.config.pad_token_id, or use batch_size=1."
            )
        keys = list(rows[0])
        for row in rows:
            if set(row) != set(keys):
                raise DataError(f"{where}: rows with different columns, {sorted(keys)} and {sorted(row)}.")
        return {key: self._column([row[key] for row in rows], key, where) for key in keys}

    def _column(self, values: list[Any], key: str, where: str) -> Any:
        if key in self.flags and isinstance(values[0], bool):
            if any(value is not values[0] for value in values):
                raise DataError(f"{where}: {key!r} is a flag of the model and differs between rows.")
            return values[0]
        if isinstance(values[0], Mapping):
            return Collator.__call__(self, values, f"{where} {key!r}")
        try:
            return self._stack([_tensor(value, _PAD_WITH.get(key, self.pad_token)) for value in values], key)
        except (IndexError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            lengths = sorted({len(value) for value in values if hasattr(value, "__len__")})
            hint = (
                f". Their lengths are {lengths[0]} to {lengths[-1]}: cut or pad them to one, by the model's feature "
                "extractor in a DataLoader's collate_fn, say"
            )
            hint = hint if len(lengths) > 1 else ""
            raise DataError(f"{where}: column {key!r} does not make a batch: {error}{hint}") from error

    def _stack(self, tensors: list[Tensor], key: str) -> Tensor:
        if key == "labels" and any(t.dtype.is_floating_point for t in tensors):
            tensors = [t.float() for t in tensors]  # regression; Python's floats are doubles
        ragged = tensors[0].dim() == 1 or len({t.shape for t in tensors}) > 1
        if tensors[0].dim() and ragged and not tensors[0].dtype.is_floating_point:
            return self._pad(tensors, _PAD_WITH.get(key, self.pad_token))
        return torch.stack(tensors)

    def _pad(self, tensors: list[Tensor], value: int) -> Tensor:
        """Pad the tensors to one length in the last dimension; the other dimensions must agree."""
        longest = max(t.shape[-1] for t in tensors)
        length = -(-longest // self.multiple) * self.multiple
        if self.limit is not None:
            length = max(longest, min(length, self.limit))
        return torch.stack([pad(t, (0, length - t.shape[-1]), value=value) for t in tensors])


def _tensor(value: Any, padding: int) -> Tensor:
    """A row's value as a tensor; lists of lists of integers (multiple choice) are padded to the longest list."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple)):
        longest = max(len(inner) for inner in value)
        if any(len(inner) < longest for inner in value) and all(isinstance(i, int) for inner in value for i in inner):
            value = [[*inner, *[padding] * (longest - len(inner))] for inner in value]
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
