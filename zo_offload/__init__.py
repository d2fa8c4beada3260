"""zo_offload: fine-tune models far larger than the device, with forward passes only.

    from zo_offload import Engine, MeZO
    engine = Engine("path/to/checkpoint", method=MeZO(lr=1e-6, eps=1e-3), offload="disk", run_dir="runs/a")
    engine.fit("train.jsonl", steps=2000)
    engine.save_pretrained("tuned/")

Names are loaded when first used, so importing the package is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Engine": "engine",
    "EngineConfig": "config",
    "FitResult": "run.result",
    "Stopped": "system.signals",
    "Method": "methods",
    "PRESETS": "methods",
    "Checkpoint": "checkpoint",
    "ZOError": "errors",
    "ConfigError": "errors",
    "CheckpointError": "errors",
    "PlanError": "errors",
    "BudgetError": "errors",
    "DataError": "errors",
    "JournalError": "errors",
    "StorageError": "errors",
    "DivergenceError": "errors",
    "RankError": "errors",
    "Group": "ranks.find",
    "Pool": "ranks.pool",
    "Round": "journal.rounds",
}

_SHOWN = (
    "Engine", "EngineConfig", "FZOO", "FitResult", "Group", "MeZO", "Method", "PRESETS", "QZO", "Stopped", "ZOError",
    "__version__",
)  # fmt: skip
"""Names that dir() and help() show. All methods and errors can be imported too; docs/api.md has the full list."""

if TYPE_CHECKING:
    from .checkpoint.checkpoint import Checkpoint as Checkpoint
    from .config import EngineConfig as EngineConfig
    from .engine import Engine as Engine
    from .errors import BudgetError as BudgetError
    from .errors import CheckpointError as CheckpointError
    from .errors import ConfigError as ConfigError
    from .errors import DataError as DataError
    from .errors import DivergenceError as DivergenceError
    from .errors import JournalError as JournalError
    from .errors import PlanError as PlanError
    from .errors import RankError as RankError
    from .errors import StorageError as StorageError
    from .errors import ZOError as ZOError
    from .journal.rounds import Round as Round
    from .methods import *  # noqa: F403 - see methods/__init__.py
    from .ranks.find import Group as Group
    from .ranks.pool import Pool as Pool
    from .run.result import FitResult as FitResult
    from .system.signals import Stopped as Stopped


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name == "__all__" or name[:1].isupper():  # a method's class: METHODS lists them
        known = import_module(".methods", __name__).METHODS.values()
        found = {kind.__name__: kind for kind in known if kind.own()}
        if name == "__all__":
            return ["__version__", *_HOMES, *found]
        if name in found:
            return found[name]
    raise AttributeError(f"module 'zo_offload' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(_SHOWN)
