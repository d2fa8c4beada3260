"""A batch, and what is known of it: found once, where it is first asked for, and carried along.

`Batches` make these; a dict of a caller's own becomes one at the door (`as_made`). So nobody looks at a batch again for
what somebody else has found.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..modules.trees import tensor_bytes
from .micro_batches import batch_rows
from .sources import named_values


class MadeBatch(dict[str, Any]):
    """The model's inputs by name; not changed once it is made.

    of_rows: made of rows by us: the first dimension of every tensor is the row. options: tokens of each row's
    verbalizers, where rows have their own.
    """

    def __init__(
        self, batch: Mapping[str, Any], *, of_rows: bool = False, options: Sequence[Sequence[list[int]]] | None = None
    ) -> None:
        super().__init__(batch)
        self.of_rows, self.options = of_rows, options

    @cached_property
    def fingerprint(self) -> int:
        """What the journal keeps of it: crc32 over names, dtypes, shapes and contents."""
        return fingerprint(self)

    @cached_property
    def tokens(self) -> int:
        return batch_tokens(self)

    @cached_property
    def most_ids(self) -> int:
        return most_ids(self)

    @cached_property
    def nbytes(self) -> int:
        """Of all its tensors."""
        return tensor_bytes([self])


def as_made(batch: Mapping[str, Any]) -> MadeBatch:
    return batch if isinstance(batch, MadeBatch) else MadeBatch(batch)


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
