"""The CPU as a device: exact-size memory, streams made of worker threads, events between them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..host_memory import available_bytes
from ..tiers import Tier
from .link import Link

_LOOK_S = 0.1  # how often a thread that waits looks at the flag: only where it is not woken, see `Event`
# glibc's; other C libraries have none. Tensors read one after another leave holes of tens of megabytes in the heap.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


class Event:
    """Set once its op has finished. `wait` blocks, then raises what the op raised, if anything.

    A flag and a plain lock: an exception that a signal handler raises in the thread that waits leaves nothing locked
    that another thread would wait for (in `threading.Event` it can).
    """

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._is_set = False
        self._gate = threading.Lock()
        self._gate.acquire()

    def set(self, error: BaseException | None = None) -> None:
        """Once set, an event stays as it is."""
        if not self._is_set:
            self._error, self._is_set = error, True
            with contextlib.suppress(RuntimeError):  # two at once: it is open
                self._gate.release()

    def is_done(self) -> bool:
        return self._is_set

    def wait(self) -> None:
        self.wait_ended()
        if self._error is not None:
            raise self._error

    def wait_ended(self) -> None:
        """Wait for the op's end, and leave what it raised alone."""
        while not self._is_set:
            if self._gate.acquire(timeout=_LOOK_S):
                self._gate.release()


class _Meeting:
    """Where all workers of a stream come together: what was submitted before has ended then."""

    def __init__(self, count: int) -> None:
        self._left, self._lock, self.held = count, threading.Lock(), Event()

    def join(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self.held.set()
        self.held.wait()


class Later:
    """Values that were enqueued for the host; `get` waits for them."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def get(self) -> list[float]:
        return [float(x) for x in self._values.tolist()]


_Op = tuple[Callable[[], None], Sequence[Event], Event]


class Stream:
    """Ops in submission order on `threads` workers; with threads=0 `submit` waits until the op has run.

    With one thread ops also finish in order. With more, later ops may overtake; events say what must not. Signal
    handlers run on the main thread only, so no op can be torn by what they raise: with threads=0 too, ops of the main
    thread run on a worker. `submit` hands an op over in one move; nothing has to be undone if it is broken off.
    """

    def __init__(self, name: str, threads: int = 1) -> None:
        self.name = name
        self._in_order = threads == 0
        self._queue: queue.SimpleQueue[_Op | _Meeting | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"zo_offload:{name}:{i}", daemon=True)
            for i in range(max(1, threads))
        ]
        if not self._in_order:
            self._start()

    def submit(self, fn: Callable[[], None], after: Sequence[Event] = (), event: Event | None = None) -> Event:
        """Enqueue fn; the returned event is set when it has run, or failed, or when an event it waits for failed."""
        event = event or self._new_event()
        if self._in_order:
            self._run_here(fn, after, event)
        else:
            self._queue.put((fn, after, event))
        return event

    def _run_here(self, fn: Callable[[], None], after: Sequence[Event], event: Event) -> None:
        if threading.current_thread() is not threading.main_thread():
            self._run(fn, after, event)
            return
        self._start()
        self._queue.put((fn, after, event))
        event.wait_ended()

    def drain(self) -> None:
        """Wait until every op submitted so far has ended. Raises nothing: errors are in the ops' events."""
        workers = [thread for thread in self._threads if thread.is_alive()]
        if workers:
            meeting = _Meeting(len(workers))
            # in one move of the interpreter: half a meeting would keep those who came
            deque(map(self._queue.put, [meeting] * len(workers)), maxlen=0)
            meeting.held.wait()

    def close(self) -> None:
        """End the workers after the ops already submitted. Safe to call twice."""
        for thread in self._threads:
            if thread.is_alive():
                self._queue.put(None)
        for thread in self._threads:
            # a worker can be where the garbage collector finds an engine that nobody closed
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()
        self._threads = []

    def _start(self) -> None:
        for thread in self._threads:
            if thread.ident is None:
                thread.start()

    def _new_event(self) -> Event:
        return Event()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, _Meeting):
                item.join()
            else:
                self._run(*item)
            del item  # what an op refers to may be large

    def _run(self, fn: Callable[[], None], after: Sequence[Event], event: Event) -> None:
        try:
            for earlier in after:
                earlier.wait()
            fn()
            event.set()
        except BaseException as error:  # handed to whoever waits for the event, which is where it can be acted on
            event.set(error)


def map_memory(nbytes: int, *, forked: bool = True) -> Tensor:
    """Zeroed uint8 memory of exactly nbytes, page-aligned, returned to the system when its last view dies.

    mmap rather than malloc: nothing is rounded up, and huge pages (where the system grants them) save most of the page
    faults and TLB misses of a window that is walked end to end. forked: processes that are forked off have it too.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= 1 << 22 and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages: plain ones work the same
            memory.madvise(mmap.MADV_HUGEPAGE)
    if not forked and hasattr(mmap, "MADV_DONTFORK"):
        memory.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(memory, dtype=torch.uint8)


class CpuDevice:
    """Host memory and worker threads behind the device interface."""

    kind = "cpu"
    torch_device = torch.device("cpu")
    late = False
    """Losses stay on the device and the host reads them a step late. On the CPU they are there at once."""
    context_bytes = 0

    def alloc(self, nbytes: int) -> Tensor:
        """A uint8 tensor where blocks are computed with; see `map_memory`."""
        return map_memory(nbytes)

    def host_alloc(self, nbytes: int) -> Tensor:
        """Memory for blocks that live on the host."""
        return self.alloc(nbytes)

    def wrap(self, tier: Tier, offload: str, block_bytes: Sequence[int], pin: str = "auto") -> Tier:
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
