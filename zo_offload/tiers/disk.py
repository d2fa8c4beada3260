"""Blocks on disk, one file each (see block_file.py), read and written by worker threads through the page cache.

Write-ahead rule: bytes that contain step t reach a file only after `Origin.before_write(t + 1)` has returned, which
waits for the journal. `flush` is the one place in the package that writes such bytes, for a run on disk and for the
snapshots of a run in memory alike, and it calls this first.

A block is always readable: if the newest generation is damaged (its checksum is verified at every fetch, and for lent
bytes as in `lending.py`), the older one is used, and the caller brings it up to date by replay; if both are damaged,
`rebuild` makes the block at version 0.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import BudgetError, CheckpointError, StorageError
from ..system import diskio
from ..system.units import show_bytes
from . import block_file
from .block_file import DATA, PAGE, WHOLE, FileShape, Foreign, Header, Spans
from .lending import SCRUB_EVERY, FileLender, Lent

log = logging.getLogger(__name__)

SHAPES = "shapes.json"  # next to the block files, written last: their sizes and trained ranges
_THEN = "The journal and the block's other generation hold the run."


@dataclass
class _Block:
    """This process's view of one file. headers: of the two generations, None = not whole or damaged."""

    shape: FileShape
    path: Path
    fd: int
    lender: FileLender
    headers: list[Header | None] = field(default_factory=lambda: [None, None])
    durable: int = -1
    """The generation known to be on the medium, never written to while it is the only one; -1: unknown."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while the file is written or synced."""

    @property
    def active(self) -> int:
        """The generation to read: the newest whole one; -1 if there is none."""
        return max((g for g in (0, 1) if self.headers[g]), key=lambda g: self.headers[g].version, default=-1)  # type: ignore[union-attr]


def shapes_of(
    block_bytes: Sequence[int], spans: Sequence[Spans], streamed: Sequence[int] | None = None
) -> tuple[FileShape, ...]:
    """Shapes of all block files. streamed: bytes of the prefix that is fetched alone; default the whole block."""
    prefix = block_bytes if streamed is None else streamed
    return tuple(FileShape(i, n, prefix[i], tuple(spans[i])) for i, n in enumerate(block_bytes))


def load_shapes(directory: Path) -> tuple[FileShape, ...]:
    """The shapes that a folder of block files was made with, for tools that have no model. CheckpointError."""
    path = directory / SHAPES
    try:
        found = [
            FileShape(i, nbytes, streamed, tuple((offset, length) for offset, length in spans))
            for i, (nbytes, streamed, spans) in enumerate(json.loads(diskio.read_file(path)))
        ]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}); a resume does not need it") from None
    for shape in found:
        numbers = [shape.nbytes, shape.streamed, *(n for span in shape.spans for n in span)]
        at = 0
        sound = all(type(n) is int and 0 <= n < 1 << 48 for n in numbers) and shape.streamed <= shape.nbytes
        for offset, length in shape.spans if sound else ():
            sound, at = sound and offset >= at and length > 0, offset + length
        if not sound or at > shape.nbytes:
            raise CheckpointError(f"{path}: the shape of block {shape.index} makes no sense: {shape}")
    return tuple(found)


def _save_shapes(directory: Path, shapes: Sequence[FileShape]) -> None:
    text = json.dumps([[shape.nbytes, shape.streamed, shape.spans] for shape in shapes])
    diskio.replace_file(directory / SHAPES, text.encode())


class Origin(Protocol):
    """The run that block files belong to: its journal, which must be on the disk first, and its base."""

    @property
    def rebuilds(self) -> bool:
        """Whether `rebuild` can be called."""

    def before_write(self, version: int) -> None:
        """Return once the journal's first `version` steps are durable; see the module."""

    def history(self, version: int) -> int:
        """`Journal.history`: binds a block to its steps and its base. 0: not known yet."""

    def rebuild(self, block: int, out: Tensor) -> None:
        """Fill `out` with a block's bytes at version 0, from the base."""


class DiskTier:
    """Blocks in `directory`; `create` writes new files, `open` reads an earlier run's.

    origin: the run of the blocks; without it (for tools that read or mark files) no block can be written.
    """

    in_memory = False

    def __init__(self, directory: Path, blocks: list[_Block], origin: Origin | None, scrub_every: int) -> None:
        self.directory, self._origin = directory, origin
        self._blocks, self._scrub_every = blocks, scrub_every

    @classmethod
    def create(
        cls, directory: Path, shapes: Sequence[FileShape], origin: Origin, *, scrub_every: int = SCRUB_EVERY
    ) -> DiskTier:
        """New block files, empty until they are first written; their space is reserved at once.

        Files with the same names are overwritten: call it only for a run whose journal needs none of them. Raises
        BudgetError if there is too little space.
        """
        diskio.allow_open_files(len(shapes), "block files")
        directory.mkdir(parents=True, exist_ok=True)
        need = sum(shape.file_bytes for shape in shapes)
        there = sum(f.stat().st_size for f in directory.glob("*.zob"))
        free = shutil.disk_usage(directory).free + there
        if need > free:
            raise BudgetError(
                f"{directory}: two generations of the trained blocks need {show_bytes(need)}, but {show_bytes(free)} "
                "is free. Choose another run_dir, or a smaller storage format"
            )
        blocks: list[_Block] = []
        try:
            for shape in shapes:
                path = _path(directory, shape.index)
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
                blocks.append(_Block(shape, path, fd, FileLender(fd, shape)))
                _reserve(fd, shape.file_bytes)
        except OSError as error:
            for block in blocks:
                os.close(block.fd)
            raise diskio.storage_error(error, "making", directory, then="Nothing was trained yet.") from error
        diskio.sync_directory(directory)
        _save_shapes(directory, shapes)
        return cls(directory, blocks, origin, scrub_every)

    @classmethod
    def open(
        cls,
        directory: Path,
        shapes: Sequence[FileShape],
        origin: Origin | None = None,
        *,
        write: bool = True,
        scrub_every: int = SCRUB_EVERY,
    ) -> DiskTier:
        """The files of an earlier run, each checked against its shape. A block may have no whole generation."""
        diskio.allow_open_files(len(shapes), "block files")
        blocks = []
        for shape in shapes:
            path = _path(directory, shape.index)
            try:
                fd = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                raise CheckpointError(
                    f"{path}: block {shape.index} of {len(shapes)} is missing; restore it, or remove the whole folder "
                    f"{directory} to rebuild all blocks from the base"
                ) from None
            except OSError as error:
                raise diskio.storage_error(error, "opening", path, then="The run is as it was.") from error
            block = _Block(shape, path, fd, FileLender(fd, shape))
            blocks.append(block)
            size = os.fstat(fd).st_size
            if size != shape.file_bytes:
                raise CheckpointError(
                    f"{path}: {size} bytes, the plan expects {shape.file_bytes}: the file was cut, or the run was made "
                    f"with another model or storage format. Restore it, or remove the whole folder {directory} to "
                    "rebuild all blocks from the base"
                )
            block.headers = [_header(block, g) for g in (0, 1)]
        return cls(directory, blocks, origin, scrub_every)

    @staticmethod
    def is_unfinished(directory: Path, shapes: Sequence[FileShape]) -> bool:
        """Whether `create` was interrupted in `directory`: its last file is missing; all files are empty."""
        sizes = {shape.index: shape.file_bytes for shape in shapes}
        there = {i for i, n in sizes.items() if (p := _path(directory, i)).is_file() and p.stat().st_size == n}
        return not (directory / SHAPES).exists() and there != sizes.keys()

    @property
    def shapes(self) -> tuple[FileShape, ...]:
        return tuple(block.shape for block in self._blocks)

    def headers(self, block: int) -> tuple[tuple[int, Header], ...]:
        """(generation, header) of the whole generations of a block, newest first."""
        found = [(g, h) for g, h in enumerate(self._blocks[block].headers) if h is not None]
        return tuple(sorted(found, key=lambda entry: -entry[1].version))

    def bind(self, history: int) -> None:
        """Write `history` into the blocks that were filled from the base before its digest was known. StorageError."""
        for entry in self._blocks:
            for generation, header in enumerate(entry.headers):
                if header is not None and header.version == 0 and header.history == 0:
                    bound = replace(header, history=history)
                    try:
                        block_file.write_header(entry.fd, entry.shape, generation, bound)
                    except OSError as error:
                        raise diskio.storage_error(
                            error, "writing", entry.path, then="Nothing was trained yet."
                        ) from error
                    entry.headers[generation] = bound

    def forget(self, block: int, generation: int) -> None:
        """Mark a generation as not whole: it belongs to steps that the journal no longer has."""
        entry = self._blocks[block]
        block_file.mark(entry.fd, entry.shape, generation)
        diskio.sync(entry.fd)
        entry.headers[generation] = None

    @property
    def torn(self) -> set[int]:
        """Blocks without a whole generation: they have to be rebuilt before they may be fetched."""
        return {i for i, block in enumerate(self._blocks) if block.active < 0}

    def fetch(self, block: int, out: Tensor, start: int = 0) -> None:
        """Read bytes [start, start + len(out)) of the block, checked. See the module about damage."""
        entry = self._blocks[block]
        while (active := entry.active) >= 0:
            header = entry.headers[active]
            assert header is not None
            try:
                sound = block_file.read(entry.fd, entry.shape, active, header, out, start)
            except OSError as error:
                raise diskio.storage_error(error, "reading", entry.path, then=_THEN) from error
            if sound:
                entry.lender.was_read(active, start, start + out.numel())
                return
            log.warning("%s: generation %d (step %d) is damaged", entry.path, active, header.version)
            entry.headers[active] = None
            if start > 0:  # the caller has this generation's first part: another generation's rest would not fit
                self.forget(block, active)
                raise CheckpointError(
                    f"{entry.path}: the second part of block {block} at step {header.version} is damaged. Resume the "
                    "run: it goes on from the block's other generation, or its base"
                )
        if self._origin is None or not self._origin.rebuilds:
            raise CheckpointError(
                f"{entry.path}: block {block} is damaged (both generations fail their checksums, or its frozen bytes "
                "do). Resume the run with its base checkpoint: the block is rebuilt from it and the journal"
            )
        log.warning("%s: rebuilding block %d from the base", entry.path, block)
        whole = (
            out
            if out.numel() == entry.shape.nbytes
            else torch.empty(entry.shape.nbytes, dtype=torch.uint8, device="cpu")
        )
        self._origin.rebuild(block, whole)
        self.flush(block, whole, ((0, entry.shape.nbytes),), 0)
        if whole is not out:
            out.copy_(whole[start : start + out.numel()])

    def lend(self, block: int, nbytes: int) -> Lent | None:
        """The first `nbytes` of the block in the page cache, checked as in `lending.py`; None: fetch them."""
        entry = self._blocks[block]
        active = entry.active
        header = entry.headers[active] if active >= 0 else None
        return None if header is None else entry.lender.lend(active, header, nbytes, self._scrub_every)

    def verify(self, block: int, buffer: Tensor) -> dict[int, bool]:
        """generation -> whether its bytes are sound, for generations marked whole. buffer: a block's size or more."""
        entry, out = self._blocks[block], buffer[: self._blocks[block].shape.nbytes]
        return {
            g: block_file.read(entry.fd, entry.shape, g, header, out, 0)
            for g, header in enumerate(entry.headers)
            if header is not None
        }

    def flush(self, block: int, data: Tensor, spans: Spans, version: int) -> None:
        """Write the block's spans, or the whole block if `spans` covers it, into the generation that is not durable."""
        entry = self._blocks[block]
        whole = tuple(spans) == ((0, entry.shape.nbytes),)
        assert whole or tuple(spans) == entry.shape.spans, f"block {block}: spans {spans}, made for {entry.shape.spans}"
        assert self._origin is not None, f"{entry.path}: opened without the run that it belongs to"
        self._origin.before_write(version)
        with entry.lock:
            try:
                self._write(entry, data, version, whole)
            except OSError as error:
                if isinstance(error, StorageError):
                    raise
                raise diskio.storage_error(error, "writing", entry.path, then=_THEN) from error

    def _write(self, entry: _Block, data: Tensor, version: int, whole: bool) -> None:
        active = entry.active
        if active >= 0 and entry.durable != active and (entry.durable < 0 or not entry.headers[entry.durable]):
            self._sync(entry)  # what is overwritten next must not be the only copy
        target = 1 - entry.durable if entry.durable >= 0 and entry.shape.spans else 0
        old = entry.headers[target] or entry.headers[1 - target]
        assert whole or old is not None, f"{entry.path}: the first write of a block is a whole one"
        assert self._origin is not None
        entry.headers[target] = None
        entry.headers[target] = block_file.write(
            entry.fd, entry.shape, target, old, data, version, self._origin.history(version), whole
        )
        entry.lender.was_written(target, whole)

    def seal(self, block: int, *, drop: bool = False) -> None:
        """Bring what was flushed to the medium; the next flush goes to the other area. Cheap if nothing was.

        drop: give the file's pages in the system's cache back; nothing will read them soon.
        """
        entry = self._blocks[block]
        with entry.lock:
            if entry.active >= 0 and entry.durable != entry.active:
                try:
                    self._sync(entry)
                except OSError as error:
                    raise diskio.storage_error(error, "syncing", entry.path, then=_THEN) from error
                if drop and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(entry.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _sync(self, entry: _Block) -> None:
        if diskio.is_gone(entry.fd):
            raise FileNotFoundError(errno.ENOENT, "deleted while the run used it")
        active = entry.active
        try:
            diskio.sync(entry.fd)
        except OSError:
            entry.headers[active] = None  # the system may have dropped its pages; the durable one was not touched
            raise
        entry.durable = active

    def version(self, block: int) -> int:
        entry = self._blocks[block]
        header = entry.headers[entry.active] if entry.active >= 0 else None
        return header.version if header is not None else 0

    def view(self, block: int) -> Tensor | None:
        return None

    def close(self) -> None:
        """Safe to call twice."""
        while self._blocks:
            entry = self._blocks.pop()
            entry.lender.close()
            os.close(entry.fd)

    def __del__(self) -> None:
        if hasattr(self, "_blocks"):  # of a run whose beginning failed
            DiskTier.close(self)


def _path(directory: Path, block: int) -> Path:
    return directory / f"{block:05d}.zob"


def _reserve(fd: int, nbytes: int) -> None:
    """Give the file its blocks now, so that a flush in mid-run cannot meet a full disk."""
    os.truncate(fd, nbytes)
    with contextlib.suppress(AttributeError):  # not on every system
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def _header(block: _Block, generation: int) -> Header | None:
    buffer = bytearray(PAGE)
    diskio.read_at(block.fd, memoryview(buffer), generation * PAGE)
    found = block_file.parse(bytes(buffer), block.shape)
    if isinstance(found, Foreign):
        raise CheckpointError(
            f"{block.path}: holds block {found.index} of {found.nbytes} bytes ({found.trained} trained); the plan "
            f"expects block {block.shape.index} of {block.shape.nbytes} ({block.shape.trained} trained). The run was "
            "made with another model, storage format or plan"
        )
    return found if found is not None and found.state == WHOLE else None


__all__ = ["DATA", "DiskTier", "FileShape", "shapes_of"]
