"""The journal on ranks that do not write it: the same records, in memory.

One run has one journal, which rank 0 writes. The other ranks take the same steps from the same numbers, and need the
records for their blocks' `history` and for the start of the run. A file of their own would have to be kept in step, and
could never be newer than rank 0's when the run is resumed. So on these ranks nothing is written ahead of blocks. If
rank 0's journal lacks steps that such blocks have (a power cut on its host), those blocks are discarded when the run is
resumed, and rebuilt from base and journal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .format import pack_header, read_journal
from .journal import Journal


class Mirror(Journal):
    """A journal in memory. path: rank 0's file, for messages."""

    def __init__(self, path: Path, data: bytes) -> None:
        super().__init__(path, read_journal(data, str(path)), fd=-1)

    @classmethod
    def begun(cls, path: Path, header: dict[str, Any]) -> Mirror:
        """The mirror of a run without steps."""
        return cls(path, pack_header(header))

    def make_durable(self, version: int) -> None:
        """Rank 0 does that."""
        self._synced = len(self.steps)

    def close(self) -> None:
        """Does nothing: no file is open."""

    def _put(self, data: bytes) -> None:
        self._cut_back()
        self._before = (self._size, self._chain[-1], len(self.notes))
        self._writing = True
        self._size += len(data)

    def _cut_file(self) -> None:
        """Does nothing: there is no file."""

    def _commit_soon(self) -> None:
        """Does nothing: there is no disk to wait for."""
