"""The CPU as a device: exact-size memory, streams made of worker threads, events between them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..system.host_memory import available_bytes
from ..tiers import Tier
from .link import Link
from .streams import Event, Later, Stream

# glibc's; other C libraries have none. Tensors read one after another leave holes of tens of megabytes in the heap.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


class _Mapping(mmap.mmap):
    """An anonymous mapping, and what is to be done before it goes."""

    before: tuple[Callable[[], None], ...] = ()

    def __del__(self) -> None:
        for call in self.before:
            with contextlib.suppress(Exception):  # nobody is there to be told; a driver that fails has failed before
                call()


_mappings: weakref.WeakValueDictionary[int, _Mapping] = weakref.WeakValueDictionary()


def before_unmapping(memory: Tensor, call: Callable[[], None]) -> None:
    """Have `call` called before the memory that begins with `memory` (of `map_memory`) goes back to the system.

    It must not refer to the memory. Called on whatever thread drops the last tensor.
    """
    mapping = _mappings[memory.data_ptr()]
    mapping.before = (*mapping.before, call)


def map_memory(nbytes: int, *, forked: bool = True) -> Tensor:
    """Zeroed uint8 memory of exactly nbytes, page-aligned, returned to the system when its last view dies.

    mmap rather than malloc: nothing is rounded up, and huge pages (where the system grants them) save most of the page
    faults and TLB misses of a window that is walked end to end. forked: processes that are forked off have it too.
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

    def default_compute(self, own: torch.dtype) -> torch.dtype:
        """16-bit matmuls are slow on most CPUs."""
        return torch.float32

    def alloc(self, nbytes: int) -> Tensor:
        """A uint8 tensor where blocks are computed with; see `map_memory`."""
        return map_memory(nbytes)

    def host_alloc(self, nbytes: int) -> Tensor:
        """Memory for blocks that live on the host."""
        return self.alloc(nbytes)

    def wrap(self, tier: Tier, offload: str, block_bytes: Sequence[int], streamed: Sequence[int], pin: str) -> Tier:
        """The tier as this device's streams need it."""
        return tier

    def stream(self, name: str, threads: int) -> Stream:
        return Stream(name, threads)

    def event(self) -> Event:
        """One that whoever runs its op will set."""
        return Event()

    def mark(self) -> Event:
        """Done once all that was computed so far is. The caller computes, so it is done now."""
        return _DONE

    def later(self, values: Tensor) -> Later:
        """values (float64) for the host to read when it wants to."""
        return Later(values.reshape(-1).clone())

    def upload(self, tensor: Tensor) -> Tensor:
        """A host tensor where the model computes."""
        return tensor

    def synchronize(self) -> None:
        """Wait until all that was computed so far is done."""

    def trim(self) -> None:
        """Give back memory that an allocator keeps though nothing uses it."""
        if _malloc_trim is not None:
            _malloc_trim(0)

    def budget(self, asked: int | None, *, chosen: bool = False) -> int | None:
        """What blocks, scratch and activations may take of `device_memory`; None: as little as works.

        chosen: the caller has chosen the window, so that nothing is to be decided for it.
        """
        return asked

    def measure_link(self) -> Link | None:
        """How fast blocks come and go, where they do over a link of the device's own."""
        return None

    def free_bytes(self) -> int:
        """What can still be allocated."""
        return available_bytes()


_DONE = Event()
_DONE.set()
