"""Saves a run's weights, at one of its steps, as a checkpoint for plain transformers."""

from __future__ import annotations

import contextlib
from collections import deque
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.adapters import IN_FULL, usual
from ..checkpoint.as_gguf import SCHEMES as GGUF
from ..checkpoint.as_kept import NAME as KEPT
from ..checkpoint.checkpoint import save_pretrained
from ..checkpoint.export import check_scheme
from ..errors import ConfigError
from ..journal import run_directory
from ..journal.calls import FitCall
from ..journal.format import load_journal
from ..journal.journal import Journal
from ..journal.masks import save_lists
from ..journal.selection import Selection
from ..kernels.records import STILL
from ..lanes.hub import Lane
from ..stream.ingest import kept_exactly, read_exactly
from ..system import diskio
from ..system.plain import user_path
from ..system.units import parse_bytes
from .active import Run
from .replaying import replayed_run

Which = int | Literal["best"]


def save(
    run: Run, directory: Path, tokenizer: Any, *, max_shard_bytes: int | float | str = 5e9, overwrite: bool = False,
    merge: bool = False, scheme: str | None = None,
) -> list[Path]:  # fmt: skip
    """Write the current weights; see `Engine.save_pretrained`."""
    check_scheme(scheme)
    scheme, merge = usual(run.opened.model, scheme, merge)
    if wrong := run.opened.cannot_be_saved(merge):
        raise ConfigError(wrong)
    run.flush()
    in_full, layout = scheme in (IN_FULL, *GGUF[1:]), None if scheme == IN_FULL else scheme
    with run.work() as parts, parts.streamer.reader.in_full() if in_full else contextlib.nullcontext():
        whole = run.opened.merged(parts.streamer.reader) if merge else None
        names = list(run.plan.params) if whole is None else whole.names
        held = run.plan, run.opened.prepared.layout, run.opened.base
        exactly = read_exactly(*held, trained=run.log.version > 0) if scheme == KEPT else kept_exactly(*held)
        as_read = exactly - {*run.prepared.tail}
        return save_pretrained(
            directory, model=run.opened.model if whole is None else whole.model, names=names,
            weights=whole or parts.streamer.reader, checkpoint=run.opened.checkpoint,
            max_shard_bytes=int(parse_bytes(max_shard_bytes, "max_shard_bytes")), overwrite=overwrite,
            tokenizer=tokenizer, scheme=layout, as_read=as_read if whole is None else whole.beside(as_read),
            run=lambda call: parts.passes.forward([Lane(STILL, {})], lambda *_: call(), exact=True)[0],
        )  # fmt: skip


def save_run(run: Run, directory: Path) -> Path:
    """Write config.json and journal of the run as this process knows it; see `Engine.save_run`."""
    journal, prepared = run.journal, run.prepared
    if journal is None or run.session is None:
        raise ConfigError("there is no journal to save: the run has not begun, or has no run_dir")
    path = directory / run_directory.JOURNAL
    if path.exists():
        raise ConfigError(f"{directory} holds a run: give another directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        run_directory.save_config(directory, run.opened.name, run.opened.model_class, prepared.config, prepared.method)
        if run.last_fit is not None:
            run_directory.save_fit(directory, run.last_fit)
        save_lists(directory, run.session.masks)
        new = path.with_name(f"{path.name}.new")
        new.unlink(missing_ok=True)
        copy_of(journal, new).close()
        new.rename(path)
        diskio.sync_directory(directory)
    except OSError as error:
        raise diskio.storage_error(error, "saving the run in", directory, then="The run is as it was.") from error
    return directory


def copy_of(journal: Journal, path: Path) -> Journal:
    """A new journal with the same header, steps and notes: another file, of the same history."""
    copy = Journal.create(path, journal.header)
    try:
        notes = deque(journal.notes)
        for record in (*journal.steps, None):
            while notes and (record is None or notes[0].step <= record.step):
                copy.note(notes.popleft().values)
            if record is not None:
                copy.append(record)
        copy.make_durable(len(copy.steps))
    except BaseException:
        copy.close()
        raise
    return copy


def known_evals(run: Run) -> list[dict[str, float]]:
    """All evaluations so far; also for a run that has not started in this process."""
    if run.session is not None or run.run_dir is None:
        return run.evals
    return run_directory.evaluations(run_directory.read_metrics(run.run_dir / run_directory.METRICS))


def step_of(run: Run, which: Which) -> int:
    """A step by its number, or the best evaluated one. Raises ConfigError."""
    if which != "best":
        return which
    evals = known_evals(run)
    best = Selection((run.last_fit or {}).get("metric")).best(evals)
    if best is None:
        raise ConfigError(f"step='best': {run.run_dir or 'the run'} has no evaluations; fit with eval_data=")
    return int(best["step"])


def at_step(run: Run, which: Which) -> Run:
    """The same run at an earlier step, made from its base and journal; it does not train. Raises ConfigError."""
    step = step_of(run, which)
    if run.opened.name is None:
        raise ConfigError(
            "a model that was given in memory has no base to make an earlier step from: fit(keep_best=True, "
            "save_dir=...) exports its best step when it reaches it"
        )
    if run.run_dir is None:
        raise ConfigError("an earlier step is made from the journal, but the run has no run_dir=")
    if run.parts is not None:
        run.flush()
    path, config = run.run_dir / run_directory.JOURNAL, run.config
    method = None if run.method.own() else run.method
    return replayed_run(
        run.opened.name, load_journal(path), str(path), to=step, objective=run.objective, method=method,
        **({"adapter": config.adapter} if config.adapter is not None else {}), device=config.device,
        threads=config.threads, trust_remote_code=config.trust_remote_code,
    )  # fmt: skip


def dir_of_saves(run: Run, call: FitCall) -> Path | None:
    """The directory for exports during training; None if there are none. Raises ConfigError if none is given."""
    in_memory = run.opened.name is None
    if not (call.save_every or (call.keep_best and in_memory)):
        if call.save_dir is not None:
            raise ConfigError(f"save_dir={call.save_dir!r}: nothing is exported during training; pass save_every= too")
        return None
    if wrong := run.opened.cannot_be_saved():
        raise ConfigError(wrong)
    if call.save_dir is not None:
        return user_path(call.save_dir).absolute()
    if run.run_dir is None:
        why = "save_every exports" if call.save_every else "keep_best of a model in memory exports its best step"
        raise ConfigError(f"{why}: pass save_dir=, or a run_dir=")
    return run.run_dir / "saved"
