"""A batch with its derived facts, each computed once, at its first use, and kept with the batch.

`Batches` make these; a caller's own dict becomes one when it enters (`as_made`). So no fact is computed twice.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..modules.trees import tensor_bytes
from .micro_batches import batch_rows
from .sources import named_values


class MadeBatch(dict[str, Any]):
    """The model's inputs by name; not changed once it is made.

    of_rows: whether this package made it from rows; then every tensor's first dimension is the row. options: tokens of
    each row's verbalizers, if rows have their own.
    """

    def __init__(
        self, batch: Mapping[str, Any], *, of_rows: bool = False, options: Sequence[Sequence[list[int]]] | None = None
    ) -> None:
        super().__init__(batch)
        self.of_rows, self.options = of_rows, options

    @cached_property
    def fingerprint(self) -> int:
        """The batch's crc32 over names, dtypes, shapes and contents, as the journal keeps it."""
        return fingerprint(self)

    @cached_property
    def tokens(self) -> int:
        return batch_tokens(self)

    @cached_property
    def most_ids(self) -> int:
        return most_ids(self)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return tensor_bytes([self])


def as_made(batch: Mapping[str, Any]) -> MadeBatch:
    """A dict as a MadeBatch. Raises DataError for anything but a dict, and for tensors without values."""
    if isinstance(batch, MadeBatch):
        return batch
    if not isinstance(batch, Mapping):
        raise DataError(
            f"a batch is a dict of tensors by the names of the model's arguments; this is {type(batch).__name__}"
        )
    absent = [name for name, value in named_values(batch) if isinstance(value, Tensor) and value.is_meta]
    if absent:
        raise DataError(f"{absent[0]!r} of the batch is on the meta device, without values")
    return MadeBatch(batch)


def fingerprint(batch: Any) -> int:
    """crc32 over a batch's names, dtypes, shapes and contents."""
    crc = 0
    for key, value in sorted(named_values(batch), key=lambda pair: pair[0]):
        if isinstance(value, Tensor):
            for part in _strided(value.detach()):
                crc = zlib.crc32(f"{key} {part.dtype} {list(part.shape)}".encode(), crc)
                crc = zlib.crc32(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
        elif isinstance(value, np.ndarray) and value.dtype != object and value.size > _PRINTED_WHOLE:
            crc = zlib.crc32(f"{key} {value.dtype} {list(value.shape)}".encode() + value.tobytes(), crc)
        else:
            crc = zlib.crc32(_ADDRESS.sub("", f"{key} {value!r}").encode(), crc)
    return crc


_PRINTED_WHOLE = 1000  # numpy's repr prints arrays of up to so many elements whole
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # in an object's default repr


def _strided(value: Tensor) -> list[Tensor]:
    """The strided tensors that a sparse or nested tensor consists of."""
    if value.is_nested:
        return list(value.unbind())
    if value.layout is torch.sparse_coo:
        value = value.coalesce()
        return [value.indices(), value.values()]
    if value.layout is torch.strided:
        return [value.resolve_conj().resolve_neg()]
    rows = value.layout in (torch.sparse_csr, torch.sparse_bsr)
    index = [value.crow_indices(), value.col_indices()] if rows else [value.ccol_indices(), value.row_indices()]
    return [*index, value.values()]


def batch_tokens(batch: Any) -> int:
    """Number of tokens that the model reads: attended tokens, else input ids; without either, the number of rows."""
    named = dict(named_values(batch))
    mask, ids = named.get("attention_mask"), named.get("input_ids")
    if isinstance(mask, Tensor):
        return int((mask != 0).sum())
    return ids.numel() if isinstance(ids, Tensor) else batch_rows(named)


def most_ids(batch: Any) -> int:
    """The most rows of an embedding that a batch can look up, including padding."""
    named = dict(named_values(batch))
    tensors = [value for value in named.values() if isinstance(value, Tensor)]
    return max((t.numel() for t in tensors if not t.is_floating_point()), default=0) or batch_rows(named)
