"""Settings of an engine that have no effect on the run that begins. None of them is passed over in silence.

A setting is refused where what it asks for does not happen: snapshots of a run without a directory. It is told by a
warning where what it asks for holds anyway (in fp32 all parameters have the 32 bits that `keep` is for) or would only
change time or memory: one set of settings may serve several machines, tiers and formats. A run that goes on keeps its
settings.

`RULES` has all of them; options of the data are in `data/idle.py`, the names in `whole` in `data/micro_batches.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ..checkpoint.weights import kept_of
from ..config import EngineConfig
from ..errors import ConfigError
from ..plan.storage import KEPT
from ..stream.ingest import Base
from .prepare import Prepared

_log = logging.getLogger(__name__)

_DEFAULTS = {field.name: field.default for field in fields(EngineConfig)}


@dataclass(frozen=True)
class Case:
    """A run that begins: the settings as they were given, what was decided by them, and the base."""

    config: EngineConfig
    prepared: Prepared
    base: Base

    def given(self, name: str) -> bool:
        """Whether a setting asks for something: its value is neither the default nor None."""
        return getattr(self.config, name) not in (None, _DEFAULTS[name])


@dataclass(frozen=True)
class Rule:
    """Settings that have no effect in some runs.

    why(case): why they have none, and what to do; "" in runs where they have one.
    """

    names: tuple[str, ...]
    why: Callable[[Case], str]
    refused: bool = False


def _nothing_rounds(case: Case) -> str:
    plan, layout = case.prepared.plan, case.prepared.layout
    formats = {layout.formats[name] for name, spec in plan.params.items() if spec.trainable}
    if layout.target == "values" and any(fmt.rounds for fmt in formats):
        return ""
    kept = "the scales that train are" if layout.target != "values" else "all that trains is"
    names = "fp32" if layout.target != "values" else " and ".join(sorted({fmt.name for fmt in formats}))
    return f"{kept} stored in {names}, which keeps every update exactly, so nothing is rounded. Leave it out"


def _keep_is_not_read(case: Case) -> str:
    if case.config.storage != KEPT:
        return ""
    return (
        "storage='kept' keeps the checkpoint's own codes, of all parameters that have some. Leave it out, or name a "
        "format as the storage"
    )


def _keep_changes_nothing(case: Case) -> str:
    prepared, storage = case.prepared, case.prepared.config.storage
    if storage == KEPT:
        return ""  # refused above
    without = prepared.formats_without_keep(case.base.dtype_of, kept_of(case.base))
    if any(fmt.name != without[name].name for name, fmt in prepared.layout.formats.items()):
        return ""
    how = "the base's own dtype" if storage is None else f"storage={storage!r}"
    return f"{how} keeps those parameters in 16 or 32 bits already. Leave it out"


def _no_run_dir(case: Case) -> str:
    if case.config.run_dir is not None:
        return ""
    return (
        "snapshots are files in the run's directory, and there is none. Pass run_dir=... (--run-dir), or leave it out"
    )


def _no_window(case: Case) -> str:
    if not case.prepared.in_place:
        return ""
    tier = case.prepared.offload
    why = (
        f"offload={tier!r}" if case.config.offload == tier else f"offload={case.config.offload!r} took {tier!r}, which"
    )
    where = "in host memory, which is this device's own" if tier == "host" else "in the device's memory"
    return f"{why} has all blocks {where}, so there is no window to fetch them into"


def _no_page_cache(case: Case) -> str:
    if case.prepared.offload == "disk" and not case.prepared.device.own_memory:
        return ""
    return "it is about blocks that are read from the system's page cache, which takes offload='disk' on a CPU"


def _no_gpu(case: Case) -> str:
    return "" if case.prepared.device.own_memory else "it is about copies from host memory to a GPU; this is a CPU"


RULES = (
    Rule(("rounding",), _nothing_rounds),
    Rule(("keep",), _keep_is_not_read, refused=True),
    Rule(("keep",), _keep_changes_nothing),
    Rule(("snapshot_steps", "snapshot_minutes"), _no_run_dir, refused=True),
    Rule(("num_slots", "prefetch", "overlap", "io_threads"), _no_window),
    Rule(("scrub_every",), _no_page_cache),
    Rule(("host_memory",), _no_gpu),
)


def check_idle(config: EngineConfig, prepared: Prepared, base: Base, *, tells: bool = True) -> None:
    """Raise ConfigError for settings that ask for what does not happen; log a warning for others without an effect.

    config: the settings as they were given. tells: False on ranks that leave the warnings to another.
    """
    case = Case(config, prepared, base)
    refused, told = list[str](), list[str]()
    for rule in RULES:
        names = [name for name in rule.names if case.given(name)]
        if names and (why := rule.why(case)):
            (refused if rule.refused else told).append(f"{_listed(config, names)}: {why}")
    if refused:
        raise ConfigError("; ".join(refused))
    for text in told if tells else ():
        _log.warning("no effect here: %s", text)


def _listed(config: EngineConfig, names: list[str]) -> str:
    values: dict[str, Any] = {name: getattr(config, name) for name in names}
    return ", ".join(f"{name}={value!r:.60}" for name, value in values.items())
