"""Predicted timeline of a step: a simulation of the same ops that a run executes, with the costs of `costs.py`.

The ops, their slots and dependencies are those of `stream.schedule`. A stream executes one op after another; an op
starts when its stream is free and all its dependencies have ended. A flush slows concurrent fetches by the link's
`flush_cost`; a drive either reads or writes. Residual parts are fetched, and blocks flushed, only in the one pass of
`fold_every` that folds. The host enqueues ahead at no cost.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..plan.layout import Layout
from ..plan.plan import Plan
from ..stream.schedule import OpKey, schedule
from ..stream.slots import WindowSize
from .costs import Step, Work
from .hardware import Drive, Link

_STREAMS = ("compute", "fetch", "flush")


@dataclass(frozen=True)
class Span:
    """One op, in seconds from the start of the trace."""

    stream: str
    name: str
    start: float
    seconds: float


@dataclass(frozen=True)
class Timeline:
    """spans: ops of the last two passes, the last of which folds. step_s: mean over fold_every passes."""

    spans: tuple[Span, ...]
    step_s: float
    busy_s: Mapping[str, float]
    """Seconds per step that each stream is busy."""

    def write(self, path: Path) -> None:
        """Write a trace that ui.perfetto.dev and chrome://tracing open."""
        named = [
            {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": stream}}
            for tid, stream in enumerate(_STREAMS)
        ]
        events = [
            {
                "ph": "X", "pid": 1, "tid": _STREAMS.index(span.stream), "name": span.name,
                "ts": round(1e6 * span.start, 3), "dur": round(1e6 * span.seconds, 3),
            }
            for span in self.spans
        ]  # fmt: skip
        path.write_text(json.dumps({"traceEvents": [*named, *events], "displayTimeUnit": "ms"}))


def simulate(
    plan: Plan, layout: Layout, window: WindowSize, work: Work, step: Step, link: Link, *, offload: str,
    drive: Drive | None = None, share: Mapping[str, float] | None = None,
) -> Timeline:  # fmt: skip
    """Simulate two rounds of `fold_every` passes; the result is the second round."""
    costs = _Costs(plan, layout, work, step, link, drive if offload == "disk" else None, share or {})
    pinned = frozenset(range(len(plan.blocks))) if offload == "none" else window.pinned
    visits, every = tuple(plan.visits), work.fold_every
    passes = 2 * every
    free, done = dict.fromkeys(_STREAMS, 0.0), dict[OpKey, float]()
    spans: list[Span] = []
    ends: list[float] = []
    busy = dict.fromkeys(_STREAMS, 0.0)
    ops = schedule(visits, num_slots=window.num_slots, pinned=pinned, ahead=window.ahead, written=layout.written)
    for op in ops:
        turn = op.visit // len(visits)
        if turn >= passes and op.kind == "compute":
            break
        folds = (turn + 1) % every == 0
        stream = op.kind
        seconds = costs.of(op.kind, op.block, folds)
        start = max([free[stream], *(done.get(key, 0.0) for key in op.after)])
        done[op.key] = free[stream] = start + seconds
        if stream == "flush" and seconds:
            free["fetch"] = max(free["fetch"], start) + costs.flush_cost * seconds
        if turn >= every:
            busy[stream] += seconds
        if turn >= passes - 2 and seconds:
            spans.append(Span(stream, plan.blocks[op.block].name, start, seconds))
        if op.kind == "compute" and (op.visit + 1) % len(visits) == 0:
            ends.append(done[op.key])
    first = min((span.start for span in spans), default=0.0)
    shown = tuple(Span(s.stream, s.name, s.start - first, s.seconds) for s in spans)
    step_s = (ends[-1] - ends[every - 1]) / every
    return Timeline(shown, step_s, {name: busy[name] / every for name in _STREAMS})


class _Costs:
    """Seconds of each op."""

    def __init__(
        self, plan: Plan, layout: Layout, work: Work, step: Step, link: Link, drive: Drive | None,
        share: Mapping[str, float],
    ) -> None:  # fmt: skip
        self._layout = layout
        times = Counter(plan.visits)
        rows = {name for owner in plan.owners if owner.rows for name in owner.params}
        rows -= {name for owner in plan.owners if not owner.rows for name in owner.params}
        products, passes = [], []
        for block in plan.blocks:
            pieces = [(p, plan.params[p.name]) for p in block.pieces]
            products.append(
                sum(p.numel * share.get(p.name, 1.0) for p, s in pieces if p.name not in rows and len(s.shape) > 1)
            )
            passes.append(float(sum(p.numel for p, _ in pieces)))
        each = [max(1, times[block.index]) for block in plan.blocks]
        self._compute = [
            step.forwards * a / max(1.0, sum(products)) / n + step.passes * b / max(1.0, sum(passes)) / n
            for a, b, n in zip(products, passes, each, strict=True)
        ]
        self.flush_cost = link.flush_cost if drive is None else 1.0
        self._in = (link.gb_per_s if drive is None else min(link.gb_per_s, drive.read_gb_per_s)) * 1e9
        self._out = (link.gb_per_s if drive is None else min(link.gb_per_s, drive.write_gb_per_s)) * 1e9

    def of(self, kind: str, block: int, folds: bool) -> float:
        if kind == "compute":
            return self._compute[block]
        if kind == "fetch":
            whole = folds and block in self._layout.written
            return (self._layout.block_bytes if whole else self._layout.stream_bytes)[block] / self._in
        return sum(nbytes for _, nbytes in self._layout.spans[block]) / self._out if folds else 0.0
