"""A run that members join: the keeper's description of it, and how a member uses that description."""

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
"""Settings that the numbers depend on; a member chooses all others itself."""
_KEEPERS = (
    "eval_data", "eval_rows", "eval_every", "metric", "keep_best", "early_stopping", "save_every", "save_dir",
    "log_every", "report_to",
)  # fmt: skip
"""Arguments of `fit` that concern only the keeper."""


def admit_members(run: Run, values: Mapping[str, Any]) -> None:
    """Keeper: describe the run, and admit members. Member: compare. values: everything that steps are computed from."""
    if run.ranks.leads and run.journal is None:
        raise ConfigError("a run that others join needs a journal: give it a run_dir (--run-dir)")
    if run.journal is not None:
        journal = run.journal
        run.ranks.follows(lambda: (len(journal.steps), f"{journal.history(len(journal.steps)):016x}"))
    run.ranks.welcome(run.journal, _told(run))
    run.ranks.same("fit", values, "Give each member all of the keeper's data (--data)")


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
    """The keeper's description, in the form of a run's config.json. Raises RankError if it is malformed."""
    try:
        settings = {name: value for name, value in about["settings"].items() if name in SHARED}
        return {
            "model": None, "model_class": about["model_class"], "settings": settings, "method": dict(about["method"]),
            "fit": dict(about["fit"]),
        }  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise RankError(f"the keeper's description of its run is malformed: {error!r}") from None
