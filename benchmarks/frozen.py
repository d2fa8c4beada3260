"""A step where most weights are frozen: each decoded once for all lanes, beside a copy a lane.

    python -m benchmarks.frozen [--quick] [--models opt-125m] [--storage bf16 int4] [--trains lora bias] [--tokens 32]
                                [--directions 8] [--repeats 7]

Random weights, random tokens, batch 1, FZOO. One engine each way over the same model, in one process; their steps are
timed in turn, so a noisy machine disturbs both, in seconds of process time and of the clock. `ratio` is the median of
the pairs' ratios of process time, a copy a lane / once. Both give the same losses, which is checked. Trains:
    lora    PEFT's adapters of rank 8 on q_proj and v_proj; the base's modules hold nothing that trains
    bias    every bias: all large modules hold a weight that is frozen beside a bias that trains
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import nn

from benchmarks.common import about, emit, quantile
from benchmarks.step import make_model
from zo_offload import FZOO, Engine
from zo_offload.stream.streamer import Streamer


def trained(model: nn.Module, what: str) -> nn.Module:
    """The model with only that part left to train."""
    if what == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        return get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"])).eval()
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    return model


def a_copy_a_lane(streamer: Streamer) -> None:
    """Give every lane its own copy of every weight from now on."""
    recipe = streamer._recipe
    streamer._recipes.clear()
    streamer._recipe = lambda *parts: replace(found := recipe(*parts), once=(False,) * len(found.once))


def compare(
    name: str, what: str, storage: str, tokens: int, directions: int, repeats: int
) -> tuple[dict[str, Any], list[float]]:
    """Of both ways, seconds of every step; and the pairs' ratios."""
    ids = torch.randint(5, 50000, (1, tokens), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    engines = [
        Engine(
            trained(make_model(name), what), method=FZOO(lr=1e-6, directions=directions), storage=storage,
            offload="host", trainable="requires_grad", example=batch,
        )
        for _ in range(2)
    ]  # fmt: skip
    times: list[list[tuple[float, float]]] = [[], []]
    scratch = [0, 0]
    with engines[0], engines[1]:
        a_copy_a_lane(engines[0].active.streamer)
        for i in range(repeats + 2):  # the first is watched, the second warms up
            losses = []
            for way, engine in enumerate(engines):
                cpu, clock = time.process_time(), time.perf_counter()
                losses.append(engine.step(batch).loss)
                if i > 1:
                    times[way].append((time.process_time() - cpu, time.perf_counter() - clock))
            assert losses[0] == losses[1], losses
        for way, engine in enumerate(engines):
            scratch[way] = engine.active.streamer.scratch_bytes
        planned = engines[1].memory.terms["scratch"]
    pairs = list(zip(*times, strict=True))
    ratios = [copies[0] / once[0] for copies, once in pairs]
    found = {
        f"{which}_{unit}": round(quantile([pair[way][i] for pair in pairs], 0.5), 4)
        for way, which in enumerate(("copies", "once"))
        for i, unit in enumerate(("cpu_s", "clock_s"))
    }
    return found | {"copies_scratch": scratch[0], "once_scratch": scratch[1], "planned_scratch": planned}, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["opt-125m"])
    parser.add_argument("--storage", nargs="+", default=["bf16", "int4"])
    parser.add_argument("--trains", nargs="+", choices=["lora", "bias"], default=["lora", "bias"])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--directions", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="LoRA on int4, three repeats")
    options = parser.parse_args()
    if options.quick:
        options.storage, options.trains, options.repeats = ["int4"], ["lora"], 3
    common = about("frozen") | {"method": "fzoo", "lanes": options.directions + 1, "tokens": options.tokens}
    for name, what, storage in product(options.models, options.trains, options.storage):
        found, ratios = compare(name, what, storage, options.tokens, options.directions, options.repeats)
        ends = {f"p{int(100 * q)}": round(quantile(ratios, q), 3) for q in (0.2, 0.8)}
        row = {"model": name, "trains": what, "storage": storage, "ratio": round(quantile(ratios, 0.5), 3), **ends}
        emit(row | {"n": len(ratios), **found}, common)


if __name__ == "__main__":
    main()
