"""A run's history, read from its directory for people: losses, evaluations, time and traffic, step by step.

The journal decides which steps count. metrics.jsonl has their costs; it may also hold steps that were discarded or
repeated, and the last entry of a repeated step counts. Nothing here opens the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, JournalError
from ..journal import run_directory
from ..journal.format import load_journal
from ..journal.learning_watch import is_skipped, warnings_of

AXES = {"steps": "steps", "forwards": "forward passes", "bytes": "bytes moved", "seconds": "seconds"}
"""The quantities for the x axis, and the axis' titles."""


@dataclass(frozen=True)
class Point:
    """A step: its loss (None: not finite), rate, and the run's costs up to its end (`AXES`; bytes: in and out)."""

    step: int
    loss: float | None
    lr: float
    cost: Mapping[str, float]


@dataclass(frozen=True)
class History:
    """A run's steps in order, its evaluations ({"step": ..., "loss": ...}), and facts from its files."""

    path: Path
    header: Mapping[str, Any]
    settings: Mapping[str, Any]
    points: list[Point]
    evals: list[dict[str, float]]
    skipped: int
    fetch_bytes: float
    flush_bytes: float
    seconds: float
    waited: float
    """Seconds that compute waited for blocks."""
    memory: Mapping[str, float]
    """Planned bytes by term, of the newest call of `fit`; empty if unknown, as in runs of earlier versions."""
    formats: Sequence[str]
    """Names of its storage formats."""
    peak_bytes: float
    """The most resident bytes of the processes that trained; 0 if unknown."""
    warnings: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def measured(self) -> list[str]:
        """Names of the evaluated values, the loss first."""
        names = {key for values in self.evals for key in values} - {"step"}
        return sorted(names, key=lambda name: (name != "loss", name))

    def curve(self, name: str, axis: str) -> list[tuple[float, float]]:
        """(cost on `axis`, value) of each evaluation that has a finite `name`."""
        at = {point.step + 1: point.cost[axis] for point in self.points} | {0: 0.0}
        return [
            (at[int(values["step"])], values[name])
            for values in self.evals
            if math.isfinite(values.get(name, math.nan)) and int(values["step"]) in at
        ]

    def losses(self, axis: str, windows: int = 100) -> list[tuple[float, float]]:
        """(cost on `axis`, training loss): means over `windows` stretches of equal length, at their ends."""
        finite = [(point.cost[axis], point.loss) for point in self.points if point.loss is not None]
        size = max(1, math.ceil(len(finite) / windows))
        parts = [finite[k : k + size] for k in range(0, len(finite), size)]
        return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]


def read_history(run: Path | str) -> History:
    """The history of the run in this directory. Raises ConfigError if it holds none."""
    path = Path(run)
    if not (path / run_directory.JOURNAL).is_file():
        raise ConfigError(f"{path} holds no run: {run_directory.JOURNAL} does not exist")
    contents = load_journal(path / run_directory.JOURNAL)
    steps = contents.steps
    metrics = run_directory.read_metrics(path / run_directory.METRICS)
    lines = {
        values["step"]: values
        for values in metrics
        if isinstance(values.get("step"), int) and "loss" in values and "fetch_bytes" in values
    }
    lanes = _forwards(contents.header)
    points: list[Point] = []
    last: dict[str, float] = {}
    total = dict.fromkeys(_COUNTED, 0.0)
    for record in steps:
        values = lines.get(record.step, {})
        new = {key: _number(values.get(name)) for key, name in _COUNTED.items()}
        new["waited"] *= new["seconds"]
        # each call of fit counts from zero; within a call tokens grow with each step (without tokens: seconds)
        grows = "tokens" if new["tokens"] else "seconds"
        begins = not last or new[grows] <= last[grows]
        for key, value in new.items():
            total[key] += max(0.0, value if begins else value - last[key]) if values else 0.0
        last = new if values else last
        cost = {
            "steps": record.step + 1, "forwards": (record.step + 1) * lanes,
            "bytes": total["fetch"] + total["flush"], "seconds": total["seconds"],
        }  # fmt: skip
        points.append(Point(record.step, record.loss if math.isfinite(record.loss) else None, record.lr, cost))
    evals = [values for values in run_directory.evaluations(metrics) if int(values["step"]) <= len(steps)]
    return History(
        path=path, header=contents.header, settings=_settings(path), points=points, evals=evals,
        skipped=sum(map(is_skipped, steps)), fetch_bytes=total["fetch"], flush_bytes=total["flush"],
        seconds=total["seconds"], waited=total["waited"], **_planned(metrics),
        warnings=[*warnings_of(steps), *(str(n.values["warning"]) for n in contents.notes if "warning" in n.values)],
    )  # fmt: skip


_COUNTED = {
    "fetch": "fetch_bytes", "flush": "flush_bytes", "seconds": "seconds", "waited": "wait_share", "tokens": "tokens"
}  # fmt: skip


def _planned(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Memory by term and formats, as the newest call of `fit` wrote them, and the highest peak of all."""
    memory: dict[str, float] = {}
    formats: list[str] = []
    for values in metrics:
        if isinstance(values.get("memory"), dict):
            memory = {str(name): _number(nbytes) for name, nbytes in values["memory"].items()}
        if isinstance(values.get("formats"), list):
            formats = [str(name) for name in values["formats"]]
    return dict(
        memory=memory, formats=formats, peak_bytes=max((_number(v.get("peak_bytes")) for v in metrics), default=0)
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def _forwards(header: Mapping[str, Any]) -> int:
    """Forwards per step of the run's method; unknown for a user's own class, which is not available here."""
    record = header.get("method")
    if not isinstance(record, dict):
        return 0
    try:
        method = run_directory.make_method(record)
    except (JournalError, ConfigError):
        return 0
    return method.forwards


def _settings(path: Path) -> dict[str, Any]:
    """The run's configuration; empty if it is missing or damaged: the run can then be shown, but not resumed."""
    try:
        return run_directory.load_config(path)
    except JournalError:
        return {}
