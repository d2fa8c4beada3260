"""How `fit` was called, kept in a run's config.json, so that a resumed run repeats what is not said again.

Kept are paths (absolute), numbers and plain options; data that was in memory, a tokenizer object and the like are not,
and have to be given again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True)
class FitCall:
    """The arguments of one call of `fit`; None: not given. eval_data=False: none, whatever there was before."""

    data: Any = None
    eval_data: Any = None
    steps: int | None = None
    batch_size: int | None = None
    micro_batches: int | None = None
    eval_every: int | None = None
    brake: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def after(self, record: Mapping[str, Any] | None) -> FitCall:
        """This call, with what it leaves out taken from an earlier one's `record`."""
        known = record if isinstance(record, Mapping) else {}
        options = known.get("options")
        call = replace(self, options={**(options if isinstance(options, Mapping) else {}), **self.options})
        missing: dict[str, Any] = {f.name: known.get(f.name) for f in fields(self) if getattr(self, f.name) is None}
        call = replace(call, **missing)
        return replace(call, eval_data=None) if call.eval_data is False else call

    def record(self) -> dict[str, Any]:
        """The part of this call that can be kept, as JSON."""
        kept = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("data", "eval_data"):
            path = kept[name]
            kept[name] = str(Path(path).expanduser().absolute()) if isinstance(path, (str, Path)) else None
        kept["options"] = {name: value for name, value in self.options.items() if _is_json(value)}
        return kept

    def check(self) -> None:
        """Raise ConfigError on numbers that cannot be, or if there is no data."""
        for name in ("steps", "batch_size", "micro_batches", "eval_every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name}={value!r}: expected a number of at least 1")
        if self.data is None:
            raise ConfigError("fit needs train_data: a run remembers only files that it was given by their path")


def _is_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError, RecursionError):
        return False
