"""Blocks on disk, one file each, read and written by worker threads through the page cache.

File `NNNNN.zob`, little-endian
    0     magic  b"ZOB1"
    4     u32    state: 0 = whole, 1 = being written
    8     u64    version: steps folded in (state 0), or about to be (state 1)
    16    u64    nbytes of block data
    24    u32    block index
    28    u32    crc32 of bytes 0..28
    4096  block data

The header says "being written" before the first data byte changes and "whole" after the last. A process that dies in
between leaves a block that names itself torn; it is rebuilt from the base checkpoint by replay. (A power cut can
reorder writes that the system had not yet put on disk; that is not covered by this header.)
"""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ..config import show_bytes
from ..errors import BudgetError, CheckpointError

HEADER_BYTES = 4096
_HEAD = struct.Struct("<4sIQQI")
_MAX_IO = 1 << 30  # one call never moves more than 2 GiB on Linux; loop well below that
WHOLE, TORN = 0, 1


class DiskTier:
    """Blocks in `directory`; `create` writes new files, `open` reads an earlier run's."""

    def __init__(self, directory: Path, block_bytes: Sequence[int], versions: list[int], torn: set[int]) -> None:
        self.directory = directory
        self._block_bytes = list(block_bytes)
        self._versions = versions
        self.torn = torn  # blocks that must be rewritten whole before they may be fetched
        self._fds = [os.open(_path(directory, b), os.O_RDWR) for b in range(len(block_bytes))]

    @classmethod
    def create(cls, directory: Path, block_bytes: Sequence[int]) -> DiskTier:
        """New block files at version 0, marked torn until they are first written. Checks the free space first."""
        directory.mkdir(parents=True, exist_ok=True)
        need = sum(block_bytes) + HEADER_BYTES * len(block_bytes)
        free = shutil.disk_usage(directory).free
        if need > free:
            raise BudgetError(
                f"offload='disk' needs {show_bytes(need)} in {directory}, but {show_bytes(free)} is free. "
                "Choose another run_dir, or a smaller storage format"
            )
        for block, nbytes in enumerate(block_bytes):
            fd = os.open(_path(directory, block), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                os.pwrite(fd, _header(block, nbytes, TORN, 0), 0)
                os.truncate(fd, HEADER_BYTES + nbytes)
            finally:
                os.close(fd)
        return cls(directory, block_bytes, [0] * len(block_bytes), set(range(len(block_bytes))))

    @classmethod
    def open(cls, directory: Path, block_bytes: Sequence[int]) -> DiskTier:
        """The files of an earlier run, each checked against the layout. Torn blocks are listed, not refused."""
        versions, torn = [], set()
        for block, nbytes in enumerate(block_bytes):
            path = _path(directory, block)
            try:
                with open(path, "rb") as file:
                    head = file.read(32)
                    size = os.fstat(file.fileno()).st_size
            except FileNotFoundError:
                raise CheckpointError(f"{path}: block {block} of {len(block_bytes)} is missing") from None
            version, state = _parse(path, head, block, nbytes, size)
            versions.append(version)
            if state != WHOLE:
                torn.add(block)
        return cls(directory, block_bytes, versions, torn)

    def fetch(self, block: int, out: Tensor) -> None:
        assert block not in self.torn, f"block {block} was never written whole"
        view, done = memoryview(cast(Any, out.numpy())), 0
        while done < len(view):
            n = os.preadv(self._fds[block], [view[done : done + _MAX_IO]], HEADER_BYTES + done)
            if n == 0:
                raise CheckpointError(
                    f"{_path(self.directory, block)}: ends after {HEADER_BYTES + done} bytes, "
                    f"expected {HEADER_BYTES + len(view)}: the file was cut while the run used it"
                )
            done += n

    def flush(self, block: int, data: Tensor, spans: tuple[tuple[int, int], ...], version: int) -> None:
        fd, nbytes = self._fds[block], self._block_bytes[block]
        os.pwrite(fd, _header(block, nbytes, TORN, version), 0)
        self.torn.add(block)
        view = memoryview(cast(Any, data.numpy()))
        for offset, length in spans:
            done = 0
            while done < length:
                chunk = view[offset + done : offset + min(length, done + _MAX_IO)]
                done += os.pwritev(fd, [chunk], HEADER_BYTES + offset + done)
        os.pwrite(fd, _header(block, nbytes, WHOLE, version), 0)
        self.torn.discard(block)
        self._versions[block] = version

    def version(self, block: int) -> int:
        return self._versions[block]

    def view(self, block: int) -> Tensor | None:
        return None

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def _path(directory: Path, block: int) -> Path:
    return directory / f"{block:05d}.zob"


def _header(block: int, nbytes: int, state: int, version: int) -> bytes:
    head = _HEAD.pack(b"ZOB1", state, version, nbytes, block)
    return head + struct.pack("<I", zlib.crc32(head))


def _parse(path: Path, head: bytes, block: int, nbytes: int, size: int) -> tuple[int, int]:
    if len(head) < 32 or head[:4] != b"ZOB1":
        raise CheckpointError(f"{path}: not a block file (starts with {head[:4]!r}, expected b'ZOB1')")
    _magic, state, version, found, index = _HEAD.unpack_from(head)
    if struct.unpack_from("<I", head, 28)[0] != zlib.crc32(head[:28]):
        raise CheckpointError(f"{path}: the header fails its checksum; delete the run and start it again from its base")
    if (index, found, size) != (block, nbytes, HEADER_BYTES + nbytes):
        raise CheckpointError(
            f"{path}: holds block {index} of {found} bytes in a file of {size}; the plan expects block {block} "
            f"of {nbytes} bytes. The run was made with another model, storage format or plan"
        )
    return version, state
