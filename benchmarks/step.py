"""One step beside as many plain forwards of the same model as its method takes: two for MeZO, the floor of any
two-point method; nine for FZOO (--method fzoo, ways "ours" only).

    python -m benchmarks.step [--quick] [--models opt-125m opt-1.3b] [--tokens 128 512] [--repeats 5] [--ways NAME ...]
                              [--block-numel N ...] [--method mezo|fzoo]

Random weights, random tokens, batch 1, compute and storage in fp32 (or as --dtype and --storage say). For each way of
running, its step and the plain forwards (loss included) are timed in turn in the same process, so a noisy machine
disturbs both; `ratio` is the median of the pairs' ratios. `fused_s` is what a step's fused passes take. Ways:
    ours none | host | disk        Engine.step, everything resident, or streamed through 3 slots
    plain mezo                     MeZO as usually written: +eps, forward, -2 eps, forward, +eps, update; torch noise
    accelerate cpu | disk, twice   two forwards through accelerate's cpu_offload / disk_offload (it cannot train;
                                   this is the least a user would pay)

    python -m benchmarks.step --tiers [--tokens 128] [--repeats 20] [--storage fp32]

sets up memory, host, and disk with and without copies at once, steps them in turn, and gives for each the median of
its ratios to the step in memory beside it, and what a step costs that does not depend on who else uses the machine: CPU
seconds of each thread, page faults, bytes and calls of reads and writes, context switches.

    python -m benchmarks.step --cold [--tokens 128] [--storage bf16]

steps from files that are not in the page cache, which is emptied of them before each: `of_slower` is the median ratio
to the slower of reading the same bytes from the same files, one after another, and the step in memory. Nothing is
folded meanwhile. The drive is that of --folder; a drive that reads slower than memory computes binds by itself.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import about, emit, opt_config, quantile
from zo_offload import FZOO, Engine, Method, MeZO
from zo_offload.kernels.distributions import DISTRIBUTIONS
from zo_offload.plan.blocks import BLOCK_NUMEL
from zo_offload.tiers.block_file import DATA

Work = Callable[[], Any]


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import OPTForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        model = OPTForCausalLM(opt_config(name))
    model = nn.Module.to(model, dtype).to_empty(device="cpu").eval()
    model.tie_weights()
    noise = (torch.randn(1 << 20) * 0.02).to(dtype)
    with torch.no_grad():
        for p in model.parameters():  # random enough for timing, and quick to make
            flat = p.view(-1)
            for start in range(0, flat.numel(), noise.numel()):
                flat[start : start + noise.numel()] = noise[: flat.numel() - start]
    model.config.use_cache = False
    return model


def pairs(work: Work, floor: Work, repeats: int) -> tuple[list[float], list[float]]:
    """Times of work and of floor, taken in turn, after one of each to warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(repeats + 1):
        for which, fn in enumerate((work, floor)):
            start = time.perf_counter()
            fn()
            if i:
                times[which].append(time.perf_counter() - start)
    return times


def plain_mezo(model: nn.Module, batch: dict[str, torch.Tensor], eps: float = 1e-3, lr: float = 1e-6) -> Work:
    """Malladi et al. 2023, Algorithm 1, as their code runs it: torch's own noise, weights perturbed in place."""
    step = [0]

    def shift(seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for p in model.parameters():
            p.data.add_(torch.normal(0.0, 1.0, p.shape, device=p.device, dtype=p.dtype), alpha=scale)

    def work() -> None:
        with torch.no_grad():
            seed = step[0] = step[0] + 1
            shift(seed, eps)
            plus = float(model(**batch).loss)
            shift(seed, -2 * eps)
            minus = float(model(**batch).loss)
            shift(seed, eps)
            shift(seed, -lr * (plus - minus) / (2 * eps))

    return work


WAYS = ("ours none", "ours host", "ours disk", "plain mezo", "accelerate cpu", "accelerate disk")


def ways(
    name: str,
    batch: dict[str, torch.Tensor],
    folder: str,
    wanted: Sequence[str],
    block_numels: Sequence[int],
    method: Method,
    storage: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[str, Work, dict[str, Any]]]:
    """Each way of running, with its work set up; the next one is set up only when this one is done with."""
    for offload, block_numel in product(("none", "host", "disk"), block_numels):
        if f"ours {offload}" not in wanted:
            continue
        run_dir = f"{tempfile.mkdtemp(dir=folder)}/run" if offload == "disk" else None
        settings: dict[str, Any] = dict(offload=offload, run_dir=run_dir, block_numel=block_numel, storage=storage)
        engine = Engine(make_model(name, dtype), method=method, **settings)
        with engine:
            engine.step(batch)
            engine.step(batch)
            streamer = engine.active.streamer
            yield (
                f"ours {offload}",
                lambda engine=engine: engine.step(batch),
                {
                    "block_numel": block_numel,
                    "blocks": len(engine.plan.blocks),
                    "resident_bytes": streamer.resident_bytes,
                    "scratch_bytes": streamer.scratch_bytes,
                    "model_bytes": engine.layout.total_bytes,
                    "fused_s": lambda engine=engine: fused_seconds(engine, batch),
                },
            )
        del engine, streamer
        gc.collect()
    if "plain mezo" in wanted:
        model = make_model(name, dtype)
        yield "plain mezo", plain_mezo(model, batch), {}
        del model
        gc.collect()
    from accelerate import cpu_offload, disk_offload

    for where in ("cpu", "disk"):
        if f"accelerate {where}" not in wanted:
            continue
        model = make_model(name, dtype)
        device = torch.device("cpu")
        model = cpu_offload(model, device) if where == "cpu" else disk_offload(model, f"{folder}/accelerate", device)
        yield f"accelerate {where}, twice", forwards(model, batch, 2), {}
        del model
        gc.collect()


def fused_seconds(engine: Engine, batch: dict[str, torch.Tensor]) -> float:
    """Of a step, what its fused passes take, their calls included; the median of five steps."""
    found = []
    for _ in range(5):
        before = engine.active.streamer.traffic
        start = before.fused_s
        engine.step(batch)
        now = engine.active.streamer.traffic
        found.append(now.fused_s - (start if now is before else 0.0))
    return round(quantile(found, 0.5), 3)


def forwards(model: nn.Module, batch: dict[str, torch.Tensor], count: int) -> Work:
    def work() -> None:
        with torch.no_grad():
            for _ in range(count):
                float(model(**batch).loss)

    return work


TIERS: dict[str, dict[str, Any]] = {
    "none": dict(offload="none"), "host": dict(offload="host"), "disk": dict(offload="disk"),
    "disk, copied": dict(offload="disk", scrub_every=1),
}  # fmt: skip
"""The last reads every block and sums it; the one before uses those in the page cache where they lie."""


def spent() -> Counter[str]:
    """What this process has spent so far: `cpu NAME` seconds of its threads (those without a name of ours, torch's,
    together), page faults, context switches, bytes and calls of reads and writes."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    found: Counter[str] = Counter()
    for task in Path("/proc/self/task").iterdir():
        name = names.get(int(task.name), "torch").removeprefix("zo_offload:").split(":")[0]
        found[f"cpu {name}"] += int((task / "schedstat").read_text().split()[0]) / 1e9  # type: ignore[assignment]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found.update({"minor_faults": usage.ru_minflt, "switches": usage.ru_nvcsw + usage.ru_nivcsw})
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    keys = {"rchar": "read_bytes", "wchar": "write_bytes", "syscr": "reads", "syscw": "writes"}
    found.update({name: int(io[key]) for key, name in keys.items()})
    return found


def tiers_in_turn(options: argparse.Namespace, name: str, tokens: int, method: Method, common: dict[str, Any]) -> None:
    """Steps of all tiers in turn, each beside one in memory."""
    ids = torch.randint(5, 50000, (1, tokens), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, ExitStack() as stack:
        engines = {
            tier: stack.enter_context(
                Engine(
                    make_model(name, DTYPES[options.dtype]), method=method, storage=options.storage,
                    fold_every=options.fold_every, snapshot_minutes=None,
                    run_dir=f"{folder}/{tier}" if "disk" in tier else None, **how,
                )
            )
            for tier, how in TIERS.items()
        }  # fmt: skip
        seconds: dict[str, list[float]] = {tier: [] for tier in TIERS}
        costs: dict[str, Counter[str]] = {tier: Counter() for tier in TIERS}
        for i in range(options.warm + options.repeats):
            for tier in list(TIERS)[:: 1 if i % 2 else -1]:
                before, start = spent(), time.perf_counter()
                engines[tier].step(batch)
                took, after = time.perf_counter() - start, spent()
                if i >= options.warm:
                    seconds[tier].append(took)
                    costs[tier].update({key: n - before[key] for key, n in after.items()})
        for tier, engine in engines.items():
            ratios = [a / b for a, b in zip(seconds[tier], seconds["none"], strict=True)]
            each = {key: round(n / options.repeats, 4) for key, n in sorted(costs[tier].items()) if n}
            emit(
                {
                    "model": name, "tokens": tokens, "tier": tier, "fold_every": engine.fold_every,
                    "ratio": round(quantile(ratios, 0.5), 3), "p20": round(quantile(ratios, 0.2), 3),
                    "p80": round(quantile(ratios, 0.8), 3), "n": len(ratios),
                    "step_s": round(quantile(seconds[tier], 0.5), 4),
                    "cpu_s": round(sum(n for key, n in each.items() if key.startswith("cpu")), 4),
                    "wait_s": round(engine.active.streamer.traffic.wait_s, 4), "each": each,
                },
                common,
            )  # fmt: skip


def evict(paths: Sequence[Path]) -> None:
    """Take files out of the page cache."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(paths: Sequence[Path], nbytes: Sequence[int]) -> None:
    """The blocks' bytes, from their files' first generation."""
    buffer = memoryview(bytearray(1 << 22))
    for path, size in zip(paths, nbytes, strict=True):
        with path.open("rb", buffering=0) as file:
            left, _ = size, file.seek(DATA)
            while left > 0:
                left -= file.readinto(buffer[:left]) or left


def seconds_of(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cold_steps(options: argparse.Namespace, name: str, tokens: int, method: Method, common: dict[str, Any]) -> None:
    """Steps from files that are not in the page cache, beside reading them and beside the step in memory."""
    ids = torch.randint(5, 50000, (1, tokens), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    still = replace(method, lr=1e-60)  # 0 in float32: updates of nothing cost no noise, however many are pending
    settings: dict[str, Any] = dict(
        method=still, storage=options.storage, fold_every=1 << 20, snapshot_minutes=None, num_slots=3
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        with Engine(make_model(name, DTYPES[options.dtype]), offload="none", **settings) as engine:
            engine.step(batch)
            memory_s = [seconds_of(lambda: engine.step(batch)) for _ in range(options.repeats)]
        run = Path(folder) / "run"
        with Engine(make_model(name, DTYPES[options.dtype]), offload="disk", run_dir=run, **settings) as engine:
            engine.step(batch)
            paths, nbytes = sorted(run.rglob("*.zob")), engine.layout.block_bytes
            reads, steps = list[float](), list[float]()
            for _ in range(options.repeats):
                evict(paths)
                reads.append(seconds_of(lambda: read_through(paths, nbytes)))
                evict(paths)
                steps.append(seconds_of(lambda: engine.step(batch)))
    compute = quantile(memory_s, 0.5)
    ratios = [step / max(read, compute) for step, read in zip(steps, reads, strict=True)]
    emit(
        {
            "model": name, "tokens": tokens, "way": "ours disk, cold", "of_slower": round(quantile(ratios, 0.5), 3),
            "p20": round(quantile(ratios, 0.2), 3), "p80": round(quantile(ratios, 0.8), 3), "n": len(ratios),
            "step_s": round(quantile(steps, 0.5), 3), "read_s": round(quantile(reads, 0.5), 3),
            "memory_s": round(compute, 3), "read_gb_per_s": round(sum(nbytes) / quantile(reads, 0.5) / 1e9, 3),
        },
        common,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["opt-125m", "opt-1.3b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="NAME", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--block-numel", nargs="+", type=int, default=[BLOCK_NUMEL], help="of ours: elements a block")
    parser.add_argument("--method", choices=["mezo", "fzoo"], default="mezo")
    parser.add_argument("--noise", choices=DISTRIBUTIONS, help="of our ways; default the method's")
    parser.add_argument("--tiers", action="store_true", help="memory, host and disk in turn, and what each costs")
    parser.add_argument("--cold", action="store_true", help="steps from files that are not in the page cache")
    parser.add_argument("--storage", help="of ours; default the model's own dtype")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of all forwards, the plain ones too")
    parser.add_argument("--fold-every", type=int, help="of --tiers")
    parser.add_argument("--warm", type=int, default=8, help="of --tiers: steps before those that count")
    parser.add_argument(
        "--folder", type=Path, help="of --tiers and --cold: where the run on disk is, default a temporary one"
    )
    parser.add_argument("--quick", action="store_true", help="opt-125m at 128 tokens, three repeats")
    options = parser.parse_args()
    if options.quick:
        options.models, options.tokens, options.repeats = ["opt-125m"], [128], 3
    noise = {} if options.noise is None else {"distribution": options.noise}
    method: Method = FZOO(lr=1e-6, **noise) if options.method == "fzoo" else MeZO(lr=1e-6, **noise)
    count = len(method.perturbations(0, 0))
    if options.method == "fzoo":
        options.ways = [way for way in options.ways if way.startswith("ours")]
    common = about("step") | {
        "method": options.method, "noise": method.distribution, "forwards": count, "dtype": options.dtype
    }  # fmt: skip
    dtype = DTYPES[options.dtype]
    for name, tokens in product(options.models, options.tokens) if options.tiers else ():
        tiers_in_turn(options, name, tokens, method, common)
    for name, tokens in product(options.models, options.tokens) if options.cold else ():
        cold_steps(options, name, tokens, method, common)
    for name in () if options.tiers or options.cold else options.models:
        plain = make_model(name, dtype)
        for tokens in options.tokens:
            ids = torch.randint(5, 50000, (1, tokens), generator=torch.Generator().manual_seed(1))
            batch = {"input_ids": ids, "labels": ids}
            floor = forwards(plain, batch, count)
            with tempfile.TemporaryDirectory() as folder:
                settings = (options.ways, options.block_numel, method, options.storage, dtype)
                for way, work, extra in ways(name, batch, folder, *settings):
                    ours, plainly = pairs(work, floor, options.repeats)
                    ratios = [a / b for a, b in zip(ours, plainly, strict=True)]
                    extra = {key: value() if callable(value) else value for key, value in extra.items()}
                    emit(
                        {
                            "model": name, "tokens": tokens, "way": way, "ratio": round(quantile(ratios, 0.5), 3),
                            "p20": round(quantile(ratios, 0.2), 3), "p80": round(quantile(ratios, 0.8), 3),
                            "n": len(ratios), "step_s": round(quantile(ours, 0.5), 3),
                            "forwards_s": round(quantile(plainly, 0.5), 3),
                            "tokens_per_s": round(tokens / quantile(ours, 0.5), 1), **extra,
                        },
                        common,
                    )  # fmt: skip
        del plain


if __name__ == "__main__":
    main()
