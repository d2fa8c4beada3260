"""The journal as the ranks have it that do not write it: the same records, in memory.

One run has one journal, which rank 0 writes. The others take the same steps from the same numbers, and need the records
to know what their blocks are of (`history`) and how the run began; a file of theirs would be one more to keep in step,
and could never be newer than what rank 0's says when the run is resumed. So on these ranks nothing is written ahead of
blocks. If rank 0's journal lacks steps that such blocks have (a power cut on its host), those blocks are given up when
the run is resumed, and made again from base and journal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .format import pack_header, read_journal
from .journal import Journal


class Mirror(Journal):
    """A journal in memory. path: of the file that rank 0 writes, for messages."""

    def __init__(self, path: Path, data: bytes) -> None:
        super().__init__(path, read_journal(data, str(path)), fd=-1)

    @classmethod
    def begun(cls, path: Path, header: dict[str, Any]) -> Mirror:
        """Of a run that has no steps yet."""
        return cls(path, pack_header(header))

    def make_durable(self, version: int) -> None:
        """Rank 0 does that."""
        self._synced = len(self.steps)

    def close(self) -> None:
        """Nothing is open."""

    def _put(self, data: bytes) -> None:
        self._cut_back()
        self._before = (self._size, self._chain[-1], len(self.notes))
        self._writing = True
        self._size += len(data)

    def _cut_file(self) -> None:
        """There is none."""

    def _commit_soon(self) -> None:
        """There is no disk to wait for."""
