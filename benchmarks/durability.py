"""What durability costs: step time with it and without, and recovery time against the steps to recover.

    python -m benchmarks.durability [--model opt-125m] [--tokens 512] [--storage bf16] [--repeats 6] [--only step]

step     one engine a way, steps taken in turn in one process, so a noisy machine disturbs all alike; ratio: the median
         over pairs against the same tier with nothing durable. For offload none and host: a run_dir (journal with its
         group commit, fingerprints, a block snapshotted at every step, far more often than the default) against none.
         For disk, which must flush: all of it against no journal sync, no checksums, no generations synced (the same
         flushes, written in place). Floors: bytes a step over the measured speed of the checksum.
recover  the seconds from `Engine.resume` to weights that are up to date, for a run whose snapshots are N steps old.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import about, emit, quantile
from benchmarks.step import make_model
from zo_offload import Engine, MeZO
from zo_offload.journal.journal import Journal, StepRecord
from zo_offload.kernels.records import Update
from zo_offload.numerics.noise import step_seed
from zo_offload.system import diskio
from zo_offload.tiers import summed_io
from zo_offload.tiers.checksum import checksum


@contextmanager
def nothing_durable() -> Iterator[None]:
    """Flushes as they are, without syncs and checksums. What is read back then is not checked either."""
    real = diskio.sync, summed_io.read_summed, summed_io.write_summed
    diskio.sync, summed_io.read_summed, summed_io.write_summed = (lambda fd: None), _read_unsummed, _write_unsummed
    try:
        yield
    finally:
        diskio.sync, summed_io.read_summed, summed_io.write_summed = real


def _read_unsummed(fd: int, out: torch.Tensor, at: int, begin: int, threads: int = 1) -> int:
    diskio.read_at(fd, memoryview(out.numpy()), at)  # type: ignore[arg-type]
    return 0


def _write_unsummed(fd: int, data: torch.Tensor, at: int, begin: int) -> int:
    diskio.write_at(fd, memoryview(data.numpy()), at)  # type: ignore[arg-type]
    return 0


def step_costs(options: argparse.Namespace, folder: Path, common: dict[str, Any]) -> None:
    ids = torch.randint(5, 50000, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    for offload in options.offload:
        settings = dict(method=MeZO(lr=1e-6), offload=offload, storage=options.storage)
        with ExitStack() as stack:
            durable = stack.enter_context(
                Engine(make_model(options.model), run_dir=folder / f"{offload}-durable", snapshot_steps=1, **settings)
            )
            plain_dir = folder / f"{offload}-plain" if offload == "disk" else None
            plain = stack.enter_context(
                Engine(make_model(options.model), run_dir=plain_dir, snapshot_minutes=None, **settings)
            )
            times: dict[str, list[float]] = {"durable": [], "plain": []}
            for i in range(options.repeats + 2):
                for name, engine in (("durable", durable), ("plain", plain))[:: 1 if i % 2 else -1]:
                    with nothing_durable() if name == "plain" else ExitStack():
                        begin = time.perf_counter()
                        for _ in range(options.fold_every):
                            engine.step(batch)
                        times[name].append((time.perf_counter() - begin) / options.fold_every)
            with nothing_durable():
                plain.close()
            ratios = sorted(a / b for a, b in zip(times["durable"][2:], times["plain"][2:], strict=True))
            traffic = durable.active.streamer.traffic
            steps = (options.repeats + 2) * options.fold_every
            moved = (traffic.fetch_bytes + traffic.flush_bytes) / steps if offload == "disk" else 0
            emit(
                {
                    "kind": "step", "model": options.model, "tokens": options.tokens, "storage": options.storage,
                    "offload": offload, "n": len(ratios),
                    "ratio": round(quantile(ratios, 0.5), 4), "p20": round(quantile(ratios, 0.2), 4),
                    "p80": round(quantile(ratios, 0.8), 4),
                    "step_s": round(quantile(times["durable"][2:], 0.5), 4), "moved_bytes": int(moved),
                    "checksum_floor_s": round(moved / checksum_speed(), 5),
                },
                common,
            )  # fmt: skip
        gc.collect()


def checksum_speed() -> float:
    """Bytes a second, of pieces that the cache holds, as the tier uses it."""
    data = torch.zeros(summed_io.CACHED, dtype=torch.uint8)
    begin = time.perf_counter()
    for _ in range(1000):
        checksum(data)
    return 1000 * data.numel() / (time.perf_counter() - begin)


def recoveries(options: argparse.Namespace, folder: Path, common: dict[str, Any]) -> None:
    """A run on disk whose blocks are at step 0 and whose journal is N steps long."""
    model = make_model(options.model)
    settings = dict(method=MeZO(lr=1e-6), offload="disk", storage=options.storage)
    for steps in options.steps:
        run = folder / f"recover-{steps}"
        with Engine(make_model(options.model), run_dir=run, **settings) as engine:
            engine.active.start()
        journal = Journal.open(run / "journal.zoj")
        for step in range(steps):
            update = Update(step_seed(0, step), 2.0**-20, 1.0, (step + 1) % engine.fold_every == 0)
            journal.append(StepRecord(step, (update,), 1.0, 1.0, 1e-6))
        journal.close()
        begin = time.perf_counter()
        with Engine.resume(run, make_model(options.model)) as engine:
            engine.active.start()
            opened = time.perf_counter() - begin
            engine.active.settle()
            took = time.perf_counter() - begin
            parameters = sum(spec.numel for spec in engine.plan.params.values())
        rate = parameters * steps / max(took - opened, 1e-9)
        emit(
            {
                "kind": "recover", "model": options.model, "storage": options.storage, "steps": steps,
                "parameters": parameters, "opened_s": round(opened, 3), "recovered_s": round(took, 3),
                "elements_per_s": round(rate), "journal_bytes": (run / "journal.zoj").stat().st_size,
            },
            common,
        )  # fmt: skip
    del model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-125m")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--storage", default="bf16")
    parser.add_argument("--offload", nargs="+", default=["none", "host", "disk"])
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--fold-every", type=int, default=4, help="steps timed together: one period of folds")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--only", choices=["step", "recover"])
    options = parser.parse_args()
    common = about("durability")
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "recover":
            step_costs(options, Path(folder), common)
        if options.only != "step":
            recoveries(options, Path(folder), common)


if __name__ == "__main__":
    main()
