"""Which layers of an adapter in a basis hold the gradient: shares of it, and of the numbers that train.

    python -m benchmarks.gradient_share [--tasks sms trec] [--batches 24] [--out FILE]

    (packages: see `real_tasks.py`)

A forward-only method learns along random directions, and of those a share |g of the part|^2 / |g|^2 is worth keeping
at the price of the part's share of the numbers. Backpropagation, before training; |g|^2 of the expected gradient is the
product of the means of two halves of the batches, so that the batches' noise does not count. `gain` is the one share
divided by the other: how much more a direction in this part alone would learn.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks.common import about, emit
from benchmarks.real_tasks import TASKS, RealTask
from zo_offload import Engine


def shares(task: RealTask, batches: int) -> dict[str, list[float]]:
    """By layer and by kind of matrix: (share of the gradient's square, share of the numbers)."""
    rows, model = task.train(7, batches), task.model()
    with Engine(model, trainable=task.layers, example=rows[0]) as engine:
        basis = engine.activation_basis(rows[0], rank=4, layers=task.layers)
        engine.restore()
    model = basis.put_on(model)
    trained = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in trained}
    for row in rows:
        model.zero_grad()
        model(**row).loss.backward()
        for name, p in trained.items():
            assert p.grad is not None
            found[name].append(p.grad.clone())
    squares = {
        name: float((torch.stack(of[::2]).mean(0) * torch.stack(of[1::2]).mean(0)).sum()) for name, of in found.items()
    }
    whole, numbers = sum(squares.values()), sum(p.numel() for p in trained.values())
    parts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, p in trained.items():
        layer, _, kind = name.split(".layer.")[1].split(".lora_")[0].partition(".")
        for part in (f"layer {layer}", kind):
            parts[part][0] += squares[name] / whole
            parts[part][1] += p.numel() / numbers
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["sms", "trec"], choices=[n for n in TASKS if n != "reviews"])
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--out", type=Path, help="add the lines to this file too")
    options = parser.parse_args()
    common = about("gradient_share")
    for name in options.tasks:
        for part, (gradient, numbers) in sorted(shares(TASKS[name](), options.batches).items()):
            line = {"task": name, "part": part, "gradient": round(gradient, 3), "numbers": round(numbers, 3),
                    "gain": round(gradient / numbers, 2)}  # fmt: skip
            emit(line, common)
            if options.out:
                with open(options.out, "a") as file:
                    file.write(json.dumps(common | line) + "\n")


if __name__ == "__main__":
    main()
