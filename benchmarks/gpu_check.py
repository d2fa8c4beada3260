"""Everything that needs a GPU, in one command: build, tests, benchmarks; under nine minutes on one H200.

    make gpu-check                                  or: python -m benchmarks.gpu_check [options]
    make gpu-check GPU_CHECK="--zo2 DIR --zo2-packages DIR"     ZO2 beside it: a checkout, and its pinned packages
    make gpu-check GPU_CHECK=--dry                  the same plumbing on a CPU; measures nothing

Each part is a process of its own with its own time limit. One that fails or runs over is named at the end and the next
one starts; the exit status is 1 then. Results are one JSON line each in OUT/gpu_check.jsonl, and a page
OUT/gpu_check.md with the commands that made them; OUT is $OUT where that is set, else benchmarks/results.

Parts, most telling first, so that a machine that is taken away early has still told most:
    doctor, build, link, kernels, tests, steps of 1.3B / 6.7B / 13B beside naive MeZO, ZO2, 30B, steps of 512 tokens

With --zo2 the time does not do for everything: `--only zo2` and `--only step` are two calls. No network, no root;
torch's CUDA wheel and the packages in NEEDED must be there (greenlet is the one that images tend to lack: unpack its
wheel and set PYTHONPATH). **This has never run on a GPU**; a dry run is part of the CPU tests.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, commit, machine

MEASURE = [sys.executable, "-m", "benchmarks.gpu_measure"]
NEEDED = ("torch", "transformers", "safetensors", "accelerate", "greenlet", "numpy", "psutil", "tqdm", "pytest")
ZO2_TEST = Path("test", "mezo_sgd", "hf_opt")


@dataclass
class Part:
    """One process. limit: seconds it may take; rows: JSON lines it printed."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path = ROOT
    reads: str = "json"  # or "zo2 speed", "zo2 memory", "text"
    label: dict[str, Any] = field(default_factory=dict)
    status: str = "not run"
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    tail: str = ""


def parts(options: argparse.Namespace) -> list[Part]:
    dry = ["--dry"] if options.dry else []
    tests = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--maxfail=20"]
    if importlib.util.find_spec("pytest_timeout") is None:
        tests += ["-o", "timeout="]
    side_by_side = ["-n", "4"] if importlib.util.find_spec("xdist") and not options.dry else []
    whole = ["tests/gpu/test_gpu_kernels.py", "-k", "golden"] if options.dry else ["tests/gpu", "-k", "not budget"]
    listed = [
        Part("doctor", [sys.executable, "-m", "zo_offload"], 60, reads="text"),
        Part("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 150, reads="text"),
        Part("link", [*MEASURE, "link", *dry], 30),
        Part("kernels", [*MEASURE, "kernels", *dry], 60),
        Part("tests", [*tests, *side_by_side, *whole], 150, reads="text"),
        # what the driver counts on the whole device: alone
        Part("test of the budget", [*tests, "tests/gpu/test_gpu_engine.py", "-k", "budget"], 40, reads="text"),
    ]
    listed[1].environment = {"ZO_CUDA": "0"} if options.dry else this_gpu()
    shapes = [("opt-1.3b", 2048, 45), ("opt-6.7b", 2048, 60), ("opt-13b", 2048, 75)]

    def step(model: str, tokens: int, limit: float, what: str = "step") -> Part:
        options_of = ["--model", model, "--tokens", str(tokens), "--dtype", options.dtype]
        return Part(f"{what} {model} {tokens}", [*MEASURE, what, *options_of, *dry], limit)

    for shape in shapes[:1] if options.dry else shapes:
        listed += [step(*shape), step(*shape, what="naive")]
    listed += zo2_parts(options)
    if not options.dry:
        listed += [
            step("opt-30b", 2048, 150),
            step("opt-1.3b", 512, 40),
            step("opt-13b", 512, 60),
            step("opt-6.7b", 512, 50),
        ]
    return listed


def this_gpu() -> dict[str, str]:
    """Build for this machine's GPU alone: a quarter of the time."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"ZO_CUDA_ARCHS": ",".join(sorted({version.replace(".", "") for version in found}))} if found else {}


def zo2_parts(options: argparse.Namespace) -> Iterator[Part]:
    """ZO2's own test_speed and test_memory, unmodified, from its own directory as its scripts call them."""
    if options.zo2 is None:
        return
    if not (options.zo2 / ZO2_TEST / "test_speed.py").exists():
        raise SystemExit(f"--zo2 {options.zo2}: no {ZO2_TEST / 'test_speed.py'} there; give the root of a ZO2 checkout")
    places = [str(options.zo2), *([str(options.zo2_packages)] if options.zo2_packages else [])]
    environment = {"PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"}
    for model, tokens in (("opt_1_3b", 2048), ("opt_6_7b", 2048), ("opt_13b", 2048)):
        for what in ("speed", "memory"):
            command = [
                sys.executable, str(ZO2_TEST / f"test_{what}.py"), "--model_name", model, "--task", "causalLM",
                "--zo_method", "zo2", "--max_steps", "8" if what == "speed" else "3", "--sequence_length", str(tokens),
                "--model_dtype", "fp16" if options.dtype == "fp16" else "bf16",
            ]  # fmt: skip
            label = {"model": model.replace("opt_", "opt-").replace("_", "."), "tokens": tokens}
            yield Part(f"zo2 {what} {model}", command, 90, environment, options.zo2, f"zo2 {what}", label)


def run(part: Part, limit: float, log: Path) -> None:
    start = time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"} | part.environment
    if part.folder == ROOT:
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with log.open("w") as out:
        try:
            process = subprocess.Popen(
                part.command,
                cwd=part.folder,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            part.status = f"could not start: {error}"
            return
        try:
            code = process.wait(timeout=limit)
            part.status = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            part.status = f"stopped after {limit:.0f} s"
    part.seconds = time.monotonic() - start
    text = log.read_text(errors="replace")
    part.tail = text[-3000:]
    part.rows = list(READERS[part.reads](text, part))


def read_json(text: str, part: Part) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                part.status += ", a result line was cut"


def read_speed(text: str, part: Part) -> Iterator[dict[str, Any]]:
    """Mean of the last half of the iterations, as ZO2's own script takes it."""
    found = [float(x) for x in re.findall(r"Time cost after iteration \d+: [\d.]+ ms, ([\d.]+) tok/s", text)]
    if found:
        last = found[len(found) // 2 :]
        rate = sum(last) / len(last)
        yield {"part": "step", "way": "ZO2, its test_speed", "tokens_per_s": round(rate, 1), "n": len(last),
               "step_s": part.label["tokens"] / rate, **part.label}  # fmt: skip
    elif part.status == "ok":
        part.status = "printed no throughput"


def read_memory(text: str, part: Part) -> Iterator[dict[str, Any]]:
    gpu = [float(x) for x in re.findall(r"Peak GPU Memory after iteration \d+: ([\d.]+) MB", text)]
    cpu = [float(x) for x in re.findall(r"Peak CPU Memory after iteration \d+: ([\d.]+) MB", text)]
    if gpu:
        yield {"part": "memory", "way": "ZO2, its test_memory", "peak_driver_bytes": int(max(gpu) * 2**20),
               "host_bytes": int(max(cpu, default=0) * 2**20), **part.label}  # fmt: skip
    elif part.status == "ok":
        part.status = "printed no memory"


READERS = {"json": read_json, "zo2 speed": read_speed, "zo2 memory": read_memory, "text": lambda text, part: iter(())}


# ---- the page


def page(done: list[Part], options: argparse.Namespace, seconds: float) -> str:
    rows = [row for part in done for row in part.rows]
    about = rows[0] if rows else {}
    lines = ["# GPU check" + (" (dry run on a CPU: no number here is a measurement)" if options.dry else ""), ""]
    lines += [f"Commit {commit()}, {about.get('date', 'no date')}, {about.get('device', 'no device')}, {machine()}."]
    lines += [f"Versions: {about.get('versions', {})}. Took {seconds:.0f} s.", ""]
    lines += ["| part | status | seconds | command |", "| --- | --- | --- | --- |"]
    for part in done:
        lines.append(f"| {part.name} | {part.status} | {part.seconds:.0f} | `{' '.join(part.command[1:])}` |")
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
    lines += ["", "## Memory by ZO2's own count", ""] + table([r for r in rows if r.get("part") == "memory"], MEMORY)
    lines += ["", "## Goals", ""] + goals(rows)
    failed = [part for part in done if part.status != "ok"]
    for part in failed:
        lines += ["", f"## {part.name}: {part.status}", "", "```", part.tail.strip()[-1500:], "```"]
    return "\n".join(lines) + "\n"


LINK = ("fetch_gbs", "flush_gbs", "both_fetch_gbs", "both_flush_gbs")
KERNEL = ("case", "gelem_per_s", "gb_per_s", "share_of_copy")
STEP = ("model", "tokens", "way", "dtype", "tokens_per_s", "step_s", "step_over_limit", "binds", "peak_allocator_bytes",
        "peak_driver_bytes", "host_over_model")  # fmt: skip
MEMORY = ("model", "tokens", "way", "peak_driver_bytes", "host_bytes")


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the CPU: proves the plumbing, measures nothing")
    parser.add_argument("--zo2", type=Path, help="root of a ZO2 checkout")
    parser.add_argument("--zo2-packages", type=Path, help="where its pinned packages were installed (pip --target)")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--minutes", type=float, default=8.7, help="of all parts together")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results"))
    parser.add_argument("--only", help="parts whose name contains this")
    options = parser.parse_args(arguments)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{sys.executable} lacks {', '.join(missing)}: install them, or unpack their wheels into a folder that "
              "PYTHONPATH names (on a machine without network, bring them along)")  # fmt: skip
        return 2
    options.zo2 = options.zo2.resolve() if options.zo2 else None
    options.zo2_packages = options.zo2_packages.resolve() if options.zo2_packages else None
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    logs = options.out / "gpu_check_logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    begin = time.monotonic()
    done = [part for part in parts(options) if not options.only or options.only in part.name]
    results = options.out / "gpu_check.jsonl"
    results.unlink(missing_ok=True)
    for part in done:
        left = 60 * options.minutes - (time.monotonic() - begin)
        if left < 10:
            part.status = "no time left"
            continue
        run(part, min(part.limit, left), logs / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', part.name)}.log")
        with results.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in part.rows)
        (options.out / "gpu_check.md").write_text(page(done, options, time.monotonic() - begin))
        print(f"{part.name:<24} {part.status:<24} {part.seconds:6.1f} s  {len(part.rows)} results", flush=True)
    text = page(done, options, time.monotonic() - begin)
    (options.out / "gpu_check.md").write_text(text)
    failed = [f"{part.name} ({part.status})" for part in done if part.status != "ok"]
    print(f"\nresults: {results}\npage:    {options.out / 'gpu_check.md'}")
    print("every part ran" if not failed else f"NOT ok: {'; '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
