"""A run as one self-contained HTML page: its settings, results and costs. No script, nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ..journal.selection import larger_is_better
from ..system.units import show_bytes
from .before_after import Example
from .chart import Curve, line_chart
from .history import AXES, History
from .step_chart import read_times, step_chart, told

_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 980px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
svg { width: 100%; max-width: 640px }
table { border-collapse: collapse } td, th { text-align: left; padding: 2px 14px 2px 0; vertical-align: top }
tr + tr { border-top: 1px solid #eee }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(430px, 100%), 1fr)); gap: 1em }
.warning { background: #fff3cd; padding: 4px 10px } .right { background: #e6f4ea } .wrong { background: #fdecea }
.right::after { content: " ✓" } .wrong::after { content: " ✗" }
code { white-space: pre-wrap; word-break: break-word }
"""


def charts(runs: Sequence[History], axis: str = "steps") -> dict[str, str]:
    """Names and <svg>s: the loss in training and on held-out rows, then each other evaluated number."""
    several = len(runs) > 1
    called = {id(run): f"{run.name}, " if several else "" for run in runs}
    trained = [
        Curve(f"{called[id(run)]}training", run.losses(axis), pale=True) for run in runs if not several or not run.evals
    ]
    held_out = [Curve(f"{called[id(run)]}held-out", run.curve("loss", axis), dots=True) for run in runs]
    found = {"loss": line_chart([*held_out, *trained], "Loss", AXES[axis], "loss")}
    for name in dict.fromkeys(name for run in runs for name in run.measured() if name != "loss"):
        curves = [Curve(run.name if several else "held-out", run.curve(name, axis), dots=True) for run in runs]
        values = [y for curve in curves for _, y in curve.pairs]
        share = bool(values) and all(0 <= y <= 1 for y in values)
        found[name] = line_chart(curves, name.replace("_", " ").capitalize(), AXES[axis], name, share=share)
    return found


def report(runs: Sequence[History], examples: Mapping[str, Sequence[Example]] | None = None) -> str:
    """The page of one run, or of several side by side. examples: rows with answers, by the run's name."""
    names = [run.name for run in runs]
    title = ", ".join(names)
    body = [f"<h1>{escape(title)}</h1>"]
    for run in runs:
        body += [f'<p class="warning">{escape(run.name)}: {escape(text)}</p>' for text in run.warnings]
    body += ["<h2>Reached</h2>", _table(["", *names], _reached(runs))]
    for axis in ("steps", *(("bytes",) if any(run.points and run.points[-1].cost["bytes"] for run in runs) else ())):
        if axis == "bytes":
            body.append("<h2>Against bytes moved</h2>")
        body += ['<div class="charts">', *charts(runs, axis).values(), "</div>"]
    body += ["<h2>Before and after</h2>"] if examples else []
    for name, rows in (examples or {}).items():
        body += [f"<h3>{escape(name)}</h3>" * (len(runs) > 1), _answers(rows)]
    body += ["<h2>Cost</h2>", _table(["", *names], _cost(runs))]
    if any(run.memory for run in runs):
        body += ["<h2>Memory</h2>", _table(["", *names], _memory(runs))]
    body += _steps(runs)
    body += ["<h2>Settings</h2>", _table(["", *names], _settings(runs))]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="generator" content="zo_offload">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


_LONGEST = 400  # characters of a row or an answer
_HEADER = ("model", "method", "noise", "seed", "fold_every", "rounding", "objective", "versions", "created")
_ASKED = ("offload", "device", "device_memory", "num_slots", "compute", "trainable", "adapter")
_CALLED = ("data", "eval_data", "batch_size", "micro_batches", "train_rows", "eval_rows", "eval_every")


def _reached(runs: Sequence[History]) -> Iterable[Sequence[str]]:
    yield ["steps", *(f"{len(run.points)}" + f" ({run.skipped} skipped)" * bool(run.skipped) for run in runs)]
    for name in dict.fromkeys(name for run in runs for name in run.measured()):
        yield [f"held-out {name.replace('_', ' ')}", *(_first_and_last(run, name) for run in runs)]
    yield ["training loss", *(_ends([y for _, y in run.losses("steps", 20)]) for run in runs)]


def _first_and_last(run: History, name: str) -> str:
    values = [values[name] for values in run.evals if name in values]
    known = [value for value in values if value == value]
    if len(values) < 3 or not known:
        return _ends(values)
    best = max(known) if larger_is_better(name) else min(known)
    return f"{_ends(values)} (best {best:.4g})"


def _ends(values: Sequence[float]) -> str:
    if not values:
        return "not measured"
    return f"{values[-1]:.4g}" if len(values) == 1 else f"{values[0]:.4g} → {values[-1]:.4g}"


def _cost(runs: Sequence[History]) -> Iterable[Sequence[str]]:
    steps = [max(1, len(run.points)) for run in runs]
    forwards = [int(run.points[-1].cost["forwards"]) if run.points else 0 for run in runs]
    yield ["forward passes", *(str(count or "not known") for count in forwards)]
    yield [
        "time in steps",
        *(f"{run.seconds:.0f} s, {run.seconds / n:.3g} s a step" for run, n in zip(runs, steps, strict=True)),
    ]
    waited = [f"{100 * run.waited / run.seconds:.1f} %" if run.seconds else "not known" for run in runs]
    yield ["of this, compute waited for blocks", *waited]
    for what, total in (("into the window", "fetch_bytes"), ("out of it", "flush_bytes")):
        moved = [getattr(run, total) for run in runs]
        yield [what, *(f"{show_bytes(n)}, {show_bytes(n / k)} a step" for n, k in zip(moved, steps, strict=True))]
    files = [(run.path / "journal.zoj").stat().st_size for run in runs]
    yield ["the journal, which rebuilds the weights", *map(show_bytes, files)]


_TERMS = {
    "window": "window of blocks", "pinned": "blocks that stay in the window", "scratch": "weights of the lanes",
    "activations": "activations", "store": "the model in host memory", "process": "the process before the run",
}  # fmt: skip


def _memory(runs: Sequence[History]) -> Iterable[Sequence[str]]:
    """The planned terms, and the measured peak of the whole process."""
    for term, words in _TERMS.items():
        if any(term in run.memory for run in runs):
            yield [words, *(show_bytes(int(run.memory[term])) if term in run.memory else "-" for run in runs)]
    yield ["together, as planned", *(_bytes_or_unknown(sum(run.memory.values())) for run in runs)]
    yield ["peak of the process, measured", *(_bytes_or_unknown(run.peak_bytes) for run in runs)]


def _bytes_or_unknown(nbytes: float) -> str:
    return show_bytes(int(nbytes)) if nbytes else "not known"


def _steps(runs: Sequence[History]) -> Iterable[str]:
    """The timed step of each run that has one."""
    found = [(run, times) for run in runs if (times := read_times(run.path)) is not None]
    if not found:
        return
    yield "<h2>One step, as it ran</h2>"
    yield "<p>Time that is neither waiting nor making weights is the model's own forward, for all lanes.</p>"
    for run, times in found:
        yield f"<h3>{escape(run.name)}</h3>" * (len(runs) > 1)
        yield step_chart(times)
        yield _table(["", run.name], ([what, share] for what, share in told(times).items()))


def _answers(rows: Sequence[Example]) -> str:
    """Rows with their answers; those that the model gives rightly stand out."""
    lines = ["<table>", "<tr><th>row</th><th>wanted</th><th>before</th><th>after</th></tr>"]
    for row in rows:
        said = "".join(
            f'<td class="{"right" if text == row.wanted else "wrong"}">{escape(_short(text))}</td>'
            for text in (row.before, row.after)
        )
        lines.append(f"<tr><td>{escape(_short(row.text))}</td><td>{escape(_short(row.wanted))}</td>{said}</tr>")
    right = [sum(text == row.wanted for row in rows for text in [getattr(row, when)]) for when in ("before", "after")]
    lines.append(f"<tr><td>as wanted, of {len(rows)}</td><td></td><td>{right[0]}</td><td>{right[1]}</td></tr>")
    return "\n".join([*lines, "</table>"])


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def _settings(runs: Sequence[History]) -> Iterable[Sequence[str]]:
    for key in _HEADER:
        found = [run.header.get(key) for run in runs]
        if any(value is not None for value in found):
            yield [key, *map(_plain, found)]
    if any(run.formats for run in runs):
        yield ["storage", *(", ".join(run.formats) or "not known" for run in runs)]
    for part, keys in (("settings", _ASKED), ("fit", _CALLED)):
        for key in keys:
            found = [_part(run.settings, part).get(key) for run in runs]
            if any(value is not None for value in found):
                yield [key, *map(_plain, found)]
    options = [_part(_part(run.settings, "fit"), "options") for run in runs]
    for key in dict.fromkeys(key for found in options for key in found):
        yield [key, *(_plain(found.get(key)) for found in options)]


def _part(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A mapping inside of a mapping; empty if it is missing or something else: files may be damaged."""
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items() if inner is not None)
    return value if isinstance(value, str) else json.dumps(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["<table>"]
    if len(head) > 2:
        lines.append("<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>")
    for first, *rest in rows:
        cells = "".join(f"<td><code>{escape(cell)}</code></td>" for cell in rest)
        lines.append(f"<tr><td>{escape(first)}</td>{cells}</tr>")
    return "\n".join([*lines, "</table>"])
