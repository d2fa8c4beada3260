"""The checksum of block files: 64 bits, cheap enough to check at every fetch.

A range of bytes that begins at byte `offset` of its block is cut into chunks of 4096 bytes (the last may be shorter
and is padded with zeros to whole words), each chunk into 1024 little-endian 32-bit words x[i]:

    chunk  h    = sum of x[i] * weight[i]                                  mod 2**64; weights: 32-bit, odd, fixed
    range  H    = sum over chunks of mix(h ^ (begin of chunk + 1) * GOLDEN)     mod 2**64; mix: splitmix64's finaliser
    weight[i]   = high half of mix((i + 1) * GOLDEN), with bit 0 set

Damage inside one word changes h for certain (odd weight, product below 2**64), damage inside one chunk whose h changed
changes H for certain (mix is a bijection); any other damage is missed with probability 2**-31 or less per chunk
(multilinear hashing, Lemire & Kaser 2013). A chunk's offset is part of its term, so swapped or stale pages are
detected. H is a sum: ranges of one block can be checked in any order, in pieces of whole chunks, and their sums added.
It detects accidents, not forgery.

The native version (csrc/cpu_checksum.cpp) is used if the library has it; `reference` is the definition.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..kernels import native

CHUNK_BYTES = 4096
GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
KNOWN = 0x9E59B088A568EEC7
"""Checksum of bytes 0, 1, .. 254, 0, 1, ... (9001 of them) at offset 64; a native library must reproduce it."""


def checksum(data: Tensor, offset: int = 0) -> int:
    """Checksum of a contiguous uint8 CPU tensor whose first byte is byte `offset` of its block."""
    fast = _native()
    if fast is None:
        return reference(data, offset)
    return fast(data.data_ptr(), data.numel(), offset)


def is_native() -> bool:
    """Whether the native checksum is used: its library exists and gives the known answer."""
    return _native() is not None


def reference(data: Tensor, offset: int = 0) -> int:
    """The definition above, in numpy."""
    flat = data.numpy()
    weights, golden = _weights(), np.uint64(GOLDEN)
    total = 0
    step = CHUNK_BYTES * 256  # limits the memory of the products
    for begin in range(0, flat.size, step):
        piece = flat[begin : begin + step]
        padded = np.zeros(-(-piece.size // CHUNK_BYTES) * CHUNK_BYTES, dtype=np.uint8)
        padded[: piece.size] = piece
        words = padded.view("<u4").reshape(-1, CHUNK_BYTES // 4).astype(np.uint64)
        with np.errstate(over="ignore"):
            sums = (words * weights).sum(axis=1, dtype=np.uint64)
            begins = np.arange(len(sums), dtype=np.uint64) * np.uint64(CHUNK_BYTES) + np.uint64(offset + begin + 1)
            total += int(_mix(sums ^ begins * golden).sum(dtype=np.uint64))
    return total & _MASK


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


@functools.cache
def _weights() -> np.ndarray:
    with np.errstate(over="ignore"):
        mixed = _mix(np.arange(1, CHUNK_BYTES // 4 + 1, dtype=np.uint64) * np.uint64(GOLDEN))
    return (mixed >> np.uint64(32)) | np.uint64(1)


@functools.cache
def _native() -> Callable[[int, int, int], int] | None:
    """The native checksum, if the library has one that gives the known answer."""
    library = native.library()
    if library is None:
        return None
    try:
        found = ctypes.CDLL(str(library.path)).zo_cpu_checksum
    except AttributeError:
        return None  # a library built before there was one
    found.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64]
    found.restype = ctypes.c_uint64
    probe = torch.arange(9001, device="cpu").remainder(255).to(torch.uint8)
    fast: Callable[[int, int, int], int] = found
    return fast if fast(probe.data_ptr(), probe.numel(), 64) == KNOWN else None
