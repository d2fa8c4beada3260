"""Everything that needs a GPU, in one command: build, probe, tests, benchmarks; under nine minutes on one H200.

    make gpu-check                                  or: python -m benchmarks.gpu_check [options]
    make gpu-check GPU_CHECK="--wheels DIR"                     packages that the machine lacks, as wheels; .whl if here
    make gpu-check GPU_CHECK="--zo2 DIR --zo2-wheels DIR"       ZO2 beside it: a checkout, and its pinned packages
    make gpu-check GPU_CHECK=--dry                  the same plumbing on a CPU; measures nothing

Each part is a process of its own with its own time limit. One that fails or runs over is named at the end and the next
one starts; the exit status is 1 then. Three files come of it, whole after every part: OUT/gpu_check.jsonl, one JSON
line a result; OUT/gpu_check.md, a page with the commands that made them; OUT/gpu_check.log, what the parts printed. OUT
is $OUT where that is set, else benchmarks/results.

Parts, most telling first, so that a limit of time cuts from the end:
    host memory, build, probe, kernels bit-equal, engine equal wherever blocks live, link, steps of 1.3B and 6.7B, the
    device's memory, fused pass, 13B, naive MeZO, losses and portions, doctor, plan, 30B, steps of 512 tokens,
    architectures, compute-sanitizer
With --zo2 each size is followed by ZO2's, and the tests wait till the end: `--only NAME` runs some parts alone.

A machine whose memory grows as it is used shows little of it before: then the first part makes it grow, and the others
are told how far it did (ZO_HOST_MEMORY).

No network, no root. torch's CUDA wheel and the packages in NEEDED must be there; greenlet is the one that images tend
to lack. ZO2 needs transformers 4.51.3, tokenizers 0.21.1 and huggingface-hub 0.30.2 (--zo2-wheels), and runs with the
torch that is there. **This has never run on a GPU**; a dry run is part of the CPU tests.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, commit
from benchmarks.gpu_page import page, report
from zo_offload.devices.nvml import DriverMemory

MEASURE = [sys.executable, "-m", "benchmarks.gpu_measure"]
NEEDED = ("torch", "transformers", "safetensors", "accelerate", "greenlet", "numpy", "psutil", "tqdm", "pytest")
WITHOUT_LANES = ("host", "build", "probe", "link", "kernels", "zo2")  # parts that run without greenlet
WHEELS = ROOT / ".whl"
ZO2_TEST = Path("test", "mezo_sgd", "hf_opt")
KEPT_FOR_THE_END = 45.0  # seconds that no other part may take: figures beside the plan


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
    device_peak: int | None = None
    """The most that the device had in use while the part ran, less what it had before; by NVML."""


def parts(options: argparse.Namespace) -> list[Part]:
    first = [
        Part("host memory", [sys.executable, "-m", "benchmarks.host_memory", *_dry(options)], 45),
        Part("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 150, reads="text"),
        Part("probe", [sys.executable, "-m", "benchmarks.gpu_probe", *_dry(options)], 90),
    ]
    # nvcc's own variable: one kernel after another on one core would take a minute
    first[1].environment = {"ZO_CUDA": "0"} if options.dry else {"NVCC_APPEND_FLAGS": "--split-compile=0"} | this_gpu()
    link, kernels = (Part(name, [*MEASURE, name, *_dry(options)], 60) for name in ("link", "kernels"))
    doctor = Part("doctor", [sys.executable, "-m", "zo_offload"], 60, reads="text")
    asked = ["opt-13b", "--storage", "bf16", "--tokens", "2048", "--device", "cpu" if options.dry else "cuda"]
    plan = Part("plan", [sys.executable, "-m", "zo_offload", "plan", *asked], 60, reads="text")
    small, large, budget, losses, archs, sanitizer = test_parts(options)
    if options.dry:
        steps = [step(options, "opt-1.3b"), step(options, "opt-1.3b", what="naive")]
        return [*first, small, large, link, *steps, kernels, doctor, plan, *zo2_parts(options, "opt-1.3b")]
    if options.zo2 is not None:
        sizes = [("opt-1.3b", 60.0), ("opt-6.7b", 90.0), ("opt-13b", 120.0), ("opt-30b", 180.0)]
        beside = [part for size, limit in sizes for part in (step(options, size, limit), *zo2_parts(options, size))]
        return [*first, link, *beside, small, large]
    return [
        *first, small, large, link, step(options, "opt-1.3b", 60), step(options, "opt-6.7b", 90), budget, kernels,
        step(options, "opt-13b", 120), *(step(options, f"opt-{size}", 60, what="naive") for size in ("1.3b", "6.7b")),
        losses, doctor, plan, step(options, "opt-30b", 180), step(options, "opt-13b", 60, what="naive"),
        step(options, "opt-6.7b", 60, tokens=512), step(options, "opt-1.3b", 60, tokens=512),
        step(options, "opt-13b", 90, tokens=512), archs, sanitizer,
    ]  # fmt: skip


def _dry(options: argparse.Namespace) -> list[str]:
    return ["--dry"] if options.dry else []


def step(options: argparse.Namespace, model: str, limit: float = 60, *, tokens: int = 2048, what: str = "step") -> Part:
    asked = ["--model", model, "--tokens", str(tokens), "--dtype", options.dtype]
    return Part(f"{what} {model} {tokens}", [*MEASURE, what, *asked, *_dry(options)], limit)


def test_parts(options: argparse.Namespace) -> list[Part]:
    """The GPU tests: kernels; engine; what the driver counts on the whole device, alone; the others; sanitizer."""
    # no -q: the project's own settings have one, and two hide how many tests passed
    base = [sys.executable, "-m", "pytest", "-rs", "--tb=short", "--durations=3", "-p", "no:cacheprovider",
            "--maxfail=20"]  # fmt: skip
    side_by_side = ["-n", "8"] if importlib.util.find_spec("xdist") and not options.dry else []
    places = [
        ("kernels bit-equal", "kernels", "golden" if options.dry else "not out_of_bounds", 120, side_by_side),
        ("tests of the engine", "engine", "seed_twice" if options.dry else "not budget", 120, side_by_side),
        ("test of the budget", "engine", "budget", 90, []),
        ("tests of losses and portions", "loss tiles experts", "test", 120, side_by_side),
        ("tests of architectures", "archs", "test", 150, side_by_side),
        ("test with compute-sanitizer", "kernels", "out_of_bounds", 150, []),
    ]
    made = []
    for name, files, chosen, limit, more in places:
        paths = [f"tests/gpu/test_gpu_{file}.py" for file in files.split()]
        part = Part(name, [*base, *more, *paths, "-k", chosen], limit, reads="text")
        part.environment = {"ZO_GPU_TESTS_ON": "cpu"} if options.dry else {}
        made.append(part)
    return made


def this_gpu() -> dict[str, str]:
    """Build for this machine's GPU alone: a quarter of the time. nvidia-smi is quick, but may not be on the path."""
    ask_torch = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
    for command in (
        ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], [sys.executable, "-c", ask_torch],
    ):  # fmt: skip
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=40, check=True).stdout.split()
        except (OSError, subprocess.SubprocessError):
            continue
        named = sorted({version.replace(".", "") for version in found if re.fullmatch(r"\d+\.\d", version)})
        if named:
            return {"ZO_CUDA_ARCHS": ",".join(named)}
    return {}


def zo2_parts(options: argparse.Namespace, model: str) -> Iterator[Part]:
    """ZO2's own test_speed and test_memory, unmodified, from its own directory as its scripts call them.

    Through `zo2_run.py`, which makes the random first weights quickly: they are most of the time otherwise.
    """
    if options.zo2 is None:
        return
    if not (options.zo2 / ZO2_TEST / "test_speed.py").exists():
        raise SystemExit(f"--zo2 {options.zo2}: no {ZO2_TEST / 'test_speed.py'} there; give the root of a ZO2 checkout")
    places = [str(options.zo2), *([str(options.zo2_packages)] if options.zo2_packages else [])]
    environment = {"PYTHONPATH": os.pathsep.join(places)}
    limits = {"opt-1.3b": 60, "opt-6.7b": 100, "opt-13b": 150, "opt-30b": 240}
    for what in ("speed", "memory") if model != "opt-30b" else ("memory",):
        command = [
            sys.executable, str(ROOT / "benchmarks" / "zo2_run.py"), str(ZO2_TEST / f"test_{what}.py"), "--model_name",
            model.replace("-", "_").replace(".", "_"), "--task", "causalLM", "--zo_method", "zo2", "--max_steps",
            "8" if what == "speed" else "3", "--sequence_length", "2048", "--model_dtype", options.dtype,
        ]  # fmt: skip
        label = {"model": model, "tokens": 2048, "dtype": options.dtype, "zo2_commit": commit(options.zo2)}
        yield Part(f"zo2 {what} {model}", command, limits[model], environment, options.zo2, f"zo2 {what}", label)


class DevicePeak:
    """The most device memory in use while the block runs, by NVML, less what was in use before it."""

    def __init__(self) -> None:
        self._memory, self._stop = DriverMemory(0), threading.Event()
        self.peak: int | None = None
        self._before = self._memory.device_used()

    def __enter__(self) -> DevicePeak:
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while self._before is not None and not self._stop.wait(0.05):
            used = self._memory.device_used()
            if used is not None:
                self.peak = max(self.peak or 0, used - self._before)


def run(part: Part, limit: float, log: Path) -> None:
    with DevicePeak() as device:
        _run(part, limit, log)
    part.device_peak = device.peak
    text = log.read_text(errors="replace")
    part.tail = text[-3000:]
    part.rows = list(READERS[part.reads](text, part))


def _run(part: Part, limit: float, log: Path) -> None:
    start = time.monotonic()
    always = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | always | part.environment
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
               "step_s": part.label["tokens"] / rate, "peak_driver_bytes": part.device_peak, **part.label}  # fmt: skip
    elif part.status == "ok":
        part.status = "printed no throughput"


def read_memory(text: str, part: Part) -> Iterator[dict[str, Any]]:
    gpu = [float(x) for x in re.findall(r"Peak GPU Memory after iteration \d+: ([\d.]+) MB", text)]
    cpu = [float(x) for x in re.findall(r"Peak CPU Memory after iteration \d+: ([\d.]+) MB", text)]
    if gpu:
        yield {"part": "memory", "way": "ZO2, its test_memory", "told_bytes": int(max(gpu) * 2**20),
               "peak_driver_bytes": part.device_peak or int(max(gpu) * 2**20),
               "host_bytes": int(max(cpu, default=0) * 2**20), **part.label}  # fmt: skip
    elif part.status == "ok":
        part.status = "printed no memory"


READERS = {"json": read_json, "zo2 speed": read_speed, "zo2 memory": read_memory, "text": lambda text, part: iter(())}


def unpack(wheels: Path | None, into: Path) -> Path | None:
    """Wheels are zip files of what is to be on the path. SystemExit where there is none, or one of another Python."""
    if wheels is None:
        return None
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise SystemExit(f"{wheels}: no wheels (*.whl) there")
    for wheel in found:
        pythons, abi = wheel.stem.split("-")[-3:-1]
        ours = f"cp{sys.version_info.major}{sys.version_info.minor}"
        if abi not in ("none", "abi3") and ours not in pythons.split("."):
            raise SystemExit(f"{wheel.name} is for {pythons}, {sys.executable} is {ours}: bring the wheel of {ours}")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
    return into


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the CPU: proves the plumbing, measures nothing")
    parser.add_argument(
        "--wheels", type=Path, default=WHEELS if WHEELS.is_dir() else None,
        help="folder of wheels that this machine lacks (greenlet); default: .whl of the checkout, if it is there",
    )  # fmt: skip
    parser.add_argument("--zo2", type=Path, help="root of a ZO2 checkout")
    parser.add_argument("--zo2-wheels", type=Path, help="folder of the wheels that ZO2 is pinned to")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="fp16", help="default fp16, as ZO2's tables")
    parser.add_argument("--minutes", type=float, default=8.7, help="of all parts together")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results"))
    parser.add_argument("--only", help="parts whose name contains this")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="gpu_check") as folder:
        return check(options, Path(folder))


def count_on(rows: list[dict[str, Any]]) -> None:
    """Host memory that was there when it was used, though the system had not shown it: the parts from now on know."""
    for row in rows:
        if row.get("part") == "host memory" and row["reached_bytes"] > row["available_after_bytes"]:
            os.environ["ZO_HOST_MEMORY"] = str(row["reached_bytes"])


def check(options: argparse.Namespace, folder: Path) -> int:
    extra = unpack(options.wheels, folder / "packages")
    if extra is not None:  # for this process and those that it starts
        sys.path.insert(0, str(extra))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(extra), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    options.zo2_packages = unpack(options.zo2_wheels, folder / "zo2_packages")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        ours = f"cp{sys.version_info.major}{sys.version_info.minor}"
        left_out = ": no engine runs, only build, probe, kernels and link" if missing == ["greenlet"] else ""
        print(
            f"{sys.executable} lacks {', '.join(missing)}{left_out}. Install it, or bring its {ours} wheel in a folder "
            f"({WHEELS.name} of this checkout, or --wheels DIR)"
        )
    if set(missing) - {"greenlet"}:
        return 2
    options.zo2 = options.zo2.resolve() if options.zo2 else None
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    done = [part for part in parts(options) if not options.only or options.only in part.name]
    results, logs = options.out / "gpu_check.jsonl", options.out / "gpu_check.log"
    results.unlink(missing_ok=True)
    logs.unlink(missing_ok=True)
    for part in done:
        left = 60 * options.minutes - KEPT_FOR_THE_END - (time.monotonic() - begin)
        if missing and part.name.split()[0] not in WITHOUT_LANES:
            part.status = f"not run: needs {', '.join(missing)}"
            continue
        if left < 10:
            part.status = "no time left"
            continue
        run(part, min(part.limit, left), folder / "part.log")
        count_on(part.rows)
        with results.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in part.rows)
        with logs.open("a") as file:
            file.write(f"\n==== {part.name}: {part.status}, {part.seconds:.0f} s\n")
            file.write((folder / "part.log").read_text(errors="replace")[-200_000:])
        (options.out / "gpu_check.md").write_text(page(done, options, time.monotonic() - begin))
        print(f"{part.name:<28} {part.status:<24} {part.seconds:6.1f} s  {len(part.rows)} results", flush=True)
    pages = [options.out / "gpu_check_predicted.md", options.out / "gpu_check.md"]
    done.append(beside_the_plan(results, pages[0]))
    run(done[-1], done[-1].limit, folder / "part.log")
    pages[1].write_text(page(done, options, time.monotonic() - begin))
    failed = [f"{part.name} ({part.status})" for part in done if part.status != "ok"]
    print(f"\nresults: {results}\npages:   {pages[1]}\n         {pages[0]}")
    print("every part ran" if not failed else f"NOT ok: {'; '.join(failed)}")
    told = options.out / "gpu_check_report.md"
    told.write_text(report(pages, results))
    print(f"to send it to the maintainers, from a clone of their repository:\n  {sending(told, done)}")
    return 1 if failed else 0


def beside_the_plan(results: Path, into: Path) -> Part:
    command = [sys.executable, "-m", "benchmarks.gpu_predicted", str(results), "--out", str(into)]
    return Part("beside the plan", command, KEPT_FOR_THE_END, reads="text")


def sending(told: Path, done: list[Part]) -> str:
    """The command that opens an issue with the report in it."""
    device = next((row["device"] for part in done for row in part.rows if "device" in row), "no result")
    return shlex.join(["gh", "issue", "create", "--title", f"gpu-check: {device}", "--body-file", str(told)])


if __name__ == "__main__":
    sys.exit(main())
