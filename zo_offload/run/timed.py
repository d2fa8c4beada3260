"""The times of one step of a run, written to its directory as a trace that `zo-offload report` draws.

The trace has the format of Chrome and Perfetto (ui.perfetto.dev opens it). It covers one step of each call of `fit`
that streams: the third, or the last if there are fewer. There is none for a GPU: it runs enqueued work at times that
only a profiler shows.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..stream.slots import Traffic
from ..system import diskio
from ..system.spans import Times

_log = logging.getLogger(__name__)

FILE = "timeline.json"
LANES = ("wait", "fused", "fetch", "flush")
"""Rows of the trace: compute waits for a block; fused passes; fetches; flushes."""
MOST = 20_000  # spans, so that the file has some megabytes at most
_STEP = 2


class TimedStep:
    """Times one of the steps from `first` to `last` and writes the trace. path: None to write nothing."""

    def __init__(self, path: Path | None, traffic: Traffic, names: Sequence[str], first: int, last: int) -> None:
        self._path, self._traffic, self._names = path, traffic, names
        self._which = min(first + _STEP, last - 1)

    def begins(self, step: int) -> None:
        if self._path is not None and step == self._which:
            self._traffic.times = Times()

    def ended(self, step: int) -> None:
        times, self._traffic.times = self._traffic.times, None
        if times is not None and self._path is not None:
            _write(self._path, trace(times, self._names, step))


def trace(times: Times, names: Sequence[str], step: int) -> dict[str, Any]:
    """The trace as JSON. names: the blocks' names, by number."""
    seconds, spans = times.seconds, times.spans[:MOST]
    rows = [
        {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": lane}}
        for tid, lane in enumerate(LANES)
    ]
    events = [
        {
            "ph": "X", "pid": 1, "tid": LANES.index(what), "name": names[block], "ts": round(1e6 * start, 1),
            "dur": round(1e6 * taken, 1),
        }
        for what, block, start, taken in spans
    ]  # fmt: skip
    return {"traceEvents": [*rows, *events], "displayTimeUnit": "ms", "step": step, "seconds": round(seconds, 6)}


def _write(path: Path, record: dict[str, Any]) -> None:
    try:
        diskio.replace_file(path, json.dumps(record).encode())
    except OSError as error:  # like metrics, for people only: no reason to end a run
        _log.warning("the times of a step are lost: %s cannot be written: %s", path, error)
