"""Names for profilers, and the times of one step; at no cost where neither is wanted: torch's own `record_function`
takes ten microseconds either way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

_NOTHING = nullcontext()


class Times:
    """When what was done to which block, by whichever thread did it: (what, block, start, seconds) on the host's clock,
    from when this was made. Where a device computes on its own, these are not its times."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self.spans: list[tuple[str, int, float, float]] = []

    @property
    def seconds(self) -> float:
        """Until now."""
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
