"""Compare formats: bytes moved, bytes held, seconds per step; and choose the format for storage="auto".

auto takes the full-parameter format that moves the fewest bytes without losing small updates:
    fp32       if the model fits in memory so that nothing moves (offload "none", or "auto" and memory for it twice)
    int8+8     else: 1.03 bytes a parameter and step, half of bf16's, over a 16-bit master; its final loss is within
               the seeds' spread of fp32 (`benchmarks.training`)
Plain bf16, fp16 and fp8 are smaller but round small updates away (`benchmarks.formats`), so auto never takes them;
bf16+16, an exact float32 master, moves twice the bytes of int8+8 and must be asked for by name.

Seconds are a lower bound: the larger of the transfers' and the fused passes' time, which overlap; the model's own
computation comes on top. Rates are given, or measured in a tenth of a second on this machine (on its GPU if asked for).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..config import EngineConfig
from ..devices import make_device
from ..devices.link import Link
from ..errors import BudgetError, ConfigError
from ..formats import FORMATS, Format
from ..kernels.device_updates import DeviceUpdates, UpdateTable
from ..kernels.records import Perturbation, Target, Terms, Update, sums_of
from ..methods import method_training
from ..numerics.fused import fused_pass
from ..numerics.noise import NoiseSpec
from ..plan.layout import Layout, make_layout
from ..plan.plan import Plan
from ..plan.storage import Stored, choose_fold_every, decide_formats
from ..system.host_memory import available_bytes
from ..system.units import parse_bytes, show_bytes
from .memory import step_bytes

STREAMED, RESIDENT = "int8+8", "fp32"
_PROBE = 1 << 18  # elements
_GPU_PROBE = 1 << 26  # long enough that the launch does not count
USUAL_LINK_GBS = 25.0  # each way, PCIe 4 x16 in practice: used if there is no GPU to measure


PassSeconds = Callable[[Format, int, Sequence[Perturbation], int], float]


@dataclass(frozen=True)
class Choice:
    """One format for a whole model, by the rule of `storage.decide_formats`, with every parameter trained."""

    name: str
    layout: Layout
    fold_every: int
    fetch_bytes: float
    flush_bytes: float
    seconds: float
    """A lower bound for one step; 0 if nothing was measured."""

    @property
    def wire_bytes(self) -> float:
        return self.fetch_bytes + self.flush_bytes


def choose_storage(
    plan: Plan, dtype_of: Callable[[str], torch.dtype], config: EngineConfig, sharers: int = 1
) -> tuple[str, str]:
    """(format, why) that storage="auto" stands for. Raises BudgetError if no format that trains everything fits.

    sharers: number of processes that each need this much of the host's memory.
    """
    free = available_bytes() // sharers
    if config.device_memory is not None and config.offload == "none":
        free = min(free, parse_bytes(config.device_memory, "device_memory"))
    sizes = {name: _layout(plan, dtype_of, name, config.keep).total_bytes for name in (RESIDENT, STREAMED)}
    room = {"none": free, "auto": free // 2}.get(config.offload, 0)
    if sizes[RESIDENT] <= room:
        return RESIDENT, f"{show_bytes(sizes[RESIDENT])} of {show_bytes(free)} free: nothing has to move"
    need = sizes[STREAMED]
    if config.offload in ("none", "host") and need > free:
        scales = type(method_training("scales")).__name__
        frozen = _layout(plan, dtype_of, "int4", config.keep, "scales").total_bytes
        raise BudgetError(
            f"storage='auto' with offload={config.offload!r}: the smallest format that trains everything and keeps its "
            f"updates, {STREAMED}, takes {show_bytes(need)}, but {show_bytes(free)} is free. Use offload='disk', or "
            f"train the scales of storage='int4' ({show_bytes(frozen)}, method={scales}())"
        )
    return STREAMED, f"it moves the least and keeps its updates, in {show_bytes(need)}"


def _layout(plan: Plan, dtype_of: Callable[[str], torch.dtype], name: str, keep: Any, target: Any = "values") -> Layout:
    stored = decide_formats(plan, name, dtype_of, keep, target)
    return make_layout(stored.plan, stored.format_of, stored.target)


def compare(
    plan: Plan,
    dtype_of: Callable[[str], torch.dtype],
    *,
    keep: Any = None,
    fold_every: int | str | None = None,
    lanes: Sequence[Perturbation] = (),
    usual_folds: int = 4,
    noises: int = 1,
    link_seconds: Callable[[float, float], float] | None = None,
    seconds_per_element: PassSeconds | None = None,
) -> Iterator[Choice]:
    """Every format that can train the plan's trained parameters, or their scales, all streamed; most bytes moved first.

    link_seconds(fetched, flushed): seconds to move that many bytes. seconds_per_element(format, fold_every, lanes,
    noises): seconds of a fused pass; noises: of a step's update.
    """
    found = []
    for name, fmt in FORMATS.items():
        if (way := _trained(plan, dtype_of, name, keep)) is None:
            continue
        stored, layout = way
        every = choose_fold_every(fold_every, stored.plan, layout, False, usual_folds, noises)
        fetched, flushed = step_bytes(stored.plan, layout, stored.plan.resident, every)
        seconds = 0.0
        if link_seconds is not None:
            seconds = link_seconds(fetched, flushed)
        if seconds_per_element is not None:
            seconds = max(seconds, seconds_per_element(fmt, every, lanes, noises) * plan.numel)
        found.append(Choice(name, layout, every, fetched, flushed, seconds))
    yield from sorted(found, key=lambda choice: -choice.wire_bytes)


def _trained(plan: Plan, dtype_of: Callable[[str], torch.dtype], name: str, keep: Any) -> tuple[Stored, Layout] | None:
    """How a format trains the plan's trained parameters: their values if it can, else their scales; None if neither."""
    targets: tuple[Target, ...] = ("values", "scales")
    for target in targets:
        try:
            stored = decide_formats(plan, name, dtype_of, keep, target)
        except ConfigError:
            continue  # the format cannot do this; not the user's error, who named no format
        return stored, make_layout(stored.plan, stored.format_of, stored.target)
    return None


# ---- rates of this machine -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """The speed of fetches, flushes and fused passes. note: where the numbers come from."""

    link_seconds: Callable[[float, float], float]
    pass_seconds: PassSeconds | None
    note: str


def rates(device: str, gb_per_s: float | None = None) -> Rates:
    """The rates of "cpu" or "cuda", measured if that device is present. gb_per_s: the link's speed instead of a
    measurement: for fetches and flushes together on the CPU (a disk's, say), each way on a GPU."""
    if device != "cpu":
        return _gpu_rates(device, gb_per_s)
    per_second = gb_per_s * 1e9 if gb_per_s is not None else copy_bytes_per_s()
    given = "given" if gb_per_s is not None else "memory copy measured; --link gives a disk's or a bus's"
    return Rates(
        lambda fetched, flushed: (fetched + flushed) / per_second, pass_seconds,
        f"at {per_second / 1e9:.1f} GB/s ({given}), fused passes measured on this CPU",
    )  # fmt: skip


def _gpu_rates(device: str, gb_per_s: float | None) -> Rates:
    link, passes, told = None, None, "fused passes not counted"
    if torch.cuda.is_available():
        gpu = make_device(device)
        link = gpu.measure_link()
        passes = functools.partial(pass_seconds, device=gpu.torch_device, numel=_GPU_PROBE)
        told = "fused passes measured on this GPU"
    given = "measured"
    if gb_per_s is not None or link is None:
        each = USUAL_LINK_GBS if gb_per_s is None else gb_per_s
        link = Link(each, each, each, each)
        given = "given" if gb_per_s is not None else "PCIe 4 x16, no GPU here to measure; --link gives another"
    both = f"{link.both_fetch_gbs:.1f} + {link.both_flush_gbs:.1f} GB/s both at once"
    return Rates(
        link.seconds, passes, f"at {link.fetch_gbs:.1f} GB/s in, {link.flush_gbs:.1f} out, {both} ({given}), {told}"
    )


def copy_bytes_per_s() -> float:
    """Speed of a memory copy: an upper bound for moving bytes between host memory and a window on the same host."""
    device = make_device("cpu")
    a, b = device.alloc(1 << 26), device.alloc(1 << 26)
    return a.numel() / min(_timed(lambda: b.copy_(a)) for _ in range(3))


def pass_seconds(
    fmt: Format, fold_every: int, lanes: Sequence[Perturbation], noises: int = 1, *,
    device: torch.device | None = None, numel: int = _PROBE,
) -> float:  # fmt: skip
    """Seconds of a fused pass per element, averaged over the pending updates of `fold_every` steps, `noises` each."""
    target: Any = "values" if fmt.trains else "scales"
    on_gpu = device is not None and device.type == "cuda"
    stored = torch.zeros(fmt.nbytes(numel), dtype=torch.uint8, device=device)
    residual = torch.zeros(fmt.residual_nbytes(numel), dtype=torch.uint8, device=device) if fmt.residual_bytes else None
    outs = [torch.empty(numel, dtype=fmt.torch_dtype if on_gpu else None, device=device) for _ in lanes]
    known = {terms: Terms(terms.seeds, (0.5,) * len(terms.seeds)) for terms in sums_of(lanes)}
    perturbations = [replace(lane, terms=known[lane.terms]) if lane.terms else lane for lane in lanes]
    steps = [fold_every] if fold_every == 1 else [1, fold_every]  # the cost is linear in the pending updates

    def once(updates: Sequence[Update] | DeviceUpdates) -> None:
        fused_pass(
            stored, fmt, param_id=1, numel=numel, updates=updates, noise=NoiseSpec(), perturbations=perturbations,
            outs=outs, residual=residual, target=target,
        )  # fmt: skip

    times = []
    for pending in steps:
        last = noises * fold_every - 1
        updates: Any = [Update(k, 2.0**-12, fold=k == last) for k in range(noises * pending)]
        if on_gpu:  # as in a run: the records are already on the device
            assert device is not None
            table = UpdateTable(device)
            table.append(updates)
            updates = table.since(0, True)
        times.append(min(_timed(lambda updates=updates: once(updates), device) for _ in range(5)))  # type: ignore[misc]
    return sum(times) / len(times) / numel


def _timed(work: Callable[[], Any], device: torch.device | None = None) -> float:
    _wait_for(device)
    start = time.perf_counter()
    work()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
