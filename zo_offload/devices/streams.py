"""Streams and events of all devices: ops run in order on worker threads, and events order them.

A device whose work runs by itself once it is enqueued (`cuda.py`) says what done means there, not how ops
are handed over.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence

from torch import Tensor

_LOOK_S = 0.1  # how often a thread that waits looks at the flag: only where it is not woken, see `Event`


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
