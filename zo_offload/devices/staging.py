"""Transfers between a GPU and blocks in host memory or on disk.

`HostSlabs`: blocks in host memory, one slab of exact size each. A separate thread page-locks the slabs that stream, the
next visited first, during the run. Copies of a locked slab run asynchronously at the link's speed; those of a slab that
is not locked (yet) go through a small ring of pinned chunks, filled by the thread that enqueues them. If the system
refuses to lock, all copies use the ring. The ring is locked before any slab, together with a reserve that a refusal
releases: slabs could take all lockable memory, but a step needs some pinned bytes of torch's.

`ThroughHost`: blocks in files. A whole block is read into pinned memory, its checksum is tested, and it is copied from
there; its only host memory is two such buffers for fetches and one for flushes.

Both are tiers; fetch and flush run on the device's fetch and flush workers, under their streams. Host code may use a
chunk again only after the copy from or to it is done: that is the only wait of each loop, on a worker.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import BudgetError
from ..kernels.driver import CudaError
from ..system.closing import Closing
from ..tiers import UNKNOWN, Fetched, HostTier, Spans, Tier
from .backend import Backend
from .pinned import RESERVE_BYTES, Lock, host_memory, refusal, warn_pageable

CHUNK_BYTES, NUM_CHUNKS = (
    16 << 20,
    3,
)  # per direction: together 4 % of OPT-1.3B's bytes, and every copy takes a millisecond


@dataclass
class Chunk:
    """Host memory for copies, and the last copy that used it."""

    memory: Tensor
    mark: Any = None


class Ring:
    """Chunks of host memory, handed out one at a time; a chunk comes back with a mark after the copy that uses it.

    All are made with the ring, page-locked if the system allows; `refused` tells why not all are.
    """

    def __init__(self, backend: Backend, nbytes: int, count: int) -> None:
        self._backend = backend
        self._free: queue.Queue[Chunk] = queue.Queue()
        self._locks: list[Lock] = []
        self.nbytes, self.refused = nbytes * count, ""
        for _ in range(count):
            memory, lock, refused = host_memory(backend, nbytes)
            self._free.put(Chunk(memory))
            self._locks += [] if lock is None else [lock]
            self.refused = self.refused or refused

    @contextmanager
    def chunk(self) -> Iterator[Tensor]:
        """A chunk that no copy uses any more. Work enqueued on the current stream inside the `with` uses it."""
        chunk = self.take()
        assert chunk is not None
        try:
            yield chunk.memory
        finally:
            try:
                self.enqueued(chunk)
            finally:
                self.give(chunk)

    def take(self, *, wait: bool = True) -> Chunk | None:
        """A chunk that no copy uses any more; if all are taken, waits or returns None. `give` it back in any case."""
        try:
            chunk = self._free.get(block=wait)
        except queue.Empty:
            return None
        if chunk.mark is not None:
            self._backend.synchronize(chunk.mark)
        return chunk

    def enqueued(self, chunk: Chunk) -> None:
        """Work enqueued on the current stream so far uses the chunk."""
        chunk.mark = chunk.mark if chunk.mark is not None else self._backend.make_event()
        self._backend.record(chunk.mark, None)

    def give(self, chunk: Chunk) -> None:
        """Return a chunk. Its next user waits for its mark."""
        self._free.put(chunk)

    def close(self) -> None:
        """Unlock. The streams must have drained."""
        closing = Closing()
        for lock in self._locks:
            closing.add(lock.release)
        closing.close()


class HostSlabs(Fetched):
    """A `HostTier` whose slabs are page-locked in the background. pin: "auto" falls back to the ring if the system
    refuses, "pinned" raises BudgetError at the next fetch or flush, "staged" does not lock. streamed: the blocks to
    lock, in this order; the others move once or never, through the ring."""

    in_memory = True

    def __init__(self, tier: HostTier, backend: Backend, pin: str, streamed: Sequence[int]) -> None:
        self._tier, self._backend, self._pin = tier, backend, pin
        self._order = list(dict.fromkeys(streamed))
        self._slab_lock = [threading.Lock() for _ in tier.slabs]  # a slab is not locked while a copy of it is enqueued
        self._pinned: dict[int, Lock] = {}
        largest = max((slab.numel() for slab in tier.slabs), default=1)
        chunk = min(CHUNK_BYTES, max(1, largest))
        self._chunk_bytes = chunk
        self._fetch_ring = Ring(backend, chunk, NUM_CHUNKS)
        self._flush_ring = Ring(backend, chunk, NUM_CHUNKS)
        self._failure: BudgetError | None = None
        self._stop = threading.Event()
        self._reserve: tuple[Tensor, Lock] | None = None
        self._worker = threading.Thread(target=self._lock_all, name="zo_offload:pin", daemon=True)
        refused = self._fetch_ring.refused or self._flush_ring.refused
        if pin != "staged" and self._order:
            if not refused:
                memory, lock, refused = host_memory(backend, RESERVE_BYTES)
                self._reserve = None if lock is None else (memory, lock)
            if refused:
                self._refused("the ring that blocks go through, and a reserve", refused)
            else:
                self._worker.start()
        if self._fetch_ring.refused or self._flush_ring.refused:
            warn_pageable("blocks", refused)

    # ---- tier --------------------------------------------------------------------------------------------------------

    def fetch(self, block: int, out: Tensor, start: int = 0) -> None:
        slab = self._tier.slabs[block][start:]
        with self._copying(block) as pinned:
            if pinned or not self._backend.is_device(out):
                self._backend.copy(out, slab[: out.numel()])
                return
            for at in range(0, out.numel(), self._chunk_bytes):
                part = out[at : at + self._chunk_bytes]
                with self._fetch_ring.chunk() as chunk:
                    chunk[: part.numel()].copy_(slab[at : at + part.numel()])
                    self._backend.copy(part, chunk[: part.numel()])

    def flush(self, block: int, data: Tensor, spans: Spans, version: int) -> None:
        slab = self._tier.slabs[block]
        with self._copying(block) as pinned:
            self._tier.set_version(block, UNKNOWN)
            if pinned or not self._backend.is_device(data):
                for offset, nbytes in spans:
                    self._backend.copy(slab[offset : offset + nbytes], data[offset : offset + nbytes])
            else:
                self._flush_staged(slab, data, spans)
        self._tier.set_version(block, version)

    def _flush_staged(self, slab: Tensor, data: Tensor, spans: Spans) -> None:
        """Flush through the ring: while a chunk is copied to the slab, the next ones are copied from the device."""
        step = self._chunk_bytes
        parts = [(at, min(at + step, low + n)) for low, n in spans for at in range(low, low + n, step)]
        under_way: deque[tuple[Chunk, Tensor]] = deque()

        def land() -> None:
            chunk, part = under_way[0]
            assert chunk.mark is not None
            self._backend.synchronize(chunk.mark)
            part.copy_(chunk.memory[: part.numel()])
            under_way.popleft()
            self._flush_ring.give(chunk)

        try:
            for low, high in parts:
                # a thread with chunks must not wait for more: two flushes at once would wait for each other
                while (chunk := self._flush_ring.take(wait=not under_way)) is None:
                    land()
                under_way.append((chunk, slab[low:high]))
                self._backend.copy(chunk.memory[: high - low], data[low:high])
                self._flush_ring.enqueued(chunk)
            while under_way:
                land()
        finally:
            for chunk, _ in under_way:
                self._flush_ring.give(chunk)

    def version(self, block: int) -> int:
        return self._tier.version(block)

    def view(self, block: int) -> Tensor | None:
        return None

    def close(self) -> None:
        """Ends the locking and unlocks all slabs, even if one fails; the tier itself stays open. The streams must have
        drained."""
        self._stop.set()
        if self._worker.is_alive():
            self._worker.join()
        closing = Closing()
        for lock in self._pinned.values():
            closing.add(lock.release)
        for ring in (self._fetch_ring, self._flush_ring):
            closing.add(ring.close)
        self._pinned = {}
        closing.close()

    # ---- locking -----------------------------------------------------------------------------------------------------

    @property
    def pinned_bytes(self) -> int:
        return sum(self._tier.slabs[block].numel() for block in self._pinned)

    def wait_pinned(self) -> None:
        """Wait until all slabs that stream are locked or the system has refused one; for measurements that should not
        start earlier."""
        if self._worker.is_alive():
            self._worker.join()

    @contextmanager
    def _copying(self, block: int) -> Iterator[bool]:
        if self._failure is not None and self._pin == "pinned":
            raise self._failure
        with self._slab_lock[block]:
            yield block in self._pinned

    def _lock_all(self) -> None:
        try:
            for block in self._order:
                if self._stop.is_set():
                    return
                slab = self._tier.slabs[block]
                with self._slab_lock[block]:
                    self._pinned[block] = Lock(self._backend, slab)
        except CudaError as error:
            self._refused(f"host memory of block {block}", str(error))
        finally:
            if self._reserve is not None:
                with contextlib.suppress(CudaError):  # a GPU that has failed: every later call reports it
                    self._reserve[1].release()
                self._reserve = None

    def _refused(self, what: str, reason: str) -> None:
        total = sum(self._tier.slabs[block].numel() for block in self._order)
        self._failure = refusal(what, self.pinned_bytes, total, reason)
        if self._pin == "auto":
            warnings.warn(f"{self._failure}. The run goes on through a ring of chunks", stacklevel=1)


class ThroughHost(Fetched):
    """A tier that reads and writes host memory (files), for blocks in device memory. pin: "pinned" raises BudgetError
    if its buffers cannot be locked; otherwise they are then pageable."""

    in_memory = False

    def __init__(self, tier: Tier, backend: Backend, largest_block: int, pin: str = "auto") -> None:
        self._tier, self._backend = tier, backend
        self._fetch_buffers = Ring(backend, largest_block, 2)
        self._flush_buffers = Ring(backend, largest_block, 1)
        if refused := self._fetch_buffers.refused or self._flush_buffers.refused:
            if pin == "pinned":
                self.close()
                raise refusal("the buffers that blocks are read into", 0, 3 * largest_block, refused)
            warn_pageable("blocks", refused)

    def fetch(self, block: int, out: Tensor, start: int = 0) -> None:
        if not self._backend.is_device(out):
            self._tier.fetch(block, out, start)
            return
        with self._fetch_buffers.chunk() as buffer:
            self._tier.fetch(block, buffer[: out.numel()], start)
            self._backend.copy(out, buffer[: out.numel()])

    def flush(self, block: int, data: Tensor, spans: Spans, version: int) -> None:
        if not self._backend.is_device(data):
            self._tier.flush(block, data, spans, version)
            return
        with self._flush_buffers.chunk() as buffer:
            for offset, nbytes in spans:
                self._backend.copy(buffer[offset : offset + nbytes], data[offset : offset + nbytes])
            self._backend.drain(None)  # the file gets bytes that have arrived
            self._tier.flush(block, buffer[: data.numel()], spans, version)

    def version(self, block: int) -> int:
        return self._tier.version(block)

    def view(self, block: int) -> Tensor | None:
        return None

    def close(self) -> None:
        """Unlocks its buffers; the tier itself stays open. The streams must have drained."""
        closing = Closing()
        for ring in (self._fetch_buffers, self._flush_buffers):
            closing.add(ring.close)
        closing.close()
