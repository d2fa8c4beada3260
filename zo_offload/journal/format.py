"""A journal's bytes: written by `journal.Journal`, read by whoever wants the run.

Under one header, a step is fully given by its updates (seed, coefficient, decay); noise is recomputed from the seed.
Replaying the records over the base weights rebuilds the weights of any step, so this file is the run and every block
file is a cache. 20,000 MeZO steps are 1.3 MB.

File layout, little-endian
    0      4 bytes   b"ZOJ3" (b"ZOJ2": the same without notes, still read and gone on with)
    4      u32       header length H in bytes
    8      H bytes   header: JSON, UTF-8 (what the run is, see identity.py)
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
    or, of a note (something to keep with the run that is not a step)
    0      u64       how many steps were taken before it
    8      40 bytes  a part of its text: JSON, UTF-8, an object
    48     u32       flags: bit 4 = a note; bit 2 = more records of the same note follow
    52     u32       bytes of text in this record
    56, 60           as above

The crc of a record covers all before it (`chain`), so records cannot be swapped, left out or taken from another run.

History. What the weights after t steps depend on, and nothing of when or where it was written, is named by 8 bytes:
    history(0)    blake2b-8 of the JSON (sorted keys, no spaces) of the header's HISTORY keys
    history(t+1)  blake2b-8 of history(t) | u64 step t | u8 flags (bits 1 and 3 as above) | of each update: u64 seed,
                  f32 coefficient, f32 decay, u8 fold; a step that was taken without an update has one of zeros
Two journals of equal history have equal weights, so a block of one is a block of the other.

What a reader does with a bad record: if a later record says that the bad one was on the disk, the file is damaged and
JournalError says where. Else the bad record and what follows are the unfinished tail of a crash (a power cut may leave
any of its pages) and are dropped, as is a step whose last record is missing.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import JournalError
from ..kernels.records import Update
from ..system import diskio

MAGIC, OLD_MAGIC = b"ZOJ3", b"ZOJ2"
RECORD_BYTES = 64
_BODY = struct.Struct("<QQffdddIII")
_NOTE = struct.Struct("<Q40sIII")
_NOTE_TEXT = 40
_CRC = struct.Struct("<I")
FOLD, SKIPPED, MORE, HALVED, NOTE = 1, 2, 4, 8, 16
_STEP_FLAGS = FOLD | SKIPPED | MORE | HALVED
_MAX_HEADER_BYTES = 1 << 24
MAX_TAIL_BYTES = 1 << 20
"""More unreadable bytes than this at the end are damage: no second of steps is that long."""
HISTORY = ("base", "plan", "trainable", "storage", "fold_every", "rounding", "seed", "noise", "method", "gains")
"""The header's keys that say what updates mean, and what they are applied to."""
_HEAD_OF_STEP, _UPDATE = struct.Struct("<QQB"), struct.Struct("<QffB")


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
class Note:
    """Something to keep with a run, told when `step` steps had been taken. values: of JSON."""

    step: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Contents:
    """What a journal's bytes say. begin: where the records begin; good: how many bytes hold whole steps and notes; the
    rest is a crash's tail. chain[t]: the checksum of all before step t, ends[t]: how many bytes the first t steps and
    the notes before the last of them take."""

    header: dict[str, Any]
    steps: list[StepRecord]
    begin: int
    good: int
    chain: list[int]
    notes: list[Note]
    ends: list[int]
    takes_notes: bool


# ---- writing ---------------------------------------------------------------------------------------------------------


def pack_header(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, sort_keys=True).encode()
    head = MAGIC + struct.pack("<I", len(text)) + text
    return head + _CRC.pack(zlib.crc32(head))


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
        out += body + _CRC.pack(chain)
    return bytes(out), chain


def pack_note(note: Note, chain: int = 0, lag: int = 0) -> tuple[bytes, int]:
    """The bytes of a note and the chain after it. ValueError on what is not JSON."""
    text = json.dumps(note.values, sort_keys=True, allow_nan=False).encode()
    out = bytearray()
    for at in range(0, len(text), _NOTE_TEXT):
        part = text[at : at + _NOTE_TEXT]
        flags = NOTE | MORE * (at + _NOTE_TEXT < len(text))
        body = _NOTE.pack(note.step, part, flags, len(part), min(lag, 0xFFFFFFFF))
        chain = zlib.crc32(body, chain)
        out += body + _CRC.pack(chain)
    return bytes(out), chain


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_journal(data: bytes, name: str = "journal", *, damaged_end: bool = False) -> Contents:
    """Everything a journal's bytes say. Raises JournalError on damage that is not a crash's tail.

    damaged_end: take the steps before the damage, whatever follows it.
    """
    header, offset, crc = _read_header(data, name)
    takes_notes = data[:4] == MAGIC
    steps: list[StepRecord] = []
    updates: list[Update] = []
    notes: list[Note] = []
    text = b""
    chain, ends, good, begin = [crc], [offset], offset, offset
    view = memoryview(data)
    while offset + RECORD_BYTES <= len(data):
        body = view[offset : offset + 60]
        crc = zlib.crc32(body, crc)
        step, seed, coeff, decay, loss, grad, lr, flags, batch_crc, _lag = _BODY.unpack(body)
        sound = crc == _CRC.unpack_from(view, offset + 60)[0] and step == len(steps)
        if sound and flags & NOTE and takes_notes and not updates and not flags & ~(NOTE | MORE):
            _, part, _, length, _ = _NOTE.unpack(body)
            text += part[:length]
            offset += RECORD_BYTES
            if not flags & MORE:
                notes.append(Note(step, _parse_note(text, name, offset)))
                text, good, chain[-1] = b"", offset, crc
            continue
        if not sound or text or flags & ~_STEP_FLAGS or not (math.isfinite(coeff) and math.isfinite(decay)):
            if not damaged_end:
                _check_tail(data, offset, len(steps), name)
            break
        offset += RECORD_BYTES
        if not flags & SKIPPED:
            updates.append(Update(seed, coeff, decay, bool(flags & FOLD)))
        if not flags & MORE:
            skipped, halved = bool(flags & SKIPPED), bool(flags & HALVED)
            steps.append(StepRecord(step, tuple(updates), loss, grad, lr, skipped, batch_crc, halved))
            updates, good = [], offset
            chain.append(crc)
            ends.append(offset)
    return Contents(header, steps, begin, good, chain, notes, ends, takes_notes)


def load_journal(path: Path) -> Contents:
    """What a journal's file says; nothing is changed. Raises JournalError."""
    try:
        return read_journal(diskio.read_file(path), str(path))
    except FileNotFoundError:
        raise JournalError(f"{path} does not exist") from None
    except OSError as error:
        raise JournalError(f"{path} cannot be read: {error}") from error


def load_header(path: Path) -> dict[str, Any]:
    """The header of a journal's file; its steps are not read. Raises JournalError."""
    try:
        start = diskio.read_file(path, 8)
        length = struct.unpack_from("<I", start, 4)[0] if len(start) == 8 else 0
        return _read_header(diskio.read_file(path, 12 + min(length, _MAX_HEADER_BYTES)), str(path))[0]
    except OSError as error:
        raise JournalError(f"{path} cannot be read: {error}") from error


def _parse_note(text: bytes, name: str, offset: int) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise JournalError(f"{name}: the note that ends at byte {offset} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise JournalError(f"{name}: the note that ends at byte {offset} is a JSON {type(values).__name__}")
    return values


def _check_tail(data: bytes, offset: int, step: int, name: str) -> None:
    """Raise unless the bad record at `offset`, of step `step`, can be the tail that a crash left."""
    rest = (len(data) - offset) // RECORD_BYTES - 1
    for at in range(offset + RECORD_BYTES, len(data) - RECORD_BYTES + 1, RECORD_BYTES):
        body = data[at : at + 60]
        before, crc = _CRC.unpack_from(data, at - 4)[0], _CRC.unpack_from(data, at + 60)[0]
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
    if len(data) < 12 or data[:4] not in (MAGIC, OLD_MAGIC):
        raise JournalError(f"{name}: not a journal (starts with {data[:4]!r}, expected {MAGIC!r})")
    length = struct.unpack_from("<I", data, 4)[0]
    if length > _MAX_HEADER_BYTES or 12 + length > len(data):
        raise JournalError(f"{name}: header of {length} bytes does not fit the file of {len(data)} bytes")
    crc = zlib.crc32(data[: 8 + length])
    if _CRC.unpack_from(data, 8 + length)[0] != crc:
        raise JournalError(f"{name}: the header fails its checksum; the run's identity is lost. Restore the file")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise JournalError(f"{name}: the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise JournalError(f"{name}: the header is a JSON {type(header).__name__}, not an object")
    return header, 12 + length, crc


# ---- history ---------------------------------------------------------------------------------------------------------


def history_start(header: Mapping[str, Any]) -> int:
    """history(0): see the module."""
    text = json.dumps({key: header.get(key) for key in HISTORY}, sort_keys=True, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def history_after(history: int, record: StepRecord) -> int:
    """history(t + 1) from history(t) and step t."""
    body = _HEAD_OF_STEP.pack(history, record.step, SKIPPED * record.skipped | HALVED * record.halved)
    updates = () if record.skipped else record.updates or (Update(0, 0.0),)
    for update in updates:
        body += _UPDATE.pack(update.seed, update.coeff, update.decay, update.fold)
    return int.from_bytes(hashlib.blake2b(body, digest_size=8).digest(), "little")


def histories(header: Mapping[str, Any], steps: Iterable[StepRecord]) -> Iterator[int]:
    """history(0), history(1), ... of a whole journal."""
    history = history_start(header)
    yield history
    for record in steps:
        history = history_after(history, record)
        yield history
