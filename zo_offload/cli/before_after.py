"""Rows of a run's evaluation data with the model's answers before and after the run, for the report page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..engine import Engine
from ..errors import ConfigError
from ..run.examples import answered


@dataclass(frozen=True)
class Example:
    """A row as text, its own answer, and the model's at the run's first and at its best or last weights."""

    text: str
    wanted: str
    before: str
    after: str


def examples(run_dir: Path | str, count: int) -> list[Example]:
    """`count` rows of the run's evaluation data, else of its training data. Opens the run.

    `after` is at the best step if the run kept it, else at the last. Raises ConfigError if the data was not a file, or
    the base is not a checkpoint: then there is nothing to compare.
    """
    if count < 1:
        raise ConfigError(f"--examples {count}: expected 1 or more")
    with Engine.resume(run_dir) as engine:
        fit = engine.active.last_fit or {}
        data = fit.get("eval_data") or fit.get("data")
        if not data or engine.checkpoint is None:
            missing = "its base is a module in memory" if engine.checkpoint is None else "its data was not a file"
            raise ConfigError(f"--examples: {run_dir} has none to show, because {missing}")
        options = fit.get("options") or {}
        with engine.at(0) as base:
            before = answered(base.active, base.batching, data, count, options)
        if fit.get("keep_best"):
            with engine.at("best") as best:
                after = answered(best.active, best.batching, data, count, options)
        else:
            after = answered(engine.active, engine.batching, data, count, options)
    return [
        Example(old.text, old.wanted, old.said.strip(), new.said.strip())
        for old, new in zip(before, after, strict=True)
    ]
