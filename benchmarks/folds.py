"""What a fold of a block on disk moves, piece by piece, when the block lies in the page cache: CPU seconds a GB.

    python -m benchmarks.folds [--mib 128] [--repeats 9] [--folder DIR]

A fold today reads the block into its slot and sums it, computes in the slot, sums it and writes it to the block's other
generation. The pieces are timed in turns, and three sums of their medians are given:

    copied     as today
    lent       the pass reads the file's view (mapped, summed where it lies) and writes the slot, which is then written
    one pass   the same, with both sums made while the pass has the bytes in a core's cache

The pass stands here for its memory's part alone: float32 that are added to a constant, in place or from one memory into
another. Its noise costs the same in all three. "one pass" is a bound: its sums, of bytes in a cache, are counted as if
nothing else were to be done with them.
"""

from __future__ import annotations

import argparse
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import about, emit, quantile
from zo_offload.devices.cpu import map_memory
from zo_offload.kernels import native
from zo_offload.tiers import checksum, lending, summed_io

SUMS = {
    "copied": ("read and sum", "pass in place", "sum and write"),
    "lent": ("map", "sum where it lies", "pass from one to another", "unmap", "sum and write"),
    "one pass": ("map", "sum in cache", "pass from one to another", "sum in cache", "unmap", "write"),
}


def works(file: int, nbytes: int) -> dict[str, Callable[[], object]]:
    """The pieces, on a file of two generations."""
    pages = lending._native()
    if native.library() is None or pages is None:
        raise SystemExit("the native library is not built: nothing is lent without it")
    slot, other = map_memory(nbytes).fill_(1), map_memory(nbytes).fill_(1)
    for generation in (0, nbytes):
        summed_io.write_summed(file, slot, generation, 0)
    how = dict(flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    view = torch.frombuffer(mmap.mmap(file, 2 * nbytes, **how), dtype=torch.uint8)[:nbytes]
    values, into, cached = slot.view(torch.float32), other.view(torch.float32), slot[: summed_io.CACHED]

    def map_view() -> None:
        if not pages.are_cached(view.data_ptr(), nbytes):
            raise SystemExit("the file does not stay in the page cache: free memory, or take fewer --mib")
        pages.bring(view.data_ptr(), nbytes)

    return {
        "read and sum": lambda: summed_io.read_summed(file, slot, 0, 0),
        "map": map_view,
        "sum where it lies": lambda: checksum.checksum(view, 0),
        "unmap": lambda: pages.let_go(view.data_ptr(), nbytes),
        "sum in cache": lambda: [checksum.checksum(cached, 0) for _ in range(0, nbytes, summed_io.CACHED)],
        "pass in place": lambda: values.add_(2.0**-30),
        "pass from one to another": lambda: torch.add(values, 2.0**-30, out=into),
        "write": lambda: os.pwrite(file, memoryview(slot.numpy()), nbytes),  # type: ignore[arg-type]
        "sum and write": lambda: summed_io.write_summed(file, slot, nbytes, 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=128, help="of a block")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where the file is, default a temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    nbytes = options.mib << 20
    with tempfile.TemporaryFile(dir=options.folder, buffering=0) as file:
        pieces = works(file.fileno(), nbytes)
        seconds: dict[str, list[float]] = {name: [] for name in pieces}
        for turn in range(options.repeats + 1):
            for name, work in pieces.items():
                start = time.thread_time()
                work()
                if turn:
                    seconds[name].append(time.thread_time() - start)
    each = {name: 1e9 * quantile(times, 0.5) / nbytes for name, times in seconds.items()}
    totals = {way: round(sum(each[name] for name in names), 3) for way, names in SUMS.items()}
    costs = {name: round(s, 3) for name, s in each.items()}
    emit({"mib": options.mib, "n": options.repeats, "s_per_gb": costs, **totals}, about("folds"))


if __name__ == "__main__":
    main()
