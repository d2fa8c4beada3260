"""Names for profilers, and the times of one step. Costs nothing if neither is needed; torch's own `record_function`
always takes ten microseconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

_NOTHING = nullcontext()


class Times:
    """Times of operations on blocks, by any thread: (what, block, start, seconds) on the host's clock, counted from the
    creation of this object. They are not the times of a device that computes asynchronously."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self.spans: list[tuple[str, int, float, float]] = []

    @property
    def seconds(self) -> float:
        """Seconds until now."""
        return time.perf_counter() - self._begin

    @contextmanager
    def taken(self, what: str, block: int) -> Iterator[None]:
        start = self.seconds
        try:
            yield
        finally:
            self.spans.append((what, block, start, self.seconds - start))


def span(name: str, times: Times | None = None, block: int = -1) -> AbstractContextManager[Any]:
    """A `with` whose body shows as `name` (zo_offload.module:phase) in a profile of this thread, and in `times`."""
    if times is not None:
        return times.taken(name.rpartition(":")[2], block)
    return record_function(name) if torch._C._autograd._profiler_enabled() else _NOTHING
