"""The CPU as a device: exact-size memory, streams made of worker threads, events between them."""

from __future__ import annotations

import contextlib
import mmap
import queue
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
        event = event or Event()
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
            with self._idle:
                self._open_ops -= 1
                self._idle.notify_all()


class CpuDevice:
    """Host memory and worker threads behind the device interface."""

    kind = "cpu"

    def alloc(self, nbytes: int) -> Tensor:
        """A zeroed uint8 tensor of exactly nbytes, page-aligned, returned to the system when its last view dies.

        mmap rather than malloc: nothing is rounded up, and huge pages (where the system grants them) save most of
        the page faults and TLB misses of a window that is walked end to end.
        """
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if nbytes >= 1 << 22 and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without transparent huge pages: plain ones work the same
                memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def stream(self, name: str, threads: int) -> Stream:
        return Stream(name, threads)
