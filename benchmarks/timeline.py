"""The simulated timeline of a step (`plan --timeline`) beside steps that ran, on this CPU.

    python -m benchmarks.timeline [--models opt-125m] [--tokens 128 512] [--repeats 5]

The simulation is `zo_offload.cli.timeline.simulate`: the ops of the schedule, with a table of costs. Here the table is
of this machine, each cost measured by itself: two plain forwards, the fused passes of as many elements in pieces of the
model's own size (with 1 .. fold_every pending updates, the last of which folds), a block read from its file in the page
cache, and one written. Then `fold_every` steps are taken `repeats` times, in turns with the plain forwards.

One JSON line a tier and length. `predicted_s` is a simulated step. `cpu_s` is a measured step's CPU time of the thread
that computes, the median: on shared cores it repeats where the clock does not; `seconds` is the quickest by the clock.
`of_predicted` is cpu_s over the simulation's busy time of that thread, `clock_of_predicted` seconds over predicted_s;
`host_s` is what the simulation leaves out: the interpreter, measured by `benchmarks.host`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import about, emit, quantile
from benchmarks.step import make_model
from zo_offload import Engine, MeZO
from zo_offload.cli.costs import Step, work_of
from zo_offload.cli.hardware import Drive, Link
from zo_offload.cli.timeline import simulate
from zo_offload.formats import get_format
from zo_offload.kernels.records import Perturbation, Update
from zo_offload.numerics.fused import fused_pass
from zo_offload.numerics.noise import NoiseSpec


@dataclass
class Timed:
    """CPU seconds of the calling thread, and seconds by the clock, of each call."""

    cpu: list[float]
    clock: list[float]


def timed(work: Callable[[], Any], repeats: int, into: Timed) -> None:
    for _ in range(repeats):
        cpu, clock = time.thread_time(), time.perf_counter()
        work()
        into.cpu.append(time.thread_time() - cpu)
        into.clock.append(time.perf_counter() - clock)


def pass_seconds(numel: int, piece: int, fold_every: int, repeats: int) -> float:
    """CPU seconds of the fused passes over numel elements, a mean step."""
    fmt, z = get_format("fp32"), NoiseSpec()
    stored = torch.randn(piece).view(torch.uint8)
    outs = [torch.empty(piece) for _ in range(2)]
    lanes = [Perturbation(1, 2.0**-10), Perturbation(1, -(2.0**-10))]
    total = 0.0
    for pending in range(1, fold_every + 1):
        updates = [Update(seed, 2.0**-20, fold=seed == fold_every) for seed in range(1, pending + 1)]

        def one(updates: list[Update] = updates, folds: bool = pending == fold_every) -> None:
            fused_pass(stored, fmt, param_id=1, numel=piece, updates=updates, write_back=folds, noise=z,
                       perturbations=lanes, outs=outs)  # fmt: skip

        found = Timed([], [])
        timed(one, repeats + 1, found)
        total += quantile(found.cpu[1:], 0.5)
    return total / fold_every * numel / piece


def file_rates(folder: Path, nbytes: int) -> tuple[float, float]:
    """GB/s of reading a file in the page cache, and of writing one there."""
    data, path, rates = bytearray(nbytes), folder / "rates", []
    for mode in ("wb", "rb"):
        best = float("inf")
        for _ in range(5):
            with path.open(mode, buffering=0) as file:
                start = time.perf_counter()
                file.write(data) if mode == "wb" else file.readinto(data)
                best = min(best, time.perf_counter() - start)
        rates.append(nbytes / best / 1e9)
    return rates[1], rates[0]


def measured(name: str, tokens: int, offload: Any, repeats: int, folder: Path) -> dict[str, Any]:
    """One line."""
    ids = torch.randint(5, 1000, (1, tokens), generator=torch.Generator().manual_seed(1))
    batch, plain = {"input_ids": ids, "labels": ids}, make_model(name)
    run_dir = folder / f"run{tokens}" if offload == "disk" else None
    method = MeZO(lr=1e-9)
    settings: dict[str, Any] = dict(offload=offload, run_dir=run_dir, snapshot_minutes=None)
    settings |= {} if offload == "none" else dict(num_slots=3)
    with Engine(make_model(name), method=method, **settings) as engine, torch.no_grad():
        engine.step(batch)
        run = engine.active
        layout, every = run.streamer.layout, run.prepared.fold_every
        forward, steps = Timed([], []), Timed([], [])

        def cycle() -> None:
            for _ in range(every):
                engine.step(batch)

        for _ in range(every - 1):
            engine.step(batch)
        for _ in range(repeats):
            timed(lambda: plain(**batch), 2, forward)
            timed(cycle, 1, steps)
        plan, window = engine.plan, run.memory.window
        work = work_of(
            plan, layout, pinned=window.pinned, offload=offload, fold_every=every, lanes=2, noises=1, lane_noises=1,
            distribution=method.distribution, rows=1, tokens=tokens, share={},
        )  # fmt: skip
    pieces = [piece.numel for block in plan.blocks for piece in block.pieces]
    forwards = 2 * quantile(forward.cpu, 0.5)
    passes = pass_seconds(sum(pieces), min(max(pieces), 4 << 20), every, repeats)
    read, write = file_rates(folder, 64 << 20)
    step = Step({"the GPU": forwards + passes}, forwards, passes)
    drive = Drive("page cache", read, write, write, 1.0)
    found = simulate(plan, layout, window, work, step, Link("memory", read, 1.0), offload=offload, drive=drive)
    cpu, clock = quantile(steps.cpu, 0.5) / every, min(steps.clock) / every
    return {
        "model": name, "tokens": tokens, "offload": offload, "fold_every": every, "repeats": repeats,
        "predicted_s": round(found.step_s, 4), "cpu_s": round(cpu, 4), "seconds": round(clock, 4),
        "of_predicted": round(cpu / found.busy_s["compute"], 3), "clock_of_predicted": round(clock / found.step_s, 3),
        "forwards_s": round(forwards, 4), "passes_s": round(passes, 4),
        "host_s": round(cpu - forwards - passes, 4), "read_gb_per_s": round(read, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["opt-125m"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    common = about("timeline")
    for name in options.models:
        for tokens in options.tokens:
            for offload in ("none", "disk"):
                with tempfile.TemporaryDirectory() as folder:
                    emit(measured(name, tokens, offload, options.repeats, Path(folder)), common)


if __name__ == "__main__":
    main()
