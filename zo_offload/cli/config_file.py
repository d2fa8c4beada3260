"""Config files: a flat YAML or JSON file with options by name, or a run's config.json, which repeats the run.

    model: base/
    data: train.jsonl
    storage: int8+8
    method: fzoo
    lr: 5e-5

Options of the command line override those of the file.
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
    """values: by the option's name. method: the method's whole record, for a run's config.json."""

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
    except Exception as error:  # yaml's error classes are in a module that is loaded only here
        raise ConfigError(f"--config {path} is malformed: {' '.join(str(error).split())}") from error
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"--config {path}: expected options by name, such as 'lr: 1e-6', found {str(found)[:60]!r}")
    if {"settings", "method", "model"} <= set(found):
        return _of_run(path, found)
    return ConfigFile(path, {key.replace("-", "_"): value for key, value in found.items()})


def _yaml(text: str) -> Any:
    """As yaml.safe_load, but a repeated key is an error: YAML uses the last one."""
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
        raise ConfigError(f"--config {path} belongs to a run whose model was made in memory: repeat it in Python")
    options = fit.pop("options", None) or {}
    values = {
        "model": record["model"],
        "model_class": record.get("model_class"),
        **record["settings"],
        **fit,
        **options,
    }
    return ConfigFile(path, {k: v for k, v in values.items() if v is not None}, dict(record["method"]))
