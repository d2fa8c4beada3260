"""Reads and writes of tensors in files, with a checksum of the bytes: the hot path of blocks on disk.

The native versions (csrc/cpu_io.cpp) move and sum 256 kB at a time while they are in the core's cache, in one call
without the interpreter's lock: in Python the worker would take that lock from the computing thread twice per chunk. The
references below do the same through `diskio`, where tests record and inject faults.
"""

from __future__ import annotations

import ctypes
import functools
import os

from torch import Tensor

from ..kernels import native
from ..system import diskio
from . import checksum as sums

CACHED = 64 * sums.CHUNK_BYTES  # 256 kB: still in the core's cache when summed after a read, or written after a sum
_MASK = (1 << 64) - 1


def read_summed(fd: int, out: Tensor, at: int, begin: int, threads: int = 1) -> int | None:
    """Fill `out` (contiguous uint8, on the CPU) from file offset `at`; its checksum, or None if the file ends early.

    begin: the place in its block of the first byte, a multiple of 4096. OSError.
    """
    io = _native()
    if io is None:
        return reference_read_summed(fd, out, at, begin)
    found = ctypes.c_uint64()
    done = io[0](fd, out.data_ptr(), out.numel(), at, begin, threads, ctypes.byref(found))
    if done < 0:
        raise OSError(-done, os.strerror(-done))
    return found.value if done == out.numel() else None


def write_summed(fd: int, data: Tensor, at: int, begin: int) -> int:
    """Write all of `data` at file offset `at`; its checksum. OSError: some of it may be written."""
    io = _native()
    if io is None:
        return reference_write_summed(fd, data, at, begin)
    found = ctypes.c_uint64()
    done = io[1](fd, data.data_ptr(), data.numel(), at, begin, ctypes.byref(found))
    if done < 0:
        raise OSError(-done, os.strerror(-done))
    return found.value


def reference_read_summed(fd: int, out: Tensor, at: int, begin: int) -> int | None:
    view, total = memoryview(out.numpy()), 0  # type: ignore[arg-type]
    for start in range(0, out.numel(), CACHED):
        run = slice(start, min(out.numel(), start + CACHED))
        if diskio.read_at(fd, view[run], at + start) < len(view[run]):
            return None
        total += sums.checksum(out[run], begin + start)
    return total & _MASK


def reference_write_summed(fd: int, data: Tensor, at: int, begin: int) -> int:
    view, total = memoryview(data.numpy()), 0  # type: ignore[arg-type]
    for start in range(0, data.numel(), CACHED):
        run = slice(start, min(data.numel(), start + CACHED))
        total += sums.checksum(data[run], begin + start)
        diskio.write_at(fd, view[run], at + start)
    return total & _MASK


@functools.cache
def _native() -> tuple[ctypes._NamedFuncPointer, ctypes._NamedFuncPointer] | None:
    """(read, write) of the native library, if it has them and its checksum is the right one."""
    library = native.library()
    if library is None or not sums.is_native():
        return None
    loaded = ctypes.CDLL(str(library.path))
    try:
        read, write = loaded.zo_cpu_read, loaded.zo_cpu_write
    except AttributeError:
        return None  # a library built before they were there
    u64, sum_at = ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint64)
    read.argtypes = [ctypes.c_int, ctypes.c_void_p, u64, u64, u64, ctypes.c_int, sum_at]
    write.argtypes = [ctypes.c_int, ctypes.c_void_p, u64, u64, u64, sum_at]
    read.restype = write.restype = ctypes.c_int64
    return read, write
