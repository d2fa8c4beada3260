"""A CUDA GPU as a device: memory, one stream per direction besides the compute stream, events between them.

    compute   torch's current stream: forwards, fused passes, losses, coefficients
    fetch     host -> device copies            waits for: the slot's last compute or flush, the block's last flush
    flush     device -> host copies            waits for: the slot's last compute

A worker thread per stream enqueues its copies, so the thread that runs the model never waits for a disk, a page lock or
a pageable copy. `Event.wait` makes the compute stream wait; the host only waits until the copy has been enqueued. No
step reads a value from the GPU; `later` copies scalars to the host, which reads them a step late.

Each block has one slab of exact size in host memory (`host_alloc`), page-locked in the background
(`staging.HostSlabs`): torch's own pinned allocator would round each allocation up to a power of two.

All CUDA calls here go through `Backend`, so that the tests can run this file with a backend that delays, reorders and
checks (tests/support/fake_cuda.py). **Not run on a GPU yet.**
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..errors import BudgetError, ConfigError
from ..kernels.driver import CudaError, driver
from ..numerics import cuda_kernels
from ..system.units import show_bytes
from ..tiers import HostTier, Tier
from .backend import Backend, TorchCuda
from .cpu import map_memory
from .link import Link, measure_link
from .nvml import DriverMemory
from .pinned import pinned_copy, small
from .staging import HostSlabs, ThroughHost
from .streams import Event, Later, Stream

LIBRARY_BYTES = 192 << 20  # cuBLAS workspaces, and kernels that are loaded at their first use
USUAL_CONTEXT_BYTES = 512 << 20  # per process, if the driver does not tell
AUTOMATIC_SHARE = 0.8  # of the free memory, if no budget is given: activations are an estimate


class CudaEvent(Event):
    """A point in a CUDA stream. Set once it has been recorded there, or its op has failed."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._backend = backend
        self.mark = backend.make_event()

    def record(self, stream: Any) -> None:
        self._backend.record(self.mark, stream)
        super().set()

    def set(self, error: BaseException | None = None) -> None:
        """Called by the compute thread: covers all that it has enqueued so far. Once set, an event does not change."""
        if self._is_set:
            return
        if error is None:
            self.record(None)
        else:
            super().set(error)

    def is_done(self) -> bool:
        return super().is_done() and (self._error is not None or self._backend.done(self.mark))

    def wait(self) -> None:
        """The compute stream waits. The host waits only until the event is recorded; raises what the op raised."""
        super().wait()
        self._backend.wait(None, self.mark)

    def before(self, stream: Any) -> None:
        """Work enqueued on `stream` from now on runs after this event."""
        super().wait()
        self._backend.wait(stream, self.mark)


class CudaStream(Stream):
    """A CUDA stream and the worker that enqueues to it; with threads=0 the caller does, to the compute stream."""

    def __init__(self, name: str, threads: int, backend: Backend) -> None:
        self._backend = backend
        self.cuda = backend.make_stream() if threads else None
        super().__init__(name, threads)

    def _new_event(self) -> Event:
        return CudaEvent(self._backend)

    def _run(self, fn: Callable[[], None], after: Sequence[Event], event: Event) -> None:
        try:
            for earlier in after:
                assert isinstance(earlier, CudaEvent)
                earlier.before(self.cuda)
            with self._backend.on(self.cuda):
                fn()
            assert isinstance(event, CudaEvent)
            event.record(self.cuda)
        except BaseException as error:  # raised in the thread that waits for the event, as on the CPU
            event.set(error)

    def _run_here(self, fn: Callable[[], None], after: Sequence[Event], event: Event) -> None:
        self._run(fn, after, event)  # the stream is the caller's own

    def drain(self) -> None:
        super().drain()
        self._backend.drain(self.cuda)


class CudaDevice:
    """One GPU behind the device interface."""

    kind = "cuda"
    own_memory = True
    late = True

    def __init__(self, backend: Backend, context_bytes: int = 0) -> None:
        """context_bytes: the driver's count for this process besides torch's tensors (kernels, libraries)."""
        self.backend, self.context_bytes = backend, context_bytes
        self.torch_device = backend.device
        self._link: Link | None = None

    def default_compute(self, own: torch.dtype) -> torch.dtype:
        """The checkpoint's own dtype: matrix units compute in 16 bits. Warns where they have no bfloat16 (T4, V100)."""
        if own is torch.bfloat16 and not self.backend.has_bf16():
            warnings.warn(
                "forwards in bf16, the checkpoint's own dtype: this GPU has no bf16 units and emulates them, many "
                "times slower. compute='fp16' is fast here, with a smaller range",
                stacklevel=1,  # of one line: Python shows it once
            )
        return own

    def alloc(self, nbytes: int) -> Tensor:
        """Uninitialised device memory. BudgetError tells the requested and the free bytes."""
        try:
            return self.backend.empty(nbytes)
        except torch.OutOfMemoryError as error:
            free, total = self.backend.memory()
            raise BudgetError(
                f"{show_bytes(nbytes)} of GPU memory were asked for, {show_bytes(free)} of {show_bytes(total)} are "
                "free. Give a smaller device_memory (fewer blocks stay on the GPU), a smaller storage format or batch"
            ) from error

    def host_alloc(self, nbytes: int) -> Tensor:
        """Exact, page-aligned host memory; `staging.HostSlabs` locks it.

        Forked processes (workers of a DataLoader) do not have it: the kernel would copy locked pages for each of them
        at once, or move written pages while the GPU uses them.
        """
        return map_memory(nbytes, forked=False)

    def stream(self, name: str, threads: int) -> CudaStream:
        return CudaStream(name, threads, self.backend)

    def event(self) -> Event:
        return CudaEvent(self.backend)

    def mark(self) -> Event:
        """An event after all work enqueued on the compute stream so far."""
        event = CudaEvent(self.backend)
        event.record(None)
        return event

    def later(self, values: Tensor) -> Later:
        """Enqueue a copy of scalars to the host, to be read later."""
        host = small(self.backend, values.numel() * values.element_size()).view(values.dtype)
        self.backend.copy(host, values.reshape(-1))
        mark = self.backend.make_event()
        self.backend.record(mark, None)
        return CudaLater(host, self.backend, mark)

    def upload(self, tensor: Tensor) -> Tensor:
        """A host tensor on the GPU, through pinned memory: a copy from pageable memory may wait for the stream."""
        if tensor.device.type != "cpu" or self.torch_device.type == "cpu":
            return tensor.to(self.torch_device)
        return pinned_copy(self.backend, tensor).to(self.torch_device, non_blocking=True)

    def wrap(self, tier: Tier, offload: str, block_bytes: Sequence[int], streamed: Sequence[int], pin: str) -> Tier:
        """The tier, adapted to the streams: host memory is page-locked, files go through pinned memory."""
        if offload == "host":
            assert isinstance(tier, HostTier)
            return HostSlabs(tier, self.backend, pin, streamed)
        return ThroughHost(tier, self.backend, max(block_bytes), pin) if offload == "disk" else tier

    def entered(self) -> AbstractContextManager[object]:
        return self.backend.entered()

    def synchronize(self) -> None:
        self.backend.drain(None)

    def budget(self, asked: int | None, *, chosen: bool = False) -> int | None:
        """`device_memory` is the driver's count: the CUDA context and the libraries' memory are subtracted.

        By default, four fifths of the memory that is free now. BudgetError if the context alone takes all of it.
        """
        if asked is None:
            return None if chosen else int(AUTOMATIC_SHARE * self.free_bytes()) - LIBRARY_BYTES
        rest = asked - self.context_bytes - LIBRARY_BYTES
        if rest <= 0:
            raise BudgetError(
                f"device_memory={show_bytes(asked)} is too small: the CUDA context takes "
                f"{show_bytes(self.context_bytes)} of it, and matrix libraries up to {show_bytes(LIBRARY_BYTES)}"
            )
        return rest

    def trim(self) -> None:
        """Release unused memory: the allocator keeps freed blocks of every size. Waits for the GPU."""
        self.backend.trim()

    def tidy(self, streams: bool) -> None:
        """Nothing: the allocator's memory was set aside by the plan."""

    def measure_link(self) -> Link | None:
        """Once per process: nothing else may use the link meanwhile, least of all page-locking."""
        if self._link is None:
            self._link = measure_link(self.torch_device, nbytes=32 << 20)
            self.trim()
        return self._link

    def free_bytes(self) -> int:
        """The driver's free bytes, plus torch's cache of freed tensors."""
        self.trim()
        return self.backend.memory()[0]


class CudaLater(Later):
    def __init__(self, host: Tensor, backend: Backend, mark: Any) -> None:
        super().__init__(host)
        self._backend, self._mark = backend, mark

    def get(self) -> list[float]:
        self._backend.synchronize(self._mark)
        return super().get()


_made: dict[int, CudaDevice] = {}
_lock = threading.Lock()


def cuda_device(name: str) -> CudaDevice:
    """The device "cuda" or "cuda:1", one object per GPU. ConfigError if torch or our kernels have no such GPU."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        built = "was built without CUDA" if torch.version.cuda is None else "finds no GPU"
        raise ConfigError(f"device={name!r}: torch {torch.__version__} {built}; `python -m zo_offload` shows more")
    index: int | None = torch.device(name).index
    if index is None:  # asking torch for the current device would be the process's first use of CUDA
        index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}: torch finds {torch.cuda.device_count()} GPUs")
    with _lock:
        if index not in _made:
            memory = DriverMemory(index)
            try:
                before = None if driver().has_context(index) else memory.device_used()
                backend = TorchCuda(index)
                cuda_kernels.kernels(index)
            except CudaError as error:
                raise ConfigError(f"device={name!r}: {error}") from error
            taken = context_bytes(memory, before, torch.cuda.memory_reserved(index))
            _made[index] = CudaDevice(backend, taken)
        return _made[index]


def context_bytes(memory: DriverMemory, before: int | None, tensors: int) -> int:
    """The driver's count for this process besides torch's `tensors` bytes.

    By the process's own count if the driver distinguishes processes; else by the growth of the device's count since
    `before` the context was made; else the usual size.
    """
    own, used = memory.process_used(), memory.device_used()
    if own is not None:
        return max(0, own - tensors)
    if before is not None and used is not None:
        return max(0, used - before - tensors)
    return USUAL_CONTEXT_BYTES
