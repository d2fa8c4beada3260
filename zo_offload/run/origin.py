"""What a run's block files stand on: the journal that is written ahead of them, and the base they can be made from."""

from __future__ import annotations

import threading

from torch import Tensor

from ..journal.identity import check_identity
from ..journal.journal import Journal
from ..stream.ingest import Filler, ModuleBase
from .opening import Opened
from .stepper import Stepper


class RunOrigin:
    """`tiers.disk.Origin` of one run. A new run has no journal until its blocks are filled from the base; `begin` gives
    it, and until then nothing but the base's bytes may be written."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._journal: Journal | None = None
        self._stepper: Stepper | None = None
        self._lock = threading.Lock()
        self._is_checked = False  # the base is the journal's, all of it

    def begin(self, journal: Journal, stepper: Stepper) -> None:
        """From here on steps may be in what is written: those that `stepper` takes and `journal` holds."""
        self._stepper, self._journal = stepper, journal

    def before_write(self, version: int) -> None:
        """Return once steps 0..version-1 are on the disk, in the journal. Any thread; StorageError."""
        if self._journal is None or self._stepper is None:
            assert version == 0, f"a block at step {version} was to be written before there is a journal"
            return
        if self._stepper.late:  # blocks may have steps whose losses the host has not read
            self._stepper.settle_before(version)
        self._journal.make_durable(version)

    def history(self, version: int) -> int:
        return 0 if self._journal is None else self._journal.history(version)

    @property
    def rebuilds(self) -> bool:
        """A module in memory lets its weights go."""
        return self._journal is not None and not isinstance(self._opened.base, ModuleBase)

    def rebuild(self, block: int, out: Tensor) -> None:
        """A block at version 0. Raises JournalError if the base is not the one that the run began with."""
        assert self._journal is not None
        base, prepared = self._opened.base, self._opened.prepared
        with self._lock:
            if not self._is_checked:
                check_identity({"base": base.digest()}, self._journal.header)
                self._is_checked = True
        Filler(prepared.plan, prepared.layout, base).fill(block, out)
