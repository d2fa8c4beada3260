"""The origin of a run's block files: the journal that is written ahead of them, and the base that rebuilds them."""

from __future__ import annotations

import threading

from torch import Tensor

from ..journal.identity import check_identity
from ..journal.journal import Journal
from ..stream.ingest import Filler, ModuleBase
from .opening import Opened
from .stepper import Stepper


class RunOrigin:
    """`tiers.disk.Origin` of one run. A new run has no journal until its blocks are filled from the base. `begin` sets
    the journal; before that, only the base's bytes may be written."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._journal: Journal | None = None
        self._stepper: Stepper | None = None
        self._lock = threading.Lock()
        self._is_checked = False  # whether the whole base was compared with the journal's

    def begin(self, journal: Journal, stepper: Stepper) -> None:
        """From here on, written blocks may contain the steps that `stepper` takes and `journal` holds."""
        self._stepper, self._journal = stepper, journal

    def before_write(self, version: int) -> None:
        """Return once steps 0..version-1 are in the journal on the disk. Any thread; StorageError."""
        if self._journal is None or self._stepper is None:
            assert version == 0, f"a block at step {version} was to be written before there is a journal"
            return
        if self._stepper.late:  # blocks may contain steps whose losses the host has not read
            self._stepper.settle_before(version)
        self._journal.make_durable(version)

    def history(self, version: int) -> int:
        return 0 if self._journal is None else self._journal.history(version)

    @property
    def rebuilds(self) -> bool:
        """Whether the base can rebuild blocks; a module in memory cannot, since it gives its weights away."""
        return self._journal is not None and not isinstance(self._opened.base, ModuleBase)

    def rebuild(self, block: int, out: Tensor) -> None:
        """A block at version 0. Raises JournalError if the base is not the run's base."""
        assert self._journal is not None
        base, prepared = self._opened.base, self._opened.prepared
        with self._lock:
            if not self._is_checked:
                check_identity({"base": base.digest()}, self._journal.header)
                self._is_checked = True
        Filler(prepared.plan, prepared.layout, base).fill(block, out)
