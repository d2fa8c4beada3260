"""Page-locked host memory: of exact size, unlocked together with its memory, and pageable if the system refuses.

Copies between a GPU and memory that is not locked work, too: the driver stages them, at half the speed or less, and a
copy to the host then blocks its thread until it is done. So a refusal never ends a run. The limit of locked memory
differs: on WSL2 it is 0.5 to 1 GB for the whole machine, in a container the remainder of its memory limit.

torch's own pinned allocator rounds each allocation up to a power of two. It is used for small memory (`small`).
"""

from __future__ import annotations

import platform
import warnings
from typing import Protocol

import torch
from torch import Tensor

from ..errors import BudgetError
from ..kernels.driver import CudaError
from ..system.units import show_bytes
from .cpu import before_unmapping, map_memory

RESERVE_BYTES = 64 << 20


class Locks(Protocol):
    """The part of `Backend` that locks."""

    def staging(self, nbytes: int) -> Tensor: ...
    def lock(self, memory: Tensor) -> None: ...
    def unlock(self, address: int) -> None: ...


class Lock:
    """A lock of a whole mapping (`map_memory`), until `release` or until the mapping goes, whichever is first.

    CudaError if the system refuses. The mapping goes with its last tensor, on any thread: behaviour is undefined if the
    driver still counts pages as locked that no longer belong to this memory.
    """

    def __init__(self, backend: Locks, memory: Tensor) -> None:
        backend.lock(memory)
        self._backend, self._address = backend, memory.data_ptr()
        self._held = True
        before_unmapping(memory, self.release)

    def release(self) -> None:
        """Safe to call twice. Raises the driver's error; the lock then counts as released: a driver that fails once in
        this way fails always."""
        if self._held:
            self._held = False
            self._backend.unlock(self._address)


def host_memory(backend: Locks, nbytes: int) -> tuple[Tensor, Lock | None, str]:
    """(exactly nbytes of host memory for copies, its lock, ""); if it cannot be locked, (memory, None, the reason)."""
    memory = map_memory(nbytes, forked=False)
    try:
        return memory, Lock(backend, memory), ""
    except CudaError as error:
        return memory, None, str(error)


def small(backend: Locks, nbytes: int) -> Tensor:
    """A few bytes for one copy, from torch's pinned cache; pageable if that cannot grow: a copy may then wait."""
    try:
        return backend.staging(nbytes)
    except RuntimeError as error:  # torch's for cudaHostAlloc
        warn_pageable("the scalars and batches of each step", str(error))
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def pinned_copy(backend: Locks, tensor: Tensor) -> Tensor:
    """A host tensor's values in memory that an asynchronous copy may read."""
    if tensor.is_pinned() or tensor.numel() == 0:
        return tensor
    copy = small(backend, tensor.numel() * tensor.element_size()).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def warn_pageable(what: str, reason: str) -> None:
    """Shown once per kind of memory: Python shows equal warnings of one line once."""
    warnings.warn(
        f"{what} go through pageable memory, which is slower: the system locks no more pages ({reason}){_limit()}",
        stacklevel=3,
    )


def refusal(what: str, locked: int, total: int, reason: str) -> BudgetError:
    """The error for memory that could not be locked: the request, the limit, and what to do."""
    return BudgetError(
        f"{what} cannot be page-locked: {reason}. {show_bytes(locked)} of {show_bytes(total)} are locked{_limit()}. "
        "Free host memory, raise the limit of the container, or set host_memory='staged'"
    )


def _limit() -> str:
    """The likely limit on this machine. The driver ignores `ulimit -l`."""
    if "microsoft" in platform.release().lower():
        return "; WSL2 lets all processes together lock 0.5 to 1 GB"
    return ""
