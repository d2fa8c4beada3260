"""Presents a checkpoint's quantized tensors as ordinary weights, decoded when they are read."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..quantized.base import Decoded, Settings
from ..quantized.files import Files, Spec
from ..quantized.table import find
from .meta_model import config_parts
from .safetensors_io import Entry

SETTINGS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""GPTQ's, AWQ's and Model Optimizer's own, beside config.json."""
_MOST = 32 << 20


class TensorFile(Protocol):
    """A file of tensors that reads their elements: `safetensors_io.SafetensorsFile`, or an object like it."""

    @property
    def entries(self) -> Mapping[str, Entry]: ...

    def read_into(self, name: str, start: int, out: Tensor) -> None: ...

    def close(self) -> None: ...


class Dequantized:
    """Decoded weights, by their names in an unquantized model."""

    def __init__(self, weights: list[Decoded], files: Files, hidden: Collection[str]) -> None:
        self.weights = {weight.name: weight for weight in weights}
        self.files = files
        self.beside = sorted(set(hidden) - {name for weight in weights for name in weight.uses})
        self.entries = {w.name: _entry(w.name, w.dtype, w.shape) for w in weights}

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Elements [start, start + len(out)) of a weight into `out`, 1-D, of its dtype."""
        self.weights[name].read_into(self.files, start, out)

    def close(self) -> None:
        """Does nothing: the tensors' files are closed by their owner."""


def dequantized(
    file_of: Mapping[str, TensorFile], settings: Settings, dtype: torch.dtype, where: Path
) -> dict[str, TensorFile]:
    """The file of each tensor, with decoded weights in place of their quantized tensors. dtype: the model's; where: the
    checkpoint, for errors. CheckpointError: see `quantized.table.find`."""
    specs = {name: Spec(file.entries[name].dtype, file.entries[name].shape) for name, file in file_of.items()}
    files = Files(specs, lambda name, start, out: file_of[name].read_into(name, start, out))
    try:
        weights, hidden = find(files, settings, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    plain = {name: file for name, file in file_of.items() if name not in hidden}
    decoded = Dequantized(weights, files, hidden)
    return {**plain, **dict.fromkeys(decoded.entries, decoded)}


def take_settings(config: Any, directory: Path | None) -> Settings:
    """A checkpoint's quantization settings, which are removed from its config: models built and exported from it are
    not quantized. {} if it has none. directory None: a config alone. Raises CheckpointError if they are malformed."""
    found = _settings_of(config, directory)
    without_settings(config)
    return found


def _settings_of(config: Any, directory: Path | None) -> Settings:
    for part in config_parts(config):
        found = getattr(part, "quantization_config", None)
        if found is None:
            continue
        if hasattr(found, "to_dict"):
            found = found.to_dict()
        if not isinstance(found, dict):
            where = "" if directory is None else f"{directory}: "
            raise CheckpointError(f"{where}config.json has quantization_config={found!r:.60}; expected settings.")
        return found
    for name in SETTINGS:
        if directory is not None and (directory / name).is_file():
            return _read(directory / name)
    return {}


def without_settings(config: Any) -> None:
    """Remove quantization_config from a config."""
    for part in config_parts(config):
        if hasattr(part, "quantization_config"):
            delattr(part, "quantization_config")


def _read(path: Path) -> Settings:
    try:
        if path.stat().st_size > _MOST:
            raise ValueError(f"{path.stat().st_size} bytes")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("no settings by name")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be used: {type(error).__name__}: {error}") from error
    if isinstance(value.get("quantization"), dict):  # Model Optimizer's
        return {"quant_method": "modelopt", **value["quantization"]}
    return value


def _entry(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Entry:
    return Entry(name, dtype, shape, 0, Spec(dtype, shape).nbytes)
