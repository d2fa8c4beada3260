"""The pages of `gpu_check`: what was measured, and one file with all of it to send."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import commit, machine

if TYPE_CHECKING:
    import argparse

    from benchmarks.gpu_check import Part

MOST = 60_000  # characters: a page of an issue on GitHub takes 65,536


def page(done: list[Part], options: argparse.Namespace, seconds: float) -> str:
    rows = [row for part in done for row in part.rows]
    about = next((row for row in rows if "versions" in row), {})
    lines = ["# GPU check" + (" (dry run on a CPU: no number here is a measurement)" if options.dry else ""), ""]
    lines += [f"Commit {commit()}, {about.get('date', 'no date')}, {about.get('device', 'no device')}, {machine()}."]
    lines += [f"Versions: {about.get('versions', {})}. Took {seconds:.0f} s.", ""]
    for row in rows:
        if row.get("part") == "host memory":
            sizes = [f"{row[key] / 1e9:.1f} GB" for key in ("available_before_bytes", "reached_bytes")]
            lines += [f"Host memory: {sizes[0]} available at first, {sizes[1]} taken to see whether it grows.", ""]
    lines += ["| part | status | seconds | last line | command |", "| --- | --- | --- | --- | --- |"]
    for part in done:
        said = last_line(part.tail) if part.reads == "text" else ""
        command = " ".join(part.command[1:])
        lines.append(f"| {part.name} | {part.status} | {part.seconds:.0f} | {said} | `{command}` |")
    lines += ["", "## Probe", "", "What no machine without a GPU could settle.", ""]
    lines += table([r for r in rows if r.get("part") == "probe"], PROBE)
    lines += ["", "## Link, GB/s", ""] + table([r for r in rows if r.get("part") == "link"], LINK)
    lines += ["", "## Fused pass", ""] + table([r for r in rows if r.get("part") == "kernels"], KERNEL)
    steps = sorted((r for r in rows if r.get("part") == "step"), key=lambda r: (r["tokens"], r["model"]))
    lines += [
        "",
        "## Steps",
        "",
        "step / limit: over max(fetch time, two plain forwards), measured in the same process.",
        "",
    ]
    lines += table(steps, STEP)
    lines += [
        "",
        "## Memory of ZO2",
        "",
        "told: by its own count, which has all that is in use on the device. driver: the most that was, less what was "
        "before it ran.",
        "",
    ]
    lines += table([r for r in rows if r.get("part") == "memory"], MEMORY)
    lines += ["", "## Goals", ""] + goals(rows)
    failed = [part for part in done if part.status != "ok"]
    for part in failed:
        lines += ["", f"## {part.name}: {part.status}", "", "```", part.tail.strip()[-1500:], "```"]
    return "\n".join(lines) + "\n"


def last_line(text: str) -> str:
    """Of a part that prints text: pytest's counts, the doctor's verdict."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:100].replace("|", "/") if lines else ""


PROBE = ("check", "verdict", "says")
LINK = ("fetch_gbs", "flush_gbs", "both_fetch_gbs", "both_flush_gbs")
KERNEL = ("case", "gelem_per_s", "gb_per_s", "share_of_copy")
STEP = ("model", "tokens", "way", "dtype", "tokens_per_s", "step_s", "step_over_limit", "binds", "peak_allocator_bytes",
        "peak_reserved_bytes", "peak_driver_bytes", "planned_device_bytes", "host_over_model")  # fmt: skip
MEMORY = ("model", "tokens", "way", "dtype", "told_bytes", "peak_driver_bytes", "host_bytes")


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> list[str]:
    if not rows:
        return ["nothing was measured"]
    head = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return head + [f"| {' | '.join(show(row.get(c), c) for c in columns)} |" for row in rows]


def show(value: Any, column: str) -> str:
    if value is None:
        return "-"
    if column.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def goals(rows: list[dict[str, Any]]) -> list[str]:
    """What was aimed at, and whether it was reached; each only where both of its numbers were measured."""
    lines = []
    by = {(r["model"], r["tokens"], r["way"]): r for r in rows if r.get("part") == "step"}
    peaks = {(r["model"], r["tokens"]): r for r in rows if r.get("part") == "memory"}
    for (model, tokens, way), row in sorted(by.items()):
        if way != "ours host":
            continue
        name = f"{model}, {tokens} tokens"
        if row.get("step_over_limit") is not None:
            lines.append(f"- {name}: step is {row['step_over_limit']} of its limit (goal: 1.10 from 6.7B up)")
        if row.get("host_over_model") is not None:
            lines.append(f"- {name}: host bytes are {row['host_over_model']} of the model's (goal: 1.05)")
        rival = by.get((model, tokens, "ZO2, its test_speed"))
        if rival:
            times = row["tokens_per_s"] / rival["tokens_per_s"]
            lines.append(f"- {name}: {times:.2f} x ZO2's tokens/s (goal: 1.5 where the link binds, never below 1)")
        peak = peaks.get((model, tokens))
        if peak and row.get("peak_driver_bytes"):
            share = row["peak_driver_bytes"] / peak["peak_driver_bytes"]
            lines.append(f"- {name}: {share:.2f} of ZO2's device memory (goal: 0.5)")
    return lines or ["nothing to compare"]


def report(pages: Sequence[Path], results: Path) -> str:
    """All pages and, as far as they fit into an issue, the results' lines without what is the same in all of them."""
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    text = "\n".join(path.read_text() for path in pages if path.exists())[: MOST * 3 // 4]
    text += "\n## Results\n\nOne JSON line a result, without versions, commit and machine.\n\n```\n"
    lines = (json.dumps({key: value for key, value in row.items() if key not in SAME}) for row in rows)
    for count, line in enumerate(lines):
        if len(text) + len(line) > MOST:
            text += f"... {len(rows) - count} more in {results.name}\n"
            break
        text += line + "\n"
    return text + "```\n"


SAME = frozenset("benchmark isa threads machine versions commit date device".split())
