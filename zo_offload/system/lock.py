"""One engine per run directory: advisory locks that the system releases when their holder ends, for any reason.

There are two, and each is enough: a lock file, which names the holder while there is no journal yet, and the open
journal itself, which nobody can remove as "a stale lock".
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
    """Unlock and close. Unlocks first: a forked child may keep the descriptor for a moment."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


class RunLock:
    """Held from `take` to `release`. The file stays; its text names the present or last holder.

    flock on a local file system; on NFS it depends on the server. A forked child shares it (a DataLoader worker that
    briefly outlives a killed parent keeps the directory locked).
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
        """Whether the lock file is still the held one: somebody may have removed it."""
        try:
            return os.path.samestat(os.stat(run_dir / NAME), os.fstat(self._fd))
        except OSError:
            return False

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Release the directory. Safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0 and self._pid == os.getpid():
            let_go(fd)
        elif fd >= 0:
            os.close(fd)  # in a forked process: the lock belongs to the parent


def _holder(fd: int) -> str:
    holder = os.pread(fd, 200, 0).decode(errors="replace").strip() or "another process"
    return "another engine of this process (close it)" if holder.split()[1:2] == [str(os.getpid())] else holder
