"""What `gpu_check` measured, each figure beside what `zo-offload plan` predicts for that GPU.

    python -m benchmarks.gpu_predicted RESULTS.jsonl [--out PAGE.md]

Reads the results of any machine, and needs no GPU. Predictions are those of the planner's formula with public rates
(`zo_offload/cli/hardware.json`); steps also with the link that was measured, so that what remains is the formula's. A
GPU without a row there is said so: the measured figures are what that row needs. Results of a dry run are set beside an
H200's predictions, which proves the plumbing alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import tell
from zo_offload import MeZO
from zo_offload.cli.answer import Machine, answer
from zo_offload.cli.costs import Work, pass_seconds
from zo_offload.cli.hardware import CONTEXT_BYTES, Gpu, find_gpu
from zo_offload.errors import ConfigError, ZOError
from zo_offload.formats import FORMATS

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def page(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "# Measured beside predicted"
    yield ""
    device = next((row["device"] for row in rows if "device" in row), "no device")
    dry = any(row.get("measured") is False for row in rows)
    try:
        gpu = find_gpu("h200" if dry else device)
    except ConfigError:
        yield f"{device} has no row in zo_offload/cli/hardware.json, so nothing was predicted for it."
        return
    yield f"{device}, predicted as {gpu.name} by `zo-offload plan` with public rates. Ratio: measured over predicted."
    if dry:
        yield "A dry run on a CPU: no number here is a measurement, and the ratios mean nothing."
    for title, lines in (
        ("Link, GB/s", link(rows, gpu)),
        ("Steps", steps(rows, gpu)),
        ("Fused pass", passes(rows, gpu)),
    ):
        found = list(lines)
        yield from ["", f"## {title}", "", "| figure | measured | predicted | ratio |", "| --- | --- | --- | --- |"]
        yield from found or ["| nothing was measured | | | |"]


def line(figure: str, measured: float | None, predicted: float, unit: str) -> str:
    if measured is None:
        return f"| {figure} | - | {predicted:.4g} {unit} | - |"
    return f"| {figure} | {measured:.4g} {unit} | {predicted:.4g} {unit} | {measured / predicted:.3g} |"


def link(rows: list[dict[str, Any]], gpu: Gpu) -> Iterator[str]:
    """The best of the repeats: the link of a shared host is not always the same."""
    found = [row for row in rows if row.get("part") == "link"]
    if not found:
        return
    alone, both = gpu.link.gb_per_s, gpu.link.gb_per_s / (1 + gpu.link.flush_cost)
    for name, predicted in (("fetch", alone), ("flush", alone), ("both_fetch", both), ("both_flush", both)):
        what = name.replace("both_", "both at once, ")
        yield line(f"{what} ({gpu.link.name})", max(row[f"{name}_gbs"] for row in found), predicted, "GB/s")


def steps(rows: list[dict[str, Any]], gpu: Gpu) -> Iterator[str]:
    fetches = [row["fetch_gbs"] for row in rows if row.get("part") == "link"]
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            if row.get("part") == "step" and str(row.get("way", "")).startswith("ours "):
                try:
                    yield from step(row, gpu, max(fetches, default=None), Path(folder))
                except ZOError as error:
                    yield f"| {row['model']}, {row['tokens']} tokens, {row['way']} | - | {error} | - |"


def step(row: dict[str, Any], gpu: Gpu, fetch_gbs: float | None, folder: Path) -> Iterator[str]:
    from benchmarks.gpu_measure import DTYPES as TORCH
    from benchmarks.gpu_measure import opt_model

    config: Any = opt_model(row["model"], TORCH[row["dtype"]], row["tokens"]).config
    path = folder / f"{row['model']}.json"
    path.write_text(json.dumps(config.to_dict() | {"dtype": DTYPES[row["dtype"]]}, default=str))
    offload = row["way"].removeprefix("ours ")
    options: dict[str, Any] = {"num_slots": 3} if offload == "host" else {}
    options |= dict(tokens=row["tokens"], batch_size=1, offload=offload, storage=row["dtype"])
    options |= dict(fold_every=row["fold_every"], model_class="OPTForCausalLM", method=MeZO())
    found = answer(str(path), Machine(gpu, gpu.link), **options)
    of = f"{row['model']}, {row['tokens']} tokens, {offload}"
    yield line(f"{of}: step ({found.step.binds} binds)", row["step_s"], found.step.seconds, "s")
    if offload == "host" and fetch_gbs is not None:
        there = replace(gpu.link, gb_per_s=fetch_gbs)
        seconds = answer(str(path), Machine(gpu, there), made=found.planned, **options).step.seconds
        yield line(f"{of}: step, with the link as measured", row["step_s"], seconds, "s")
    yield line(f"{of}: two forwards", row.get("two_forwards_s"), found.step.forwards, "s")
    device = found.planned.memory.device_bytes + CONTEXT_BYTES
    peak = row.get("peak_driver_bytes")
    yield line(f"{of}: device memory", None if peak is None else peak / 1e9, device / 1e9, "GB")


def passes(rows: list[dict[str, Any]], gpu: Gpu) -> Iterator[str]:
    """A pass with K pending updates and one fold over a billion elements, two lanes of one noise."""
    for row in rows:
        if row.get("part") != "kernels" or row.get("case") == "copy":
            continue
        name, noise, updates, _ = row["case"].split(", ")
        fmt = FORMATS[name]
        held = fmt.nbytes(10**9) + (fmt.residual_nbytes(10**9) if fmt.residual_bytes else 0)
        work = Work(0.0, 0.0, 0.0, 1e9, float(held), 2, 1, noise, int(updates.removeprefix("K=")), 1, 1)
        yield line(row["case"], row["gelem_per_s"], 1 / pass_seconds(work, gpu), "Gelem/s")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    rows = [json.loads(text) for text in args.results.read_text().splitlines()]
    tell(page(rows), args.out)


if __name__ == "__main__":
    sys.exit(main())
