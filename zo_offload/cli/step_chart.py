"""One step of a run as an SVG of bars over time: waits of compute, fetches, fused passes and flushes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..run.timed import FILE, LANES
from ..system import diskio
from .chart import COLOURS, ticks

_WIDTH, _LEFT, _RIGHT, _ROW, _TOP = 960, 130, 60, 26, 30  # right: half of the last mark's text, and a little more
_LEAST = 0.25  # pixels: narrower bars are drawn this wide, and only where there is no bar yet
_ROWS = {
    "wait": "compute waits", "fused": "weights are made", "fetch": "blocks fetched", "flush": "blocks flushed",
}  # fmt: skip
_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class StepTimes:
    """The times of one step. spans: (what, block's name, start, seconds)."""

    step: int
    seconds: float
    spans: Sequence[tuple[str, str, float, float]]

    def share(self, what: str) -> float:
        """Share of the step during which at least one thread did `what`."""
        covered = end = 0.0
        for start, stop in sorted((a, min(a + s, self.seconds)) for kind, _, a, s in self.spans if kind == what):
            covered += max(0.0, stop - max(start, end))
            end = max(end, stop)
        return covered / self.seconds if self.seconds else 0.0


def read_times(run: Path) -> StepTimes | None:
    """A run's timed step; None if there is none, or if the file is unreadable, since the run does not depend on it."""
    path = run / FILE
    try:
        if path.stat().st_size > _MOST_BYTES:
            return None
        record = json.loads(diskio.read_file(path))
        spans = [
            (LANES[event["tid"]], str(event["name"]), event["ts"] / 1e6, event["dur"] / 1e6)
            for event in record["traceEvents"]
            if event["ph"] == "X"
        ]
        seconds = float(record["seconds"])
        sound = all(math.isfinite(number) for _, _, *numbers in spans for number in (*numbers, seconds))
        return StepTimes(int(record["step"]), seconds, spans) if sound and seconds > 0 else None
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None


def step_chart(times: StepTimes) -> str:
    """An <svg>; the pointer on a bar shows its block."""
    marks = [tick for tick in ticks(0.0, times.seconds * 1e3) if tick <= times.seconds * 1e3 * 1.02]
    height = _TOP + _ROW * len(LANES) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" font-family="sans-serif" '
        f'font-size="12" style="max-width: {_WIDTH}px" aria-label="step {times.step} over time">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="18" font-size="14" font-weight="bold">Step {times.step}: {times.seconds:.3g} s</text>',
    ]
    bottom = _TOP + _ROW * len(LANES)
    for mark in marks:
        x = round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * mark / (times.seconds * 1e3), 1)
        parts.append(f'<path d="M{x} {_TOP}V{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{mark:g} ms</text>')
    for number, lane in enumerate(LANES):
        y = _TOP + _ROW * number
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 17}" text-anchor="end">{_ROWS[lane]}</text>')
        parts += _bars(times, lane, y, COLOURS[number])
    parts.append("</svg>")
    return "\n".join(parts)


def _bars(times: StepTimes, lane: str, y: int, colour: str) -> Iterator[str]:
    scale, drawn = (_WIDTH - _LEFT - _RIGHT) / times.seconds, -1.0
    for _, name, start, seconds in sorted((s for s in times.spans if s[0] == lane), key=lambda span: span[2]):
        x, width = _LEFT + scale * start, scale * max(0.0, min(seconds, times.seconds - start))
        if start > times.seconds or (width < _LEAST and x < drawn):
            continue
        width = max(width, _LEAST)
        drawn = x + width
        yield (
            f'<rect x="{x:.2f}" y="{y + 4}" width="{width:.2f}" height="{_ROW - 8}" fill="{colour}">'
            f"<title>{escape(name)}: {1e3 * seconds:.3g} ms</title></rect>"
        )


def told(times: StepTimes) -> Mapping[str, Any]:
    """Shares of the step, in words."""
    return {_ROWS[lane]: f"{100 * times.share(lane):.1f} % of the step" for lane in LANES}
