"""A run directory: what a run was asked to do, what it did, and where its blocks lie.

    config.json      how the engine was made (for `Engine.resume`); plain JSON
    journal.zoj      every step, see journal.py; written when the first weights are in place: without it, no run
    metrics.jsonl    one line a step or evaluation, for people and plots
    blocks/          the blocks of offload="disk", or the snapshots of a run in memory; see tiers/block_file.py
    lock             held by the process that uses the directory, see lock.py

Nothing here is ever unpickled, and nothing is deleted by this package.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import diskio
from .config import EngineConfig
from .errors import ConfigError, JournalError
from .methods import MeZO, method_from

CONFIG, JOURNAL, METRICS, BLOCKS = "config.json", "journal.zoj", "metrics.jsonl", "blocks"
PREDICATE = "<predicate>"


def check_fresh(run_dir: Path) -> None:
    """Raise if a new run cannot start in run_dir: it holds a run, or is not a directory.

    What a run left that ended before its journal existed is taken over: it had trained nothing.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir={str(run_dir)!r} is a file; give a directory")
    if (run_dir / JOURNAL).exists():
        raise ConfigError(
            f"run_dir={str(run_dir)!r} holds a run. Continue it with Engine.resume({str(run_dir)!r}) "
            "(zo-offload fit --resume), or give another directory"
        )
    if (run_dir / BLOCKS).exists() and not (run_dir / CONFIG).exists():
        raise ConfigError(
            f"run_dir={str(run_dir)!r} holds {BLOCKS}/ but no {CONFIG} and no {JOURNAL}: it is not a run of ours. "
            "Give another directory"
        )


def settings_of(config: EngineConfig) -> dict[str, Any]:
    """The engine's settings as plain JSON; a predicate for `trainable` is named as one. Without trust_remote_code: a
    journal is passed on, and trust is not."""
    trainable = config.trainable if isinstance(config.trainable, (str, list, tuple, type(None))) else PREDICATE
    settings = {**asdict(dataclasses.replace(config, trainable=None)), "run_dir": None, "trainable": trainable}
    settings.pop("trust_remote_code", None)
    return settings


def method_of(method: MeZO) -> dict[str, Any]:
    return asdict(method)


def save_config(run_dir: Path, model: str | None, model_class: str | None, config: EngineConfig, method: MeZO) -> None:
    """Write config.json beside and rename: it is there whole or not at all."""
    settings = settings_of(config)
    if config.trust_remote_code:
        settings["trust_remote_code"] = True
    record = {"model": model, "model_class": model_class, "settings": settings, "method": method_of(method)}
    text = json.dumps(record, indent=1, sort_keys=True) + "\n"
    try:
        diskio.replace_file(run_dir / CONFIG, text.encode())
    except OSError as error:
        raise diskio.storage_error(error, "writing", run_dir / CONFIG, then="Nothing was trained yet.") from error


def load_config(run_dir: Path) -> dict[str, Any]:
    """config.json of a run. Raises JournalError if there is none."""
    path = run_dir / CONFIG
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise JournalError(f"{path} is missing: {str(run_dir)!r} is not a run directory") from None
    except (ValueError, RecursionError) as error:
        raise JournalError(f"{path} is damaged: {error}") from None
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("model"), (str, type(None)))
        or not all(isinstance(record.get(part), dict) for part in ("settings", "method"))
    ):
        raise JournalError(f"{path} is not a run's configuration ({str(record)[:100]})")
    check_settings({k: v for k, v in record["settings"].items() if k != "trust_remote_code"}, str(path))
    record["settings"] = with_mode(record["settings"], record["model"])
    return record


def with_mode(settings: dict[str, Any], model: str | None) -> dict[str, Any]:
    """Settings with the `mode` that a run had before there was that setting: a module in memory was run as it was."""
    return {"mode": "as_is" if model is None else "eval", **settings}


def check_settings(settings: dict[str, Any], where: str) -> None:
    """Raise JournalError if settings that were read from a file have a name that EngineConfig lacks."""
    known = {field.name for field in dataclasses.fields(EngineConfig)} - {"trust_remote_code"}
    if unknown := sorted(set(settings) - known):
        raise JournalError(f"{where} has settings that this version does not know: {', '.join(unknown)}")


def make_method(record: dict[str, Any]) -> MeZO:
    """The method that `method_of` or a journal's header describes. JournalError on options it does not have."""
    try:
        return method_from(record)
    except TypeError as error:
        raise JournalError(f"the run's method cannot be made by this version: {error}") from None


class Metrics:
    """Append-only metrics.jsonl; lines past the journal's end are kept, they are history.

    Metrics are for people: if they cannot be written (disk full) the run goes on without them, and says so once.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = open(path, "a", buffering=1) if path is not None else None  # noqa: SIM115 - lives with the run
        self.error: OSError | None = None

    def write(self, **values: Any) -> None:
        if self._file is None or self.error is not None:
            return
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[key] = None  # JSON has no NaN
        try:
            self._file.write(json.dumps(values) + "\n")
        except OSError as error:
            self.error = error

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self.error = error


def evaluations(path: Path | None) -> list[dict[str, float]]:
    """The evaluations that metrics.jsonl holds, the last of each step; lines that a crash cut are passed over."""
    found: dict[int, dict[str, float]] = {}
    if path is None or not path.exists():
        return []
    for line in path.read_bytes().splitlines():
        try:
            values = json.loads(line)
            evals = {k.removeprefix("eval_"): v for k, v in values.items() if k.startswith("eval_")}
            if evals:
                found[int(values["step"])] = {"step": values["step"], **evals}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return [found[step] for step in sorted(found)]
