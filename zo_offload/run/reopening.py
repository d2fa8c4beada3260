"""Builds an existing run from its record: resumed from its directory, or joined at its keeper."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import EngineConfig
from ..data.losses import as_objective, model_loss
from ..errors import CheckpointError, ConfigError
from ..journal import run_directory
from ..journal.format import read_journal
from ..journal.identity import objective_name
from ..ranks.alone import Alone
from ..ranks.member import Member
from .active import Run
from .joining import SHARED, record_of
from .opening import open_model
from .session import Maker

_NOT_SETTINGS = ("objective", "tokenizer", "model_class", "example", "base")


@dataclass(frozen=True)
class Reopened:
    """A continued run, and the tokenizer that was passed for it."""

    run: Run
    tokenizer: Any


def resumed(run_dir: Path, model: Any, method: Any, changes: Mapping[str, Any], team: Alone) -> Reopened:
    """The run of a directory; arguments and errors of `Engine.resume`."""
    changes = dict(changes)
    record, header, told = team.first("resuming", lambda: run_directory.resumed(run_dir, tells=team.world > 1))
    data = None if told is None or team.leads else b64decode(told)
    where = record["model"] if model is None else model
    if where is None:
        raise ConfigError(f"{run_dir} was made from a module in memory: pass it again: resume(run_dir, model)")
    if isinstance(where, str) and model is None and Path(where).is_absolute() and not Path(where).exists():
        raise CheckpointError(
            f"the base of {run_dir} is {where}, which does not exist. If it was moved, give its new path: "
            "Engine.resume(run_dir, model=...) (--base)"
        )
    if record["settings"].get("trainable") == run_directory.PREDICATE and "trainable" not in changes:
        raise ConfigError(f"{run_dir} was made with trainable=<a function>: pass the same one to resume")
    passed = _passed(changes)
    config = EngineConfig(**{**record["settings"], **changes, "run_dir": run_dir})
    return _reopened(where, config, record, header, data, method, passed, team)


def check_changes(changes: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings that a member cannot choose, because the run defines them."""
    if unknown := sorted(changes.keys() & {*SHARED} - {"adapter", "trainable"}):
        raise ConfigError(f"{', '.join(unknown)}: a member takes what the run has; leave it out")


def joined(member: Member, model: Any, method: Any, changes: Mapping[str, Any]) -> Reopened:
    """The run of a keeper, as its member; arguments and errors of `Engine.join`."""
    changes = dict(changes)
    record, passed = record_of(member.about_run), _passed(changes)
    run_directory.check_settings(record["settings"], f"the keeper at {member.address}")
    config = EngineConfig(**{**record["settings"], "snapshot_minutes": None, **changes})
    header = None if member.journal is None else read_journal(member.journal).header
    return _reopened(model, config, record, header, member.journal, method, passed, member)


def _passed(changes: dict[str, Any]) -> dict[str, Any]:
    """Remove the entries that are not engine settings from `changes`, and return them."""
    return {name: changes.pop(name, None) for name in _NOT_SETTINGS}


def _reopened(
    where: Any, config: EngineConfig, record: Mapping[str, Any], header: Mapping[str, Any] | None, data: bytes | None,
    method: Any, passed: Mapping[str, Any], team: Alone,
) -> Reopened:  # fmt: skip
    """header: the journal's, if there is one; data: the journal's bytes, if another process has the file."""
    objective = model_loss if passed["objective"] is None else as_objective(passed["objective"])
    made = run_directory.make_method(record["method"], method)
    opened = open_model(
        where, made, config, model_class=passed["model_class"] or record.get("model_class"),
        example=passed["example"], base=passed["base"], fresh=False, ranks=team,
        recorded=header,
    )  # fmt: skip
    opened = opened if data is None else replace(opened, header=header)
    begin = Maker(opened, objective_name(objective, model_loss), fresh=False, told=data).start
    run = Run(opened, objective, begin, example=passed["example"], resumes=True, last_fit=record.get("fit"))
    return Reopened(run, passed["tokenizer"])
