"""Between a GPU and blocks that live in host memory or on disk.

`HostSlabs`: blocks in host memory, one exact slab each. A thread of its own page-locks slab after slab while the run
is under way already; copies of a locked slab run by themselves at the link's speed, those of one that is not locked
(yet) go through a small ring of pinned chunks, filled by the thread that enqueues them. Where the system refuses to
lock, the ring does for good.

`ThroughHost`: blocks in files. A block is read into pinned memory whole, where its checksum is tested, and copied from
there; two such buffers for fetches, one for flushes, are all the host memory it takes.

Both are tiers; fetch and flush run on the device's fetch and flush workers, under their streams. Host code may touch
a pinned chunk again only after the copy from or to it is done: that is the one wait of each loop, on a worker.
"""

from __future__ import annotations

import queue
import resource
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import BudgetError
from ..kernels.driver import CudaError
from ..system.units import show_bytes
from ..tiers import UNKNOWN, HostTier, Spans, Tier
from .backend import Backend

CHUNK_BYTES, NUM_CHUNKS = 16 << 20, 3  # each way: 4 % of OPT-1.3B's bytes together, and every copy still a millisecond


@dataclass
class Chunk:
    """Pinned memory and the last copy that touched it."""

    memory: Tensor
    mark: Any = None


class Ring:
    """Pinned chunks handed out one at a time; a chunk comes back with a mark behind the copy that uses it."""

    def __init__(self, backend: Backend, nbytes: int, count: int) -> None:
        self._backend, self._nbytes, self._count = backend, nbytes, count
        self._free: queue.Queue[Chunk] = queue.Queue()
        self._made = 0
        self._lock = threading.Lock()
        self.nbytes = 0

    @contextmanager
    def chunk(self) -> Iterator[Tensor]:
        """A chunk that no copy uses any more. What is enqueued on the current stream inside of the `with` uses it."""
        chunk = self._take()
        if chunk.mark is not None:
            self._backend.synchronize(chunk.mark)
        try:
            yield chunk.memory
        finally:
            chunk.mark = chunk.mark if chunk.mark is not None else self._backend.make_event()
            self._backend.record(chunk.mark, None)
            self._free.put(chunk)

    def _take(self) -> Chunk:
        with self._lock:
            if self._free.empty() and self._made < self._count:
                self._made += 1
                self.nbytes += self._nbytes
                return Chunk(self._backend.staging(self._nbytes))
        return self._free.get()


class HostSlabs:
    """A `HostTier` whose slabs are page-locked in the background. pin: "auto" falls back to the ring where the system
    refuses, "pinned" raises BudgetError at the next fetch or flush, "staged" does not lock."""

    in_memory = True

    def __init__(self, tier: HostTier, backend: Backend, pin: str) -> None:
        self._tier, self._backend, self._pin = tier, backend, pin
        count = len(tier.slabs)
        self._locks = [threading.Lock() for _ in range(count)]  # a slab is not locked while a copy of it is enqueued
        self._pinned = [False] * count
        self._fetch_ring = Ring(backend, CHUNK_BYTES, NUM_CHUNKS)
        self._flush_ring = Ring(backend, CHUNK_BYTES, NUM_CHUNKS)
        self._failure: BudgetError | None = None
        self._stop = threading.Event()
        self._worker = threading.Thread(target=self._lock_all, name="zo_offload:pin", daemon=True)
        if pin != "staged":
            self._worker.start()

    # ---- tier --------------------------------------------------------------------------------------------------------

    def fetch(self, block: int, out: Tensor, start: int = 0) -> None:
        slab = self._tier.slabs[block][start:]
        with self._copying(block) as pinned:
            if pinned or not self._backend.is_device(out):
                self._backend.copy(out, slab[: out.numel()])
                return
            for at in range(0, out.numel(), CHUNK_BYTES):
                part = out[at : at + CHUNK_BYTES]
                with self._fetch_ring.chunk() as chunk:
                    chunk[: part.numel()].copy_(slab[at : at + part.numel()])
                    self._backend.copy(part, chunk[: part.numel()])

    def flush(self, block: int, data: Tensor, spans: Spans, version: int) -> None:
        slab = self._tier.slabs[block]
        with self._copying(block) as pinned:
            self._tier.set_version(block, UNKNOWN)
            for offset, nbytes in spans:
                if pinned or not self._backend.is_device(data):
                    self._backend.copy(slab[offset : offset + nbytes], data[offset : offset + nbytes])
                else:
                    self._flush_staged(slab[offset : offset + nbytes], data[offset : offset + nbytes])
        self._tier.set_version(block, version)

    def _flush_staged(self, slab: Tensor, data: Tensor) -> None:
        for start in range(0, data.numel(), CHUNK_BYTES):
            part = data[start : start + CHUNK_BYTES]
            with self._flush_ring.chunk() as chunk:
                self._backend.copy(chunk[: part.numel()], part)
                self._backend.drain(None)
                slab[start : start + part.numel()].copy_(chunk[: part.numel()])

    def version(self, block: int) -> int:
        return self._tier.version(block)

    def view(self, block: int) -> Tensor | None:
        return None

    def close(self) -> None:
        """Ends the locking, unlocks what was locked; the tier itself stays open. The streams must have drained."""
        self._stop.set()
        if self._worker.is_alive():
            self._worker.join()
        for block, pinned in enumerate(self._pinned):
            if pinned:
                self._backend.unlock(self._tier.slabs[block])
        self._pinned = [False] * len(self._pinned)

    # ---- locking -----------------------------------------------------------------------------------------------------

    @property
    def pinned_bytes(self) -> int:
        return sum(slab.numel() for slab, pinned in zip(self._tier.slabs, self._pinned, strict=False) if pinned)

    def wait_pinned(self) -> None:
        """Until all slabs are locked or the system has refused one; for measurements that should not start before."""
        if self._worker.is_alive():
            self._worker.join()

    @contextmanager
    def _copying(self, block: int) -> Iterator[bool]:
        if self._failure is not None and self._pin == "pinned":
            raise self._failure
        with self._locks[block]:
            yield self._pinned[block]

    def _lock_all(self) -> None:
        for block, slab in enumerate(self._tier.slabs):
            if self._stop.is_set():
                return
            try:
                with self._locks[block]:
                    self._backend.lock(slab)
                    self._pinned[block] = True
            except CudaError as error:
                self._failure = self._refusal(block, slab, error)
                if self._pin == "auto":
                    warnings.warn(f"{self._failure}. The run goes on through a ring of pinned chunks", stacklevel=1)
                return

    def _refusal(self, block: int, slab: Tensor, error: CudaError) -> BudgetError:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        shown = "unlimited" if limit == resource.RLIM_INFINITY else show_bytes(limit)
        total = sum(s.numel() for s in self._tier.slabs)
        return BudgetError(
            f"host memory of block {block} ({show_bytes(slab.numel())}) cannot be page-locked: {error}. "
            f"{show_bytes(self.pinned_bytes)} of {show_bytes(total)} are locked, the process may lock {shown} "
            "(ulimit -l). Raise the limit, or set host_memory='staged'"
        )


class ThroughHost:
    """A tier that knows host memory only (files), for blocks in device memory."""

    in_memory = False

    def __init__(self, tier: Tier, backend: Backend, largest_block: int) -> None:
        self._tier, self._backend = tier, backend
        self._fetch_buffers = Ring(backend, largest_block, 2)
        self._flush_buffers = Ring(backend, largest_block, 1)

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
        """The tier itself stays open."""
