"""The CPU as a device: memory of exact size, worker threads as streams, events between them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..system.host_memory import available_bytes, private_bytes
from ..tiers import Tier
from .link import Link
from .streams import Event, Later, Stream

# glibc only. Tensors that are read one after another leave holes of tens of megabytes in the heap.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
LET_GROW = 32 << 20
"""Bytes that a process may grow by before the allocator gives back what it keeps; where all blocks lie in its memory,
an eighth of that if it is more."""


class _Mapping(mmap.mmap):
    """An anonymous mapping, with calls to make before it is unmapped."""

    before: tuple[Callable[[], None], ...] = ()

    def __del__(self) -> None:
        for call in self.before:
            with contextlib.suppress(Exception):  # no one can handle it; a failing driver has failed before
                call()


_mappings: weakref.WeakValueDictionary[int, _Mapping] = weakref.WeakValueDictionary()


def before_unmapping(memory: Tensor, call: Callable[[], None]) -> None:
    """Call `call` before the memory that begins with `memory` (of `map_memory`) returns to the system.

    It must not refer to the memory. It runs on the thread that drops the last tensor.
    """
    mapping = _mappings[memory.data_ptr()]
    mapping.before = (*mapping.before, call)


def map_memory(nbytes: int, *, forked: bool = True) -> Tensor:
    """Zeroed uint8 memory of exactly nbytes, page-aligned, returned to the system when its last view dies.

    mmap rather than malloc: nothing is rounded up, and huge pages (if the system grants them) save most page faults and
    TLB misses of a window that is read from end to end. forked: forked processes have the memory, too.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    memory = _Mapping(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= 1 << 22 and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages: plain ones work the same
            memory.madvise(mmap.MADV_HUGEPAGE)
    if not forked and hasattr(mmap, "MADV_DONTFORK"):
        memory.madvise(mmap.MADV_DONTFORK)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    _mappings[tensor.data_ptr()] = memory
    return tensor


class CpuDevice:
    """Host memory and worker threads behind the device interface."""

    kind = "cpu"
    own_memory = False
    torch_device = torch.device("cpu")
    late = False
    context_bytes = 0
    _tidied = 0  # private bytes after `tidy` last trimmed

    def default_compute(self, own: torch.dtype) -> torch.dtype:
        """16-bit matmuls are slow on most CPUs."""
        return torch.float32

    def alloc(self, nbytes: int) -> Tensor:
        """A uint8 tensor in which blocks are computed; see `map_memory`."""
        return map_memory(nbytes)

    def host_alloc(self, nbytes: int) -> Tensor:
        """Memory for blocks that live on the host."""
        return self.alloc(nbytes)

    def wrap(self, tier: Tier, offload: str, block_bytes: Sequence[int], streamed: Sequence[int], pin: str) -> Tier:
        """The tier, adapted to this device's streams."""
        return tier

    def stream(self, name: str, threads: int) -> Stream:
        return Stream(name, threads)

    def event(self) -> Event:
        """An event that the runner of its op sets."""
        return Event()

    def mark(self) -> Event:
        """An event that is done once all computation so far is. The caller computes, so it is done now."""
        return _DONE

    def later(self, values: Tensor) -> Later:
        """values (float64), for the host to read later."""
        return Later(values.reshape(-1).clone())

    def upload(self, tensor: Tensor) -> Tensor:
        """A host tensor on the model's device."""
        return tensor

    def entered(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        """Wait until all computation so far is done."""

    def trim(self) -> None:
        """Release unused memory that an allocator keeps."""
        if _malloc_trim is not None:
            _malloc_trim(0)

    def tidy(self, streams: bool) -> None:
        """Buffers of many sizes come and go in every visit, and the gaps between them would add up: to half as much
        again as the plan for a LoRA of OPT-6.7B. Trimming takes milliseconds, and then page faults, so it waits until
        the process grows: beside a model in memory by more than the buffers of a pass, which would all fault anew."""
        if private_bytes() > self._tidied + (LET_GROW if streams else max(LET_GROW, self._tidied // 8)):
            self.trim()
            self._tidied = private_bytes()

    def budget(self, asked: int | None, *, chosen: bool = False) -> int | None:
        """The part of `device_memory` for blocks, scratch and activations; None: as little as works.

        chosen: the caller has chosen the window, so no default is decided.
        """
        return asked

    def measure_link(self) -> Link | None:
        """The speed of fetches and flushes, if the device has a link of its own."""
        return None

    def free_bytes(self) -> int:
        """Bytes that can still be allocated."""
        return available_bytes()


_DONE = Event()
_DONE.set()
