"""Formats side by side: bytes on the wire, bytes held, seconds a step; and which one storage="auto" takes.

auto looks for the full-parameter format that moves the least without losing small updates:
    fp32       if the model fits where nothing has to move (offload "none", or "auto" on a host with room for it twice)
    int8+8     else: 1.03 bytes a parameter and step, half of bf16's, over a 16-bit master; its final loss is within
               the seeds' spread of fp32 (`benchmarks.training`)
Plain bf16, fp16 and fp8 are smaller than their masters but round updates away (`benchmarks.formats`), so auto never
takes them; bf16+16, the exact float32 master, moves twice the bytes of int8+8 and is there by name.

Seconds are a floor: the larger of the wire's and the fused passes', which overlap; what the model itself computes comes
on top. Rates are measured in a tenth of a second on this machine, or given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .config import EngineConfig, parse_bytes, show_bytes
from .devices import CpuDevice
from .errors import BudgetError
from .formats import FORMATS, Format
from .fused import Perturbation, Update, fused_pass
from .layout import Layout, make_layout
from .memory import available_bytes, step_bytes
from .noise import NoiseSpec
from .plan import Plan
from .storage import choose_fold_every, decide_formats

STREAMED, RESIDENT = "int8+8", "fp32"
_PROBE = 1 << 18  # elements


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


def choose_storage(plan: Plan, dtype_of: Callable[[str], torch.dtype], config: EngineConfig) -> tuple[str, str]:
    """(format, why) that storage="auto" stands for. Raises BudgetError if none that trains everything fits."""
    free = available_bytes()
    if config.device_memory is not None and config.offload == "none":
        free = min(free, parse_bytes(config.device_memory, "device_memory"))
    sizes = {name: _layout(plan, dtype_of, name, config.keep).total_bytes for name in (RESIDENT, STREAMED)}
    room = {"none": free, "auto": free // 2}.get(config.offload, 0)
    if sizes[RESIDENT] <= room:
        return RESIDENT, f"{show_bytes(sizes[RESIDENT])} of {show_bytes(free)} free: nothing has to move"
    need = sizes[STREAMED]
    if config.offload in ("none", "host") and need > free:
        frozen = _layout(plan, dtype_of, "int4", config.keep, "scales").total_bytes
        raise BudgetError(
            f"storage='auto' with offload={config.offload!r}: the smallest format that trains everything and keeps its "
            f"updates, {STREAMED}, takes {show_bytes(need)}, but {show_bytes(free)} is free. Use offload='disk', or "
            f"train the scales of storage='int4' ({show_bytes(frozen)}, method=QZO())"
        )
    return STREAMED, f"it moves the least and keeps its updates, in {show_bytes(need)}"


def _layout(plan: Plan, dtype_of: Callable[[str], torch.dtype], name: str, keep: Any, target: Any = "values") -> Layout:
    stored = decide_formats(plan, name, dtype_of, keep, target)
    return make_layout(stored.plan, stored.format_of, target)


def compare(
    plan: Plan,
    dtype_of: Callable[[str], torch.dtype],
    *,
    keep: Any = None,
    fold_every: int | None = None,
    lanes: int = 2,
    link_bytes_per_s: float | None = None,
    seconds_per_element: Callable[[Format, int, int], float] | None = None,
) -> Iterator[Choice]:
    """Every format that can train what `plan` trains, everything streamed; most bytes on the wire first."""
    found = []
    for name, fmt in FORMATS.items():
        target: Any = "values" if fmt.trains else "scales"
        stored = decide_formats(plan, name, dtype_of, keep, target)
        layout = make_layout(stored.plan, stored.format_of, target)
        every = choose_fold_every(fold_every, stored.plan, layout, "host", "gaussian")
        fetched, flushed = step_bytes(stored.plan, layout, stored.plan.resident, every)
        seconds = 0.0
        if link_bytes_per_s is not None:
            seconds = (fetched + flushed) / link_bytes_per_s
        if seconds_per_element is not None:
            seconds = max(seconds, seconds_per_element(fmt, every, lanes) * plan.numel)
        found.append(Choice(name, layout, every, fetched, flushed, seconds))
    yield from sorted(found, key=lambda choice: -choice.wire_bytes)


# ---- rates of this machine -------------------------------------------------------------------------------------------


def copy_bytes_per_s() -> float:
    """What memory copies here: the most a link between host memory and a window on the same host can give."""
    device = CpuDevice()
    a, b = device.alloc(1 << 26), device.alloc(1 << 26)
    return a.numel() / min(_timed(lambda: b.copy_(a)) for _ in range(3))


def pass_seconds(fmt: Format, fold_every: int, lanes: int) -> float:
    """Seconds of a fused pass an element, on average over the pending updates of `fold_every` steps."""
    target: Any = "values" if fmt.trains else "scales"
    stored = torch.zeros(fmt.nbytes(_PROBE), dtype=torch.uint8)
    residual = torch.zeros(fmt.residual_nbytes(_PROBE), dtype=torch.uint8) if fmt.residual_bytes else None
    outs = [torch.empty(_PROBE) for _ in range(lanes)]
    perturbations = [Perturbation(1, 2.0**-10 * (-1) ** lane) for lane in range(lanes)]
    counts = [fold_every] if fold_every == 1 else [1, fold_every]  # the cost is linear in the pending updates

    def once(count: int) -> None:
        updates = [Update(k, 2.0**-12, fold=count == fold_every and k == count - 1) for k in range(count)]
        fused_pass(
            stored, fmt, param_id=1, numel=_PROBE, updates=updates, noise=NoiseSpec(), perturbations=perturbations,
            outs=outs, residual=residual, target=target,
        )  # fmt: skip

    times = [min(_timed(lambda count=count: once(count)) for _ in range(5)) for count in counts]  # type: ignore[misc]
    return sum(times) / len(times) / _PROBE


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
