"""A connection to a torch store on another host whose calls always end, even if the other side dies.

A call of TCPStore's client waits as long as its server is silent: for ever, if that process is stopped or its host is
gone. So a separate thread makes the calls, one at a time, and the caller waits for it only for a limited time. After a
time-out or any error, the line is lost for good: its thread is abandoned (it ends with the process, or when the server
answers), and a new line must be made.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as _distributed

from ..errors import ConfigError, RankError

SILENT_S = 20.0
"""Seconds without an answer after which a store counts as lost."""
GRACE_S = 2.0
"""Seconds to wait after that: a process that was stopped finds the time already over when it continues."""
PAYLOAD_BYTES = 4 << 20
"""Longest value: TCPStore closes a connection that brings twice as much."""

dist: Any = _distributed


class Lost(RankError):
    """The store does not answer (any more): a new line must be made."""


class Line:
    """Calls of a `torch.distributed.Store` with a time-out. open: makes the store, on the line's thread. One caller."""

    def __init__(self, open: Callable[[], Any], where: str, silent_s: float = SILENT_S) -> None:
        self._where, self._silent_s = where, silent_s
        self._calls: queue.SimpleQueue[tuple[Callable[[Any], Any], queue.SimpleQueue[Any]] | None] = queue.SimpleQueue()
        self._lost: str | None = None
        threading.Thread(target=self._work, args=(open,), name="zo_offload:line", daemon=True).start()
        self._call(lambda store: None)  # it is open

    def _work(self, open: Callable[[], Any]) -> None:
        store: Any = None
        while (call := self._calls.get()) is not None:
            method, answer = call
            try:
                store = open() if store is None else store
                answer.put((method(store), None))
            except (RuntimeError, OSError, ValueError) as error:  # torch.distributed's errors derive from the first
                answer.put((None, error))
        del store

    def _call(self, method: Callable[[Any], Any]) -> Any:
        if self._lost is not None:
            raise Lost(self._lost)
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._calls.put((method, answer))
        value: Any = None
        error: Any = f"no answer in {self._silent_s:.0f} s"
        for seconds in (self._silent_s, min(GRACE_S, self._silent_s)):  # this process may have been stopped meanwhile
            with suppress(queue.Empty):
                value, error = answer.get(timeout=seconds)
                break
        if error is not None:
            self._lost = f"{self._where} cannot be reached ({str(error).splitlines()[0][:150]})"
            self.close()
            raise Lost(self._lost)
        return value

    def close(self) -> None:
        """Let the thread end, when it can. Safe to call twice."""
        if self._lost is None:
            self._lost = f"{self._where}: this line was closed"
        self._calls.put(None)

    # ---- calls of the store ------------------------------------------------------------------------------------------

    def get(self, key: str) -> bytes | None:
        """The value of a key, None if there is none. (`Store.get` would wait for it.)"""
        found: bytes = self._call(lambda store: store.compare_set(key, "?", "?"))
        return None if found == b"?" else found

    def set(self, key: str, value: bytes) -> None:
        assert len(value) <= PAYLOAD_BYTES and value != b"?"
        self._call(lambda store: store.set(key, value))

    def get_all(self, keys: list[str]) -> list[bytes]:
        """The values of several keys in one call; all must have one."""
        return list(self._call(lambda store: store.multi_get(keys)))

    def first_of_all(self, values: Mapping[str, bytes]) -> None:
        """Set those keys that have no value."""

        def set_each(store: Any) -> None:
            for key, value in values.items():
                store.compare_set(key, "", value.decode())

        self._call(set_each)

    def first(self, key: str, value: bytes, before: bytes = b"") -> bytes:
        """Set a key if it still has the value `before` (b"": none); returns its present value."""
        found: bytes = self._call(lambda store: store.compare_set(key, before.decode(), value.decode()))
        return found

    def add(self, key: str, count: int) -> int:
        """Add `count` to a counter and return its new value."""
        return int(self._call(lambda store: store.add(key, count)))

    def has(self, keys: list[str]) -> bool:
        """Whether all of them have values."""
        return bool(self._call(lambda store: store.check(keys)))

    def delete(self, *keys: str) -> None:
        def delete_each(store: Any) -> None:
            for key in keys:
                store.delete_key(key)

        self._call(delete_each)

    def size(self) -> int:
        """How many keys there are."""
        return int(self._call(lambda store: store.num_keys()))


# ---- addresses -------------------------------------------------------------------------------------------------------


def parse(address: str, what: str = "address") -> tuple[str, int]:
    """ "host:29400", ":29400", "[::1]:29400" as (host, port). Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not int(port) < 1 << 16:
        raise ConfigError(f"{what} {address!r}: expected HOST:PORT, such as 10.0.0.7:29400")
    return host.strip("[]"), int(port)


def served(address: str) -> tuple[Any, int]:
    """A store of this process that listens at an address and nowhere else, and its port. Raises ConfigError."""
    host, port = parse(address)
    try:
        family = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a keeper that is started again
            listener.bind((host, port))
            listener.listen(1024)
            port = listener.getsockname()[1]
            store = dist.TCPStore(
                host or "localhost", port, None, is_master=True, wait_for_workers=False,
                timeout=timedelta(seconds=SILENT_S), master_listen_fd=listener.detach(), use_libuv=True,
            )  # fmt: skip
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{address!r} cannot be listened at: {str(error).splitlines()[0][:150]}") from None
    return store, port


def dialled(address: str, silent_s: float = SILENT_S) -> Line:
    """A line to the store at an address. Raises Lost if nobody listens there."""
    host, port = parse(address)
    host = host or "localhost"
    try:  # first without torch, whose client prints every attempt on standard error
        socket.create_connection((host, port), timeout=silent_s).close()
    except OSError as error:
        raise Lost(f"nobody answers at {address} ({error.strerror or error})") from None

    def open() -> Any:
        seconds = timedelta(seconds=silent_s)
        return dist.TCPStore(host, port, None, is_master=False, wait_for_workers=False, timeout=seconds)

    return Line(open, f"the keeper at {address}", silent_s)


def over(store: Any, where: str) -> Line:
    """A line to a store of this process."""
    return Line(lambda: store, where)


def quietly(call: Callable[[], Any]) -> None:
    """Make a call whose failure does not matter, since the other side may be gone."""
    with suppress(Lost):
        call()
