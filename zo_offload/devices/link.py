"""Measures how fast blocks can move between host and device: fetch alone, flush alone, both at once. It is never
assumed, since on some hosts the two directions share bandwidth."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Link:
    """Gigabytes (1e9) per second, with page-locked host memory."""

    fetch_gbs: float
    flush_gbs: float
    both_fetch_gbs: float
    """The speed of each direction while both are busy."""
    both_flush_gbs: float

    def as_row(self) -> dict[str, float]:
        return {name: round(value, 2) for name, value in asdict(self).items()}

    def seconds(self, fetch_bytes: float, flush_bytes: float) -> float:
        """The least time to move so many bytes: both directions at once while both have work, then the rest alone."""
        together = min(fetch_bytes / self.both_fetch_gbs, flush_bytes / self.both_flush_gbs)
        rest_in = max(0.0, fetch_bytes - together * self.both_fetch_gbs) / self.fetch_gbs
        rest_out = max(0.0, flush_bytes - together * self.both_flush_gbs) / self.flush_gbs
        return (together + rest_in + rest_out) / 1e9


def measure_link(device: torch.device, nbytes: int = 64 << 20, repeats: int = 4) -> Link:
    """The link of `device`; on the CPU, copies within host memory. Takes 4 * nbytes and some milliseconds."""
    on_gpu = device.type == "cuda"
    host = [torch.zeros(nbytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
    there = [torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
    streams: list[Any] = [torch.cuda.Stream(device) for _ in range(2)] if on_gpu else [None, None]  # type: ignore[no-untyped-call]

    def run(fetch: bool, flush: bool) -> tuple[float, float]:
        """Bytes per second of each direction."""
        if not on_gpu:
            start = time.perf_counter()
            for _ in range(repeats):
                if fetch:
                    there[0].copy_(host[0])
                if flush:
                    host[1].copy_(there[1])
            rate = repeats * nbytes / max(1e-9, time.perf_counter() - start)
            return rate, rate
        torch.cuda.synchronize(device)
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(2)]  # type: ignore[no-untyped-call]
        for way, wanted in enumerate((fetch, flush)):
            if not wanted:
                continue
            with torch.cuda.stream(streams[way]):
                marks[way][0].record()
                for _ in range(repeats):
                    if way == 0:
                        there[0].copy_(host[0], non_blocking=True)
                    else:
                        host[1].copy_(there[1], non_blocking=True)
                marks[way][1].record()
        torch.cuda.synchronize(device)
        rates = [0.0, 0.0]
        for way, wanted in enumerate((fetch, flush)):
            if wanted:
                rates[way] = repeats * nbytes / (marks[way][0].elapsed_time(marks[way][1]) / 1e3)
        return rates[0], rates[1]

    run(True, True)  # the first copies warm the link up
    both = run(True, True)
    return Link(run(True, False)[0] / 1e9, run(False, True)[1] / 1e9, both[0] / 1e9, both[1] / 1e9)
