"""Makes the memory of a virtual machine grow: python -m benchmarks.host_memory [--dry].

Some machines show a small part of their memory at first and get the rest as it is used. A run that asks beforehand
whether a model fits would be told no. So as much as the largest model of `gpu_check` needs is written to, a little at
a time, for as long as the system has some left a moment later; then all of it is given back. Where that much is
available from the start, nothing is done.

One JSON line: bytes available before and after, and how much was held at once. Knows nothing of torch: it is quick.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NEEDED = 72 << 30  # OPT-30B in 16 bits, and what stages it
STEP, SPARE = 1 << 29, 3 << 29
PATIENCE_S = 3.0
THREADS = 8


def available() -> int:
    """Bytes, as the kernel counts them."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return NEEDED


def take(nbytes: int, pool: ThreadPoolExecutor) -> mmap.mmap:
    """Memory that has been written to."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    start, part = ctypes.addressof(ctypes.c_char.from_buffer(memory)), nbytes // THREADS
    list(pool.map(lambda i: ctypes.memset(start + i * part, 1, part), range(THREADS)))
    return memory


def grow(needed: int, step: int, spare: int, free: Callable[[], int], patience_s: float) -> int:
    """Take memory a step at a time up to `needed` bytes; how many were held when it ended. All are given back.

    A step is taken while `spare` bytes more than it are free, or become free within `patience_s`: the system is never
    driven to where it ends processes.
    """
    held: list[mmap.mmap] = []
    with ThreadPoolExecutor(THREADS) as pool:
        while len(held) * step < needed:
            until = time.monotonic() + patience_s
            while free() < step + spare and time.monotonic() < until:
                time.sleep(0.02)
            if free() < step + spare:
                break
            held.append(take(step, pool))
    return len(held) * step


def main() -> None:
    before, reached = available(), 0
    if "--dry" in sys.argv:
        reached = grow(4 << 20, 1 << 20, 0, available, 0.0)
    elif before < NEEDED:
        reached = grow(NEEDED, STEP, SPARE, available, PATIENCE_S)
    row = {"part": "host memory", "available_before_bytes": before, "reached_bytes": reached}
    print(json.dumps(row | {"available_after_bytes": available()}))


if __name__ == "__main__":
    main()
