"""The zoo: tiny random models of every transformers class that can be built, and plain modules that do odd things, each
trained a few steps by the engine and by a plain loop in memory, compared bit for bit.

    python -m benchmarks.zoo --out zoo.jsonl              one JSON line a model; begun again, it goes on where it was
    python -m benchmarks.zoo --only Llama --out -         those with this in their name

A model is *tried* if it can be built tiny and its plain forward gives numbers. Then it is
    equal      losses, gradients and weights of all steps are the plain loop's, every bit
    refused    the engine says in one of its own errors that it cannot
    random     two plain forwards differ: there is nothing to compare with
    wrong      everything else: other numbers, an error that is not ours, no end
One process computes, one model after another; it is ended where one takes longer than --limit.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import multiprocessing
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.common import about
from benchmarks.zoo_models import build, classes
from benchmarks.zoo_modules import MODULES
from zo_offload import Engine, MeZO
from zo_offload.errors import DivergenceError, ZOError
from zo_offload.numerics.noise import NoiseSpec, assign_param_ids, noise, step_seed

STEPS = 3
LR = 1e-4
EPS = float(torch.tensor(1e-3))

Batch = dict[str, Any]


@dataclass(frozen=True)
class Result:
    name: str
    outcome: str
    """"equal", "refused", "random", "wrong" or "unbuildable"."""
    why: str = ""
    seconds: float = 0.0
    parameters: int = 0


def names() -> list[str]:
    """All of them, always in the same order; that of the classes is mixed, so that a part of them is a sample."""
    mixed = sorted(classes(), key=lambda name: zlib.crc32(name.encode()))
    return [*MODULES, *mixed]


def make(name: str) -> tuple[nn.Module, Batch]:
    """The model, always the same, and a batch for it. Raises Unbuildable."""
    if name in MODULES:
        torch.manual_seed(sum(map(ord, name)))
        return MODULES[name].build().eval(), MODULES[name].batch()
    return build(name)


def objective(model: nn.Module, batch: Batch) -> Tensor:
    """The mean square of every floating number that the model gives, whatever its task."""
    out = model(**batch)
    values = list(out.values()) if isinstance(out, dict) else out
    floats = [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.dtype.is_floating_point and t.numel()]
    return torch.stack([t.double().square().mean() for t in floats]).sum()


def plain_loop(
    model: nn.Module, batch: Batch, fresh: Callable[[], nn.Module]
) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """(losses of each step at +eps and -eps, the weights after the last): every forward by a fresh model."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad and p.dtype is torch.float32}
    ids = assign_param_ids([name for name, _ in model.named_parameters()])
    weights = {name: p.detach().clone() for name, p in named.items()}
    steps = []
    for step in range(STEPS):
        z = {n: noise(NoiseSpec(), step_seed(0, step), ids[n], w.numel()).view(w.shape) for n, w in weights.items()}
        losses = []
        for scale in (EPS, -EPS):
            lane = fresh()
            with torch.no_grad():
                for name, p in lane.named_parameters():
                    if name in weights:
                        p.copy_(_multiply_add(scale, z[name], weights[name]))
                losses.append(float(objective(lane, batch)))
        update = float(torch.tensor(LR * ((losses[0] - losses[1]) / (2 * EPS)), dtype=torch.float32))
        weights = {name: _multiply_add(-update, z[name], w) for name, w in weights.items()}
        steps.append((losses[0], losses[1]))
    return steps, weights


def _multiply_add(scale: float, z: Tensor, w: Tensor) -> Tensor:
    """w + scale * z, rounded once."""
    return (w.double() + scale * z.double()).float()


def compare(name: str) -> Result:
    """Try one model in this process."""
    begun = time.monotonic()

    def result(outcome: str, why: str = "") -> Result:
        return Result(name, outcome, " ".join(why.split())[:300], round(time.monotonic() - begun, 2), numel)

    numel = 0
    try:
        model, batch = make(name)
        numel = sum(p.numel() for p in model.parameters())
        fresh = (lambda: make(name)[0]) if name in MODULES else (lambda: copy.deepcopy(model))
        with torch.compiler.set_stance("force_eager"):
            (want, weights), (again, _) = plain_loop(model, batch, fresh), plain_loop(model, batch, fresh)
    except Exception as error:
        return result("unbuildable", f"{type(error).__name__}: {error}")
    if any(loss != loss for pair in want for loss in pair):
        return result("unbuildable", "its plain forward gives NaN")
    if again != want:
        return result("random")
    try:
        engine = Engine(model, method=MeZO(lr=LR, eps=EPS), offload="host", num_slots=3, objective=objective, threads=1)
        records = [engine.step(batch) for _ in range(STEPS)]
        found = {n: p.detach() for n, p in engine.restore().named_parameters()}
    except ZOError as error:
        wrong = isinstance(error, DivergenceError)  # of numbers that are finite in the plain loop
        return result("wrong" if wrong else "refused", f"{type(error).__name__}: {error}")
    except Exception as error:
        return result("wrong", f"{type(error).__name__}: {error}")
    for step, (record, (plus, minus)) in enumerate(zip(records, want, strict=True)):
        mean, grad = (plus + minus) / 2, (plus - minus) / (2 * EPS)
        if (record.loss, record.grad) != (mean, grad):
            return result("wrong", f"step {step}: loss {record.loss!r} grad {record.grad!r}, plain {mean!r} {grad!r}")
    differ = [n for n, w in weights.items() if not torch.equal(found[n], w)]
    return result("wrong", f"weights differ: {differ[:3]} ({len(differ)})") if differ else result("equal")


# ---- all of them -----------------------------------------------------------------------------------------------------


def _work(pipe: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pipe.send("ready")
    while (name := pipe.recv()) is not None:
        pipe.send(compare(name))


class Worker:
    """A process that compares; another one takes its place where it does not answer in time."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._process: Any = None

    def compare(self, name: str) -> Result:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            self._pipe.recv()  # what it imports is not the model's time
        self._pipe.send(name)
        how = f"no end within {self._limit_s:g} s"
        with contextlib.suppress(EOFError, ConnectionError):
            if self._pipe.poll(self._limit_s):
                found: Result = self._pipe.recv()
                return found
        if not self._process.is_alive():
            how = f"its process ended with code {self._process.exitcode}"
        self._stop()
        return Result(name, "wrong", how, self._limit_s)

    def _stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._process = None

    def close(self) -> None:
        if self._process is not None:
            self._stop()


def run(wanted: Iterable[str], limit_s: float, say: Callable[[Result], None]) -> None:
    worker = Worker(limit_s)
    try:
        for name in wanted:
            say(worker.compare(name))
    finally:
        worker.close()


def summary(results: list[Result]) -> dict[str, Any]:
    """What the last line says."""
    outcomes = Counter(r.outcome for r in results)
    refused = Counter(r.why.split(":")[0] for r in results if r.outcome == "refused")
    tried = sum(n for outcome, n in outcomes.items() if outcome != "unbuildable")
    return {
        "kind": "summary", "models": len(results), "tried": tried, "equal": outcomes["equal"],
        "refused": dict(refused), "random": outcomes["random"], "wrong": outcomes["wrong"],
        "wrong_names": [r.name for r in results if r.outcome == "wrong"],
    }  # fmt: skip


def _read(path: Path) -> Iterator[Result]:
    for line in path.read_text().splitlines() if path.exists() else []:
        entry = json.loads(line)
        if entry["kind"] == "model":
            yield Result(*(entry[key] for key in ("name", "outcome", "why", "seconds", "parameters")))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="-", help="file to append to and go on from; - for the standard output")
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a model may take")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="stop after so many; what is left is for the next run"
    )
    options = parser.parse_args(arguments)
    out = None if options.out == "-" else Path(options.out)
    done = list(_read(out)) if out is not None else []
    known = {r.name for r in done}
    ends = time.monotonic() + options.minutes * 60

    def write(entry: dict[str, Any]) -> None:
        with open(out, "a") if out is not None else contextlib.nullcontext(sys.stdout) as file:
            print(json.dumps(entry), file=file, flush=True)

    def say(r: Result) -> None:
        done.append(r)
        write({"kind": "model", **vars(r)})

    def left() -> Iterator[str]:
        for name in names():
            if options.minutes and time.monotonic() > ends:
                return
            if name not in known and options.only in name:
                yield name

    run(left(), options.limit, say)
    write(about("zoo") | {"steps": STEPS} | summary(done))
    return 1 if any(r.outcome == "wrong" for r in done) else 0


if __name__ == "__main__":
    sys.exit(main())
