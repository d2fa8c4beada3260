"""A run directory: what a run was asked to do, what it did, and where its blocks lie.

    config.json      how the engine was made (for `Engine.resume`); plain JSON
    journal.zoj      every step, see journal.py
    metrics.jsonl    one line a step or evaluation, for people and plots
    blocks/          block files of offload="disk", see tiers/disk.py

Nothing here is ever unpickled, and nothing is deleted by this package.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .config import EngineConfig
from .errors import ConfigError, JournalError
from .methods import MeZO

CONFIG, JOURNAL, METRICS, BLOCKS = "config.json", "journal.zoj", "metrics.jsonl", "blocks"


def check_fresh(run_dir: Path) -> None:
    """Raise if a new run cannot start in run_dir: it holds a run, or is not a directory."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir={str(run_dir)!r} is a file; give a directory")
    if (run_dir / JOURNAL).exists():
        raise ConfigError(
            f"run_dir={str(run_dir)!r} holds a run. Continue it with Engine.resume({str(run_dir)!r}) "
            "(zo-offload fit --resume), or give another directory"
        )
    if (run_dir / BLOCKS).exists():
        raise ConfigError(
            f"run_dir={str(run_dir)!r} holds blocks of a run that never started (no {JOURNAL}). "
            "Remove the directory or give another one"
        )


def save_config(run_dir: Path, model: str | None, model_class: str | None, config: EngineConfig, method: MeZO) -> None:
    """Write config.json beside and rename: it is there whole or not at all."""
    trainable = config.trainable if isinstance(config.trainable, (str, list, tuple, type(None))) else "<predicate>"
    record = {
        "model": model,
        "model_class": model_class,
        "settings": {**asdict(config), "run_dir": None, "trainable": trainable},
        "method": {k: v for k, v in asdict(method).items() if k != "name"},
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    beside = run_dir / (CONFIG + ".new")
    beside.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    os.replace(beside, run_dir / CONFIG)


def load_config(run_dir: Path) -> dict[str, Any]:
    """config.json of a run. Raises JournalError if there is none."""
    path = run_dir / CONFIG
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise JournalError(f"{path} is missing: {str(run_dir)!r} is not a run directory") from None
    except json.JSONDecodeError as error:
        raise JournalError(f"{path} is damaged: {error}") from None
    if not isinstance(record, dict) or not {"model", "settings", "method"} <= set(record):
        raise JournalError(f"{path} is not a run's configuration (keys {sorted(record)})")
    return record


class Metrics:
    """Append-only metrics.jsonl; lines past the journal's end are kept, they are history."""

    def __init__(self, path: Path | None) -> None:
        self._file = open(path, "a", buffering=1) if path is not None else None  # noqa: SIM115 - lives with the run

    def write(self, **values: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps(values) + "\n")

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()


def check_identity(wanted: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise JournalError naming every part of a run's identity that differs from the journal's."""
    differ = [
        f"{key}: the journal has {found.get(key)!r}, this engine {wanted[key]!r}"
        for key in sorted(wanted)
        if key != "versions" and found.get(key) != wanted[key]
    ]
    if differ:
        raise JournalError(
            "this run cannot be continued as asked; " + "; ".join(differ) + ". Steps, evaluation, offload tier, window "
            "and threads may change; the base weights, storage, compute, rounding, fold_every, seed, noise and method "
            "may not"
        )
