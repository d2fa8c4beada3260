"""What carries rows between ranks: a table with one row a turn and rank, kept by torch's store (`torch.distributed`).

A store and no collective, for these reasons: rows may be of any length; waiting can be broken off, so that a rank looks
for signals and for the death of others while it waits; a rank that fails leaves its error in its row; and it does not
matter which backend the process group has (a collective on host memory has none under NCCL). Some hundred bytes a step
travel, in well under a millisecond.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from ..errors import RankError

FIRST_NAP_S, LONGEST_NAP_S = 1e-4, 0.02
"""Between two looks for rows: at most a tenth of what was waited, and never long."""


class Exchange(Protocol):
    """A table of rows: `put` mine, wait for those of the others, read them all. One thread at a time."""

    rank: int
    world: int

    def put(self, turn: int, row: bytes) -> None:
        """Write my row of a turn; once."""
        ...

    def missing(self, turn: int, seconds: float) -> list[int]:
        """Ranks whose row of a turn is not there; waits at most so long for the last of them."""
        ...

    def rows(self, turn: int) -> list[bytes]:
        """All rows of a turn, by rank; none may be missing."""
        ...

    def drop(self, turn: int) -> None:
        """My row of a turn was read by all."""
        ...

    def flag(self, turn: int) -> None:
        """Raise a flag that all ranks can see at any time, without a turn of its own."""
        ...

    def is_flagged(self, turn: int) -> bool: ...


class StoreExchange:
    """`Exchange` over a `torch.distributed.Store`: TCPStore between processes, HashStore between threads.

    Raises RankError where the store is gone: the process that keeps it (torchrun's agent, or rank 0) has ended.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self._store, self.rank, self.world = store, rank, world

    def _key(self, turn: int, rank: int) -> str:
        return f"{turn}/{rank}"

    def _keys(self, turn: int) -> list[str]:
        return [self._key(turn, rank) for rank in range(self.world)]

    def put(self, turn: int, row: bytes) -> None:
        self._call(self._store.set, self._key(turn, self.rank), row)

    def missing(self, turn: int, seconds: float) -> list[int]:
        """Looks again and again: the store's own wait tells of each time-out on standard error."""
        keys, began = self._keys(turn), time.monotonic()
        while not self._call(self._store.check, keys):
            if (waited := time.monotonic() - began) >= seconds:
                return [rank for rank, key in enumerate(keys) if not self._call(self._store.check, [key])]
            time.sleep(min(LONGEST_NAP_S, FIRST_NAP_S + waited / 10))
        return []

    def rows(self, turn: int) -> list[bytes]:
        return list(self._call(self._store.multi_get, self._keys(turn)))

    def drop(self, turn: int) -> None:
        self._call(self._store.delete_key, self._key(turn, self.rank))

    def flag(self, turn: int) -> None:
        self._call(self._store.set, f"{turn}/flag", b"1")

    def is_flagged(self, turn: int) -> bool:
        return bool(self._call(self._store.check, [f"{turn}/flag"]))

    def _call(self, method: Any, *args: Any) -> Any:
        try:
            return method(*args)
        except RuntimeError as error:  # torch.distributed's errors are its children
            raise RankError(
                f"rank {self.rank} of {self.world}: the store that ranks meet in cannot be reached "
                f"({str(error).splitlines()[0][:150]}): the process that keeps it, torchrun's or rank 0, has ended"
            ) from None
