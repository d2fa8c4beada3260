"""Several processes on one run beside one process: the same bits, and how much faster.

    python -m benchmarks.ranks [--quick]

A Llama of 16 layers is trained by MeZO on 4 micro-batches (8 lanes) and by FZOO (9 lanes), in memory and through host
memory, by 1, 2, 3 and 4 processes of one thread each. Every process is started by torchrun, as a user would, and gives
losses, the digest of its weights, and the seconds of its steps after the first two (which trace and warm up). The
numbers of processes are taken in turns, `--repeats` times; what counts is the median of the ratios of neighbours in
time. Cores that other work shares, or fewer cores than processes, make the ratio smaller: `load` says what ran beside.
Also the exchange alone: seconds a turn of a row of 8 losses, by number of processes. Exit status 1 if a bit differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from .common import ROOT, about, quantile

WORLDS: tuple[int, ...] = (1, 2, 3, 4)
CASES: dict[str, dict[str, Any]] = {
    "mezo": dict(method="mezo", micro_batches=4, offload="none"),
    "mezo host bf16": dict(method="mezo", micro_batches=4, offload="host", storage="bf16"),
    "fzoo int8+8": dict(method="fzoo", micro_batches=1, offload="host", storage="int8+8"),
}
WARM = 2  # steps that are not counted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one case, 1 and 2 processes, once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rank", metavar="CASE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        return train(args.rank, args.steps)
    names, worlds, repeats = list(CASES), WORLDS, args.repeats
    if args.quick:
        names, worlds, repeats = names[:1], WORLDS[:2], 1
    same = True
    for name in names:
        found: dict[int, list[list[dict[str, Any]]]] = {world: [] for world in worlds}
        for _ in range(repeats):
            for world in worlds:
                found[world].append(launch(name, world, args.steps))
        told = {(rank["losses"], rank["weights"]) for runs in found.values() for ranks in runs for rank in ranks}
        same &= len(told) == 1
        seconds = {world: [max(rank["seconds"] for rank in ranks) for ranks in found[world]] for world in worlds}
        for world in worlds:
            ratios = [one / several for one, several in zip(seconds[1], seconds[world], strict=True)]
            print(json.dumps({
                **about("ranks"), "case": name, "ranks": world, "bits_equal": len(told) == 1,
                "seconds_a_step": round(median(seconds[world]), 4), "times_one_process": round(median(ratios), 3),
                "exchange_ms": round(median(r["exchange_ms"] for ranks in found[world] for r in ranks), 3),
                "repeats": repeats, "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1),
            }), flush=True)  # fmt: skip
    return 0 if same else 1


def launch(name: str, world: int, steps: int) -> list[dict[str, Any]]:
    """What each of `world` processes found."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "-m",
                   "benchmarks.ranks", "--rank", name, "--steps", str(steps)]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ZO_RANKS_OUT": folder}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


def train(name: str, steps: int) -> int:
    """One process: train, and write what was found to a file of its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from zo_offload import FZOO, Engine, MeZO

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=16, num_attention_heads=8,
        max_position_embeddings=256,
    )).eval()  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 4096, (steps, 8, 64))]
    case = dict(CASES[name])
    method = (MeZO if case.pop("method") == "mezo" else FZOO)(lr=1e-6, batch_size=8)
    micro_batches, times = case.pop("micro_batches"), [time.perf_counter()]
    with Engine(model, method=method, **case) as engine:
        result = engine.fit(data, steps=steps, micro_batches=micro_batches,
                            callback=lambda record: times.append(time.perf_counter()))  # fmt: skip
        digest = hashlib.blake2b(digest_size=8)
        for _, weight in engine.weights():
            digest.update(weight.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        turns = []
        for n in range(200):
            begin = time.perf_counter()
            engine.ranks.losses(n, [1.0] * len(engine.ranks.cells(8)))
            turns.append(time.perf_counter() - begin)
        found = {
            "losses": hashlib.blake2b(json.dumps(result.losses).encode(), digest_size=8).hexdigest(),
            "weights": digest.hexdigest(), "seconds": (times[-1] - times[WARM]) / (steps - WARM),
            "exchange_ms": 1e3 * quantile(turns, 0.5),
        }  # fmt: skip
        (Path(os.environ["ZO_RANKS_OUT"]) / f"{engine.ranks.rank}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
