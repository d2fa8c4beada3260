"""CUDA without a GPU: streams that run late and in any order CUDA allows, events between them, and a race checker.

`FakeBackend` stands in for `devices.backend.TorchCuda`. Copy streams are worker threads that take a random while for
each op; the compute stream is the calling thread, so torch computes at once. Data that is used too early is therefore
really wrong. What computing at once hides (a fetch that does not wait for the compute before it) is found by vector
clocks: every access to tracked memory must be ordered with every earlier conflicting one by events or host waits.
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zo_offload.devices import Later
from zo_offload.devices.cpu import CpuDevice
from zo_offload.devices.cuda import CudaDevice
from zo_offload.devices.link import Link
from zo_offload.kernels.driver import CudaError

Clock = dict[int, int]
COMPUTE = 0


@dataclass
class Recording:
    """What an event stands for since it was last recorded."""

    done: threading.Event = field(default_factory=threading.Event)
    clock: Clock = field(default_factory=dict)


class FakeEvent:
    def __init__(self) -> None:
        self.recording = Recording()
        self.recording.done.set()  # never recorded: waiting for it is no wait, as in CUDA


class FakeStream:
    def __init__(self, index: int, delay: Any) -> None:
        self.index, self._delay = index, delay
        self.clock: Clock = {index: 0}
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._open = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def put(self, fn: Any) -> None:
        self._queue.put(fn)

    def _work(self) -> None:
        while (fn := self._queue.get()) is not None:
            self._delay()
            fn()


@dataclass
class Access:
    start: int
    end: int
    write: bool
    stream: int
    at: int
    what: str


class RaceError(AssertionError):
    pass


class FakeBackend:
    """See the module.

    fail_lock: page-locking fails once this many bytes are locked. pool: bytes that may be page-locked in all, by `lock`
    and by torch's pinned allocator, which rounds up to powers of two and keeps what is freed, as on WSL2. fail_unlock:
    unlocking fails, as every call does after a fault on the GPU.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        seed: int = 0,
        longest_s: float = 2e-3,
        fail_lock: int | None = None,
        pool: int | None = None,
        fail_unlock: bool = False,
    ) -> None:
        self._random = random.Random(seed)
        self._longest, self._fail_lock, self.pool, self._fail_unlock = longest_s, fail_lock, pool, fail_unlock
        self._registered: dict[int, int] = {}
        self._cache: list[tuple[int, weakref.ref[Any]]] = []
        self.unlocks = self.refusals = self.entries = self.depth = 0
        self._current = threading.local()
        self._lock = threading.Lock()
        self.compute_clock: Clock = {COMPUTE: 0}
        self._seen_done: Clock = {}  # what the main thread has waited for: before all that is enqueued from then on
        self.streams: list[FakeStream] = []
        self._accesses: list[Access] = []
        self._device: set[int] = set()
        self._ranges: list[tuple[int, int]] = []
        self.tracked: list[tuple[int, int]] = []
        self.copies = 0
        self.races: list[str] = []
        self._keep: list[Tensor] = []

    # ---- Backend -----------------------------------------------------------------------------------------------------

    def _delay(self) -> None:
        with self._lock:
            wait = self._random.choice((0.0, 0.0, self._random.uniform(0, self._longest)))
        time.sleep(wait)

    @contextlib.contextmanager
    def entered(self) -> Any:
        self.depth += 1
        self.entries += 1
        try:
            yield
        finally:
            self.depth -= 1

    def make_stream(self) -> FakeStream:
        stream = FakeStream(1 + len(self.streams), self._delay)
        self.streams.append(stream)
        return stream

    def make_event(self) -> FakeEvent:
        return FakeEvent()

    def _on(self, stream: Any) -> FakeStream | None:
        return stream if stream is not None else getattr(self._current, "stream", None)

    def record(self, event: FakeEvent, stream: Any) -> None:
        recording, stream = Recording(), self._on(stream)
        with self._lock:
            clock = self.compute_clock if stream is None else stream.clock
            index = COMPUTE if stream is None else stream.index
            recording.clock = dict(clock)
            clock[index] = clock[index] + 1
        event.recording = recording
        recording.done.set() if stream is None else stream.put(recording.done.set)

    def wait(self, stream: Any, event: FakeEvent) -> None:
        recording, stream = event.recording, self._on(stream)
        if stream is None:
            recording.done.wait()
        else:
            stream.put(recording.done.wait)
        self._merge(self.compute_clock if stream is None else stream.clock, recording.clock)

    def _merge(self, clock: Clock, other: Clock) -> None:
        with self._lock:
            for index, at in other.items():
                clock[index] = max(clock.get(index, -1), at)

    def done(self, event: FakeEvent) -> bool:
        return event.recording.done.is_set()

    def synchronize(self, event: FakeEvent) -> None:
        event.recording.done.wait()

    def drain(self, stream: Any) -> None:
        stream = self._on(stream)
        if stream is None:
            self.host_waited()
            return
        idle = threading.Event()
        stream.put(idle.set)
        idle.wait()
        self.host_waited(stream)

    def host_waited(self, stream: FakeStream | None = None) -> None:
        """All of a stream is done, and the main thread knows: what it has enqueued from here on comes after."""
        if threading.current_thread() is threading.main_thread():
            clock = self.compute_clock if stream is None else stream.clock
            self._merge(self.compute_clock, clock)
            self._merge(self._seen_done, clock)

    @contextlib.contextmanager
    def on(self, stream: Any) -> Any:
        before = getattr(self._current, "stream", None)
        self._current.stream = stream if stream is not None else before
        try:
            yield
        finally:
            self._current.stream = before

    def copy(self, to: Tensor, source: Tensor) -> None:
        stream = self._on(None)
        self.copies += 1
        if stream is not None:
            self._merge(stream.clock, {i: at for i, at in self._seen_done.items() if i != stream.index})
        index = COMPUTE if stream is None else stream.index
        self.access(source, False, index, "copy from")
        self.access(to, True, index, "copy to")
        if stream is None:
            self._move(to, source)
        else:
            stream.put(lambda: self._move(to, source))

    def _move(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source)

    def is_device(self, tensor: Tensor) -> bool:
        at = tensor.data_ptr()
        return any(start <= at < end for start, end in self._ranges)

    def empty(self, nbytes: int) -> Tensor:
        memory = CpuDevice().alloc(nbytes)
        if nbytes:
            memory.fill_(0xA5)  # device memory comes with rubbish in it
            self._keep.append(memory)  # an address is only this memory's while it lives
            self._ranges.append((memory.data_ptr(), memory.data_ptr() + nbytes))
        return memory

    def staging(self, nbytes: int) -> Tensor:
        size = 1 << max(0, nbytes - 1).bit_length()
        memory = torch.full((nbytes,), 0x5A, dtype=torch.uint8, device="cpu")
        for i, (cached, used) in enumerate(self._cache):
            if cached == size and used() is None:
                self._cache[i] = size, weakref.ref(memory.untyped_storage())
                return memory
        if self._is_over(size):
            self.refusals += 1
            raise RuntimeError("CUDA error: out of memory (cudaHostAlloc)")
        self._cache.append((size, weakref.ref(memory.untyped_storage())))
        return memory

    def _is_over(self, more: int) -> bool:
        return self.pool is not None and self.locked + sum(size for size, _ in self._cache) + more > self.pool

    @property
    def locked(self) -> int:
        """Bytes that are registered."""
        return sum(self._registered.values())

    def lock(self, memory: Tensor) -> None:
        self._delay()
        nbytes = memory.numel()
        if (self._fail_lock is not None and self.locked + nbytes > self._fail_lock) or self._is_over(nbytes):
            self.refusals += 1
            raise CudaError("cuMemHostRegister: the CUDA driver says CUDA_ERROR_OUT_OF_MEMORY (out of memory)", 2)
        if memory.data_ptr() in self._registered:
            raise CudaError("cuMemHostRegister: CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", 712)
        self._registered[memory.data_ptr()] = nbytes

    def unlock(self, address: int) -> None:
        self.unlocks += 1
        if self._fail_unlock:
            raise CudaError("cuMemHostUnregister: CUDA_ERROR_ILLEGAL_ADDRESS", 700)
        if self._registered.pop(address, None) is None:
            raise CudaError("cuMemHostUnregister: CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", 713)

    bf16 = True

    def has_bf16(self) -> bool:
        return self.bf16

    def memory(self) -> tuple[int, int]:
        return 8 << 30, 8 << 30

    def trim(self) -> None:
        pass

    # ---- races -------------------------------------------------------------------------------------------------------

    def access(self, tensor: Tensor, write: bool, stream: int, what: str) -> None:
        """An access that is being enqueued on a stream; noted in `races` if an earlier one is not ordered before it."""
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        with self._lock:
            clock = self.compute_clock if stream == COMPUTE else self.streams[stream - 1].clock
            for old in self._accesses:
                conflict = old.start < end and start < old.end and (old.write or write) and old.stream != stream
                if conflict and clock.get(old.stream, -1) < old.at:
                    self.races.append(f"{what} on stream {stream} races with {old.what} on stream {old.stream}")
            kept = []
            for old in self._accesses:  # one access of a kind and stream is enough: later ones are ordered after it
                if not (old.start == start and old.end == end and old.stream == stream and old.write == write):
                    kept.append(old)
            kept.append(Access(start, end, write, stream, clock[stream], what))
            self._accesses = kept[-400:]


class LateScalars(Later):
    """Scalars that arrive only after a while."""

    def __init__(self, values: Tensor, delay: Any) -> None:
        super().__init__(values)
        self._delay = delay

    def get(self) -> list[float]:
        self._delay()
        return super().get()


class FakeCudaDevice(CudaDevice):
    """The real `CudaDevice` over the fake backend; the model computes on the CPU."""

    def __init__(self, backend: FakeBackend | None = None) -> None:
        super().__init__(backend if backend is not None else FakeBackend())

    def measure_link(self):
        return Link(50.0, 50.0, 40.0, 40.0)

    def budget(self, asked, *, chosen=False):
        # no budget: the smallest window, so that blocks do stream
        return None if asked is None else super().budget(asked, chosen=chosen)


class DelayedCpuDevice(CpuDevice):
    """The CPU, with losses that stay away until they are asked for, and then take a while."""

    late = True

    def __init__(self, seed: int = 0) -> None:
        self._backend = FakeBackend(seed)

    def later(self, values: Tensor) -> Later:
        return LateScalars(values.reshape(-1).clone(), self._backend._delay)
