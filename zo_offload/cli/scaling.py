"""Predicts tokens per second, and the bottleneck, for several GPUs that share a step.

Each GPU fetches all blocks over its own link and keeps a whole copy (docs/ranks.md), and computes its share of the
lanes. GPUs of one host share its memory or drive; GPUs on separate hosts (a pool) do not. The messages between ranks,
some milliseconds per step, are left out. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..kernels.records import noises_of
from ..ranks.alone import cells
from .answer import Answer, Machine, seconds_on
from .costs import Step, Work

_OWN_HOSTS, _ONE_HOST = "hosts of their own", "one host"


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


def shared(found: Answer, ranks: int, *, one_host: bool, rows: int = 1) -> Shared:
    """The same step on several GPUs. rows: factor of rows and micro-batches. one_host: they share memory and drive."""
    made, work = found.planned, found.work
    micro_batches = made.micro_batches * rows
    lanes = work.lanes * micro_batches
    busy = min(ranks, lanes)
    slowest = max(
        (_seconds(found.machine, found, work, cells(lanes, rank, ranks), micro_batches, rows) for rank in range(busy)),
        key=lambda step: step.seconds,
    )
    parts = dict(slowest.parts)
    if one_host:
        parts |= {name: busy * parts[name] for name in ("host memory", "the drive") if name in parts}
    binds = max(parts, key=lambda name: parts[name])
    return Shared(ranks, parts[binds], binds, made.batch_size * made.tokens * rows, ranks - busy)


def _seconds(machine: Machine, found: Answer, work: Work, mine: range, micro_batches: int, rows: int) -> Step:
    """Seconds of a GPU that has the lanes `mine` of a step: it makes noise for the perturbations of these lanes."""
    perturbations, lanes = {lane // micro_batches for lane in mine}, found.planned.prepared.method.perturbations(0, 0)
    noises = noises_of(lane for i, lane in enumerate(lanes) if i in perturbations)
    flops = work.forward_flops / work.lanes * rows * len(mine) / micro_batches
    share = replace(work, lanes=len(perturbations), lane_noises=noises, forward_flops=flops)
    return seconds_on(machine, found.planned, share)


def lines(found: Answer, ranks: int) -> Iterator[str]:
    """A table: the same step, and one with `ranks` times the rows, on one host and on separate hosts."""
    made, lanes = found.planned, found.work.lanes * found.planned.micro_batches
    yield f"GPUs that share a run, a whole copy of the blocks each (docs/ranks.md); {lanes} lanes a step"
    counted = f"{'tokens/s':>10}{'binds':>13}"
    yield f"{'GPUs':>4}  {'where':<19}{'s a step':>9}{counted}  |{'rows':>6}{counted}"
    for count in counts(ranks):
        for one_host in (True, False)[: 1 if count == 1 else 2]:
            same = shared(found, count, one_host=one_host)
            more = shared(found, count, one_host=one_host, rows=count)
            yield (
                f"{count:>4}  {_ONE_HOST if one_host else _OWN_HOSTS:<19}{same.seconds:>9.2f}{same.tokens_per_s:>10.0f}"
                f"{same.binds:>13}  |{made.batch_size * count:>6}{more.tokens_per_s:>10.0f}{more.binds:>13}"
            )
    yield from _notes(found, ranks, lanes)


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
