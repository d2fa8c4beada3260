"""The journal: a training run written down as scalars, append-only.

Under one header, a step is fully given by its updates (seed, coefficient, decay); noise is recomputed from the seed.
Replaying the records over the base weights rebuilds the weights of any step, so this file is the run and every block
file is a cache. 20,000 MeZO steps are 1.3 MB.

File layout, little-endian
    0      4 bytes   b"ZOJ2"
    4      u32       header length H in bytes
    8      H bytes   header: JSON, UTF-8 (identity of base, plan, layout, method, noise, storage, data; see session.py)
    8+H    u32       crc32 of bytes 0 .. 8+H
    then records of 64 bytes
    0      u64       step
    8      u64       seed of the noise
    16     f32       coefficient  (w <- w * decay - coefficient * z)
    20     f32       decay
    24     f64       loss: the mean of the step's losses, weighted as the step weighted them
    32     f64       grad: the projected gradient
    40     f64       lr
    48     u32       flags: bit 0 = fold after this update; bit 1 = skipped (nothing was applied); bit 2 = more records
                     of the same step follow; bit 3 = the loss was not finite and eps is half from the next step on
    52     u32       fingerprint of the step's batch (crc32), 0 where the data gives none
    56     u32       lag: how many of the steps before this one were not yet known to be on the disk
    60     u32       crc32 of the 60 bytes before, continued from that of the record before (the first: of the header)

The crc of a record covers all before it (`chain`), so records cannot be swapped, left out or taken from another run.

Group commit: a step is given to the system at once (a killed process loses none) and synced within `commit_s`, one
second, or when a block that contains it is about to be written, whichever is first. So a power cut costs the last
second of steps at most, and nothing that any block file contains.

What a reader does with a bad record: if a later record says that the bad one was on the disk, the file is damaged and
JournalError says where. Else the bad record and what follows are the unfinished tail of a crash (a power cut may leave
any of its pages) and are dropped, as is a step whose last record is missing; `dropped_bytes` says how much.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import diskio
from .errors import JournalError, StorageError
from .fused import Update

MAGIC = b"ZOJ2"
RECORD_BYTES = 64
_BODY = struct.Struct("<QQffdddIII")
FOLD, SKIPPED, MORE, HALVED = 1, 2, 4, 8
_FLAGS = FOLD | SKIPPED | MORE | HALVED
_MAX_HEADER_BYTES = 1 << 24
MAX_TAIL_BYTES = 1 << 20
"""More unreadable bytes than this at the end are damage: no second of steps is that long."""
COMMIT_S = 1.0


@dataclass(frozen=True)
class StepRecord:
    """One step as the journal keeps it: the updates it applied and the scalars a reader wants to see."""

    step: int
    updates: tuple[Update, ...]
    loss: float
    grad: float
    lr: float
    skipped: bool = False
    batch_crc: int = 0
    halved: bool = False
    """eps is half of what it was from the next step on (method.on_nonfinite="halve_eps")."""


@dataclass(frozen=True)
class Contents:
    """What a journal's bytes say. begin: where the records begin; good: how many bytes hold whole steps;
    the rest is a crash's tail. chain[t]: the checksum after t steps."""

    header: dict[str, Any]
    steps: list[StepRecord]
    begin: int
    good: int
    chain: list[int]


def pack_step(record: StepRecord, chain: int = 0, lag: int = 0) -> tuple[bytes, int]:
    """The bytes of one step (one record an update, all but the last flagged MORE) and the chain after it."""
    updates = record.updates or (Update(0, 0.0),)
    out = bytearray()
    for index, update in enumerate(updates):
        flags = FOLD * update.fold | SKIPPED * record.skipped | MORE * (index < len(updates) - 1)
        flags |= HALVED * record.halved
        seed, coeff, decay = (0, 0.0, 1.0) if record.skipped else (update.seed, update.coeff, update.decay)
        body = _BODY.pack(
            record.step, seed, coeff, decay, record.loss, record.grad, record.lr, flags, record.batch_crc,
            min(lag, 0xFFFFFFFF),
        )  # fmt: skip
        chain = zlib.crc32(body, chain)
        out += body + struct.pack("<I", chain)
    return bytes(out), chain


def read_journal(data: bytes, name: str = "journal", *, damaged_end: bool = False) -> Contents:
    """Everything a journal's bytes say. Raises JournalError on damage that is not a crash's tail.

    damaged_end: take the steps before the damage, whatever follows it.
    """
    header, offset, crc = _read_header(data, name)
    steps: list[StepRecord] = []
    updates: list[Update] = []
    chain, good, begin = [crc], offset, offset
    while offset + RECORD_BYTES <= len(data):
        body = data[offset : offset + 60]
        crc = zlib.crc32(body, crc)
        step, seed, coeff, decay, loss, grad, lr, flags, batch_crc, _lag = _BODY.unpack(body)
        sound = crc == struct.unpack_from("<I", data, offset + 60)[0]
        if not sound or step != len(steps) or flags & ~_FLAGS or not (math.isfinite(coeff) and math.isfinite(decay)):
            if not damaged_end:
                _check_tail(data, offset, good, len(steps), name)
            break
        offset += RECORD_BYTES
        if not flags & SKIPPED:
            updates.append(Update(seed, coeff, decay, bool(flags & FOLD)))
        if not flags & MORE:
            skipped, halved = bool(flags & SKIPPED), bool(flags & HALVED)
            steps.append(StepRecord(step, tuple(updates), loss, grad, lr, skipped, batch_crc, halved))
            updates, good = [], offset
            chain.append(crc)
    return Contents(header, steps, begin, good, chain)


def _check_tail(data: bytes, offset: int, good: int, step: int, name: str) -> None:
    """Raise unless the bad record at `offset`, of step `step`, can be the tail that a crash left."""
    rest = (len(data) - offset) // RECORD_BYTES - 1
    for at in range(offset + RECORD_BYTES, len(data) - RECORD_BYTES + 1, RECORD_BYTES):
        body = data[at : at + 60]
        before, crc = struct.unpack_from("<I", data, at - 4)[0], struct.unpack_from("<I", data, at + 60)[0]
        if zlib.crc32(body, before) != crc:
            continue
        later, *_, lag = _BODY.unpack(body)
        if later - lag > step:
            break
    else:
        if len(data) - offset <= MAX_TAIL_BYTES:
            return
    raise JournalError(
        f"{name}: record {step} at byte {offset} fails its checksum and {rest} records follow it. Restore the file, or "
        f"cut it to {step} steps (zo-offload journal cut) to resume from there"
    )


def _read_header(data: bytes, name: str) -> tuple[dict[str, Any], int, int]:
    if len(data) < 12 or data[:4] != MAGIC:
        raise JournalError(f"{name}: not a journal (starts with {data[:4]!r}, expected {MAGIC!r})")
    length = struct.unpack_from("<I", data, 4)[0]
    if length > _MAX_HEADER_BYTES or 12 + length > len(data):
        raise JournalError(f"{name}: header of {length} bytes does not fit the file of {len(data)} bytes")
    crc = zlib.crc32(data[: 8 + length])
    if struct.unpack_from("<I", data, 8 + length)[0] != crc:
        raise JournalError(f"{name}: the header fails its checksum; the run's identity is lost. Restore the file")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise JournalError(f"{name}: the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise JournalError(f"{name}: the header is a JSON {type(header).__name__}, not an object")
    return header, 12 + length, crc


def pack_header(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, sort_keys=True).encode()
    head = MAGIC + struct.pack("<I", len(text)) + text
    return head + struct.pack("<I", zlib.crc32(head))


class Journal:
    """The open journal of a run. `append` hands a step to the system at once; `make_durable` waits for the disk."""

    def __init__(self, path: Path, contents: Contents, fd: int, commit_s: float = COMMIT_S) -> None:
        self.path, self.header, self.steps, self.commit_s = path, contents.header, contents.steps, commit_s
        self.dropped_bytes = 0
        self._chain, self._size, self._fd = contents.chain, contents.good, fd
        self._synced = 0
        self._failed: StorageError | None = None
        self._write_lock, self._sync_lock = threading.Lock(), threading.Lock()
        self.settle: Callable[[int], None] = lambda version: None
        """Makes sure that steps 0..version-1 have been appended, where losses reach the host later than blocks may."""
        self._due = threading.Condition()
        self._committer: threading.Thread | None = None
        self._closing = False

    @classmethod
    def create(cls, path: Path, header: dict[str, Any], commit_s: float = COMMIT_S) -> Journal:
        """A new journal, its header on the disk. Refuses a path that exists: a run is never overwritten."""
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
            diskio.append(fd, head)
            diskio.sync(fd)
            diskio.sync_directory(path.parent)
        except OSError as error:
            os.close(fd)
            path.unlink(missing_ok=True)  # made above, by us alone; a headless journal would block the directory
            raise diskio.storage_error(error, "making", path, then="Nothing was trained yet.") from error
        return cls(path, read_journal(head, str(path)), fd, commit_s)

    @classmethod
    def open(cls, path: Path, commit_s: float = COMMIT_S) -> Journal:
        """An existing journal, ready to append; a cut tail is dropped (`dropped_bytes`)."""
        try:
            data = path.read_bytes()
            contents = read_journal(data, str(path))
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except FileNotFoundError:
            raise JournalError(f"{path} is missing: {path.parent} is not a run directory") from None
        except OSError as error:
            raise diskio.storage_error(error, "opening", path, then="The run is as it was.") from error
        journal = cls(path, contents, fd, commit_s)
        if contents.good < len(data):
            diskio.cut(fd, contents.good)
            journal.dropped_bytes = len(data) - contents.good
        journal.make_durable(len(contents.steps))
        return journal

    def append(self, record: StepRecord) -> None:
        """Add one step. After this returns a killed process has not lost it; see `make_durable` for a power cut.

        Raises StorageError, and from then on always: the journal ends with the last step that was added whole.
        """
        assert record.step == len(self.steps)
        assert all(math.isfinite(u.coeff) for u in record.updates)
        self._check()
        with self._write_lock:
            data, chain = pack_step(record, self._chain[-1], len(self.steps) - self._synced)
            try:
                diskio.append(self._fd, data)
            except OSError as error:
                self._fail(error)
                diskio.cut(self._fd, self._size)  # no half a record; if this fails too, a reader drops the tail
                self._check()
            self._size += len(data)
            self._chain.append(chain)
            self.steps.append(record)
        self._commit_soon()

    def chain(self, version: int) -> int:
        """The checksum of the journal's first `version` steps: names a state of this very run."""
        return self._chain[version]

    def make_durable(self, version: int) -> None:
        """Return once steps 0..version-1 are on the disk. Called before block bytes are written, and at the end."""
        self.settle(version)
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
        """Sync and close. Raises StorageError if the last steps could not be synced."""
        with self._due:
            self._closing = True
            self._due.notify_all()
        if self._committer is not None:
            self._committer.join()
        try:
            if self._failed is None:
                self.make_durable(len(self.steps))
        finally:
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
        with self._due:
            self._due.notify_all()

    def _is_closing(self) -> bool:
        return self._closing

    def _commit(self) -> None:
        """The committer thread: a step is synced at most commit_s after it was added (by the monotonic clock)."""
        while True:
            with self._due:
                self._due.wait_for(lambda: self._is_closing() or len(self.steps) > self._synced)
                if not self._is_closing():
                    self._due.wait_for(self._is_closing, timeout=self.commit_s)  # counts on the monotonic clock
                if self._is_closing():
                    return
            try:
                self.make_durable(len(self.steps))
            except StorageError:
                return  # kept in _failed: the next append raises it
