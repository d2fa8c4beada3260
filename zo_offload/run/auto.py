"""Formats side by side: bytes on the wire, bytes held, seconds a step; and which one storage="auto" takes.

auto looks for the full-parameter format that moves the least without losing small updates:
    fp32       if the model fits where nothing has to move (offload "none", or "auto" on a host with room for it twice)
    int8+8     else: 1.03 bytes a parameter and step, half of bf16's, over a 16-bit master; its final loss is within
               the seeds' spread of fp32 (`benchmarks.training`)
Plain bf16, fp16 and fp8 are smaller than their masters but round updates away (`benchmarks.formats`), so auto never
takes them; bf16+16, the exact float32 master, moves twice the bytes of int8+8 and is there by name.

Seconds are a floor: the larger of the wire's and the fused passes', which overlap; what the model itself computes comes
on top. Rates are measured in a tenth of a second on this machine, of its GPU where that is asked for, or given.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config import EngineConfig
from ..devices import make_device
from ..devices.link import Link
from ..errors import BudgetError, ConfigError
from ..formats import FORMATS, Format
from ..kernels.device_updates import DeviceUpdates, UpdateTable
from ..kernels.records import Perturbation, Target, Update
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
USUAL_LINK_GBS = 25.0  # each way, of PCIe 4 x16 in practice: where there is no GPU to measure


@dataclass(frozen=True)
class Choice:
    """One format for a whole model, by `storage.decide_formats`' rule, with every parameter trained."""

    name: str
    layout: Layout
    fold_every: int
    fetch_bytes: float
    flush_bytes: float
    seconds: float
    """At least this long a step; 0 where nothing was measured."""

    @property
    def wire_bytes(self) -> float:
        return self.fetch_bytes + self.flush_bytes


def choose_storage(
    plan: Plan, dtype_of: Callable[[str], torch.dtype], config: EngineConfig, sharers: int = 1
) -> tuple[str, str]:
    """(format, why) that storage="auto" stands for. Raises BudgetError if none that trains everything fits.

    sharers: processes that each want as much of this host's memory.
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
    fold_every: int | None = None,
    lanes: int = 2,
    distribution: str = "gaussian",
    noises: int = 1,
    link_seconds: Callable[[float, float], float] | None = None,
    seconds_per_element: Callable[[Format, int, int], float] | None = None,
) -> Iterator[Choice]:
    """Every format that can train what `plan` trains, or scales of it, all streamed; most bytes on the wire first.

    link_seconds(fetched, flushed): of that many bytes. seconds_per_element(format, fold_every, lanes): of a fused pass.
    """
    found = []
    for name, fmt in FORMATS.items():
        if (way := _trained(plan, dtype_of, name, keep)) is None:
            continue
        stored, layout = way
        every = choose_fold_every(fold_every, stored.plan, layout, False, distribution, noises)
        fetched, flushed = step_bytes(stored.plan, layout, stored.plan.resident, every)
        seconds = 0.0
        if link_seconds is not None:
            seconds = link_seconds(fetched, flushed)
        if seconds_per_element is not None:
            seconds = max(seconds, seconds_per_element(fmt, every, lanes) * plan.numel)
        found.append(Choice(name, layout, every, fetched, flushed, seconds))
    yield from sorted(found, key=lambda choice: -choice.wire_bytes)


def _trained(plan: Plan, dtype_of: Callable[[str], torch.dtype], name: str, keep: Any) -> tuple[Stored, Layout] | None:
    """A format's way to train what `plan` trains: values if it can, else scales; None if it has neither."""
    targets: tuple[Target, ...] = ("values", "scales")
    for target in targets:
        try:
            stored = decide_formats(plan, name, dtype_of, keep, target)
        except ConfigError:
            continue  # this way is closed to the format; not an error of the user, who named none
        return stored, make_layout(stored.plan, stored.format_of, stored.target)
    return None


# ---- rates of this machine -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """How fast blocks come and go and fused passes run. note: where the numbers are from."""

    link_seconds: Callable[[float, float], float]
    pass_seconds: Callable[[Format, int, int], float] | None
    note: str


def rates(device: str, gb_per_s: float | None = None) -> Rates:
    """The numbers of "cpu" or "cuda", measured where that device is there. gb_per_s: the link's speed, not to be
    measured: fetches and flushes together on the CPU (a disk's, say), each way on a GPU."""
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
    """What memory copies here: the most a link between host memory and a window on the same host can give."""
    device = make_device("cpu")
    a, b = device.alloc(1 << 26), device.alloc(1 << 26)
    return a.numel() / min(_timed(lambda: b.copy_(a)) for _ in range(3))


def pass_seconds(
    fmt: Format, fold_every: int, lanes: int, *, device: torch.device | None = None, numel: int = _PROBE
) -> float:
    """Seconds of a fused pass an element, on average over the pending updates of `fold_every` steps."""
    target: Any = "values" if fmt.trains else "scales"
    on_gpu = device is not None and device.type == "cuda"
    stored = torch.zeros(fmt.nbytes(numel), dtype=torch.uint8, device=device)
    residual = torch.zeros(fmt.residual_nbytes(numel), dtype=torch.uint8, device=device) if fmt.residual_bytes else None
    outs = [torch.empty(numel, dtype=fmt.torch_dtype if on_gpu else None, device=device) for _ in range(lanes)]
    perturbations = [Perturbation(1, 2.0**-10 * (-1) ** lane) for lane in range(lanes)]
    counts = [fold_every] if fold_every == 1 else [1, fold_every]  # the cost is linear in the pending updates

    def once(updates: Sequence[Update] | DeviceUpdates) -> None:
        fused_pass(
            stored, fmt, param_id=1, numel=numel, updates=updates, noise=NoiseSpec(), perturbations=perturbations,
            outs=outs, residual=residual, target=target,
        )  # fmt: skip

    times = []
    for count in counts:
        updates: Any = [Update(k, 2.0**-12, fold=count == fold_every and k == count - 1) for k in range(count)]
        if on_gpu:  # as in a run: the records are there already
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
