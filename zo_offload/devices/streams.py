"""Streams and events of all devices: ops run in order on worker threads, and events order them.

A device with asynchronous work (`cuda.py`) only redefines when an event is done, not how ops are submitted.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence

from torch import Tensor

_LOOK_S = 0.1  # the interval at which a waiting thread checks the flag if it is not woken, see `Event`


class Event:
    """Set once its op has finished. `wait` blocks, then raises the op's error, if any.

    A flag and a plain lock: if a signal handler raises in the waiting thread, nothing stays locked that another thread
    would wait for (as can happen with `threading.Event`).
    """

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._is_set = False
        self._gate = threading.Lock()
        self._gate.acquire()

    def set(self, error: BaseException | None = None) -> None:
        """Once set, an event does not change."""
        if not self._is_set:
            self._error, self._is_set = error, True
            with contextlib.suppress(RuntimeError):  # two at once: it is already released
                self._gate.release()

    def is_done(self) -> bool:
        return self._is_set

    def wait(self) -> None:
        self.wait_ended()
        if self._error is not None:
            raise self._error

    def wait_ended(self) -> None:
        """Wait for the op's end, without raising its error."""
        while not self._is_set:
            if self._gate.acquire(timeout=_LOOK_S):
                self._gate.release()


class _Meeting:
    """A meeting of all workers of a stream: when it is complete, all earlier ops have ended."""

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

    With one thread ops also finish in order. With more, later ops may overtake; events prevent it. Signal handlers run
    on the main thread only, so their exceptions cannot interrupt an op: even with threads=0, ops of the main thread run
    on a worker. `submit` hands an op over in one move; an interrupted call leaves nothing to undo.
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
        """Enqueue fn; the returned event is set when fn has run or failed, or when an event in `after` failed."""
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
        """Wait until every op submitted so far has ended. Does not raise: errors are in the ops' events."""
        workers = [thread for thread in self._threads if thread.is_alive()]
        if workers:
            meeting = _Meeting(len(workers))
            # in one move of the interpreter: half a meeting would block the workers that came
            deque(map(self._queue.put, [meeting] * len(workers)), maxlen=0)
            meeting.held.wait()

    def close(self) -> None:
        """End the workers after the ops already submitted. Safe to call twice."""
        for thread in self._threads:
            if thread.is_alive():
                self._queue.put(None)
        for thread in self._threads:
            # the garbage collector may close a forgotten engine on a worker
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
            del item  # an op may refer to large objects

    def _run(self, fn: Callable[[], None], after: Sequence[Event], event: Event) -> None:
        try:
            for earlier in after:
                earlier.wait()
            fn()
            event.set()
        except BaseException as error:  # raised in the thread that waits for the event, which can act on it
            event.set(error)
