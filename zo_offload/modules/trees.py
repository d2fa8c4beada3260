"""The tensors inside a value: a batch, a module's arguments, a forward's output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in dicts, lists, tuples, named tuples, dataclasses that torch knows, and any other mapping."""
    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):  # a kind that torch has no rule for, such as transformers' BatchEncoding
            found += tensors_of(list(leaf.values()))
    return found


def tensor_bytes(values: Iterable[Any]) -> int:
    """Bytes of all tensors in `values`, each counted once."""
    found = {id(tensor): tensor.nbytes for value in values for tensor in tensors_of(value)}
    return sum(found.values())
