"""A run directory: a run's settings, its journal and metrics, and its blocks.

    config.json      how the engine was made (for `Engine.resume`) and how `fit` was last called; plain JSON
    journal.zoj      every step, see journal.py; written when the first weights are in place: without it, no run
    metrics.jsonl    one line per step or evaluation, for people and plots
    tail/            the numbers of a tail, which scalars do not rebuild; see tail_files.py
    timeline.json    the times of one step, for people: see run/timed.py; only if blocks stream
    blocks/          the blocks of offload="disk", or the snapshots of a run in memory; see tiers/block_file.py
    lock             held by the process that uses the directory, see lock.py
    ranks/N/         for a run over several processes: blocks/ and lock of rank N, from 1 on

Nothing here is ever unpickled, and this package deletes nothing but a run without steps that starts again. A run cannot
start in a directory that holds a checkpoint, or foreign files with these names.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from ..config import EngineConfig
from ..errors import ConfigError, JournalError
from ..methods import Method, known_record, method_from
from ..numerics.noise import LAYOUT_VERSION
from ..system import diskio
from .format import TAKES_NOTES, VERSIONS, load_header, read_journal

_log = logging.getLogger(__name__)

CONFIG, JOURNAL, METRICS, BLOCKS, RANKS = "config.json", "journal.zoj", "metrics.jsonl", "blocks", "ranks"
PREDICATE = "<predicate>"


_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json", "adapter_config.json")


def check_fresh(run_dir: Path) -> None:
    """Raise ConfigError if a new run cannot start in run_dir: it holds a run, a checkpoint, or files of the same names.

    The files of a run that took no step (its journal is missing, or empty) are reused: it had trained nothing.
    """
    try:
        if not run_dir.exists():
            return
        if not run_dir.is_dir():
            raise ConfigError(f"run_dir={str(run_dir)!r} is a file; give a directory")
        here = f"run_dir={str(run_dir)!r}"
        if (run_dir / JOURNAL).exists() and not is_without_steps(run_dir):
            raise ConfigError(
                f"{here} holds a run. Continue it with Engine.resume({str(run_dir)!r}) "
                "(zo-offload fit --resume), or give another directory"
            )
        ours = _is_config(run_dir / CONFIG)
        if (run_dir / CONFIG).exists() and not ours:
            raise ConfigError(
                f"{here} holds a {CONFIG} that is not a run's: it holds a checkpoint or an export, and a run would "
                "overwrite it. Give another directory"
            )
        if found := sorted(path.name for pattern in _WEIGHTS for path in run_dir.glob(pattern)):
            raise ConfigError(
                f"{here} holds weights ({', '.join(found[:3])}): a run is not begun among them. Give another"
            )
        if (run_dir / METRICS).exists() and not (run_dir / JOURNAL).exists():
            raise ConfigError(
                f"{here} holds {METRICS} but no {JOURNAL}, which is the run. Restore it, or give another directory"
            )
        if (run_dir / BLOCKS).exists() and not (ours and (run_dir / BLOCKS).is_dir()):
            raise ConfigError(
                f"{here} holds {BLOCKS}/ but no {CONFIG} and no {JOURNAL}: it is not a run of ours. "
                "Give another directory"
            )
    except OSError as error:
        raise diskio.storage_error(error, "looking at", run_dir, then="Nothing was changed.") from error


_NO_STEPS_BYTES = 1 << 20  # a larger journal has steps: no need to read it


def is_without_steps(run_dir: Path) -> bool:
    """Whether run_dir holds the journal of a run without steps. An unreadable journal counts as having steps."""
    path = run_dir / JOURNAL
    try:
        if path.stat().st_size > _NO_STEPS_BYTES:
            return False
        return _is_config(run_dir / CONFIG) and not read_journal(diskio.read_file(path), str(path)).steps
    except (JournalError, OSError):
        return False


def takes_notes(run_dir: Path) -> bool:
    """Whether run_dir's journal is of the present format."""
    try:
        return VERSIONS.get(diskio.read_file(run_dir / JOURNAL)[:4], 0) >= TAKES_NOTES
    except OSError:
        return False


def save_fit(run_dir: Path, fit: Mapping[str, Any]) -> None:
    """Add the arguments of `fit` to config.json."""
    record = load_config(run_dir)
    if record.get("fit") != fit:
        _write(run_dir / CONFIG, {**record, "fit": fit})


def _is_config(path: Path) -> bool:
    try:
        return _is_record(json.loads(diskio.read_file(path)))
    except (OSError, ValueError, RecursionError):
        return False


def _is_record(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and isinstance(record.get("model", 0), (str, type(None)))
        and isinstance(record.get("model_class"), (str, type(None)))
        and isinstance(record.get("fit"), (dict, type(None)))
        and all(isinstance(record.get(part), dict) for part in ("settings", "method"))
    )


def settings_of(config: EngineConfig) -> dict[str, Any]:
    """The engine's settings as plain JSON; a predicate for `trainable` is recorded only as such. Without
    trust_remote_code: a journal may be passed on to others, who must decide on trust themselves."""
    trainable = config.trainable if isinstance(config.trainable, (str, list, tuple, type(None))) else PREDICATE
    settings = {**asdict(dataclasses.replace(config, trainable=None)), "run_dir": None, "trainable": trainable}
    settings.pop("trust_remote_code", None)
    return settings


def method_of(method: Method) -> dict[str, Any]:
    """A method's name and fields as JSON; for a user's own method also its class."""
    fields: dict[str, Any] = json.loads(json.dumps({**asdict(method), "name": method.name}))
    return fields if method.own() else {**fields, "class": method_class(method)}


def method_class(method: Method) -> str:
    return f"{type(method).__module__}:{type(method).__qualname__}"


def save_config(
    run_dir: Path,
    model: str | None,
    model_class: str | None,
    config: EngineConfig,
    method: Method,
) -> None:
    """Write config.json to a temporary file and rename it: it exists whole or not at all."""
    settings = settings_of(config)
    if config.trust_remote_code:
        settings["trust_remote_code"] = True
    record = {"model": model, "model_class": model_class, "settings": settings, "method": method_of(method)}
    _write(run_dir / CONFIG, record)


def _write(path: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=1, sort_keys=True) + "\n"
    try:
        diskio.replace_file(path, text.encode())
    except OSError as error:
        raise diskio.storage_error(error, "writing", path, then="No step was taken.") from error


def load_config(run_dir: Path) -> dict[str, Any]:
    """config.json of a run. Raises JournalError if there is none."""
    path = run_dir / CONFIG
    try:
        record: dict[str, Any] = json.loads(diskio.read_file(path))
    except (FileNotFoundError, NotADirectoryError):
        if not run_dir.exists():
            raise JournalError(
                f"{str(run_dir)!r} does not exist. If the run was moved, give its new directory"
            ) from None
        raise JournalError(f"{path} is missing: {str(run_dir)!r} is not a run directory") from None
    except OSError as error:
        raise JournalError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise JournalError(f"{path} is damaged: {error}") from None
    if not _is_record(record):
        what = "a checkpoint's" if isinstance(record, dict) and "architectures" in record else str(record)[:100]
        raise JournalError(f"{path} is not a run's configuration, but {what}")
    check_settings({k: v for k, v in record["settings"].items() if k != "trust_remote_code"}, str(path))
    record["settings"] = with_mode(record["settings"], record["model"])
    return record


def resumed(run_dir: Path, *, tells: bool) -> tuple[dict[str, Any], dict[str, Any] | None, str | None]:
    """(config.json, the journal's header, the journal's bytes in base64) of a run to resume.

    tells: other ranks need the bytes. Header and bytes are None if the run starts again. Raises JournalError if run_dir
    holds no run.
    """
    record = load_config(run_dir)
    path = run_dir / JOURNAL
    if not path.exists() and (run_dir / METRICS).exists():
        raise JournalError(f"{run_dir}: {JOURNAL} is missing, and it is the run. Restore it")
    if not path.exists() or (is_without_steps(run_dir) and not takes_notes(run_dir)):
        return record, None, None
    return record, load_header(path), b64encode(diskio.read_file(path)).decode() if tells else None


def with_mode(settings: dict[str, Any], model: str | None) -> dict[str, Any]:
    """Settings with the `mode` of runs from before that setting: a module in memory ran in its own mode."""
    return {"mode": "as_is" if model is None else "eval", **settings}


def check_settings(settings: dict[str, Any], where: str) -> None:
    """Raise JournalError if settings from a file have a name that EngineConfig lacks."""
    known = {field.name for field in dataclasses.fields(EngineConfig)} - {"trust_remote_code"}
    if unknown := sorted(set(settings) - known):
        raise JournalError(f"{where} has settings that this version does not know: {', '.join(unknown)}")


def make_method(record: dict[str, Any], given: Method | type[Method] | None = None) -> Method:
    """The method that `method_of` or a journal's header describes. JournalError on options it does not have.

    given: the caller's method or method class, for a class of their own; a class gets the run's fields. The noise
    layout is the run's, unless the caller asked for another one than the newest: then it is another run.
    """
    if isinstance(given, Method):
        if given.noise_layout != LAYOUT_VERSION:
            return given
        return given.with_options(noise_layout=known_record(record)["noise_layout"])
    if given is None and "class" in record:
        raise JournalError(
            f"the run was made with a method of your own, {record['class']!r}: pass it again as it was, "
            f"method={record['class'].rpartition(':')[2]} (--method file.py:{record['class'].rpartition(':')[2]})"
        )
    try:
        return method_from(record, given)
    except (TypeError, ConfigError) as error:
        raise JournalError(f"the run's method cannot be made by this version: {error}") from None


class Metrics:
    """Append-only metrics.jsonl; lines past the journal's end are kept as history.

    Metrics are for people: if they cannot be written (disk full), the run goes on without them and warns once.
    """

    def __init__(self, path: Path | None) -> None:
        self._file: IO[str] | None = None
        self._path = path
        self.error: OSError | None = None
        try:
            if path is not None:
                self._file = open(path, "a", buffering=1, opener=_open_now)  # noqa: SIM115 - lives with the run
        except OSError as error:
            self._give_up(error)

    def write(self, **values: Any) -> None:
        if self._file is None or self.error is not None:
            return
        try:
            self._file.write(to_json(values) + "\n")
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.error = error
        _log.warning("the run goes on without %s, which cannot be written: %s", self._path, error)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self.error = self.error or error


def _open_now(path: str, flags: int) -> int:
    """Open a file for writing; a pipe without a reader is an error instead of a wait."""
    return os.open(path, flags | os.O_NONBLOCK, 0o644)


def to_json(values: Mapping[str, Any]) -> str:
    """A line of JSON; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}, allow_nan=False
    )


def read_metrics(path: Path | None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order. Lines that a crash cut are skipped; an unreadable file gives a warning."""
    try:
        lines = diskio.read_file(path).splitlines() if path is not None else []
    except FileNotFoundError:
        return []
    except OSError as error:
        _log.warning("the evaluations so far are not known, %s cannot be read: %s", path, error)
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [values for values in found if isinstance(values, dict)]


def evaluations(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The evaluations among lines of metrics.jsonl, the last one of each step; those on other data than the newest are
    left out, since they cannot be compared."""
    found: dict[int, tuple[Any, dict[str, float]]] = {}
    for values in metrics:
        evals = {
            k.removeprefix("eval_"): math.nan if v is None else v for k, v in values.items() if k.startswith("eval_")
        }
        try:
            if evals:
                found[int(values["step"])] = values.get("data"), {"step": values["step"], **evals}
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
    alike = (None, evaluated_data(metrics))
    return [found[step][1] for step in sorted(found) if found[step][0] in alike]


def evaluated_data(metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """The rows of the newest evaluation; None if unknown."""
    told = [values["data"] for values in metrics if "data" in values]
    return told[-1] if told and isinstance(told[-1], str) else None
