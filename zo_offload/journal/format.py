"""A journal's bytes: written by `journal.Journal`, read by any reader of the run.

Under one header, a step is fully given by its updates (seed, coefficient, decay); noise is recomputed from the seed.
Replaying the records over the base weights rebuilds the weights of any step, so this file is the run and every block
file is a cache. 20,000 MeZO steps are 1.3 MB.

File layout, little-endian
    0      4 bytes   b"ZOJ4" (b"ZOJ3": without noises and scalars; b"ZOJ2": without notes too; both are read and gone
                     on with, as they are)
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
or, of noises (three updates a record of the step whose first record came before; decay 1, only the step's last folds)
    0      u64       step
    8      3 * 12    u64 seed, f32 coefficient, of each; zeros behind the last
    44     u32       0
    48     u32       flags: bit 5 = noises; bit 2 = more records of the same step follow; bit 0 = fold after the last
    52     u32       how many there are
    56, 60           as above
or, of scalars (what a method keeps of a step beside loss and grad, for the steps after it)
    0      u64       step
    8      5 * 8     f64 of each; zeros behind the last
    48     u32       flags: bit 6 = scalars; bit 2 = more records of the same step follow
    52     u32       how many there are
    56, 60           as above

The crc of a record covers all before it (`chain`), so records cannot be swapped, left out or taken from another run.

History. 8 bytes name everything that the weights after t steps depend on, but not when or where it was written:
    history(0)    blake2b-8 of the JSON (sorted keys, no spaces) of the header's HISTORY keys
    history(t+1)  blake2b-8 of history(t) | u64 step t | u8 flags (bits 1 and 3 as above) | of each update: u64 seed,
                  f32 coefficient, f32 decay, u8 fold; a step that was taken without an update has one of zeros
Two journals of equal history have equal weights, so a block of one is a block of the other.

Bad records: if a later record says that the bad one was on the disk, the file is damaged and JournalError names the
place. Otherwise the bad record and everything after it are the unfinished tail of a crash (a power cut may leave any of
its pages) and are dropped, like a step whose last record is missing.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import JournalError
from ..kernels.records import Update
from ..system import diskio

MAGIC = b"ZOJ4"
VERSIONS = {b"ZOJ2": 2, b"ZOJ3": 3, MAGIC: 4}
"""A journal's first bytes -> the version of its records."""
TAKES_NOTES, PACKED = 3, 4
"""The first versions with notes; with noises and scalars."""
RECORD_BYTES = 64
_BODY = struct.Struct("<QQffdddIII")
_STEP, _FLAGS_AT = struct.Struct("<Q"), 48
_NOTE = struct.Struct("<Q40sIII")  # of all records but a step's first, what is at 8 .. 47
_NOTE_TEXT = 40
_NOISE, _NOISES = struct.Struct("<Qf"), 3  # in one record
_SCALAR, _SCALARS = struct.Struct("<d"), 5
_CRC = struct.Struct("<I")
FOLD, SKIPPED, MORE, HALVED, NOTE, NOISES, SCALARS = 1, 2, 4, 8, 16, 32, 64
_STEP_FLAGS = FOLD | SKIPPED | MORE | HALVED
_MAX_HEADER_BYTES = 1 << 24
MAX_TAIL_BYTES = 1 << 20
"""More unreadable bytes than this at the end are damage: one second of steps is never that long."""
HISTORY = ("base", "plan", "trainable", "storage", "fold_every", "rounding", "seed", "noise", "method", "gains")
"""The header's keys that define the meaning of updates, and the weights that they are applied to."""
_HEAD_OF_STEP, _UPDATE = struct.Struct("<QQB"), struct.Struct("<QffB")


@dataclass(frozen=True)
class StepRecord:
    """One step as the journal keeps it: its updates, and scalars for readers."""

    step: int
    updates: tuple[Update, ...]
    loss: float
    grad: float
    lr: float
    skipped: bool = False
    batch_crc: int = 0
    halved: bool = False
    """eps is halved from the next step on (method.on_nonfinite="halve_eps")."""
    scalars: tuple[float, ...] = ()
    """The method's further numbers of the step, float64: `Method.scalars`."""


@dataclass(frozen=True)
class Note:
    """Values kept with a run, noted after `step` steps. values: JSON."""

    step: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Contents:
    """The contents of a journal. begin: offset of the first record; good: number of bytes with whole steps and notes;
    the rest is a crash's tail. chain[t]: the checksum of everything before step t; ends[t]: number of bytes of the
    first t
    steps and the notes before the last of them. version: of `VERSIONS`."""

    header: dict[str, Any]
    steps: list[StepRecord]
    begin: int
    good: int
    chain: list[int]
    notes: list[Note]
    ends: list[int]
    version: int

    @property
    def takes_notes(self) -> bool:
        return self.version >= TAKES_NOTES


# ---- writing ---------------------------------------------------------------------------------------------------------


def pack_header(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, sort_keys=True).encode()
    head = MAGIC + struct.pack("<I", len(text)) + text
    return head + _CRC.pack(zlib.crc32(head))


def pack_step(record: StepRecord, chain: int = 0, lag: int = 0, version: int = 4) -> tuple[bytes, int]:
    """The bytes of one step (all records but the last flagged MORE) and the chain after it. version: the journal's."""
    updates = record.updates or (Update(0, 0.0),)
    alone = updates  # updates with a record of their own
    if version >= PACKED and all(u.decay == 1.0 for u in updates[1:]) and not any(u.fold for u in updates[:-1]):
        alone = updates[:1]
    lag = min(lag, 0xFFFFFFFF)
    bodies = []
    for update in alone:
        flags = FOLD * update.fold | SKIPPED * record.skipped | HALVED * record.halved
        seed, coeff, decay = (0, 0.0, 1.0) if record.skipped else (update.seed, update.coeff, update.decay)
        bodies.append((record.step, seed, coeff, decay, record.loss, record.grad, record.lr, flags, record.batch_crc))
    packed = [(_BODY.pack(*body, lag), body[-2]) for body in bodies]
    for group in _in_groups(updates[len(alone) :], _NOISES):
        text = b"".join(_NOISE.pack(update.seed, update.coeff) for update in group)
        flags = NOISES | FOLD * group[-1].fold
        packed.append((_NOTE.pack(record.step, text, flags, len(group), lag), flags))
    for numbers in _in_groups(record.scalars, _SCALARS):
        text = b"".join(map(_SCALAR.pack, numbers))
        packed.append((_NOTE.pack(record.step, text, SCALARS, len(numbers), lag), SCALARS))
    out = bytearray()
    for index, (body, flags) in enumerate(packed):
        if index < len(packed) - 1:
            body = body[:_FLAGS_AT] + _CRC.pack(flags | MORE) + body[_FLAGS_AT + 4 :]
        chain = zlib.crc32(body, chain)
        out += body + _CRC.pack(chain)
    return bytes(out), chain


def _in_groups(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


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


class _Reading:
    """The state after the records so far, with the step or note that is not complete yet."""

    def __init__(self, version: int, name: str) -> None:
        self.version, self.name = version, name
        self.steps: list[StepRecord] = []
        self.notes: list[Note] = []
        self.updates: list[Update] = []
        self.scalars: list[float] = []
        self.text = b""
        self.first: tuple[Any, ...] | None = None  # the fields of the open step's first record

    def take(self, body: memoryview, end: int) -> bool | None:
        """Read one record that ends at byte `end`: None if impossible, else whether it ended a step (or a note)."""
        _, part, flags, count, _ = _NOTE.unpack(body)
        kind = flags & (NOTE | NOISES | SCALARS)
        if kind == NOTE and self.version >= TAKES_NOTES and not flags & ~(NOTE | MORE) and self.first is None:
            return self._note(part[:count], flags, end)
        if self.text:
            return None
        if kind in (NOISES, SCALARS) and self.version >= PACKED and self.first is not None:
            sound = self._packed(part, kind, flags, count)
        else:
            sound = self._update(body, flags)
        return self._end_step(flags) if sound else None

    def _note(self, text: bytes, flags: int, end: int) -> bool:
        self.text += text
        if flags & MORE:
            return False
        self.notes.append(Note(len(self.steps), _parse_note(self.text, self.name, end)))
        self.text = b""
        return True

    def _update(self, body: memoryview, flags: int) -> bool:
        _, seed, coeff, decay, loss, grad, lr, _, batch_crc, _ = _BODY.unpack(body)
        if flags & ~_STEP_FLAGS or not (math.isfinite(coeff) and math.isfinite(decay)):
            return False
        self.first = loss, grad, lr, bool(flags & SKIPPED), batch_crc, bool(flags & HALVED)
        if not flags & SKIPPED:
            self.updates.append(Update(seed, coeff, decay, bool(flags & FOLD), not self.updates))
        return True

    def _packed(self, part: bytes, kind: int, flags: int, count: int) -> bool:
        if flags & ~(kind | MORE | FOLD) or not 0 < count <= (_NOISES if kind == NOISES else _SCALARS):
            return False
        if kind == SCALARS:
            self.scalars += [value for (value,) in _SCALAR.iter_unpack(part[: count * _SCALAR.size])]
            return True
        found = list(_NOISE.iter_unpack(part[: count * _NOISE.size]))
        if not all(math.isfinite(coeff) for _, coeff in found):
            return False
        last = len(found) - 1
        self.updates += [Update(s, c, 1.0, bool(flags & FOLD) and i == last, False) for i, (s, c) in enumerate(found)]
        return True

    def _end_step(self, flags: int) -> bool:
        if flags & MORE:
            return False
        assert self.first is not None
        loss, grad, lr, skipped, batch_crc, halved = self.first
        step, updates, scalars = len(self.steps), tuple(self.updates), tuple(self.scalars)
        self.steps.append(StepRecord(step, updates, loss, grad, lr, skipped, batch_crc, halved, scalars))
        self.updates, self.scalars, self.first = [], [], None
        return True


def read_journal(data: bytes, name: str = "journal", *, damaged_end: bool = False) -> Contents:
    """The contents of a journal's bytes. Raises JournalError on damage that is not a crash's tail.

    damaged_end: return the steps before the damage, whatever follows it.
    """
    header, offset, crc = _read_header(data, name)
    found = _Reading(VERSIONS[data[:4]], name)
    chain, ends, good, begin = [crc], [offset], offset, offset
    view = memoryview(data)
    while offset + RECORD_BYTES <= len(data):
        body = view[offset : offset + 60]
        crc = zlib.crc32(body, crc)
        sound = crc == _CRC.unpack_from(view, offset + 60)[0] and _STEP.unpack_from(body)[0] == len(found.steps)
        ended = found.take(body, offset + RECORD_BYTES) if sound else None
        if ended is None:
            if not damaged_end:
                _check_tail(data, offset, len(found.steps), name)
            break
        offset += RECORD_BYTES
        if len(found.steps) == len(chain):
            chain.append(crc)
            ends.append(offset)
            good = offset
        elif ended:  # a note
            good, chain[-1] = offset, crc
    return Contents(header, found.steps, begin, good, chain, found.notes, ends, found.version)


def load_journal(path: Path) -> Contents:
    """The contents of a journal's file; nothing is changed. Raises JournalError."""
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
    if len(data) < 12 or data[:4] not in VERSIONS:
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
