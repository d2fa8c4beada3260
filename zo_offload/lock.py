"""One process a run directory: an advisory lock that the system drops when its holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from . import diskio
from .errors import ConfigError

NAME = "lock"


class RunLock:
    """Held from `take` to `release`. The file stays; its text says who holds or last held it.

    flock on a local file system; on NFS it is as good as the server's. A child made by fork shares it (a DataLoader
    worker that outlives its parent for a moment keeps the directory locked that long).
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def take(cls, run_dir: Path) -> RunLock:
        """Lock run_dir, which must exist. Raises ConfigError naming the holder if it is in use."""
        path = run_dir / NAME
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise diskio.storage_error(error, "locking", path, then="Nothing was changed.") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(fd, 200).decode(errors="replace").strip() or "another process"
            if holder.split()[1:2] == [str(os.getpid())]:
                holder = "another engine of this process (close it)"
            os.close(fd)
            raise ConfigError(f"{run_dir} is in use by {holder}. Wait for it to end, or use another run_dir") from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return cls(fd)

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Give the directory up. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
