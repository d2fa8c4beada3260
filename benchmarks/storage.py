"""A step streamed from disk in each storage format beside bf16, in the same run.

    python -m benchmarks.storage [--model opt-125m] [--tokens 64] [--steps 8] [--formats NAME ...] [--out FILE]

Random weights, one row of random tokens, fp32 compute, Gaussian noise, updates folded every 4 steps, blocks in files
behind a window of 3 slots. Files that were just written are in the system's page cache where it has room, so the
floor is a copy from there, not the medium. Formats take turns with bf16: a format's steps are timed between two blocks
of bf16 steps, and `ratio` is its mean step over theirs. The steps timed are a whole number of folds, so that fetches
and flushes count with their share. Formats whose values never change train their scales (QZO).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import about, emit
from benchmarks.step import make_model
from zo_offload import QZO, Engine, MeZO
from zo_offload.formats import FORMATS, get_format

FOLD_EVERY = 4


def engine_of(name: str, storage: str, folder: str) -> Engine:
    method = MeZO(lr=1e-6) if get_format(storage).trains else QZO(lr=1e-7)
    run_dir = Path(tempfile.mkdtemp(dir=folder)) / "run"
    return Engine(
        make_model(name), method=method, storage=storage, offload="disk", fold_every=FOLD_EVERY, run_dir=run_dir
    )


def timed(engine: Engine, batch: dict[str, torch.Tensor], steps: int) -> tuple[float, Any]:
    """Seconds a step, and the traffic of the steps."""
    streamer = engine.active.streamer
    before = (streamer.traffic.fetch_bytes, streamer.traffic.flush_bytes, streamer.traffic.wait_s)
    start = time.perf_counter()
    for _ in range(steps):
        engine.step(batch)
    seconds = (time.perf_counter() - start) / steps
    after = (streamer.traffic.fetch_bytes, streamer.traffic.flush_bytes, streamer.traffic.wait_s)
    return seconds, [(b - a) / steps for a, b in zip(before, after, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-125m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="steps timed, a multiple of 4")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--out", type=Path, help="add the lines to this file too")
    options = parser.parse_args()
    common = about("storage")
    ids = torch.randint(5, 50000, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    with tempfile.TemporaryDirectory() as folder, engine_of(options.model, "bf16", folder) as bf16:
        timed_once = [bf16.step(batch) for _ in range(FOLD_EVERY)]
        assert all(record.updates for record in timed_once)
        for storage in options.formats:
            with engine_of(options.model, storage, folder) as engine:
                for _ in range(FOLD_EVERY):
                    engine.step(batch)
                first, _ = timed(bf16, batch, options.steps)
                seconds, (fetched, flushed, waited) = timed(engine, batch, options.steps)
                last, _ = timed(bf16, batch, options.steps)
                result = {
                    "model": options.model, "tokens": options.tokens, "storage": storage, "steps": options.steps,
                    "trains": "values" if get_format(storage).trains else "scales",
                    "ratio_to_bf16": round(2 * seconds / (first + last), 3), "step_s": round(seconds, 4),
                    "bf16_step_s": [round(first, 4), round(last, 4)], "wait_s": round(waited, 4),
                    "fetch_bytes_a_step": round(fetched), "flush_bytes_a_step": round(flushed),
                    "held_bytes": engine.layout.total_bytes,
                }  # fmt: skip
            emit(result, common)
            if options.out:
                with open(options.out, "a") as file:
                    file.write(json.dumps(common | result) + "\n")


if __name__ == "__main__":
    main()
