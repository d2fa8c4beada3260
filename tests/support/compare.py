"""Bit-equality: the one way in which tests compare tensors, losses, and what holds several of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

PLAIN = (bool, int, float, str, bytes, torch.dtype, type(None))


def assert_same(got: Any, want: Any, what: str = "") -> None:
    """Equal bit for bit: every tensor, number and text in tuples, lists and mappings, whose names must be the same.

    Where `want` has NaN nothing would be compared, so that is a mistake in the test. Of other objects (a model's
    output, a cache) the tensors in them are compared.
    """
    assert _compare(got, want, what), f"{what}: there is nothing to compare"


def _compare(got: Any, want: Any, what: str) -> int:
    """How many values were compared."""
    if isinstance(want, Tensor):
        assert isinstance(got, Tensor), f"{what}: {type(got).__name__} in a tensor's place"
        assert not want.isnan().any(), f"{what}: the reference is NaN, so this compares nothing"
        assert got.shape == want.shape and got.dtype == want.dtype, (
            f"{what}: {got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}"
        )
        assert torch.equal(got, want), f"{what}: {int((got != want).sum())} of {want.numel()} values differ"
        return 1
    if isinstance(want, PLAIN):
        assert got == want, f"{what}: {got!r}, not {want!r}"
        return 1
    if isinstance(want, Mapping):
        assert got.keys() == want.keys(), f"{what}: {sorted(got.keys() ^ want.keys())} on one side only"
        return sum(_compare(got[name], want[name], f"{what} {name}") for name in want)
    if not isinstance(want, (tuple, list)):
        got, want = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in (got, want))
    assert len(got) == len(want), f"{what}: {len(got)} values, not {len(want)}"
    return sum(_compare(x, y, f"{what} {i}") for i, (x, y) in enumerate(zip(got, want, strict=True)))
