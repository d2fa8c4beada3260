"""Page-locked host memory: of exact size, unlocked together with its memory, and pageable if the system refuses.

Copies between a GPU and memory that is not locked work too: the driver stages them, at a half or less of the speed,
and a copy to the host then keeps its thread until it is done. So a refusal never ends a run. How much may be locked
differs: on WSL2 it is 0.5 to 1 GB for the whole machine, in a container what its memory limit leaves.

torch's own pinned allocator rounds each allocation up to a power of two. It serves what is small (`small`).
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

    CudaError if the system refuses. The mapping goes with its last tensor, wherever that is dropped: a driver that
    still takes pages for locked that are not this memory's any more is undefined.
    """

    def __init__(self, backend: Locks, memory: Tensor) -> None:
        backend.lock(memory)
        self._backend, self._address = backend, memory.data_ptr()
        self._held = True
        before_unmapping(memory, self.release)

    def release(self) -> None:
        """Safe to call twice. Raises what the driver says; the lock counts as gone then: a driver that fails once in
        this way fails always."""
        if self._held:
            self._held = False
            self._backend.unlock(self._address)


def host_memory(backend: Locks, nbytes: int) -> tuple[Tensor, Lock | None, str]:
    """(exactly nbytes of host memory for copies, its lock, ""); (memory, None, why it is pageable) where it must be."""
    memory = map_memory(nbytes, forked=False)
    try:
        return memory, Lock(backend, memory), ""
    except CudaError as error:
        return memory, None, str(error)


def small(backend: Locks, nbytes: int) -> Tensor:
    """A few bytes for one copy, from torch's pinned cache; pageable if that cannot grow: then a copy may wait."""
    try:
        return backend.staging(nbytes)
    except RuntimeError as error:  # torch's for cudaHostAlloc
        warn_pageable("the scalars and batches of each step", str(error))
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def pinned_copy(backend: Locks, tensor: Tensor) -> Tensor:
    """A host tensor's values where an asynchronous copy may read them."""
    if tensor.is_pinned() or tensor.numel() == 0:
        return tensor
    copy = small(backend, tensor.numel() * tensor.element_size()).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def warn_pageable(what: str, reason: str) -> None:
    """Once a kind of memory: python shows equal warnings of one place once."""
    warnings.warn(
        f"{what} go through pageable memory, which is slower: the system locks no more pages ({reason}){_limit()}",
        stacklevel=3,
    )


def refusal(what: str, locked: int, total: int, reason: str) -> BudgetError:
    """Memory that was to be locked and is not: what was asked, what there is, what to do."""
    return BudgetError(
        f"{what} cannot be page-locked: {reason}. {show_bytes(locked)} of {show_bytes(total)} are locked{_limit()}. "
        "Free host memory, raise the limit of the container, or set host_memory='staged'"
    )


def _limit() -> str:
    """What limits it here, as far as is known. The driver does not look at `ulimit -l`."""
    if "microsoft" in platform.release().lower():
        return "; WSL2 lets all processes together lock 0.5 to 1 GB"
    return ""
