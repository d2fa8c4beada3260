"""Reads GGUF files, a range of a tensor's elements at a time.

    "GGUF", version u32 (2, 3), tensors u64, values u64, then the values: key, type u32, value; then for each tensor its
    name, number of dimensions u32, dimensions u64 (the fastest first), type u32, offset u64; then, from the next
    multiple of general.alignment (32), the data. Strings: length u64, UTF-8. Little endian.

The header is not trusted: every count and size is compared with the file's size before it is used.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError
from .base import Codes, Kept, kept_as
from .files import Files, Spec
from .gguf_blocks import BLOCKS, PLAIN, BlockType
from .packed_float import LARGEST_EXPONENT

_SIMPLE = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_RUN = 1 << 20
MAX_TENSORS = 1_000_000
MAX_STRING = 1 << 24


@dataclass(frozen=True)
class GGUFTensor:
    spec: Spec
    """The shape and dtype after decoding."""
    kind: BlockType | None
    """None: plain floats."""
    begin: int
    nbytes: int


class GGUFFile:
    """One file: its checked header, and elements on demand. CheckpointError on any damage that it can detect."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.values: dict[str, Any] = {}
        """Values that are not arrays, and the lengths of arrays."""
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            with open(path, "rb") as file:
                _Header(self, file, os.fstat(self._fd).st_size).read()
        except BaseException:
            self.close()
            raise

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Elements [start, start + len(out)) of a tensor into `out`, of its dtype. Memory: a few million elements."""
        tensor = self.tensors[name]
        if tensor.kind is None:
            self._pread(name, tensor.begin + start * out.dtype.itemsize, out.view(torch.uint8))
            return
        for at in range(0, len(out), _RUN):
            part = out[at : at + _RUN]
            blocks, begin = self._blocks(name, tensor.kind, start + at, len(part))
            part.copy_(tensor.kind.decode(blocks).reshape(-1)[begin : begin + len(part)])

    def bytes_into(self, name: str, start: int, out: Tensor) -> None:
        """Bytes [start, start + len(out)) of a tensor as the file has them into `out`, uint8."""
        self._pread(name, self.tensors[name].begin + start, out)

    def kept(self, name: str) -> tuple[Kept, ...]:
        """The storage formats that hold a tensor's codes, the smallest first."""
        kind = self.tensors[name].kind
        if kind is None:
            return ()
        found: tuple[Kept, ...] = ()
        for held, shift in kind.kept:
            run, fits = partial(self._codes, name, held, shift), partial(self._fits, name, held)
            found += kept_as(held, kind.group, run, fits=fits)
        return found

    def _codes(self, name: str, held: str, shift: int, files: Files, start: int, count: int) -> Codes:
        """Code, scale and minimum of each of the elements [start, start + count)."""
        kind = self.tensors[name].kind
        assert kind is not None
        blocks, begin = self._blocks(name, kind, start, count)
        codes, scales, minima = kind.parts(blocks)
        if shift:
            codes, minima = codes + shift, -shift * scales
        if held == "mxfp4":
            scales = blocks[:, :1]

        def cut(plane: Tensor, each: int) -> Tensor:
            return plane.repeat_interleave(each, 1).reshape(-1)[begin : begin + count]

        narrow = codes.to(torch.int8 if held == "int8" else torch.uint8).view(torch.uint8)
        return cut(narrow, 1), cut(scales, kind.group), None if minima is None else cut(minima, kind.group)

    def _fits(self, name: str, held: str, files: Files) -> bool:
        """Whether mxfp4's codes are finite numbers: reads them all."""
        tensor = self.tensors[name]
        if held != "mxfp4" or tensor.kind is None:
            return True
        runs = range(0, tensor.spec.numel, _RUN)
        blocks = (self._blocks(name, tensor.kind, at, min(_RUN, tensor.spec.numel - at))[0] for at in runs)
        return all(int(raw[:, 0].max()) <= LARGEST_EXPONENT for raw in blocks)

    def _blocks(self, name: str, kind: BlockType, start: int, count: int) -> tuple[Tensor, int]:
        """The blocks that contain elements [start, start + count), uint8 [n, nbytes], and its index in them."""
        first, last = start // kind.numel, -(-(start + count) // kind.numel)
        raw = torch.empty((last - first) * kind.nbytes, dtype=torch.uint8, device="cpu")
        self._pread(name, self.tensors[name].begin + first * kind.nbytes, raw)
        return raw.view(last - first, -1), start - first * kind.numel

    def _pread(self, name: str, at: int, out: Tensor) -> None:
        view, done = out.numpy().data if len(out) else memoryview(b""), 0
        while done < len(out):
            got = os.preadv(self._fd, [view[done : done + (1 << 30)]], at + done)
            if got == 0:
                raise CheckpointError(f"{self.path}: ends at byte {at + done}, inside of tensor {name!r}. Restore it.")
            done += got

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


class _Header:
    def __init__(self, owner: GGUFFile, file: BinaryIO, size: int) -> None:
        self.owner, self.file, self.size = owner, file, size

    def read(self) -> None:
        if self.file.read(4) != b"GGUF":
            raise self.wrong("does not begin with GGUF")
        version = self.number("I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            raise self.wrong(
                "is big-endian, which is not supported" if swapped else f"version {version}; 2 and 3 are read"
            )
        tensors, values = self.number("Q"), self.number("Q")
        if tensors > MAX_TENSORS or values > MAX_TENSORS:
            raise self.wrong(f"has {tensors} tensors and {values} values; at most {MAX_TENSORS} are taken")
        for _ in range(values):
            key = self.string()
            if key in self.owner.values:
                raise self.wrong(f"has the value {key!r} twice")
            self.owner.values[key] = self.value(self.number("I"))
        found = [self.tensor() for _ in range(tensors)]
        alignment = self.owner.values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise self.wrong(f"general.alignment={alignment!r}")
        begin = -(-self.file.tell() // alignment) * alignment
        for name, kind, spec, offset in found:
            nbytes = spec.nbytes if kind is None else spec.numel // kind.numel * kind.nbytes
            if name in self.owner.tensors:
                raise self.wrong(f"has tensor {name!r} twice")
            if begin + offset + nbytes > self.size:
                raise self.wrong(
                    f"has {self.size} bytes, and tensor {name!r} goes on to byte {begin + offset + nbytes}: it was cut "
                    "short. Download or copy it again"
                )
            self.owner.tensors[name] = GGUFTensor(spec, kind, begin + offset, nbytes)

    def tensor(self) -> tuple[str, BlockType | None, Spec, int]:
        name, dims = self.string(), self.number("I")
        if not 0 < dims <= 4:
            raise self.wrong(f"tensor {name!r} has {dims} dimensions")
        shape = tuple(self.number("Q") for _ in range(dims))[::-1]
        code, offset = self.number("I"), self.number("Q")
        kind = BLOCKS.get(code)
        if kind is None and code not in PLAIN:
            known = ", ".join(["F32", "F16", "BF16", *(block.name for block in BLOCKS.values())])
            raise self.wrong(f"has tensor {name!r} of type {code}, which is not supported. Supported: {known}")
        if math.prod(shape) > 8 * 256 * self.size or (kind is not None and shape[-1] % kind.numel):
            raise self.wrong(f"tensor {name!r} of type {code} has the shape {list(shape)}")
        return name, kind, Spec(PLAIN.get(code, torch.float32), shape), offset

    def number(self, code: str) -> Any:
        raw = self.take(struct.calcsize(code))
        return struct.unpack(f"<{code}", raw)[0]

    def string(self) -> str:
        length = self.number("Q")
        if length > MAX_STRING:
            raise self.wrong(f"has a text of {length} bytes")
        return self.take(length).decode("utf-8", "replace")

    def value(self, code: int) -> Any:
        if code == _STRING:
            return self.string()
        if code in _SIMPLE:
            return self.number(_SIMPLE[code])
        if code != _ARRAY:
            raise self.wrong(f"has a value of type {code}")
        of, count = self.number("I"), self.number("Q")
        if of == _STRING:
            if count * 8 > self.size:
                raise self.wrong(f"has an array of {count} texts")
            for _ in range(count):
                length = self.number("Q")
                self.skip(length)
        elif of in _SIMPLE:
            self.skip(count * struct.calcsize(_SIMPLE[of]))
        else:
            raise self.wrong(f"has an array of type {of}")
        return count

    def skip(self, count: int) -> None:
        if self.file.tell() + count > self.size:
            raise self.wrong(f"ends inside of its header (byte {self.size}): it was cut short")
        self.file.seek(count, 1)

    def take(self, count: int) -> bytes:
        raw = self.file.read(count)
        if len(raw) != count:
            raise self.wrong(f"ends inside of its header (byte {self.size}): it was cut short")
        return raw

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.owner.path}: not a GGUF file that can be used: it {what}.")
