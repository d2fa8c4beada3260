"""The open journal of a run; `format.py` defines its bytes.

Group commit: a step is handed to the system at once (a killed process loses none) and synced within `commit_s`, one
second, or when a block that contains it is about to be written, whichever is first. So a power cut loses at most the
last second of steps, and none that a block file contains.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import queue
import threading
import time
from pathlib import Path
from typing import Any

from ..errors import JournalError, StorageError
from ..system import diskio
from ..system.lock import hold, let_go
from .format import (  # fmt: skip
    RECORD_BYTES,
    Contents,
    Note,
    StepRecord,
    history_after,
    history_start,
    pack_header,
    pack_note,
    pack_step,
    read_journal,
)

__all__ = [
    "COMMIT_S", "RECORD_BYTES", "Contents", "Journal", "Note", "StepRecord", "pack_header", "pack_step", "read_journal",
]  # fmt: skip

COMMIT_S = 1.0


class Journal:
    """The open journal of a run. `append` hands a step to the system at once; `make_durable` waits for the disk.

    `append` may be interrupted anywhere (by a signal handler's exception): `mend` makes the file and this object
    consistent again.
    """

    def __init__(self, path: Path, contents: Contents, fd: int, commit_s: float = COMMIT_S) -> None:
        self.path, self.header, self.steps, self.commit_s = path, contents.header, contents.steps, commit_s
        self.notes, self.takes_notes, self.version = contents.notes, contents.takes_notes, contents.version
        self.dropped_bytes = 0
        self._history = [history_start(contents.header)]  # filled up to the last requested step
        self._history_lock = threading.Lock()
        self._chain, self._size, self._fd = contents.chain, contents.good, fd
        self._before = (self._size, self._chain[-1], len(self.notes))  # size, chain, notes before the last addition
        self._synced = 0
        self._writing = False  # during an addition: the file may hold more than this object knows
        self._failed: StorageError | None = None
        self._write_lock, self._sync_lock = threading.Lock(), threading.Lock()
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True: a step was added; False: the end
        self._woken = False
        self._committer: threading.Thread | None = None

    @classmethod
    def create(cls, path: Path, header: dict[str, Any], commit_s: float = COMMIT_S) -> Journal:
        """A new journal, locked, with its header on the disk. Raises if the path exists: a run is never overwritten."""
        head = pack_header(header)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            raise JournalError(
                f"{path} exists: this directory holds a run. Resume it, or choose another run_dir"
            ) from None
        except OSError as error:
            raise diskio.storage_error(error, "making", path, then="Nothing was trained yet.") from error
        try:
            hold(fd, path)
            diskio.append(fd, head)
            diskio.sync(fd)
            diskio.sync_directory(path.parent)
        except OSError as error:
            os.close(fd)
            path.unlink(missing_ok=True)  # made above, by us alone; a headless journal would block the directory
            raise diskio.storage_error(error, "making", path, then="Nothing was trained yet.") from error
        return cls(path, read_journal(head, str(path)), fd, commit_s)

    @classmethod
    def open(cls, path: Path, commit_s: float = COMMIT_S, *, alone: bool = False) -> Journal:
        """An existing journal, ready to append; a cut tail is dropped (`dropped_bytes`).

        alone: lock it, so that no other process appends to it. Raises ConfigError if it is locked already.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except FileNotFoundError:
            raise JournalError(f"{path} is missing: {path.parent} is not a run directory") from None
        except OSError as error:
            raise diskio.storage_error(error, "opening", path, then="The run is as it was.") from error
        try:
            if alone:
                hold(fd, path)
            data = diskio.read_file(path)
            contents = read_journal(data, str(path))
            journal = cls(path, contents, fd, commit_s)
            if contents.good < len(data):
                diskio.cut(fd, contents.good)
                journal.dropped_bytes = len(data) - contents.good
            journal.make_durable(len(contents.steps))
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise diskio.storage_error(error, "opening", path, then="The run is as it was.") from error
            raise
        return journal

    def append(self, record: StepRecord) -> None:
        """Add one step. After this returns a killed process has not lost it; see `make_durable` for a power cut.

        Raises StorageError, and then again at every call: the journal ends with the last whole step.
        """
        assert record.step == len(self.steps)
        assert all(math.isfinite(u.coeff) for u in record.updates)
        self._check()
        with self._write_lock:
            data, chain = pack_step(record, self._chain[-1], len(self.steps) - self._synced, self.version)
            self._put(data)
            self._chain.append(chain)
            self.steps.append(record)
            self._writing = False
        self._commit_soon()

    def note(self, values: dict[str, Any]) -> None:
        """Note `values` (JSON) at the present step. Durable with the next durable step.

        Does nothing in a journal of the earlier format, which has no notes. Raises StorageError.
        """
        if not self.takes_notes:
            return
        self._check()
        note = Note(len(self.steps), values)
        with self._write_lock:
            data, chain = pack_note(note, self._chain[-1], len(self.steps) - self._synced)
            self._put(data)
            self._chain[-1] = chain
            self.notes.append(note)
            self._writing = False

    def mend(self, version: int) -> None:
        """After an interrupted `append`: cut the journal to `version` steps, at most one less than before.

        Raises StorageError.
        """
        with self._sync_lock, self._write_lock:
            if len(self.steps) > version:
                self._writing = True
            del self.steps[version:]
            self._synced = min(self._synced, len(self.steps))
            self._cut_back()

    def _put(self, data: bytes) -> None:
        """Append bytes to the file. The caller clears `_writing` once this object's fields match the file."""
        self._cut_back()
        self._check_size()
        self._before = (self._size, self._chain[-1], len(self.notes))
        self._writing = True
        try:
            diskio.append(self._fd, data)
        except OSError as error:
            if error.errno is None:
                raise  # a signal handler's (TimeoutError), not the system's
            self._fail(error)
            diskio.cut(self._fd, self._size)  # no half a record; if this fails too, a reader drops the tail
            self._check()
        self._size += len(data)

    def _cut_back(self) -> None:
        """Remove an interrupted addition from the file."""
        if not self._writing or self._failed is not None:
            return
        self._size, chain, notes = self._before
        self._chain[len(self.steps) :] = [chain]
        del self.notes[notes:]
        with self._history_lock:
            del self._history[len(self.steps) + 1 :]
        self._cut_file()
        self._writing = False

    def _cut_file(self) -> None:
        try:
            diskio.cut(self._fd, self._size)
        except OSError as error:
            if error.errno is None:
                raise
            self._fail(error)
            self._check()

    def _check_size(self) -> None:
        """Raise StorageError, now and at every later call, if another process has changed the file."""
        found = os.fstat(self._fd).st_size
        if found != self._size:
            self._failed = StorageError(
                errno.ESTALE,
                f"{self.path} has {found} bytes where this run has written {self._size}: another process changed it. "
                "End that process, then resume the run",
            )
            self._check()

    def chain(self, version: int) -> int:
        """The checksum of everything before step `version`; blocks of the earlier format name their history by it."""
        return self._chain[version]

    def history(self, version: int) -> int:
        """8 bytes that name everything that the weights after `version` steps depend on: see `format.py`."""
        with self._history_lock:
            while len(self._history) <= version:
                step = len(self._history) - 1
                self._history.append(history_after(self._history[-1], self.steps[step]))
            return self._history[version]

    def make_durable(self, version: int) -> None:
        """Return once steps 0..version-1 are on the disk. Called before block bytes are written, and at the end."""
        with self._sync_lock:
            self._check()
            if version > self._synced:
                count = len(self.steps)
                try:
                    if diskio.is_gone(self._fd):
                        raise FileNotFoundError(errno.ENOENT, "deleted while the run used it")
                    diskio.sync(self._fd)
                except OSError as error:
                    self._fail(error)
                    self._check()
                self._synced = count

    def close(self) -> None:
        """Sync and close. Raises StorageError if the last steps could not be synced. Safe to call twice."""
        self._wake.put(False)
        if self._committer is not None and self._committer is not threading.current_thread():
            self._committer.join()
        try:
            if self._failed is None and self._fd >= 0:
                self.make_durable(len(self.steps))
        finally:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                let_go(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:  # for a run whose start failed; its steps, if any, are with the system
            os.close(self._fd)

    def _fail(self, error: OSError) -> None:
        last = f"The journal is good up to step {self._synced - 1}." if self._synced else "It holds no durable step."
        self._failed = diskio.storage_error(error, "journaling to", self.path, then=last)

    def _check(self) -> None:
        """A failed write or sync is final: the system may have dropped the pages that it could not write."""
        if self._failed is not None:
            raise self._failed

    def _commit_soon(self) -> None:
        if self._committer is None:
            self._committer = threading.Thread(target=self._commit, name="zo_offload:journal", daemon=True)
            self._committer.start()
        if not self._woken:
            self._wake.put(True)
            self._woken = True

    def _commit(self) -> None:
        """The committer thread: a step is synced at most commit_s after it was added (by the monotonic clock)."""
        while self._wake.get():
            end = time.monotonic() + self.commit_s
            with contextlib.suppress(queue.Empty):
                while (left := end - time.monotonic()) > 0:
                    if not self._wake.get(timeout=left):
                        return
            self._woken = False  # before the steps are counted: a step that comes now wakes this thread again
            try:
                self.make_durable(len(self.steps))
            except StorageError:
                return  # kept in _failed: the next append raises it
