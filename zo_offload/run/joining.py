"""A run that members join: what its keeper tells them of it, and what they make of that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, RankError
from ..journal import run_directory
from .active import Run

SHARED = (
    "storage", "keep", "compute", "mode", "rounding", "fold_every", "block_numel", "trainable", "seed", "whole",
    "adapter", "config_overrides",
)  # fmt: skip
"""Settings that numbers depend on; in all others a member is its own master."""
_KEEPERS = (
    "eval_data", "eval_rows", "eval_every", "metric", "keep_best", "early_stopping", "save_every", "save_dir",
    "log_every", "report_to",
)  # fmt: skip
"""Of a call of `fit`: what the keeper does, and members do not."""


def admit_members(run: Run, values: Mapping[str, Any]) -> None:
    """Keeper: tell what the run is, and let members in. Member: compare. values: what steps are computed on."""
    if run.ranks.leads and run.journal is None:
        raise ConfigError("a run that others join has a journal: give it a run_dir (--run-dir)")
    if run.journal is not None:
        journal = run.journal
        run.ranks.follows(lambda: (len(journal.steps), f"{journal.history(len(journal.steps)):016x}"))
    run.ranks.welcome(run.journal, _told(run))
    run.ranks.same("fit", values, "Members are given the data of the keeper, all of it (--data)")


def _told(run: Run) -> dict[str, Any]:
    prepared = run.prepared
    settings = run_directory.settings_of(prepared.config) if run.journal is None else run.journal.header["settings"]
    fit = {name: value for name, value in (run.last_fit or {}).items() if name not in _KEEPERS}
    shared = {name: settings[name] for name in SHARED if name in settings}
    return {
        "settings": {**shared, "fold_every": prepared.fold_every},
        "model_class": run.opened.model_class, "method": run_directory.method_of(run.method), "fit": fit,
    }  # fmt: skip


def record_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """What the keeper told, as a run's config.json has it. Raises RankError on what is none."""
    try:
        settings = {name: value for name, value in about["settings"].items() if name in SHARED}
        return {
            "model": None, "model_class": about["model_class"], "settings": settings, "method": dict(about["method"]),
            "fit": dict(about["fit"]),
        }  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise RankError(f"what the keeper told of its run is none: {error!r}") from None
