"""Seconds per step for each possible bottleneck: the formula of docs/planning.md. Nothing is measured here.

link      (fetched + flush_cost x flushed) / link        both ways at once are not the sum
host      (fetched + flushed) / host memory's bandwidth
drive     fetched / reading + flushed / sustained writing (blocks in files)
GPU       forwards + fused passes, one after the other on one stream
step      the largest of these: they overlap
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..kernels.distributions import DISTRIBUTIONS
from ..plan.layout import Layout
from ..plan.plan import Plan
from ..run.memory import step_bytes
from .hardware import Drive, Gpu, Link

SHORT, LONG = 0.5, 0.65  # share of the peak that products reach, below and from 1024 tokens per forward
ISSUED, COPIED = 0.65, 0.8  # shares of full issue and of the memory's rate that a fused pass reaches
# Instructions per element of the bf16 passes on sm_80 to sm_120, counted in machine code (`benchmarks.sass`): decode
# and output; a stream of noise; a fold.
BASE, NOISE, FOLD = 18.5, {"gaussian": 21.0, "rademacher": 10.0}, 4.0


HOST_VISIT, HOST_LANE = 45e-6, 73e-6
"""Seconds of one core to make an owner's weights, and for each lane's turn at it (`benchmarks.host_gpu`, a Xeon)."""


@dataclass(frozen=True)
class Work:
    """The work of one step: bytes moved, flops of multiply-adds, elements."""

    fetched: float
    flushed: float
    forward_flops: float
    """Flops of all lanes, on the whole batch."""
    elements: float
    """Number of weights that fused passes write."""
    streamed_bytes: float
    """Storage bytes that fused passes read."""
    lanes: int
    fold_every: int
    distribution: str
    noises: int
    """Number of noises per update."""
    lane_noises: int
    """Number of noises in the lanes: one per direction, or one per term of a sum that lanes go along."""
    tokens: int
    """Tokens of one forward."""

    def rows(self, factor: float) -> Work:
        """The work with `factor` times the rows."""
        more = {"forward_flops": self.forward_flops * factor, "tokens": max(1, round(self.tokens * factor))}
        return Work(**{**vars(self), **more})


@dataclass(frozen=True)
class Step:
    """Seconds of a step, for each part of the hardware."""

    parts: Mapping[str, float]
    """Seconds of link, host memory, drive and GPU, if known."""
    forwards: float
    passes: float

    @property
    def seconds(self) -> float:
        return max(self.parts.values())

    @property
    def binds(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])


def work_of(
    plan: Plan, layout: Layout, *, pinned: frozenset[int], offload: str, fold_every: int, lanes: int,
    distribution: str, noises: int, lane_noises: int, rows: int, tokens: int, share: Mapping[str, float],
    attention: tuple[int, int] = (0, 0),
) -> Work:  # fmt: skip
    """The work of a step with `rows` rows of `tokens` tokens. share: for each parameter, the share that a token
    computes with (part of routed experts, 0 for an embedding's table). attention: (layers, width) of causal
    attention."""
    moves = offload != "none"
    fetched, flushed = step_bytes(plan, layout, pinned, fold_every) if moves else (0.0, 0.0)
    used: dict[str, float] = {}
    for owner in plan.owners:
        for name in owner.params:
            if not owner.rows and len(plan.params[name].shape) > 1:
                used[name] = used.get(name, 0.0) + share.get(name, 1.0)
    active = sum(times * plan.params[name].numel for name, times in used.items())
    layers, width = attention
    flops = 2.0 * active * rows * tokens + 2.0 * layers * width * rows * tokens * tokens
    return Work(
        fetched, flushed, lanes * flops, float(plan.numel), float(sum(layout.stream_bytes)), lanes, fold_every,
        distribution, noises, lane_noises, rows * tokens,
    )  # fmt: skip


def pass_seconds(work: Work, gpu: Gpu) -> float:
    """Seconds of a step's fused passes: limited by instructions or by memory."""
    noise = NOISE.get(work.distribution, NOISE["gaussian"])
    assert work.distribution in DISTRIBUTIONS
    pending = (work.fold_every + 1) / 2 * work.noises
    each = BASE + noise * (pending + work.lane_noises) + FOLD / work.fold_every + 2.0 * max(0, work.lanes - 2)
    by_issue = work.elements * each / (ISSUED * gpu.instructions_per_ns * 1e9)
    by_memory = (work.streamed_bytes + 2.0 * work.lanes * work.elements) / (COPIED * gpu.memory_gb_per_s * 1e9)
    return max(by_issue, by_memory)


def step_seconds(
    work: Work, gpu: Gpu, link: Link, *, drive: Drive | None = None, host_gb_per_s: float | None = None
) -> Step:
    """Seconds of a step. drive: the drive that holds the blocks' files, if any."""
    reached = SHORT if work.tokens < 1024 else LONG
    forwards = work.forward_flops / (reached * gpu.tensor_tflops * 1e12)
    passes = pass_seconds(work, gpu)
    parts = {"the GPU": forwards + passes}
    if work.fetched:
        parts["the link"] = (work.fetched + link.flush_cost * work.flushed) / (link.gb_per_s * 1e9)
        if host_gb_per_s is not None:
            parts["host memory"] = (work.fetched + work.flushed) / (host_gb_per_s * 1e9)
        if drive is not None:
            read = work.fetched / (drive.read_gb_per_s * 1e9)
            parts["the drive"] = read + work.flushed / (drive.write_gb_per_s * 1e9)
    return Step(parts, forwards, passes)
