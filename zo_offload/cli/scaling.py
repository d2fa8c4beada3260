"""Predicts tokens per second, and the bottleneck, for several GPUs that share a step.

Each GPU computes its share of the lanes. Ways to bring it the blocks, for n GPUs, in seconds of a step that moves F
bytes (fetched and flushed):
    one host             a whole copy each:      F / link,         n F / host memory or drive
    hosts of their own   the same:               F / link,         F / host memory or drive
    slices               an n-th each, gathered: F / n / link,     F / host memory,   (n - 1) / n fetched / nvlink
    shards               the same, on the GPUs, where then no block is kept whole:    (n - 1) / n fetched / nvlink
The first two are built (docs/ranks.md); the others show what they would give, where --nvlink names the rate at which a
GPU receives from the others. Messages between ranks, some milliseconds per step, are left out. Nothing is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..kernels.records import noises_of
from ..ranks.alone import cells
from ..run.memory import step_bytes
from .answer import Answer, Machine, seconds_on
from .costs import Step, Work
from .hardware import CONTEXT_BYTES

OWN_HOSTS, ONE_HOST, SLICES, SHARDS = "hosts of their own", "one host", "one host, slices", "one host, shards"
MOST = 1 << 16
"""More GPUs are not planned for."""


@dataclass(frozen=True)
class Shared:
    """A step by several GPUs: seconds and bottleneck; tokens: in its batch; idle: GPUs without a lane."""

    ranks: int
    seconds: float
    binds: str
    tokens: int
    idle: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def counts(ranks: int) -> list[int]:
    """1, 2, 4, ... and `ranks` itself."""
    return sorted({ranks, *(1 << i for i in range(ranks.bit_length()) if 1 << i <= ranks)})


def shared(found: Answer, ranks: int, way: str = OWN_HOSTS, *, rows: int = 1, nvlink: float | None = None) -> Shared:
    """The same step on several GPUs. way: see the module. rows: factor of rows and micro-batches. nvlink: GB/s."""
    made, work = found.planned, found.work
    micro_batches = made.micro_batches * rows
    lanes = work.lanes * micro_batches
    busy = min(ranks, lanes)
    slowest = max(
        (_seconds(found.machine, found, work, cells(lanes, rank, ranks), micro_batches, rows) for rank in range(busy)),
        key=lambda step: step.seconds,
    )
    parts = dict(slowest.parts)
    if way == ONE_HOST:
        parts |= {name: busy * parts[name] for name in ("host memory", "the drive") if name in parts}
    if way in (SLICES, SHARDS):
        assert nvlink is not None
        parts["nvlink"] = (ranks - 1) / ranks * gathered(found, way) / (nvlink * 1e9)
        if "the link" in parts:
            parts["the link"] /= ranks
    if way == SHARDS:
        parts = {name: parts[name] for name in ("the GPU", "nvlink")}
    binds = max(parts, key=lambda name: parts[name])
    return Shared(ranks, parts[binds], binds, made.batch_size * made.tokens * rows, ranks - busy)


def _seconds(machine: Machine, found: Answer, work: Work, mine: range, micro_batches: int, rows: int) -> Step:
    """Seconds of a GPU that has the lanes `mine` of a step: it makes noise for the perturbations of these lanes."""
    perturbations, lanes = {lane // micro_batches for lane in mine}, found.planned.prepared.method.perturbations(0, 0)
    noises = noises_of(lane for i, lane in enumerate(lanes) if i in perturbations)
    flops = work.forward_flops / work.lanes * rows * len(mine) / micro_batches
    share = replace(work, lanes=len(perturbations), lane_noises=noises, forward_flops=flops)
    return seconds_on(machine, found.planned, share)


def gathered(found: Answer, way: str) -> float:
    """Bytes that all GPUs together bring each of them in a step: shards keep no block whole."""
    prepared = found.planned.prepared
    if way == SLICES:
        return found.work.fetched
    return step_bytes(prepared.plan, prepared.layout, frozenset(), prepared.fold_every)[0]


def fits(found: Answer, ranks: int) -> bool:
    """Whether n-ths of all blocks fit beside the rest in the GPUs' memory."""
    made, layout = found.planned, found.planned.prepared.layout
    kept = sum(layout.block_bytes[block] for block in made.memory.window.pinned)  # shards lie in their place
    beside = made.memory.device_bytes - kept + CONTEXT_BYTES
    return beside + layout.total_bytes / ranks <= found.machine.gpu.memory_gb * 1e9


def _ways(found: Answer, ranks: int, nvlink: float | None) -> Iterator[str]:
    yield ONE_HOST
    if ranks == 1:
        return
    yield OWN_HOSTS
    if nvlink is None or not found.work.fetched:
        return
    if found.planned.prepared.offload == "host":
        yield SLICES
    if fits(found, ranks):
        yield SHARDS


def lines(found: Answer, ranks: int, nvlink: float | None = None) -> Iterator[str]:
    """A table: the same step, and one with `ranks` times the rows, by where the GPUs and the blocks are."""
    made, lanes = found.planned, found.work.lanes * found.planned.micro_batches
    yield f"GPUs that share a run (docs/ranks.md); {lanes} lanes a step"
    counted = f"{'tokens/s':>10}{'binds':>13}"
    yield f"{'GPUs':>4}  {'where':<19}{'s a step':>9}{counted}  |{'rows':>6}{counted}"
    for count in counts(ranks):
        for way in _ways(found, count, nvlink):
            same = shared(found, count, way, nvlink=nvlink)
            more = shared(found, count, way, rows=count, nvlink=nvlink)
            yield (
                f"{count:>4}  {way:<19}{same.seconds:>9.2f}{same.tokens_per_s:>10.0f}"
                f"{same.binds:>13}  |{made.batch_size * count:>6}{more.tokens_per_s:>10.0f}{more.binds:>13}"
            )
    yield from _notes(found, ranks, lanes)
    if nvlink is not None:
        yield _of_nvlink(found, ranks, nvlink)


def _of_nvlink(found: Answer, ranks: int, nvlink: float) -> str:
    offload = found.planned.prepared.offload
    if not found.work.fetched:
        return f"--nvlink {nvlink:g}: no block moves, so there is nothing to slice"
    without = "" if offload == "host" else f"; slices are of host memory, and --offload is {offload}"
    full = "" if fits(found, ranks) else f"; shards on {ranks} GPUs do not fit their memory"
    return f"slices and shards are NOT BUILT: predicted for {nvlink:g} GB/s from the other GPUs{without}{full}"


def _notes(found: Answer, ranks: int, lanes: int) -> Iterator[str]:
    machine, prepared = found.machine, found.planned.prepared
    if ranks > lanes:
        yield f"{lanes} lanes keep {lanes} GPUs busy: --micro-batches, or a method with more directions, makes more"
    if prepared.offload == "host":
        copies = ranks * prepared.layout.total_bytes
        fits = copies <= machine.room
        if machine.host_bytes is not None and not fits:
            yield f"{ranks} copies on one host take {copies / 1e9:.0f} GB, of which {machine.room / 1e9:.0f} are there"
        if machine.host_gb_per_s is None:
            yield "host memory, which GPUs of one host read together, was not said: --host-bandwidth"
    yield "right of the bar: as many times the rows and micro-batches. Nothing was measured, on one GPU or on several"
