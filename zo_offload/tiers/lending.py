"""Blocks on disk as they lie in the system's page cache: lent as a view of their file, and nothing is copied.

A file is mapped once, privately: what would write to a view by mistake writes to pages of its own, never to the file. A
view is lent only of bytes that all lie in the page cache; what has to come from the medium is read, and checked, as
ever. While a view is out its pages count as this process's, so they are given back by name once the visit is over.

Checksums of views. A generation whose bytes this process has written, or has read and summed, is summed again at every
`scrub_every`-th lending, and at the first one after it was opened or after the system let some of its pages go. What
folds go into is not lent: it is read and summed first. So damage done behind our back to bytes that stay in memory is
seen after at most that many visits, has changed losses at most, and is never folded into a generation with a good sum.

A file that somebody cuts, or a medium that fails to read, while a view is out ends the process (SIGBUS), as a power
cut would. `scrub_every=1` lends nothing: every fetch is a checked copy.

The native library does this (csrc/cpu_io.cpp); without it nothing is lent.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import native
from . import block_file, checksum
from .block_file import FileShape, Header

SCRUB_EVERY = 16
"""For block files without settings; `EngineConfig.scrub_every` is the same."""
NEVER = 1 << 62
AROUND = 1 << 16  # bytes: a fault on a page that is cached maps those around it too, by default on Linux


@dataclass(frozen=True)
class Lent:
    """Bytes where they lie, until they are given back; not to be written to."""

    memory: Tensor
    give_back: Callable[[], None]


class Fetched:
    """A tier whose blocks are copied, always."""

    def lend(self, block: int, nbytes: int) -> Lent | None:
        return None


class FileLender:
    """Lends the blocks of one file, and knows when their bytes were summed last.

    `age[generation][part]`: lendings of the streamed part (0) and of the rest (1) since then, or `NEVER`.
    """

    def __init__(self, fd: int, shape: FileShape) -> None:
        self._fd, self._shape = fd, shape
        self._file: Tensor | None = None
        self.age = [[NEVER, NEVER], [NEVER, NEVER]]

    def was_read(self, generation: int, start: int, stop: int) -> None:
        """Bytes [start, stop) of the block were summed, and are sound."""
        for part in self._parts(start, stop):
            self.age[generation][part] = 0

    def was_written(self, generation: int, whole: bool) -> None:
        """The trained bytes of a generation were written and summed on the way, or all; the frozen ones are as old as
        the last sum of either generation."""
        for part in (0, 1):
            self.age[generation][part] = 0 if whole else min(age[part] for age in self.age)

    def was_lost(self, generation: int) -> None:
        """Nothing is known of a generation's bytes any more."""
        self.age[generation] = [NEVER, NEVER]

    def lend(self, generation: int, header: Header, nbytes: int, scrub_every: int) -> Lent | None:
        """The first `nbytes` of the block; None where they are to be read."""
        pages, at = _native(), block_file.lies_at(self._shape, generation, nbytes)
        if pages is None or at is None or scrub_every == 1 or os.fstat(self._fd).st_size != self._shape.file_bytes:
            return None
        view = self._mapped()[at : at + nbytes]
        if not nbytes or not pages.are_cached(view.data_ptr(), nbytes):
            self.was_lost(generation)
            return None
        age, parts = self.age[generation], self._parts(0, max(nbytes, self._shape.streamed))
        due = [part for part in parts if age[part] + 1 >= scrub_every]
        if due and not block_file.is_sound(self._mapped(), self._shape, generation, header, due):
            pages.let_go(self._mapped().data_ptr(), self._shape.file_bytes)
            self.was_lost(generation)
            return None  # it is read then, which names the damage
        for part in parts:
            age[part] = 0 if part in due else age[part] + 1
        pages.bring(view.data_ptr(), nbytes)
        return Lent(view, functools.partial(_let_go, self._mapped(), view))

    def close(self) -> None:
        """The mapping goes with the last view."""
        self._file = None

    def _parts(self, start: int, stop: int) -> list[int]:
        """The parts of the block that lie whole in the range; of the rest, its padding at the end may lack."""
        streamed, nbytes = self._shape.streamed, self._shape.nbytes
        return [0] * (start == 0 and stop >= streamed) + [1] * (start <= streamed < nbytes and stop > streamed)

    def _mapped(self) -> Tensor:
        if self._file is None:
            size, protect = self._shape.file_bytes, mmap.PROT_READ | mmap.PROT_WRITE
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
            self._file = torch.frombuffer(mmap.mmap(self._fd, size, flags=flags, prot=protect), dtype=torch.uint8)
        return self._file


def _let_go(file: Tensor, view: Tensor) -> None:
    """The view's pages, and those around it that its faults have mapped."""
    pages, first, end = _native(), file.data_ptr(), file.data_ptr() + file.numel()
    low = max(first, view.data_ptr() // AROUND * AROUND)
    high = min(end, -(-(view.data_ptr() + view.numel()) // AROUND) * AROUND)
    assert pages is not None, "it was lent"
    pages.let_go(low, high - low)


@dataclass(frozen=True)
class _Pages:
    """Of addresses in a mapping, (address, nbytes) each: whether all lie in the page cache, bring them into this
    process's page tables, take them out."""

    are_cached: Callable[[int, int], int]
    bring: Callable[[int, int], None]
    let_go: Callable[[int, int], None]


@functools.cache
def _native() -> _Pages | None:
    library = native.library()
    if library is None or not checksum.is_native():
        return None
    loaded = ctypes.CDLL(str(library.path))
    try:
        found = [loaded.zo_cpu_pages_cached, loaded.zo_cpu_pages_bring, loaded.zo_cpu_pages_let_go]
    except AttributeError:
        return None  # a library built before they were there
    for function in found:
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_uint64], ctypes.c_int
    return _Pages(*found)
