"""One engine a run directory: advisory locks that the system drops when their holder ends, however it ends.

Two of them, each enough: a file of its own, which says who holds the directory while there is no journal yet, and the
open journal itself, which nobody can remove as "a stale lock".
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from pathlib import Path

from ..errors import ConfigError
from . import diskio

NAME = "lock"


def hold(fd: int, path: Path) -> None:
    """Lock an open file until its descriptor is closed. ConfigError if another one holds it, also in this process."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{path.parent} is in use: another engine holds its {path.name}. Wait for it to end, or use another run_dir"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):  # a file system without locks
            raise


def let_go(fd: int) -> None:
    """Unlock and close. Unlocked first: a child made by fork may have the descriptor for a moment longer."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


class RunLock:
    """Held from `take` to `release`. The file stays; its text says who holds or last held it.

    flock on a local file system; on NFS it is as good as the server's. A child made by fork shares it (a DataLoader
    worker that outlives a killed parent for a moment keeps the directory locked that long).
    """

    def __init__(self, fd: int) -> None:
        self._fd, self._pid = fd, os.getpid()

    @classmethod
    def take(cls, run_dir: Path) -> RunLock:
        """Lock run_dir, which must exist. Raises ConfigError naming the holder if it is in use."""
        path = run_dir / NAME
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise diskio.storage_error(error, "locking", path, then="Nothing was changed.") from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigError(f"{path} is a pipe, socket or device, not a file: {run_dir} is not a run directory")
            try:
                hold(fd, path)
            except ConfigError:
                raise ConfigError(
                    f"{run_dir} is in use by {_holder(fd)}. Wait for it to end, or use another run_dir"
                ) from None
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError as error:
            os.close(fd)
            raise diskio.storage_error(error, "locking", path, then="Nothing was changed.") from error
        except BaseException:
            os.close(fd)
            raise
        return cls(fd)

    def is_there(self, run_dir: Path) -> bool:
        """Whether the lock file is still the one that is held: somebody may have removed it."""
        try:
            return os.path.samestat(os.stat(run_dir / NAME), os.fstat(self._fd))
        except OSError:
            return False

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Give the directory up. Safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0 and self._pid == os.getpid():
            let_go(fd)
        elif fd >= 0:
            os.close(fd)  # in a process that was forked: the lock is the parent's


def _holder(fd: int) -> str:
    holder = os.pread(fd, 200, 0).decode(errors="replace").strip() or "another process"
    return "another engine of this process (close it)" if holder.split()[1:2] == [str(os.getpid())] else holder
