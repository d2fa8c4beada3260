"""Config files: a flat YAML or JSON whose keys are the names of options, or the config.json of a run, which repeats it.

    model: base/
    data: train.jsonl
    storage: int8+8
    method: fzoo
    lr: 5e-5

Options of the command line come before those of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..system.plain import once, user_path


@dataclass(frozen=True)
class ConfigFile:
    """values: by the option's name. method: of a run's config.json, the method's whole record."""

    path: str
    values: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] | None = None


def read_config(path: str) -> ConfigFile:
    """A file's values, unchecked. Raises ConfigError."""
    try:
        text = user_path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    try:
        is_json = Path(path).suffix.lower() == ".json"
        found = json.loads(text, object_pairs_hook=once) if is_json else _yaml(text)
    except Exception as error:  # yaml's errors are of a module that is loaded here
        raise ConfigError(f"--config {path} is not read: {' '.join(str(error).split())}") from error
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"--config {path}: expected options by name, such as 'lr: 1e-6', found {str(found)[:60]!r}")
    if {"settings", "method", "model"} <= set(found):
        return _of_run(path, found)
    return ConfigFile(path, {key.replace("-", "_"): value for key, value in found.items()})


def _yaml(text: str) -> Any:
    """As yaml.safe_load, but a key that stands twice is an error: YAML takes the last."""
    import yaml

    loader: Any = yaml.SafeLoader

    class Once(loader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if twice := {key for key in keys if keys.count(key) > 1}:
                raise ValueError(f"{', '.join(map(repr, sorted(twice)))} is there twice")
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader=Once)


def _of_run(path: str, record: Mapping[str, Any]) -> ConfigFile:
    fit = dict(record.get("fit") or {})
    if record["model"] is None:
        raise ConfigError(f"--config {path} is of a run whose model was made in memory: repeat it in Python")
    options = fit.pop("options", None) or {}
    values = {
        "model": record["model"],
        "model_class": record.get("model_class"),
        **record["settings"],
        **fit,
        **options,
    }
    return ConfigFile(path, {k: v for k, v in values.items() if v is not None}, dict(record["method"]))
