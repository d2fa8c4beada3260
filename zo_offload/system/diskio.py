"""Reads, writes and syncs of a run's files: complete, or an error that names the file, the reason and the remedy.

All durable writes of a run go through these few functions, so tests can record the order of all writes and syncs, and
simulate a power cut at any point between them.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat
from pathlib import Path

from ..errors import BudgetError, StorageError
from .units import show_bytes

SPARE_FILES = 64  # descriptors left for the rest of the process
MAX_IO = 1 << 30  # Linux moves at most 0x7ffff000 bytes a call


def allow_open_files(count: int, what: str) -> None:
    """Let this process hold `count` more files open: raises its soft limit (often 1024) if the hard limit allows.

    Raises BudgetError, with both numbers, if it does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = len(os.listdir("/proc/self/fd")) + count + SPARE_FILES
    if soft == resource.RLIM_INFINITY or need <= soft:
        return
    if hard != resource.RLIM_INFINITY and need > hard:
        raise BudgetError(
            f"{count} {what} are held open together, but this process may open only {hard} files. Raise that limit "
            "(ulimit -Hn), or give a larger block_numel, so that there are fewer"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


def write_at(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of data at this offset."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwritev(fd, [view[done : done + MAX_IO]], offset + done)


def append(fd: int, data: bytes) -> None:
    """Append all of data to a file that was opened with O_APPEND."""
    done = 0
    while done < len(data):
        done += os.write(fd, data[done:])


def read_at(fd: int, out: memoryview, offset: int) -> int:
    """Fill `out` from this offset; returns the bytes read, fewer only at the end of the file."""
    done = 0
    while done < len(out):
        n = os.preadv(fd, [out[done : done + MAX_IO]], offset + done)
        if n == 0:
            break
        done += n
    return done


def read_file(path: Path, limit: int = -1) -> bytes:
    """All of a regular file, or its first `limit` bytes. OSError for anything else: a pipe could block."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "is a directory", str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "is a pipe, socket or device, not a file", str(path))
        return file.read(limit)


def sync(fd: int) -> None:
    """Return once the file's writes are on the medium. An error is final: the system may have dropped the pages."""
    os.fdatasync(fd)


def cut(fd: int, nbytes: int) -> None:
    """Shorten the file."""
    os.ftruncate(fd, nbytes)


def sync_directory(path: Path) -> None:
    """Return once the directory's entries (new files, renames) are on the medium."""
    sync_path(path, os.O_DIRECTORY)


def sync_path(path: Path, flags: int = 0) -> None:
    """Return once the file or directory at `path` is on the medium."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes) -> None:
    """Replace `path` atomically: write a temporary file, sync it, rename it, sync the rename."""
    beside = path.with_name(path.name + ".new")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        append(fd, data)
        sync(fd)
    finally:
        os.close(fd)
    os.replace(beside, path)
    sync_directory(path.parent)


def is_gone(fd: int) -> bool:
    """Whether the open file was deleted: writes would be lost."""
    return os.fstat(fd).st_nlink == 0


def storage_error(error: OSError, doing: str, path: Path, *, then: str) -> StorageError:
    """The error of a failed read or write: the file, the reason, the free space, and the state of the run."""
    try:
        free = f", {show_bytes(shutil.disk_usage(path.parent).free)} free there"
    except OSError:
        free = f"; {path.parent} cannot be reached"
    hint = {
        errno.ENOSPC: "Free space",
        errno.EDQUOT: "Free space (quota)",
        errno.EROFS: "The file system is read-only; make it writable",
    }.get(error.errno or 0, "Repair the storage")
    reason = error.strerror or str(error)
    return StorageError(error.errno or errno.EIO, f"{doing} {path}: {reason}{free}. {then} {hint}, then resume the run")
