"""Weights by canonical name, one chunk of elements at a time: the source of blocks and of written checkpoints.

Also digests of weights, computed while they are read:
    per tensor   blake2b-8 of "<canonical name> <dtype> <shape> <crc32 of its bytes>"
    together     blake2b-8 of the lines "<name> <digest of the tensor>" in order of names
"""

from __future__ import annotations

import functools
import hashlib
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..formats import Format

CHUNK = 1 << 20
"""Elements read, converted and written at a time: they fit in a core's cache. A multiple of every group."""


class Weights(Protocol):
    """Tensors by name, read in chunks. `read_into` may be called from several threads."""

    def shape_of(self, name: str) -> torch.Size: ...

    def dtype_of(self, name: str) -> torch.dtype: ...

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Elements [start, start + len(out)) of a tensor, flattened, into `out`: 1-D, contiguous, of its dtype."""
        ...


@runtime_checkable
class Placed(Weights, Protocol):
    """Weights that are fetched a block at a time."""

    def place_of(self, name: str, element: int) -> int:
        """The block of an element: reading in this order fetches each block once."""
        ...


@runtime_checkable
class Keeping(Protocol):
    """Weights of which some are in the codes of a storage format already, or of several."""

    def kept_formats(self, name: str) -> tuple[Format, ...]:
        """Those formats, the smallest first."""
        ...

    def kept_part(self, name: str, fmt: Format, start: int, count: int) -> Tensor:
        """Elements [start, start + count) as such a format's streamed part, from a multiple of its group on."""
        ...


def kept_of(base: object) -> Callable[[str], tuple[Format, ...]]:
    """name -> the formats that hold its codes, the smallest first; none for a base without codes."""
    return base.kept_formats if isinstance(base, Keeping) else lambda name: ()


class Base(Weights, Protocol):
    """The source of a run's initial weights."""

    def digest_of(self, name: str) -> str:
        """Identity of one tensor's name, dtype, shape and content; reads what `read_into` has not read before."""
        ...

    def digest(self) -> str:
        """Identity of all its names, dtypes, shapes and contents; reads only elements that were not read before."""
        ...


def chunks(
    fill: Callable[[int, Tensor], None], dtype: torch.dtype, start: int, stop: int
) -> Iterator[tuple[int, Tensor]]:
    """(start, values) of elements [start, stop) in order, filled by `fill(start, out)`; each valid until the next."""
    buffer = torch.empty(min(CHUNK, stop - start), dtype=dtype, device="cpu")
    for at in range(start, stop, CHUNK):
        values = buffer[: min(CHUNK, stop - at)]
        fill(at, values)
        yield at, values


# ---- digests ---------------------------------------------------------------------------------------------------------


def entry_digest(name: str, dtype: torch.dtype, shape: Iterable[int], crc: int) -> str:
    """The digest of one tensor, from the crc32 of its bytes (16 hex digits)."""
    line = f"{name} {str(dtype).removeprefix('torch.')} {list(shape)} {crc:08x}"
    return hashlib.blake2b(line.encode(), digest_size=8).hexdigest()


def tensor_digest(name: str, tensor: Tensor) -> str:
    """The digest of a tensor in memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return entry_digest(name, tensor.dtype, tensor.shape, zlib.crc32(_bytes(flat)))


def together(digests: Mapping[str, str]) -> str:
    """The digest of all tensors, from theirs."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()


class Crcs:
    """crc32 of tensors whose bytes are added in chunks, in any order, from any thread; free if in order. Each chunk
    counts once, and chunks of one tensor must not overlap (otherwise the tensor is summed again when needed)."""

    def __init__(self) -> None:
        self._whole: dict[str, int] = {}
        self._parts: dict[str, dict[int, tuple[int, int]]] = {}  # name -> end -> (begin, crc) of contiguous bytes read
        self._lock = threading.Lock()

    def add(self, name: str, begin: int, data: Tensor, total: int) -> None:
        """Add bytes [begin, begin + data.nbytes) of a tensor of `total` bytes."""
        if name in self._whole:
            return
        with self._lock:
            parts = self._parts.setdefault(name, {})
            before = parts.pop(begin, None)
        crc = zlib.crc32(_bytes(data), 0 if before is None else before[1])
        with self._lock:
            parts[begin + data.nbytes] = (begin if before is None else before[0], crc)
            if sum(end - start for end, (start, _) in parts.items()) >= total:
                self._join(name, parts, total)

    def _join(self, name: str, parts: dict[int, tuple[int, int]], total: int) -> None:
        """Compute the tensor's crc if its parts are contiguous. Otherwise they overlap, and are dropped."""
        at = crc = 0
        for end, (start, part) in sorted(parts.items(), key=lambda entry: entry[1][0]):
            if start != at:
                break
            at, crc = end, combine(crc, part, end - start)
        if at == total:
            self._whole[name] = crc
        self._parts.pop(name, None)

    def of(self, name: str, read: Callable[[], Iterator[Tensor]]) -> int:
        """The tensor's crc. read: reads all of it in order, if not all of it was added."""
        if name not in self._whole:
            crc = 0
            for values in read():
                crc = zlib.crc32(_bytes(values), crc)
            self._whole[name] = crc
        return self._whole[name]


_POLYNOMIAL = 0xEDB88320  # of crc32, bits reversed: the lowest bit is the highest power
_ONE = 1 << 31


def combine(first: int, second: int, nbytes: int) -> int:
    """crc32 of two concatenated byte strings, from their crcs and the second's length (like zlib's crc32_combine)."""
    return _times(_power(8 * nbytes), first) ^ second


def _times(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), modulo crc32's."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@functools.lru_cache(maxsize=256)
def _power(bits: int) -> int:
    """x ** bits."""
    power, square = _ONE, _ONE >> 1
    while bits:
        power = _times(power, square) if bits & 1 else power
        square, bits = _times(square, square), bits >> 1
    return power


def _bytes(flat: Tensor) -> memoryview | bytes:
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
