"""Line charts as SVG: curves of runs, for a page or a file.

Written here because reports are made on the machine of the run, which may have no plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 340  # the legend comes below
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 26, 34, 48
_LINE, _SHORT, _LONG = 18, 20, 44  # of the legend: height; characters of a name, two names or one in a line
COLOURS = ("#2563ab", "#c8501e", "#2b8a3e", "#8e44ad", "#b8860b", "#0f8b8d", "#d6336c", "#555555")
"""Distinct in grey as well as in colour; from the ninth curve on they repeat, dashed."""


@dataclass(frozen=True)
class Curve:
    """(x, y) pairs in the order of x, with a name for the legend. dots: mark each pair."""

    name: str
    pairs: Sequence[tuple[float, float]]
    dots: bool = False
    pale: bool = False


def line_chart(curves: Sequence[Curve], title: str, x_name: str, y_name: str, *, share: bool = False) -> str:
    """An <svg> of the curves that have pairs. share: y is between 0 and 1 and shown in per cent."""
    shown = [curve for curve in curves if curve.pairs]
    xs = [x for curve in shown for x, _ in curve.pairs] or [0.0, 1.0]
    ys = [y for curve in shown for _, y in curve.pairs] or [0.0, 1.0]
    x_ticks, y_ticks = ticks(min(*xs, 0.0), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high, y_low, y_high = x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return (
            round(_LEFT + across * (WIDTH - _LEFT - _RIGHT), 1),
            round(HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM), 1),
        )

    columns = 2 if all(len(curve.name) <= _SHORT for curve in shown) else 1
    height = HEIGHT + _LINE * math.ceil(len(shown) / columns)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="sans-serif" font-size="12" aria-label="{escape(title, quote=True)}">',
        "<!-- drawn by zo_offload -->",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="18" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for tick in y_ticks:
        x, y = at(x_low, tick)
        text = f"{100 * tick:.4g} %" if share else short(tick)
        parts.append(f'<path d="M{x} {y}H{WIDTH - _RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{text}</text>')
    for tick in x_ticks:
        x, y = at(tick, y_low)
        parts.append(f'<path d="M{x} {y}v5" stroke="#444"/>')
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{short(tick)}</text>')
    x, y = at(x_low, y_low)
    parts.append(f'<path d="M{x} {y}H{WIDTH - _RIGHT}" stroke="#444"/>')
    parts.append(f'<text x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_name)}</text>')
    parts.append(
        f'<text transform="translate(14 {(HEIGHT - _BOTTOM + _TOP) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_name)}</text>"
    )
    for number, curve in enumerate(shown):
        legend = (_LEFT + number % columns * 280, HEIGHT + 8 + _LINE * (number // columns))
        parts.extend(_drawn(curve, number, [at(x, y) for x, y in curve.pairs], legend))
    parts.append("</svg>")
    return "\n".join(parts)


def _drawn(curve: Curve, number: int, places: Sequence[tuple[float, float]], legend: tuple[float, float]) -> list[str]:
    """A curve, and its name in the legend at that place."""
    colour = COLOURS[number % len(COLOURS)]
    style = f'stroke="{colour}" fill="none" stroke-width="{1 if curve.pale else 2}"'
    style += ' stroke-dasharray="6 3"' * (number >= len(COLOURS)) + ' opacity="0.55"' * curve.pale
    line = "M" + "L".join(f"{x} {y}" for x, y in places)
    parts = [f'<path d="{line}" {style} stroke-linejoin="round"/>']
    if curve.dots or len(places) == 1:
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in places]
    x, y = legend
    parts.append(f'<path d="M{x} {y}h22" {style}/>')
    parts.append(f'<text x="{x + 28}" y="{y + 4}">{escape(_cut(curve.name))}</text>')
    return parts


def _cut(name: str) -> str:
    """A name that fits into a line of the legend. The middle is left out: runs of a sweep often differ at the end."""
    return name if len(name) <= _LONG else f"{name[: _LONG // 2 - 2]}...{name[-(_LONG // 2 - 1) :]}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` evenly spaced round numbers, from at most `low` to at least `high`."""
    if not high > low:
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(scale * times for times in (1, 2, 2.5, 5, 10) if scale * times >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]


def short(value: float) -> str:
    """A number for an axis: 12000 -> 12k, 3.2e9 -> 3.2G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}"
