"""Safetensors files, read and written one chunk of elements at a time.

Before any read, the header is checked as untrusted bytes: sizes, offsets, dtypes, and that the tensors fill the data
without gaps. Elements are then read by one `pread` into the caller's memory: unlike a mapping it cannot cause a bus
error if the file is cut meanwhile, cannot alias the file, holds only the requested pages, and may be called from any
number of threads.

Writing begins with the header, from names, dtypes and shapes; elements can then be written in any order.

File layout, little-endian (https://github.com/huggingface/safetensors): header bytes u64 | JSON header, padded with
blanks | data. Header: name -> {"dtype", "shape", "data_offsets": [begin, end]} from the data, and "__metadata__".
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..quantized.files import Spec
from ..system import diskio

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_HEADER_PARTS = 5_000_000
"""The most brackets, braces, colons and commas of a header, about ten per tensor: they determine its memory."""
READ_CHUNK_BYTES = 1 << 30  # Linux moves at most 0x7ffff000 bytes a call

_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {code: getattr(torch, t) for code, t in _TORCH_NAMES.items() if hasattr(torch, t)}
CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. begin and end are byte offsets from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class SafetensorsFile:
    """One file: its checked header, and tensors on demand. Raises CheckpointError on any visible damage."""

    def __init__(self, path: Path):
        self.path = path
        self._fd = -1
        self._lock = threading.Lock()
        self.metadata, self.entries = read_header(path)

    def read(self, name: str) -> Tensor:
        """The whole tensor, in new memory."""
        entry = self.entries[name]
        out = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        self.read_into(name, 0, out.view(-1))
        return out

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Elements [start, start + len(out)) of a tensor into `out`, 1-D and contiguous, of its dtype. Reads no others.

        CheckpointError if the file ends before them.
        """
        self._read(self.entries[name], start, out)

    def _read(self, entry: Entry, start: int, out: Tensor) -> None:
        name = entry.name
        assert out.dtype == entry.dtype, f"{name}: {entry.dtype} into {out.dtype}"
        begin, nbytes = entry.begin + start * entry.dtype.itemsize, out.nbytes
        assert begin + nbytes <= entry.end, f"{name}: elements from {start}, {len(out)} of them"
        if self._fd < 0:
            self._open()
        view = out.view(torch.uint8).numpy().data if nbytes else b""
        done = 0
        while done < nbytes:
            got = os.preadv(self._fd, [view[done : done + READ_CHUNK_BYTES]], begin + done)
            if got == 0:
                raise CheckpointError(
                    f"{self.path}: ends at byte {begin + done} inside tensor {name!r}, which goes on to byte "
                    f"{entry.end}; the file was cut short after it was opened. Restore it."
                )
            done += got

    def _open(self) -> None:
        with self._lock:
            if self._fd < 0:
                self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at interpreter exit `os` may be gone
            self.close()


def files_by_tensor(files: Iterable[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    """The file of each tensor. Raises CheckpointError if a tensor is in two files."""
    found: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file.entries:
            other = found.setdefault(name, file)
            if other is not file:
                raise CheckpointError(
                    f"{file.path.parent}: {name!r} is in {other.path.name} and in {file.path.name}; shards of two "
                    "checkpoints lie together, or an index is of another one. Download or copy it again."
                )
    return found


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """(metadata, entries in the file's order). Checks everything that can be checked without reading the data."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors file. Download or copy it again.")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES or 8 + length > size:
            raise CheckpointError(
                f"{path}: header of {length} bytes in a file of {size} bytes; this is not a safetensors file, or it "
                "was cut short. Download or copy it again."
            )
        raw = file.read(length)
    _check_parts(path, raw)
    try:
        header = json.loads(raw, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of too many digits, too deep, twice
        raise CheckpointError(
            f"{path}: the safetensors header is not JSON ({error}). Download or copy it again."
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is a JSON {type(header).__name__}, not an object.")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ is a JSON {type(metadata).__name__}, not an object.")
    entries = {name: _entry(path, name, value, 8 + length, size) for name, value in header.items()}
    _check_tiling(path, entries, 8 + length, size)
    return metadata, entries


def _check_parts(path: Path, raw: bytes) -> None:
    """Check the header before it is parsed: one of only brackets would take thirty times its size in memory."""
    if sum(map(raw.count, (b"[", b"{", b":", b","))) <= MAX_HEADER_PARTS:
        return
    parts = 0  # now without characters in strings
    for found in re.finditer(rb'"(?:[^"\\]++|\\.)*+"|[\[{:,]', raw, re.DOTALL):
        parts += found.end() - found.start() == 1
        if parts > MAX_HEADER_PARTS:
            raise CheckpointError(
                f"{path}: a safetensors header of {len(raw)} bytes with more than {MAX_HEADER_PARTS} parts, as 500,000 "
                "tensors have. It is damaged, or not a model's."
            )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} is in it twice")
    return found


def _entry(path: Path, name: str, value: Any, data_begin: int, size: int) -> Entry:
    try:
        code, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        well_typed = type(code) is str and all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, begin, end))
        well_typed = well_typed and len(shape) <= 64 and math.prod(n for n in shape if n) < 1 << 60  # torch's strides
    except (TypeError, KeyError, ValueError):
        well_typed = False
    if not well_typed:
        raise CheckpointError(f"{path}: header entry of tensor {name!r} is malformed: {str(value)[:200]}.")
    if code not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {code}, which this torch ({torch.__version__}) lacks."
        )
    dtype = DTYPES[code]
    if data_begin + end > size:
        raise CheckpointError(
            f"{path}: tensor {name!r} ends at byte {data_begin + end}, but the file has {size} bytes; it was cut "
            "short. Download or copy it again."
        )
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {list(shape)} and dtype {code} needs "
            f"{math.prod(shape) * dtype.itemsize} bytes, but its offsets [{begin}, {end}] hold {end - begin}."
        )
    return Entry(name, dtype, shape, data_begin + begin, data_begin + end)


def _check_tiling(path: Path, entries: dict[str, Entry], data_begin: int, size: int) -> None:
    at = data_begin
    for entry in sorted(entries.values(), key=lambda e: (e.begin, e.end)):
        if entry.begin != at:
            raise CheckpointError(
                f"{path}: tensor {entry.name!r} begins at byte {entry.begin}, and the one before it ends at {at}; "
                "tensors must follow each other without gap or overlap."
            )
        at = entry.end
    if at != size:
        raise CheckpointError(f"{path}: {size - at} bytes after the last tensor (ends at byte {at} of {size}).")


class Shard:
    """The planned contents of one file, with tensors in the order of their bytes.

    header_room: bytes reserved for the header; `header_bound` gives a sufficient number. Tensor offsets stay multiples
    of the element size (`fits` tells whether the next one's would be).
    """

    def __init__(self, header_room: int) -> None:
        self.nbytes = 0
        self.tensors: dict[str, Spec] = {}
        self.begins: dict[str, int] = {}
        """Each tensor's offset in bytes, from the first tensor."""
        self.room = -(-header_room // 8) * 8

    def fits(self, tensor: Spec, max_bytes: int) -> bool:
        aligned = self.nbytes % tensor.dtype.itemsize == 0
        return self.nbytes == 0 or (aligned and self.nbytes + tensor.nbytes <= max_bytes)

    def add(self, name: str, tensor: Spec) -> None:
        assert name not in self.tensors, name
        if tensor.dtype not in CODES:
            raise CheckpointError(f"tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot hold.")
        self.tensors[name], self.begins[name] = tensor, self.nbytes
        self.nbytes += tensor.nbytes

    def header(self, metadata: dict[str, str]) -> bytes:
        """The file's bytes before its data, padded with blanks."""
        entries: dict[str, Any] = {"__metadata__": metadata}
        for name, tensor in self.tensors.items():
            offsets = [self.begins[name], self.begins[name] + tensor.nbytes]
            entries[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        raw = json.dumps(entries, separators=(",", ":")).encode()
        assert len(raw) <= self.room, f"{len(raw)} bytes of header in a room of {self.room}"
        return self.room.to_bytes(8, "little") + raw.ljust(self.room)


class ShardWriter:
    """Writes a shard's file: its header now, elements as they come. Not atomic: write under another name and rename."""

    def __init__(self, path: Path, shard: Shard, metadata: dict[str, str]):
        self.path, self._shard = path, shard
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115  # finish or abandon closes it
        header = shard.header(metadata)
        diskio.write_at(self._file.fileno(), memoryview(header), 0)
        self._begin = len(header)

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Elements [start, start + len(values)) of a tensor; values: 1-D, contiguous, on the CPU. OSError."""
        assert values.dtype == self._shard.tensors[name].dtype, name
        at = self._begin + self._shard.begins[name] + start * values.dtype.itemsize
        if len(values):
            diskio.write_at(self._file.fileno(), values.view(torch.uint8).numpy().data, at)

    def finish(self) -> None:
        """Sync the file to the medium."""
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def header_bound(shapes: dict[str, tuple[int, ...]], metadata: dict[str, str]) -> int:
    """Bytes that the header of any subset of these tensors needs at most."""
    widest = [10**15, 10**15]
    entries = {n: {"dtype": "F8_E4M3", "shape": list(s), "data_offsets": widest} for n, s in shapes.items()}
    return len(json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode())
