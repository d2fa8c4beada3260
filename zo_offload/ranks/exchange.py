"""Exchanges rows between ranks: a table with one row per turn and rank, in torch's store (`torch.distributed`).

A store instead of collectives, for these reasons: rows may have any length; waits can be interrupted, so that a rank
checks for signals and dead ranks while it waits; a failing rank leaves its error in its row; and it works with any
backend of the process group (NCCL has no collective on host memory). A step sends some hundred bytes, in well under a
millisecond.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from ..errors import RankError

FIRST_NAP_S, LONGEST_NAP_S = 1e-4, 0.02
"""Seconds between two checks for rows: at most a tenth of the time waited so far, within these limits."""


class Exchange(Protocol):
    """A table of rows: `put` one's own, wait for the others', read them all. One thread at a time."""

    rank: int
    world: int

    def put(self, turn: int, row: bytes) -> None:
        """Write this rank's row of a turn, once."""
        ...

    def missing(self, turn: int, seconds: float) -> list[int]:
        """Ranks whose row of a turn is missing, after waiting at most `seconds` for the last of them."""
        ...

    def rows(self, turn: int) -> list[bytes]:
        """All rows of a turn, by rank; none may be missing."""
        ...

    def drop(self, turn: int) -> None:
        """Delete this rank's row of a turn that all ranks have read."""
        ...

    def flag(self, turn: int) -> None:
        """Raise a flag that all ranks can see at any time, without a turn of its own."""
        ...

    def is_flagged(self, turn: int) -> bool: ...


class StoreExchange:
    """`Exchange` over a `torch.distributed.Store`: TCPStore between processes, HashStore between threads.

    Raises RankError if the store is gone: the process that keeps it (torchrun's agent, or rank 0) has ended.
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
        """Polls: the store's own wait prints each time-out on standard error."""
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
        except RuntimeError as error:  # torch.distributed's errors derive from it
            raise RankError(
                f"rank {self.rank} of {self.world}: the store that ranks meet in cannot be reached "
                f"({str(error).splitlines()[0][:150]}): the process that keeps it, torchrun's or rank 0, has ended"
            ) from None
