"""The CPU as a device: exact-size memory, streams made of worker threads, events between them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..tiers import Tier
    from .link import Link

# glibc's; other C libraries have none. Tensors read one after another leave holes of tens of megabytes in the heap.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


class Event:
    """Set once its op has finished. `wait` blocks, then raises what the op raised, if anything."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._error: BaseException | None = None

    def set(self, error: BaseException | None = None) -> None:
        self._error = error
        self._done.set()

    def is_done(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        self._done.wait()
        if self._error is not None:
            raise self._error


class Later:
    """Values that were enqueued for the host; `get` waits for them."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def get(self) -> list[float]:
        return [float(x) for x in self._values.tolist()]


class Stream:
    """Ops in submission order on `threads` workers; with threads=0 each op runs inside `submit`.

    With one thread ops also finish in order. With more, later ops may overtake; events say what must not.
    """

    def __init__(self, name: str, threads: int = 1) -> None:
        self.name = name
        self._queue: queue.SimpleQueue[tuple[Callable[[], None], Sequence[Event], Event] | None] = queue.SimpleQueue()
        self._idle = threading.Condition()
        self._open_ops = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"zo_offload:{name}:{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[[], None], after: Sequence[Event] = (), event: Event | None = None) -> Event:
        """Enqueue fn; the returned event is set when it has run, or failed, or when an event it waits for failed."""
        event = event or self._new_event()
        with self._idle:
            self._open_ops += 1
        if self._threads:
            self._queue.put((fn, after, event))
        else:
            self._run(fn, after, event)
        return event

    def drain(self) -> None:
        """Wait until every op submitted so far has ended. Raises nothing: errors are in the ops' events."""
        with self._idle:
            self._idle.wait_for(lambda: self._open_ops == 0)

    def close(self) -> None:
        """End the workers after the ops already submitted."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _new_event(self) -> Event:
        return Event()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            self._run(*item)

    def _run(self, fn: Callable[[], None], after: Sequence[Event], event: Event) -> None:
        try:
            for earlier in after:
                earlier.wait()
            fn()
            event.set()
        except BaseException as error:  # handed to whoever waits for the event, which is where it can be acted on
            event.set(error)
        finally:
            self._ended()

    def _ended(self) -> None:
        with self._idle:
            self._open_ops -= 1
            self._idle.notify_all()


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
        from ..memory import available_bytes

        return available_bytes()


_DONE = Event()
_DONE.set()
