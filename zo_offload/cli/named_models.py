"""Configurations of well-known models by their usual names (`models.json`), for planning without a download.

Shapes and counts of layers are as published; settings that affect no weight's shape are transformers' defaults.
"""

from __future__ import annotations

import difflib
import functools
import json
from pathlib import Path
from typing import Any

from .. import hf
from ..errors import CheckpointError, ConfigError


@functools.cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(__file__).with_name("models.json").read_text())
    return found


def model_names() -> list[str]:
    return list(_table())


def is_named(model: str) -> bool:
    return model.lower() in _table()


def named_config(model: str) -> Any:
    """transformers' config of a known name. CheckpointError if this transformers has no such architecture."""
    row = _table()[model.lower()]
    try:
        config = hf.AutoConfig.for_model(row["model_type"], **row["config"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{model}: this transformers does not know {row['model_type']!r}: {error}") from error
    config.architectures, config.dtype = [row["architecture"]], row["dtype"]
    if "quantization_config" in row:
        config.quantization_config = row["quantization_config"]
    return config


def published_as(model: str) -> str:
    """The format of its published files if that is neither 16 bits nor read here, else ""."""
    return str(_table().get(model.lower(), {}).get("published_as", ""))


def config_of_file(path: Path) -> Any:
    """The config in a JSON file of any name."""
    try:
        fields = json.loads(path.read_text())
        kind = fields.pop("model_type", None) if isinstance(fields, dict) else None
        if not isinstance(kind, str) or kind not in hf.transformers.CONFIG_MAPPING:
            raise ValueError(
                f"its model_type is {kind!r}, which transformers {hf.transformers.__version__} does not know"
            )
        return hf.AutoConfig.for_model(kind, **fields)
    except Exception as error:  # whatever transformers makes of a stranger's file
        raise CheckpointError(f"{path} is not a config.json of a model: {type(error).__name__}: {error}") from error


def like(model: str, cutoff: float = 0.6) -> list[str]:
    """Known names that are like it, or like the last part of a hub's id."""
    return difflib.get_close_matches(model.rpartition("/")[2].lower(), model_names(), 4, cutoff)


def unknown(model: str) -> ConfigError:
    """The error for a model that is no directory, file or known name; it lists similar names."""
    near = like(model, 0.4)
    told = f"; names like it are {', '.join(near)}" if near else f"; such as {', '.join(model_names()[::12])}"
    return ConfigError(
        f"{model} does not exist, and is not a known name{told}. Give a directory with config.json, or a config's "
        "own file"
    )
