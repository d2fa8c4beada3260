"""Runs drawn at random, each beside others that must come to the same bits. One JSON line; exit 1 on a difference.

    python -m benchmarks.draws [--minutes 3] [--seed 0] [--count N] [--only 17]

A draw is what a run's numbers depend on: a method with its options, storage, rounding, folds, pieces, what trains, an
adapter, micro-batches, a schedule, batches whose loss is NaN. It is run

    plainly     whole in memory, a parameter at a time through the reference of the fused pass, no engine (`plain`);
                not with an adapter, dropout, or layers computed in pieces
    once        by an engine, never stopped
    again       by engines in other tiers, orders and windows, stopped in each way there is (closed, dropped, stopped
                from a callback, an error there, killed) and resumed under yet another, disturbed in between
                (evaluated, read, exported, an earlier step opened)
    replayed    from base and journal, to the last step and to one before

Losses and weights of all of them are compared with `==`. --only: one draw by its number, told in full.
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import about, emit
from benchmarks.plain_runs import plain_run
from zo_offload import Engine
from zo_offload.formats import FORMATS
from zo_offload.methods import METHODS, Method
from zo_offload.methods.base import lr_schedule
from zo_offload.replay import replayed

VOCAB, ROWS, LENGTH = 48, 4, 8
POISON = 1
"""A batch that begins with this token has a loss that is NaN."""
RATES = {"mezo": 1e-3, "fzoo": 3e-3, "fzoo-loo": 3e-3, "fzoo-r": 3e-3, "spsa-1.5": 1e-3, "nspsa": 1e-3, "sign": 1e-3}


# ---- what is drawn ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """What a run's numbers depend on."""

    method: Method
    settings: dict[str, Any]
    base: str
    steps: int
    micro_batches: int
    poisoned: frozenset[int]
    by_fit: bool

    def rate(self, step: int) -> float:
        factor = lr_schedule(self.method.schedule, self.method.warmup_steps, self.steps)(step)
        return self.method.lr * factor

    @property
    def has_plain(self) -> bool:
        """Whether `plain` computes the same: no adapter, no random numbers, layers whole, batches known."""
        odd = {"adapter", "block_numel"} & self.settings.keys() or self.settings.get("mode") == "train"
        return not odd and not self.by_fit


def draw_method(rng: random.Random, steps: int) -> Method:
    name = rng.choice(sorted(METHODS.keys() - {"senszoq", "tail-alone"}))  # which need a file, and a tail
    kind = METHODS[name]
    options: dict[str, Any] = {
        "lr": RATES.get(name, 1e-3) * rng.choice((0.1, 1.0)), "eps": rng.choice((1e-3, 1e-2, 3e-3)),
        "weight_decay": rng.choice((0.0, 0.1)), "distribution": rng.choice(("gaussian", "rademacher")),
        "rounds": rng.choice((7, 10)), "noise_layout": rng.choice((1, 2)),
        "on_nonfinite": rng.choice(("stop", "skip", "halve_eps")), "batch_size": ROWS,
    }  # fmt: skip
    schedule = rng.choice(("constant", "linear", "cosine", "constant_with_warmup"))
    options |= {"schedule": schedule, "warmup_steps": rng.randrange(steps) if schedule != "constant" else 0}
    has = kind.__dataclass_fields__
    for what, choices in {
        "directions": (2, 3, 4), "window": (1, 2, 5), "beta": (0.5, 0.9), "pool": (1, 3, 64), "grad_clip": (0.5, 100.0),
        "clip": (0.5, 37.0), "top": (0, 1), "sparsity": (0.0, 0.5, 0.9), "mask_seed": (0, 5),
        "theta": (0.3, 1.35),
    }.items():  # fmt: skip
        if what in has and rng.random() < 0.8:
            options[what] = rng.choice(choices)
    if name == "fzoo-r" and "directions" in options:
        options["directions"] = rng.choice((4, 6))
    if name == "conmezo" and options.get("window") == 1:
        options["window"] = 3
    if name == "seed-pool":
        options["weight_decay"] = 0.0
    return kind(**options)


def draw(number: int, seed: int) -> tuple[Draw, random.Random]:
    rng = random.Random(f"{seed} {number}")
    steps = rng.randrange(4, 10)
    method = draw_method(rng, steps)
    on_scales = method.target != "values"
    some = rng.random()
    if on_scales:
        storage = rng.choice([name for name, fmt in FORMATS.items() if fmt.trains_scales])
    else:
        storage = rng.choice(list(FORMATS))
    settings: dict[str, Any] = {
        "storage": storage, "seed": rng.choice((0, 7, 2**64 - 1)), "rounding": rng.choice(("nearest", "stochastic")),
        "fold_every": rng.choice((None, 1, 2, 3, 5)), "compute": rng.choice((None, None, "fp32", "bf16")),
    }  # fmt: skip
    if on_scales:
        settings["trainable"] = rng.choice((None, ["layers"]))
    elif some < 0.2 and method.name != "sparse-mezo":  # which has no threshold among an adapter's zeros
        settings |= {"adapter": rng.choice(("r=2", {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "fc1"]}))}
    elif not FORMATS[storage].trains:
        settings["trainable"] = ["*_layer_norm", "bias"]
    else:
        settings["trainable"] = rng.choice((None, None, ["layers"], ["embed_tokens", "layers.1"], "layers.0.fc1"))
    if method.name == "lezo" and "trainable" in settings:
        settings["trainable"] = ["layers"] if FORMATS[storage].trains else ["*_layer_norm", "bias"]  # several layers
    if rng.random() < 0.3:
        settings["block_numel"] = rng.choice((256, 700, 1500))
    if rng.random() < 0.2:
        settings["mode"] = "train"
    if rng.random() < 0.2 and "adapter" not in settings:
        settings["keep"] = rng.choice(("embed_tokens", ["layers.0"]))
    poisoned = (
        frozenset(range(steps)) if rng.random() < 0.05 else frozenset(rng.sample(range(steps), rng.choice((1, 2))))
    )
    poisoned = poisoned if method.on_nonfinite != "stop" and rng.random() < 0.7 else frozenset()
    base, by_fit = rng.choice(("tied", "untied")), not poisoned and rng.random() < 0.3
    found = Draw(method, {k: v for k, v in settings.items() if v is not None}, base, steps, rng.choice((1, 1, 2, 4)),
                 poisoned, by_fit)  # fmt: skip
    return found, rng


def way(rng: random.Random) -> dict[str, Any]:
    """How it is run: nothing that its numbers depend on."""
    slots = rng.choice((None, 2, 3, 5))
    found = {
        "offload": rng.choice(("none", "host", "disk")), "order": rng.choice(("module", "block", "lane")),
        "num_slots": slots, "prefetch": rng.choice((None, 1)) if slots else None, "threads": rng.choice((1, 2)),
        "io_threads": rng.choice((1, 2)), "snapshot_steps": rng.choice((None, 1, 3)), "overlap": True,
    }  # fmt: skip
    return found | {"overlap": False, "prefetch": None} if rng.random() < 0.15 else found


# ---- bases, batches --------------------------------------------------------------------------------------------------


def make_bases(folder: Path) -> dict[str, Path]:
    from transformers import OPTConfig, OPTForCausalLM

    made = {}
    for name, tied in (("tied", True), ("untied", False)):
        torch.manual_seed(0)
        config = OPTConfig(
            vocab_size=VOCAB, hidden_size=16, num_hidden_layers=3, ffn_dim=32, num_attention_heads=2,
            max_position_embeddings=16, word_embed_proj_dim=16, tie_word_embeddings=tied, dropout=0.1,
        )  # fmt: skip
        OPTForCausalLM(config).save_pretrained(folder / name)
        made[name] = folder / name
    return made


def batch(step: int, poisoned: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
    if poisoned:
        ids[:, 0] = POISON
    return {"input_ids": ids, "labels": ids}


DATA = [{"input_ids": row.tolist()} for step in range(5) for row in batch(step)["input_ids"]]
HELD_OUT = [{"input_ids": row.tolist()} for row in batch(99)["input_ids"]]


def objective(model: Any, inputs: Any) -> Any:
    loss = model(**inputs).loss
    return loss * math.nan if int(inputs["input_ids"][0, 0]) == POISON else loss


def plain(drawn: Draw, base: Path) -> tuple[list[float], list[dict[str, Tensor]]]:
    """See `plain_run`."""
    engine = Engine(str(base), method=drawn.method, objective=objective, **{**drawn.settings, "offload": "none"})
    model = type(engine.model).from_pretrained(base).eval()  # type: ignore[attr-defined]
    model.config.use_cache = False
    batches = [batch(step, step in drawn.poisoned) for step in range(drawn.steps)]
    rates = [drawn.rate(step) for step in range(drawn.steps)]
    return plain_run(
        engine, model, batches, rates, objective=objective, micro_batches=drawn.micro_batches,
        counts=lambda part: float(part["labels"][:, 1:].numel()),
    )  # fmt: skip


# ---- engines ---------------------------------------------------------------------------------------------------------


class Broken(Exception):
    """Raised in a callback."""


def begin(drawn: Draw, base: Path, run: Path, how: dict[str, Any]) -> Engine:
    return Engine(str(base), method=drawn.method, run_dir=run, objective=objective, **{**drawn.settings, **how})


def go_on(drawn: Draw, engine: Engine, to: int, at: Callable[[int], None] = lambda step: None) -> None:
    """Take steps up to `to`; at(step) is called after each."""
    if drawn.by_fit:
        engine.fit(
            DATA, steps=drawn.steps, batch_size=ROWS, micro_batches=drawn.micro_batches,
            callback=lambda record: at(record.step + 1),
        )  # fmt: skip
        return
    engine.weights()  # from here on a resumed engine's log has the run's steps
    for step in range(engine.log.version, to):
        engine.step(batch(step, step in drawn.poisoned), drawn.rate(step), micro_batches=drawn.micro_batches)
        at(step + 1)


def weights_of(engine: Engine) -> dict[str, Tensor]:
    return dict(engine.weights())


def losses_of(engine: Engine) -> list[float]:
    assert engine.journal is not None
    return [record.loss for record in engine.journal.steps]


def disturb(rng: random.Random, engine: Engine, folder: Path, step: int) -> None:
    """What a user does in the midst of a run."""
    what = rng.choice(("evaluate", "weights", "export", "at", "run", "nothing", "nothing"))
    if what == "evaluate":
        engine.evaluate(HELD_OUT, batch_size=2)
    elif what == "weights":
        next(engine.weights())
    elif what == "export":
        shutil.rmtree(folder / "export", ignore_errors=True)
        engine.save_pretrained(folder / "export")
    elif what == "at":
        with engine.at(rng.randrange(step + 1)) as then:
            next(then.weights())
    elif what == "run":
        engine.run({"input_ids": batch(3)["input_ids"]})


def stopped(drawn: Draw, base: Path, run: Path, folder: Path, rng: random.Random) -> tuple[Engine, list[str]]:
    """An engine at the end of a run that was stopped several times, and how."""
    told: list[str] = []
    stops = sorted(rng.sample(range(1, drawn.steps), min(drawn.steps - 1, rng.choice((1, 2, 3)))))
    for stop in [*stops, drawn.steps]:
        how = way(rng)
        end = rng.choice(("close", "drop", "error", "kill")) if stop < drawn.steps else "end"
        told.append(f"{end} at {stop} under {how}")

        def work(how: dict[str, Any] = how, stop: int = stop, end: str = end) -> Engine:
            new = not (run / "config.json").exists()
            engine = begin(drawn, base, run, how) if new else Engine.resume(run, objective=objective, **how)

            def at(step: int) -> None:
                if step == stop and end == "kill":
                    if engine.journal is not None and rng.random() < 0.5:
                        engine.journal.make_durable(step)
                    os.kill(os.getpid(), signal.SIGKILL)
                if step == stop and end == "error":
                    raise Broken
                if step == stop and drawn.by_fit and end != "end":
                    engine.stop()
                if rng.random() < 0.4:
                    disturb(rng, engine, folder, step)

            try:
                go_on(drawn, engine, stop, at)
            except Broken:
                pass
            except BaseException:
                engine.close()
                raise
            return engine

        if end == "kill":
            in_child(work)
            continue
        engine = work()
        if end == "end":
            return engine, told
        if end in ("close", "error"):
            engine.close()
        else:
            del engine
            gc.collect()
    raise AssertionError("the last one ends")


def in_child(work: Callable[[], Any]) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status):
        raise AssertionError("the run that was to be killed ended, see above")


# ---- one draw --------------------------------------------------------------------------------------------------------


def differ(got: dict[str, Tensor], want: dict[str, Tensor]) -> str:
    if got.keys() != want.keys():
        return f"names {sorted(got.keys() ^ want.keys())}"
    for name, tensor in want.items():
        other = got[name]
        if other.dtype != tensor.dtype or not torch.equal(other, tensor):
            return f"{name}: {int((other != tensor).sum())} of {tensor.numel()} differ ({other.dtype}, {tensor.dtype})"
    return ""


def same_losses(got: list[float], want: list[float]) -> bool:
    return len(got) == len(want) and all(a == b or (a != a and b != b) for a, b in zip(got, want, strict=True))


def check(drawn: Draw, rng: random.Random, base: Path, folder: Path) -> Iterator[str]:
    """What differs, in words."""
    first = way(rng)
    engine = begin(drawn, base, folder / "once", first)
    go_on(drawn, engine, drawn.steps)
    losses, weights = losses_of(engine), weights_of(engine)
    engine.close()
    after: list[dict[str, Tensor]] = []
    if drawn.has_plain:
        want, after = plain(drawn, base)
        if not same_losses(losses, want):
            yield f"losses {losses} under {first}, plain {want}"
        if found := differ(weights, after[-1]):
            yield f"weights under {first} and plain: {found}"
    engine, told = stopped(drawn, base, folder / "again", folder, rng)
    if not same_losses(losses_of(engine), losses):
        yield f"losses {losses_of(engine)} after {told}, never stopped under {first}: {losses}"
    if found := differ(weights_of(engine), weights):
        yield f"weights after {told}, never stopped under {first}: {found}"
    engine.close()
    options = {
        "objective": objective,
        **({"adapter": drawn.settings["adapter"]} if "adapter" in drawn.settings else {}),
    }
    with replayed(base, folder / "again", **options) as engine:
        if found := differ(weights_of(engine), weights):
            yield f"weights replayed: {found}"
    if after:
        step = rng.randrange(drawn.steps + 1)
        with replayed(base, folder / "again", to=step, **options) as engine:
            if found := differ(weights_of(engine), after[step]):
                yield f"weights replayed to step {step}, and plain: {found}"


def tried(number: int, seed: int, bases: dict[str, Path], loud: bool = False) -> tuple[str, Draw]:
    """ "equal", "refused: why", or what is wrong with a draw."""
    drawn, rng = draw(number, seed)
    if loud:
        print(drawn, file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrong = list(check(drawn, rng, bases[drawn.base], Path(folder)))
        except Exception as error:
            if loud:
                traceback.print_exc()
            return f"{type(error).__name__}: {error}", drawn
    return "; ".join(wrong) or "equal", drawn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("zo_offload").setLevel(logging.ERROR)
    end = time.monotonic() + 60 * options.minutes
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        bases = make_bases(Path(folder))
        number = options.only or 0
        while options.only is None or not outcomes:
            if number == options.count or time.monotonic() > end:
                break
            said, drawn = tried(number, options.seed, bases, options.only is not None)
            outcomes[said if said == "equal" else "wrong"] += 1
            if said != "equal":
                print(
                    f"draw {number} of seed {options.seed}: {drawn.method.name}: {said[:1500]}",
                    file=sys.stderr,
                    flush=True,
                )
            number += 1
    emit({"seed": options.seed, "draws": number, **outcomes}, about("draws"))
    return 1 if outcomes["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
