"""Compares values that must be equal on all ranks, and names each difference by its path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def unlike(values: Sequence[Any], name: str = "") -> Iterator[str]:
    """Each part of JSON values, one value per rank, that is not the same on all: its path, and each rank's part."""
    if all(isinstance(value, Mapping) for value in values):
        for key in sorted(set().union(*values)):
            yield from unlike([value.get(key) for value in values], f"{name}.{key}" if name else str(key))
    elif any(not _same(value, values[0]) for value in values):
        yield f"{name}: {', '.join(_groups(values))}"


def between(mine: Any, theirs: Any, me: str, them: str, name: str = "") -> Iterator[str]:
    """Each part of two JSON values that differs: its path, and both parts."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for key in sorted(mine.keys() | theirs.keys()):
            yield from between(mine.get(key), theirs.get(key), me, them, f"{name}.{key}" if name else str(key))
    elif not _same(mine, theirs):
        yield f"{name or 'all'}: {me} has {_short(mine)}, {them} {_short(theirs)}"


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and (one == other or (one != one and other != other))


def _groups(values: Sequence[Any]) -> Iterator[str]:
    """ "ranks 0 and 2 have x" for each of the values that differ."""
    left = list(range(len(values)))
    while left:
        same = [rank for rank in left if _same(values[rank], values[left[0]])]
        yield f"{of_ranks(same)} {'has' if len(same) == 1 else 'have'} {_short(values[left[0]])}"
        left = [rank for rank in left if rank not in same]


def of_ranks(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 0, 1 and 2"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:120] + "..."
