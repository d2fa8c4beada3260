"""The journal: a training run written down as scalars, append-only.

Under one header, a step is fully given by its updates (seed, coefficient, decay); noise is recomputed from the seed.
Replaying the records over the base weights rebuilds the weights of any step, so this file is the run and every block
file is a cache. 20,000 MeZO steps are 1.3 MB.

File layout, little-endian
    0      4 bytes   b"ZOJ1"
    4      u32       header length H in bytes
    8      H bytes   header: JSON, UTF-8 (identity of base, plan, method, noise, storage)
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
                     of the same step follow
    52     u32       fingerprint of the step's batch (crc32), 0 where the data gives none
    56     u32       0
    60     u32       crc32 of the 60 bytes before

A crash can cut the last record short: `Journal.open` drops such a tail, and a step whose last record is missing, and
says how many bytes it dropped. A bad record anywhere else is damage, not a crash, and raises JournalError.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import JournalError
from .fused import Update

MAGIC = b"ZOJ1"
RECORD_BYTES = 64
_BODY = struct.Struct("<QQffdddIII")
FOLD, SKIPPED, MORE = 1, 2, 4
_MAX_HEADER_BYTES = 1 << 24


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


def pack_step(record: StepRecord) -> bytes:
    """The bytes of one step: one record an update, all but the last flagged MORE."""
    updates = record.updates or (Update(0, 0.0),)
    out = bytearray()
    for index, update in enumerate(updates):
        flags = FOLD * update.fold | SKIPPED * record.skipped | MORE * (index < len(updates) - 1)
        seed, coeff, decay = (0, 0.0, 1.0) if record.skipped else (update.seed, update.coeff, update.decay)
        body = _BODY.pack(
            record.step, seed, coeff, decay, record.loss, record.grad, record.lr, flags, record.batch_crc, 0
        )
        out += body + struct.pack("<I", zlib.crc32(body))
    return bytes(out)


def read_journal(data: bytes, name: str = "journal") -> tuple[dict[str, Any], list[StepRecord], int]:
    """(header, steps, bytes that hold them). Trailing bytes past that are a cut record and may be dropped."""
    header, offset = _read_header(data, name)
    steps: list[StepRecord] = []
    updates: list[Update] = []
    good = offset
    while offset + RECORD_BYTES <= len(data):
        body, crc = data[offset : offset + 60], struct.unpack_from("<I", data, offset + 60)[0]
        if zlib.crc32(body) != crc:
            if offset + RECORD_BYTES >= len(data):
                break  # the last record, half written over preallocated or reordered space: a crash's tail
            raise JournalError(
                f"{name}: record {(offset - good) // RECORD_BYTES + len(steps)} at byte {offset} fails its checksum "
                f"and {(len(data) - offset) // RECORD_BYTES - 1} records follow it. Restore the file, or truncate it "
                f"to {good} bytes to resume from step {len(steps)}"
            )
        step, seed, coeff, decay, loss, grad, lr, flags, batch_crc, _ = _BODY.unpack(body)
        if step != len(steps):
            raise JournalError(f"{name}: step {step} at byte {offset} where step {len(steps)} was expected")
        offset += RECORD_BYTES
        if not flags & SKIPPED:
            updates.append(Update(seed, coeff, decay, bool(flags & FOLD)))
        if not flags & MORE:
            steps.append(StepRecord(step, tuple(updates), loss, grad, lr, bool(flags & SKIPPED), batch_crc))
            updates, good = [], offset
    return header, steps, good


def _read_header(data: bytes, name: str) -> tuple[dict[str, Any], int]:
    if len(data) < 12 or data[:4] != MAGIC:
        raise JournalError(f"{name}: not a journal (starts with {data[:4]!r}, expected {MAGIC!r})")
    length = struct.unpack_from("<I", data, 4)[0]
    if length > _MAX_HEADER_BYTES or 12 + length > len(data):
        raise JournalError(f"{name}: header of {length} bytes does not fit the file of {len(data)} bytes")
    if struct.unpack_from("<I", data, 8 + length)[0] != zlib.crc32(data[: 8 + length]):
        raise JournalError(f"{name}: the header fails its checksum; the run's identity is lost. Restore the file")
    return json.loads(data[8 : 8 + length]), 12 + length


class Journal:
    """The open journal of a run. `append` hands a step to the system at once; `make_durable` waits for the disk.

    Write-ahead rule: bytes that contain step t reach persistent storage only after `make_durable(t + 1)` returned.
    The streamer's flush is the one place that writes such bytes, and it calls this first.
    """

    def __init__(self, path: Path, header: dict[str, Any], steps: list[StepRecord], fd: int) -> None:
        self.path, self.header, self.steps = path, header, steps
        self._fd = fd
        self._synced = len(steps)
        self._lock = threading.Lock()
        self.dropped_bytes = 0

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> Journal:
        """A new journal. Refuses a path that exists: a run is never overwritten."""
        text = json.dumps(header, sort_keys=True).encode()
        head = MAGIC + struct.pack("<I", len(text)) + text
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        except FileExistsError:
            raise JournalError(
                f"{path} exists: this directory holds a run. Resume it, or choose another run_dir"
            ) from None
        _write(fd, head + struct.pack("<I", zlib.crc32(head)))
        os.fsync(fd)
        return cls(path, header, [], fd)

    @classmethod
    def open(cls, path: Path) -> Journal:
        """An existing journal, ready to append; a cut tail is dropped (`dropped_bytes`)."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise JournalError(f"{path} is missing: {path.parent} is not a run directory") from None
        header, steps, good = read_journal(data, str(path))
        fd = os.open(path, os.O_RDWR | os.O_APPEND)
        journal = cls(path, header, steps, fd)
        if good < len(data):
            os.ftruncate(fd, good)
            journal.dropped_bytes = len(data) - good
        return journal

    def append(self, record: StepRecord) -> None:
        """Add one step. After this returns a killed process has not lost it; see `make_durable` for a power cut."""
        assert record.step == len(self.steps)
        assert all(math.isfinite(u.coeff) for u in record.updates)
        _write(self._fd, pack_step(record))
        self.steps.append(record)

    def make_durable(self, version: int) -> None:
        """Return once steps 0..version-1 are on the disk. Called from the flush stream and at the end of a run."""
        with self._lock:
            if version > self._synced:
                count = len(self.steps)
                os.fdatasync(self._fd)
                self._synced = count

    def close(self) -> None:
        self.make_durable(len(self.steps))
        os.close(self._fd)


def _write(fd: int, data: bytes) -> None:
    """All of data, or an OSError naming how far it came (disk full)."""
    done = 0
    while done < len(data):
        done += os.write(fd, data[done:])
