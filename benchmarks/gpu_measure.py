"""What `gpu_check` measures, a part at a time: python -m benchmarks.gpu_measure PART [options].

One JSON line a result on standard output, each beside its floor measured in the same process.

    link                    fetch, flush and both at once, page-locked
    kernels                 the fused pass, Gelem/s and share of copy bandwidth, per format, distribution and K
    step MODEL TOKENS       engine steps: offload none and host; two plain forwards; memory by allocator and driver
    naive MODEL TOKENS      MeZO as usually written, resident: +eps, forward, -2 eps, forward, +eps, update

--dry runs the same code on the CPU with small sizes: it proves the plumbing, its numbers mean nothing. **No number of
this has been measured on a GPU yet.**
"""

from __future__ import annotations

import argparse
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.common import about, emit, opt_config, quantile
from zo_offload.devices.link import Link, measure_link
from zo_offload.devices.nvml import DriverMemory
from zo_offload.formats import FORMATS
from zo_offload.kernels.device_updates import UpdateTable
from zo_offload.kernels.records import Perturbation, Update
from zo_offload.numerics.fused import fused_pass
from zo_offload.numerics.noise import NoiseSpec

if TYPE_CHECKING:  # the engine is imported where it runs: link and kernels need no greenlet
    from zo_offload import Engine

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCALE = 0.02


class Clock:
    """Times of a piece of work in seconds, the device's own where there is one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def times(self, work: Callable[[], Any], repeats: int, warm: int = 1) -> list[float]:
        found = []
        for i in range(warm + repeats):
            self.sync()
            start = time.perf_counter()
            work()
            self.sync()
            if i >= warm:
                found.append(time.perf_counter() - start)
        return found


class PeakDriverMemory:
    """The most device memory in use, sampled while the block runs: `peak`, and in `source` by which count.

    By NVML the whole device's, less what was used before this process had a context; without NVML by cudaMemGetInfo,
    the whole device's with nothing taken off. `own`: this process's by NVML, where it tells processes apart.
    """

    def __init__(self, memory: DriverMemory, before: int | None) -> None:
        self._memory, self._before = memory, before
        self._stop = threading.Event()
        self.peak: int | None = None
        self.own: int | None = None
        nvml = before is not None
        self.source = "NVML, device less before" if nvml else "cudaMemGetInfo" if torch.cuda.is_available() else None

    def __enter__(self) -> PeakDriverMemory:
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while self.source is not None and not self._stop.wait(0.05):
            used, own = self._used(), self._memory.process_used()
            self.peak = max(self.peak or 0, used) if used is not None else self.peak
            self.own = max(self.own or 0, own) if own is not None else self.own

    def _used(self) -> int | None:
        if self._before is None:
            free, total = torch.cuda.mem_get_info()
            return int(total - free)
        used = self._memory.device_used()
        return None if used is None else used - self._before

    def as_row(self) -> dict[str, Any]:
        return {"peak_driver_bytes": self.peak, "peak_driver_source": self.source, "peak_process_bytes": self.own}


class RandomBase:
    """Random weights of a model on meta, one tensor at a time: a tile of noise again and again, quick to make."""

    def __init__(self, plan_of: nn.Module, dtype: torch.dtype) -> None:
        self._shapes = {name: p.shape for name, p in plan_of.named_parameters()}
        self._dtype = dtype
        self._tile = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * SCALE).to(dtype)

    def shape_of(self, name: str) -> torch.Size:
        return self._shapes[name]

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        size, at = self._tile.numel(), 0
        while at < len(out):
            begin = (start + at) % size
            count = min(size - begin, len(out) - at)
            out[at : at + count] = self._tile[begin : begin + count]
            at += count

    def dtype_of(self, name: str) -> torch.dtype:
        return self._dtype

    def digest_of(self, name: str) -> str:
        return "random"

    def digest(self) -> str:
        return "random"


def opt_model(name: str, dtype: torch.dtype, tokens: int) -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    if name == "opt-tiny":
        config = OPTConfig(
            vocab_size=512, hidden_size=64, num_hidden_layers=4, ffn_dim=256, num_attention_heads=4,
            max_position_embeddings=max(64, tokens), word_embed_proj_dim=64,
        )  # fmt: skip
    else:
        config = opt_config(name)
    config.use_cache = False
    config.tie_word_embeddings = False  # as ZO2's own protocol has it
    with torch.device("meta"):
        return nn.Module.to(OPTForCausalLM(config), dtype).eval()


def batch_of(model: nn.Module, tokens: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(5, model.config.vocab_size, (1, tokens), generator=g)  # type: ignore[union-attr, arg-type]
    return {"input_ids": ids, "labels": ids}


def resident_copy(name: str, dtype: torch.dtype, tokens: int, device: torch.device) -> nn.Module:
    model = opt_model(name, dtype, tokens).to_empty(device=device)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, SCALE)
    return model


# ---- parts


def link_part(options: Any, common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Three repeats: the link of a shared host is not always the same."""
    for _ in range(3):
        found = find_link(options)
        yield {"part": "link", **found.as_row()}


def find_link(options: Any) -> Link:
    return measure_link(options.torch_device, nbytes=1 << 20 if options.dry else 256 << 20)


def kernels_part(options: Any, common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    device, clock = options.torch_device, Clock(options.torch_device)
    n = 1 << 16 if options.dry else 1 << 28
    source = torch.ones(4 * n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_gbs = 2 * source.numel() / quantile(clock.times(lambda a=target, b=source: a.copy_(b), 5), 0.5) / 1e9
    yield {"part": "kernels", "case": "copy", "gb_per_s": round(copy_gbs, 1)}
    del source, target
    outs = [torch.empty(n, dtype=torch.bfloat16, device=device) for _ in range(2)]
    perturbations = [Perturbation(7, 2.0**-10), Perturbation(7, -(2.0**-10))]
    for name, fmt in FORMATS.items():
        stored = torch.zeros(fmt.nbytes(n), dtype=torch.uint8, device=device)
        residual = torch.zeros(fmt.residual_nbytes(n), dtype=torch.uint8, device=device) if fmt.residual_bytes else None
        for kind in ("gaussian", "rademacher"):
            for count in (1, 4, 8) if name == "bf16" else (1,):
                updates: Any = [Update(i, 2.0**-12, fold=fmt.trains and i == count - 1) for i in range(count)]
                if device.type == "cuda":  # as in a run: the records are there already
                    table = UpdateTable(device)
                    table.append(updates)
                    updates = table.since(0, True)

                def work(stored: Tensor = stored, residual: Tensor | None = residual, updates: Any = updates,
                         kind: Any = kind, fmt: Any = fmt) -> None:  # fmt: skip
                    fused_pass(
                        stored, fmt, param_id=1, numel=n, updates=updates, write_back=fmt.trains,
                        noise=NoiseSpec(kind), perturbations=perturbations, outs=outs, residual=residual,
                    )  # fmt: skip

                seconds = quantile(clock.times(work, 5, warm=2), 0.5)
                moved = (stored.numel() + (0 if residual is None else residual.numel())) * (
                    2 if fmt.trains else 1
                ) + 4 * n
                yield {
                    "part": "kernels", "case": f"{name}, {kind}, K={count}, 2 bf16 lanes",
                    "gelem_per_s": round(n / seconds / 1e9, 2), "gb_per_s": round(moved / seconds / 1e9, 1),
                    "share_of_copy": round(moved / seconds / 1e9 / copy_gbs, 3),
                }  # fmt: skip
        del stored, residual


def two_forwards(options: Any, model: nn.Module, batch: dict[str, Tensor]) -> float:
    placed = {k: v.to(options.torch_device) for k, v in batch.items()}

    def work() -> None:
        with torch.no_grad():
            for _ in range(2):
                model(**placed)

    return quantile(Clock(options.torch_device).times(work, 3, warm=2), 0.5)


def step_part(options: Any, common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Offload host first: its memory is what must not be disturbed. Each row is told as soon as it can be."""
    device, dtype = options.torch_device, DTYPES[options.dtype]
    batch = batch_of(opt_model(options.model, dtype, options.tokens), options.tokens)
    found = find_link(options)
    give_back(device)  # what the copies held is not the engine's
    floor: float | None = None
    for offload in ("host", "none"):
        row = steps_of(options, offload, batch)
        give_back(device)
        if floor is None:
            floor = two_forwards(options, resident_copy(options.model, dtype, options.tokens, device), batch)
            give_back(device)
        fetch = row["model_bytes"] / 1e9 / found.both_fetch_gbs  # something flows back at every fold
        limit = max(floor, fetch if offload == "host" else 0.0)
        yield row | {
            "two_forwards_s": floor, "fetch_s": fetch, "step_over_limit": round(row["step_s"] / limit, 3),
            "binds": "fetch" if limit > floor else "compute",
        }  # fmt: skip


def steps_of(options: Any, offload: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    """An engine's steps and memory, without what they are compared with."""
    from zo_offload import Engine, MeZO

    settings: dict[str, Any] = {"num_slots": 3} if offload == "host" else {}
    if options.torch_device.type == "cuda":
        settings["device"] = "cuda"
        torch.cuda.reset_peak_memory_stats()
    stamps: list[float] = []
    model = opt_model(options.model, DTYPES[options.dtype], options.tokens)
    base = RandomBase(model, DTYPES[options.dtype])
    with PeakDriverMemory(options.driver_memory, options.driver_before) as driver, Engine(
        model, method=MeZO(lr=1e-7), base=base, offload=offload, fold_every=options.fold_every, **settings
    ) as engine:  # fmt: skip
        engine.step(batch)
        wait_pinned(engine)
        engine.fit(
            [batch] * (options.steps + 3), steps=options.steps + 3, batch_size=1,
            callback=lambda record: stamps.append(time.perf_counter()),
        )  # fmt: skip
        times = [b - a for a, b in pairwise(stamps[1:])] or [float("nan")]
        enqueue = min(launch_seconds(engine, batch, Clock(options.torch_device)) for _ in range(2))
        row = {
            "part": "step", "way": f"ours {offload}", "model": options.model, "tokens": options.tokens,
            "dtype": options.dtype, "fold_every": engine.fold_every, "step_s": quantile(times, 0.5),
            "p20": quantile(times, 0.2), "p80": quantile(times, 0.8), "n": len(times),
            "tokens_per_s": round(options.tokens / quantile(times, 0.5), 1),
            "model_bytes": engine.layout.total_bytes, "resident_bytes": engine.active.streamer.resident_bytes,
            "planned_device_bytes": engine.memory.device_bytes, "context_bytes": engine.device.context_bytes,
            "visits": len(engine.plan.visits), "enqueue_s": round(enqueue, 5),
            "host_over_model": host_over_model(engine) if offload == "host" else None,
        }  # fmt: skip
    return row | allocator_peaks(options.torch_device) | driver.as_row()


def give_back(device: torch.device) -> None:
    """Memory that nothing refers to any more, to the driver: it would count for what is measured next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def allocator_peaks(device: torch.device) -> dict[str, Any]:
    """Of torch's allocator since the last reset: tensors, and what it holds for them."""
    if device.type != "cuda":
        return {}
    return {"peak_allocator_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved()}  # fmt: skip


def launch_seconds(engine: Engine, batch: dict[str, Tensor], clock: Clock) -> float:
    """What the host takes to enqueue a step on an idle device: the least that a step can take."""
    clock.sync()
    start = time.perf_counter()
    launched = engine.active.launch(batch)
    seconds = time.perf_counter() - start
    engine.active.finish(launched)
    return seconds


def wait_pinned(engine: Engine) -> None:
    tier = engine.active.streamer.window.tier
    if hasattr(tier, "wait_pinned"):
        tier.wait_pinned()


def host_over_model(engine: Engine) -> float:
    """Bytes of host memory that hold weights, over the model's: slabs, and what stages them."""
    tier: Any = engine.active.streamer.window.tier
    staged = sum(getattr(tier, ring).nbytes for ring in ("_fetch_ring", "_flush_ring") if hasattr(tier, ring))
    return round((engine.layout.total_bytes + staged) / engine.layout.total_bytes, 4)


def naive_part(options: Any, common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Plain MeZO with the whole model on the GPU (`benchmarks.step.plain_mezo`)."""
    from benchmarks.step import plain_mezo

    device, dtype = options.torch_device, DTYPES[options.dtype]
    model = resident_copy(options.model, dtype, options.tokens, device)
    batch = {k: v.to(device) for k, v in batch_of(model, options.tokens).items()}
    work = plain_mezo(model, batch, lr=1e-7)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with PeakDriverMemory(options.driver_memory, options.driver_before) as driver:
        times = Clock(device).times(work, 3, warm=2)
    yield {
        "part": "step", "way": "naive MeZO, resident", "model": options.model, "tokens": options.tokens,
        "dtype": options.dtype, "step_s": quantile(times, 0.5), "tokens_per_s": options.tokens / quantile(times, 0.5),
        "n": len(times),
    } | allocator_peaks(device) | driver.as_row()  # fmt: skip


PARTS = {"link": link_part, "kernels": kernels_part, "step": step_part, "naive": naive_part}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", default="opt-1.3b")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--fold-every", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="on the CPU, small")
    options = parser.parse_args(arguments)
    options.driver_memory = DriverMemory(0)
    options.driver_before = options.driver_memory.device_used()
    if not options.dry and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no GPU: nothing was measured (--dry tries the plumbing on the CPU)")
    options.torch_device = torch.device("cpu" if options.dry else "cuda:0")
    if options.dry:
        options.model, options.tokens, options.steps = "opt-tiny", min(options.tokens, 32), 2
    common = about("gpu") | {
        "device": "cpu, dry run: not a measurement" if options.dry else torch.cuda.get_device_name(0),
        "measured": not options.dry,
    }
    for result in PARTS[options.part](options, common):
        emit(result, common)


if __name__ == "__main__":
    main()
