"""One block in one file, in two generations: a crash at any moment leaves a whole one.

File, little-endian
    0      4096    header of generation 0
    4096   4096    header of generation 1
    8192   nbytes  the block; its trained ranges ("spans") are those of generation 0
    then, from the next multiple of 4096: the spans of generation 1, one after another without gaps

    Bytes that training never writes are stored once. A block that is not trained has no second area.

Header (the rest of its 4096 bytes is zero)
    0      4s      b"ZOB3"
    4      u32     block index
    8      u32     state: 0 = empty or being written, 1 = whole
    12     u32     0
    16     u64     version: steps folded in
    24     u64     nbytes of the block
    32     u64     bytes of its streamed part, a prefix (see layout.py); nbytes if it is not split
    40     u64     bytes of its spans
    48     4 u64   checksums (checksum.py, offsets from the begin of the block): trained bytes of the streamed part,
                   frozen bytes of it, trained bytes of the rest, frozen bytes of it
    80     u64     history of those bytes (Journal.history(version), which begins with the base's digest);
                   0 if it is not known yet, while a run starts: such bytes must not be trusted later
    88     u32     crc32 of bytes 0..88

    A header of the earlier format is read too: b"ZOB2", at 12 the journal's checksum after `version` steps ("chain",
    0 for the base), at 80 the crc32 of bytes 0..80. It is never written any more.

Order of writes. One generation at most is *durable*: known to be on the medium. Flushes go to the other one, in place,
any number of times: state 0, the spans, then the header with state 1 and the checksums. `seal` syncs the file; only
after that does the fresh generation become the durable one, and the next flush goes to the other area. So
    - a killed process leaves the durable generation unchanged, and at most one generation half written, marked so;
    - a power cut may lose or reorder any writes since the last seal; what they touched fails its header's crc, its
      state or its checksum, and the durable generation was not touched.
Assumptions: fdatasync returns when data is durable on the medium; a write does not damage bytes outside its range.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from torch import Tensor

from ..system import diskio
from . import summed_io
from .checksum import checksum

Spans = tuple[tuple[int, int], ...]

PAGE = 4096
DATA = 2 * PAGE
WRITING, WHOLE = 0, 1
_HEAD = struct.Struct("<4sIIIQQQQ4QQ")
_OLD_HEAD = struct.Struct("<4sIIIQQQQ4Q")
MAGIC, OLD_MAGIC = b"ZOB3", b"ZOB2"
HEADER_BYTES = _HEAD.size + 4


@dataclass(frozen=True)
class FileShape:
    """The shape of a block file for this plan. spans: trained ranges, ascending, disjoint."""

    index: int
    nbytes: int
    streamed: int
    spans: Spans

    @property
    def trained(self) -> int:
        return sum(length for _, length in self.spans)

    @property
    def second(self) -> int:
        """The file offset of generation 1's spans."""
        return DATA + -(-self.nbytes // PAGE) * PAGE

    @property
    def file_bytes(self) -> int:
        return self.second + self.trained if self.spans else DATA + self.nbytes

    @property
    def frozen(self) -> Spans:
        """The ranges between the spans."""
        gaps, at = [], 0
        for offset, length in (*self.spans, (self.nbytes, 0)):
            if offset > at:
                gaps.append((at, offset - at))
            at = offset + length
        return tuple(gaps)


@dataclass(frozen=True)
class Extent:
    """Bytes [offset, offset + nbytes) of a block, at file offset `at`, counted in checksum number `sum`."""

    offset: int
    nbytes: int
    at: int
    sum: int


@lru_cache(maxsize=4096)
def extents(shape: FileShape, generation: int) -> tuple[tuple[Extent, ...], tuple[Extent, ...]]:
    """(trained, frozen) pieces of a block as this generation stores them, cut where the streamed part ends."""
    trained, packed = [], shape.second
    for offset, length in shape.spans:
        trained += _cut(shape.streamed, offset, length, DATA + offset if generation == 0 else packed, 0)
        packed += length
    frozen = [e for offset, length in shape.frozen for e in _cut(shape.streamed, offset, length, DATA + offset, 1)]
    return tuple(trained), tuple(frozen)


def _cut(streamed: int, offset: int, length: int, at: int, kind: int) -> list[Extent]:
    here = max(0, min(length, streamed - offset))
    both = [Extent(offset, here, at, kind), Extent(offset + here, length - here, at + here, kind + 2)]
    return [extent for extent in both if extent.nbytes]


@dataclass(frozen=True)
class Header:
    """A generation's header; see the module. chain: of a file of the earlier format, whose history is None."""

    state: int
    version: int
    sums: tuple[int, int, int, int]
    history: int | None = 0
    chain: int = 0

    def pack(self, shape: FileShape) -> bytes:
        body = _HEAD.pack(
            MAGIC, shape.index, self.state, 0, self.version, shape.nbytes, shape.streamed, shape.trained, *self.sums,
            self.history or 0,
        )  # fmt: skip
        return body + struct.pack("<I", zlib.crc32(body))

    def is_of(self, chain: Callable[[int], int], history: Callable[[int], int]) -> bool:
        """Whether these bytes belong to the journal with these checksums (chain) and histories by number of steps. In
        the earlier format the base's bytes cannot be checked."""
        if self.history is None:
            return self.version == 0 or self.chain == chain(self.version)
        return self.history == history(self.version)


@dataclass(frozen=True)
class Foreign:
    """A sound header for another block, size or plan."""

    index: int
    nbytes: int
    trained: int


def parse(data: bytes, shape: FileShape) -> Header | Foreign | None:
    """A generation's header; None if it was never whole or is damaged (a reader uses the other generation)."""
    layout = _OLD_HEAD if data[:4] == OLD_MAGIC else _HEAD
    size = layout.size
    if len(data) < size + 4 or struct.unpack_from("<I", data, size)[0] != zlib.crc32(data[:size]):
        return None
    magic, index, state, chain, version, nbytes, streamed, trained, *rest = layout.unpack_from(data)
    if magic not in (MAGIC, OLD_MAGIC):
        return None
    if (index, nbytes, streamed, trained) != (shape.index, shape.nbytes, shape.streamed, shape.trained):
        return Foreign(index, nbytes, trained)
    sums = cast(tuple[int, int, int, int], tuple(rest[:4]))
    return Header(state, version, sums, rest[4] if magic == MAGIC else None, chain)


def read(fd: int, shape: FileShape, generation: int, header: Header, out: Tensor, start: int) -> bool:
    """Fill `out` with bytes [start, start + len(out)) of the block; False if the file ends early or a checksum fails.

    The parts (streamed, rest) that are entirely in the range are checked while they are read.
    """
    stop = start + out.numel()
    sums = [0, 0, 0, 0]
    for group in extents(shape, generation):
        for extent in group:
            begin, end = max(start, extent.offset), min(stop, extent.offset + extent.nbytes)
            if begin >= end:
                continue
            part = out[begin - start : end - start]
            found = summed_io.read_summed(fd, part, extent.at + begin - extent.offset, begin)
            if found is None:
                return False
            sums[extent.sum] += found  # not checked if the extent was not read whole
    covered = [0, 1] * (start == 0 and stop >= shape.streamed)
    covered += [2, 3] * (start <= shape.streamed and stop == shape.nbytes)
    return all(sums[i] & 0xFFFFFFFFFFFFFFFF == header.sums[i] for i in covered)


def lies_at(shape: FileShape, generation: int, nbytes: int) -> int | None:
    """The file offset at which the block's first `nbytes` are contiguous; None if they are in several places."""
    if generation == 0 or not shape.spans:
        return DATA
    offset, length = shape.spans[0]
    return shape.second if offset == 0 and length >= nbytes else None


def is_sound(file: Tensor, shape: FileShape, generation: int, header: Header, parts: Iterable[int]) -> bool:
    """Whether a generation's parts (0: streamed, 1: the rest) in the mapped file match their checksums."""
    sums = [0, 0, 0, 0]
    wanted = [i for part in parts for i in (2 * part, 2 * part + 1)]
    for group in extents(shape, generation):
        for extent in group:
            if extent.sum in wanted:
                sums[extent.sum] += checksum(file[extent.at : extent.at + extent.nbytes], extent.offset)
    return all(sums[i] & 0xFFFFFFFFFFFFFFFF == header.sums[i] for i in wanted)


def write(
    fd: int,
    shape: FileShape,
    generation: int,
    old: Header | None,
    data: Tensor,
    version: int,
    history: int,
    whole: bool,
) -> Header:
    """Write a generation's spans (whole: the frozen bytes too) and then its header, which is returned.

    old: the header that the file may hold for this generation, or the other generation's, for its frozen sums.
    """
    sums = [0, old.sums[1], 0, old.sums[3]] if old is not None and not whole else [0, 0, 0, 0]
    mark(fd, shape, generation)
    trained, frozen = extents(shape, generation)
    for extent in (*trained, *(frozen if whole else ())):
        bytes_of = data[extent.offset : extent.offset + extent.nbytes]
        sums[extent.sum] += summed_io.write_summed(fd, bytes_of, extent.at, extent.offset)
    total = cast(tuple[int, int, int, int], tuple(s & 0xFFFFFFFFFFFFFFFF for s in sums))
    return write_header(fd, shape, generation, Header(WHOLE, version, total, history))


def write_header(fd: int, shape: FileShape, generation: int, header: Header) -> Header:
    """Write a generation's header alone; returns it."""
    diskio.write_at(fd, header.pack(shape), generation * PAGE)
    return header


def mark(fd: int, shape: FileShape, generation: int) -> None:
    """Mark a generation as not whole."""
    diskio.write_at(fd, EMPTY.pack(shape), generation * PAGE)


EMPTY = Header(WRITING, 0, (0, 0, 0, 0))
