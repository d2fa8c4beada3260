"""`zo-offload sweep`: one run for each method, rate and seed of a small grid, each in a directory of its own.

    DIR/fzoo-lr0.01-seed0/     an ordinary run of fit: plot, report, eval and resume take it
    DIR/sweep.json             the sweep's settings, each run's result, and the table

The same command again continues the sweep: finished runs are not repeated, a stopped run is resumed. Settings are
compared by the last evaluation of their runs, or the best one with keep_best; the mean over seeds decides, and the
worst seed is shown next to it. Results of the chosen setting must be reported on other rows than those that chose it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..engine import Engine
from ..errors import ConfigError, DivergenceError
from ..journal import run_directory
from ..journal.selection import Selection, larger_is_better
from ..methods import Method
from ..system import diskio

FILE = "sweep.json"


@dataclass(frozen=True)
class Point:
    """One run to be made."""

    method: Method
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method.name}-lr{self.method.lr:g}-seed{self.seed}"


@dataclass(frozen=True)
class Reached:
    """A run's result. values: those of the evaluation that counts; empty if it ended before one (see `what`)."""

    run: str
    method: str
    lr: float
    seed: int
    steps: int
    values: Mapping[str, float]
    what: str = ""


@dataclass(frozen=True)
class Row:
    """The runs of one method and rate. failed: number of runs that ended before their evaluation, or whose value is not
    a number; a row with failed runs cannot be the best."""

    method: str
    lr: float
    seeds: int
    failed: int
    mean: float
    worst: float
    best: float
    spread: float
    """The standard deviation over seeds, by N - 1; NaN for fewer than two seeds."""


def grid(
    methods: Sequence[Method], rates: Sequence[float], times: Sequence[float], seeds: Sequence[int]
) -> list[Point]:
    """Every method at every rate with every seed. rates: for all methods; times: factors of each method's own rate;
    neither: its own rate. Raises ConfigError if two points have the same name."""
    if rates and times:
        raise ConfigError("--rates are learning rates, and --times are factors of the method's own: give one of them")
    points = []
    for method in methods:
        for lr in rates or [factor * method.lr for factor in times or (1.0,)]:
            points += [Point(dataclasses.replace(method, lr=lr), seed) for seed in seeds]
    names = [point.name for point in points]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"the grid has {twice} twice: give each method, rate and seed once")
    return points


def sweep(
    folder: Path,
    points: Sequence[Point],
    make: Callable[[Point, Path, bool], Engine],
    fit: Mapping[str, Any],
    asked: Mapping[str, Any],
) -> Iterator[tuple[Reached, bool]]:
    """Each point's result, in order, and whether it is from an earlier call. make(point, directory, begun): a run's
    engine; begun: whether the run exists there already. fit: arguments of `Engine.fit`. asked: the settings that all
    runs share, as JSON; all runs of a folder have the same.

    Raises ConfigError if the folder holds another sweep.
    """
    known = _known(folder, asked)
    folder.mkdir(parents=True, exist_ok=True)
    for point in points:
        if point.name in known:
            yield known[point.name], True
            continue
        reached = _run(point, folder / point.name, make, fit)
        known[point.name] = reached
        _write(folder, asked, known, fit.get("metric"))
        yield reached, False


def table(runs: Sequence[Reached], metric: str | None = None) -> tuple[str, list[Row]]:
    """The metric of the comparison, and one row per method and rate, the best first."""
    values = next((run.values for run in runs if run.values), None)
    name = Selection(metric).name(values) if values is not None else metric or "loss"
    sign = -1.0 if larger_is_better(name) else 1.0
    rows = []
    for method, lr in dict.fromkeys((run.method, run.lr) for run in runs):
        mine = [run for run in runs if (run.method, run.lr) == (method, lr)]
        found = [y for run in mine if math.isfinite(y := run.values.get(name, math.nan))]
        ends = (max, min) if sign > 0 else (min, max)  # the worst, the best
        worst, best = (end(found) if found else math.nan for end in ends)
        mean = sum(found) / len(found) if found else math.nan
        spread = math.sqrt(sum((y - mean) ** 2 for y in found) / (len(found) - 1)) if len(found) > 1 else math.nan
        rows.append(Row(method, lr, len(mine), len(mine) - len(found), mean, worst, best, spread))
    return name, sorted(rows, key=lambda row: (row.failed, sign * row.mean if math.isfinite(row.mean) else math.inf))


def lines(name: str, rows: Sequence[Row]) -> Iterator[str]:
    """The table for people."""
    width = max(len("method"), *(len(row.method) for row in rows))
    yield f"{'method':<{width}} {'lr':>10} {'seeds':>6} {f'mean {name}':>15} {'spread':>9} {'worst':>9} {'best':>9}"
    for row in rows:
        numbers = "".join(f" {_number(value):>9}" for value in (row.spread, row.worst, row.best))
        failed = f"   {row.failed} ended before" * bool(row.failed)
        yield f"{row.method:<{width}} {row.lr:>10.3g} {row.seeds:>6} {_number(row.mean):>15}{numbers}{failed}"
    first = rows[0]
    if first.failed == 0:
        yield (
            f"best by its mean {name}: --method {first.method} --lr {first.lr:.6g}. It was chosen on these rows: "
            "report results on others"
        )


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


def _run(point: Point, path: Path, make: Callable[[Point, Path, bool], Engine], fit: Mapping[str, Any]) -> Reached:
    begun = (path / run_directory.JOURNAL).exists() and not run_directory.is_without_steps(path)
    values: Mapping[str, float] | None = None
    what = ""
    with make(point, path, begun) as engine:
        try:
            result = engine.fit(**fit)
            values = result.best if fit.get("keep_best") else next(reversed(result.evals), None)
            what = result.stopped or ""
        except DivergenceError as error:
            what = str(error).partition(". ")[0]
        steps = engine.log.version
    return Reached(point.name, point.method.name, point.method.lr, point.seed, steps, dict(values or {}), what)


def _known(folder: Path, asked: Mapping[str, Any]) -> dict[str, Reached]:
    """Earlier results in this folder."""
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        record = json.loads(diskio.read_file(path))
        before = record["asked"]
        runs = [Reached(**run) for run in record["runs"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is not a sweep's: {error}. Give another directory") from error
    for key in sorted({*before, *asked}):
        if before.get(key) != asked.get(key):
            raise ConfigError(
                f"{folder} holds a sweep with {key}={before.get(key)!r}, but {asked.get(key)!r} is given now: runs of "
                "both cannot be compared. Give another directory as --run-dir"
            )
    return {run.run: dataclasses.replace(run, values=_numbers(run.values)) for run in runs}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in values.items()}


def _write(folder: Path, asked: Mapping[str, Any], known: Mapping[str, Reached], metric: str | None) -> None:
    name, rows = table([*known.values()], metric)
    rows_, runs = [asdict(row) for row in rows], [asdict(run) for run in known.values()]
    record = {"asked": asked, "metric": name, "table": rows_, "runs": runs}
    diskio.replace_file(folder / FILE, (json.dumps(_finite(record), indent=1, allow_nan=False) + "\n").encode())


def _finite(value: Any) -> Any:
    """The value, or None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
