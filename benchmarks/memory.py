"""Peak resident memory of training a model streamed from disk, beside the plan's prediction.

    python -m benchmarks.memory [--quick] [--models opt-1.3b opt-2.7b opt-6.7b] [--layers N ...] [--tokens 128]
    python -m benchmarks.memory --lora 16 --storage int4 --models opt-6.7b     # an adapter on a checkpoint's path

Each case runs in a process of its own: bf16 storage, fp32 compute, random weights written straight into blocks (the
whole model is never in memory), three steps of batch 1. `peak_bytes` is the kernel's high-water mark (VmHWM) of that
process; `predicted_bytes` what the plan said before anything was allocated; `model_bytes` the weights on disk. The
opt-1.3b shape is also run with other numbers of layers: the peak must not follow them.

With --lora a checkpoint of random bf16 weights is written first (a temporary directory takes twice its size), by
another process; what is measured opens it, ingests it, trains, and exports the adapter, and merged with --merge.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT, about, emit, opt_config


class RandomBase:
    """First weights made up on the spot, a tile of noise again and again."""

    def __init__(self, shapes: dict[str, torch.Size]) -> None:
        self._shapes = shapes
        self._noise = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def shape_of(self, name: str) -> torch.Size:
        return self._shapes[name]

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        size = self._noise.numel()
        at = 0
        while at < len(out):
            begin = (start + at) % size
            count = min(size - begin, len(out) - at)
            out[at : at + count] = self._noise[begin : begin + count]
            at += count

    def dtype_of(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def digest_of(self, name: str) -> str:
        return "random"

    def digest(self) -> str:
        return "random"


def high_water_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def random_opt(name: str, layers: int | None) -> tuple[Any, RandomBase]:
    """An OPT on meta, and random weights for it."""
    from transformers import OPTForCausalLM

    config = opt_config(name)
    if layers:
        config.num_hidden_layers = layers
    config.use_cache = False
    with torch.device("meta"):
        model = OPTForCausalLM(config).eval()
    model.tie_weights()
    return model, RandomBase({n: p.shape for n, p in model.named_parameters()})


def write(name: str, layers: int | None, folder: str) -> None:
    """A checkpoint of random weights; the whole model is never in memory."""
    from zo_offload.checkpoint.checkpoint import save_pretrained

    model, base = random_opt(name, layers)
    save_pretrained(folder, model=model, names=[n for n, _ in model.named_parameters()], weights=base)


def adapted_case(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train an adapter on the checkpoint in this process; returns what was predicted and what was seen."""
    from zo_offload import Engine, MeZO

    ids = torch.randint(5, 50000, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    folder = Path(options.checkpoint).parent
    start = time.perf_counter()
    engine = Engine(
        options.checkpoint, adapter=f"r={options.lora}", storage=options.storage, method=MeZO(lr=1e-4, eps=1e-2),
        offload="disk", run_dir=folder / "run", order=options.order, example=batch,
    )  # fmt: skip
    predicted = engine.memory
    times: list[float] = []
    peaks: dict[str, int] = {}
    with engine:
        for _ in range(options.steps):
            engine.step(batch)
            times.append(round(time.perf_counter() - start, 2))
            peaks.setdefault("ingested_and_a_step", high_water_bytes())
        engine.save_pretrained(folder / "adapter")
        peaks["adapter_exported"] = high_water_bytes()
        if options.merge:
            engine.save_pretrained(folder / "merged", merge=True)
            peaks["merged_exported"] = high_water_bytes()
        trained = engine.plan.trainable_numel
    return {
        "model": name, "lora": options.lora, "storage": options.storage, "trained": trained, "tokens": options.tokens,
        "order": predicted.order, "model_bytes": engine.layout.total_bytes, "peak_bytes": peaks["ingested_and_a_step"],
        "peaks": peaks, "predicted_bytes": predicted.total_bytes, "terms": dict(predicted.terms), "seconds_at": times,
        "adapter_bytes": sum(p.stat().st_size for p in (folder / "adapter").iterdir()),
    }  # fmt: skip


def case(name: str, layers: int | None, tokens: int, steps: int, order: Any) -> dict[str, Any]:
    """Train in this process; returns what was predicted and what was seen."""
    from zo_offload import Engine, MeZO

    model, base = random_opt(name, layers)
    ids = torch.randint(5, 50000, (1, tokens), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(model, base=base, method=MeZO(lr=1e-6), offload="disk", run_dir=f"{folder}/run", order=order,
                        example=batch)  # fmt: skip
        predicted = engine.memory
        times = []
        with engine:
            for _ in range(steps):
                start = time.perf_counter()
                engine.step(batch)
                times.append(round(time.perf_counter() - start, 2))
            traffic = engine.active.streamer.traffic
    return {
        "model": name, "layers": model.config.num_hidden_layers, "tokens": tokens, "order": predicted.order,
        "model_bytes": engine.layout.total_bytes, "peak_bytes": high_water_bytes(),
        "predicted_bytes": predicted.total_bytes, "terms": dict(predicted.terms), "step_s": times,
        "wait_s": round(traffic.wait_s, 2), "fused_s": round(traffic.fused_s, 2),
    }  # fmt: skip


def _adapted(cases: list[tuple[str, int]], arguments: list[str]) -> None:
    common = about("memory_lora")
    for name, layers in cases:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.memory", *arguments, "--one", name, str(layers)]
            command += ["--checkpoint", f"{folder}/base"]
            subprocess.run([*command, "--write"], cwd=ROOT, check=True)
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(done.stdout)
        result["peak_over_predicted"] = round(result["peak_bytes"] / result["predicted_bytes"], 3)
        emit(result, common)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["opt-1.3b", "opt-2.7b", "opt-6.7b"])
    parser.add_argument("--layers", nargs="+", type=int, default=[6, 12, 48], help="of opt-1.3b, besides its 24")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--order", default="block")
    parser.add_argument("--quick", action="store_true", help="opt-125m only")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "LAYERS"), help=argparse.SUPPRESS)
    parser.add_argument("--lora", type=int, help="rank of an adapter on a checkpoint of random weights")
    parser.add_argument("--storage", default="int4", help="of the base, with --lora")
    parser.add_argument("--merge", action="store_true", help="with --lora: export the merged model too")
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one and options.write:
        write(options.one[0], int(options.one[1]) or None, options.checkpoint)
        return
    if options.one and options.lora:
        print(json.dumps(adapted_case(options.one[0], options)))
        return
    if options.one:
        layers = int(options.one[1]) or None
        print(json.dumps(case(options.one[0], layers, options.tokens, options.steps, options.order)))
        return
    cases = [("opt-125m", 0)] if options.quick else [(m, 0) for m in options.models]
    if options.lora:
        _adapted(cases, sys.argv[1:])
        return
    if not options.quick and "opt-1.3b" in options.models:
        cases += [("opt-1.3b", n) for n in options.layers]
    common = about("memory")
    for name, layers in cases:
        command = [sys.executable, "-m", "benchmarks.memory", "--one", name, str(layers), "--order", options.order]
        command += ["--tokens", str(options.tokens), "--steps", str(options.steps)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(done.stdout)
        result["peak_over_predicted"] = round(result["peak_bytes"] / result["predicted_bytes"], 3)
        result["peak_over_model"] = round(result["peak_bytes"] / result["model_bytes"], 3)
        emit(result, common)


if __name__ == "__main__":
    main()
