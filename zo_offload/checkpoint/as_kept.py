"""An export in the layout of a quantized checkpoint: its codes leave as the bytes that came, in their own tensors.

For a model that was read from quantized files (GPTQ, AWQ, compressed-tensors, fp8, mxfp4, NVFP4, bitsandbytes) and of
which norms, biases, a head or other plain tensors were trained: a weight that did not train, and that blocks hold
exactly, leaves as the tensors that it was read from, and all else as always. config.json has the quantization settings
of the files again, so the scheme's library loads the result as it loaded the original.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..quantized.files import Spec
from .dequantized import SETTINGS
from .kept import Coded, sources
from .recipe import Recipe
from .small_files import Origin, write_json
from .weights import CHUNK

NAME = "kept"
_KEY = "quantization_config"


@runtime_checkable
class Came(Coded, Protocol):
    """A checkpoint's quantized tensors (`dequantized.Dequantized`)."""

    @property
    def beside(self) -> Collection[str]:
        """Tensors that belong to no weight: scales of quantized activations."""


def check(model: nn.Module, checkpoint: Origin | None) -> Came:
    """The tensors that leave as they came. Raises ConfigError if nothing came quantized, or in a layout of its own."""
    if checkpoint is not None and checkpoint.gguf is not None:
        raise ConfigError("an export as kept of a GGUF file: --as gguf writes codes that did not train as they came")
    coded = None if checkpoint is None else checkpoint.coded()
    if not isinstance(coded, Came):
        raise ConfigError("an export as kept is of a quantized checkpoint, and this model was not read from one")
    return coded


def parts_of(recipes: Mapping[str, Recipe], came: Came, is_exact: Callable[[str], bool]) -> dict[str, tuple[str, ...]]:
    """The tensors that are written in place of each quantized weight, by the weight's name in the files.

    recipes: of what is written otherwise. is_exact: whether a state dict entry holds exactly what the files hold.
    Raises ConfigError if a quantized weight was trained, or is stored rounded; CheckpointError if files name it
    otherwise than transformers does.
    """
    if lost := [name for name in came.weights if name not in recipes]:
        raise CheckpointError(
            f"an export as kept: {len(lost)} quantized tensors, such as {lost[0]!r}, have other names in transformers' "
            "own exports of this model. Leave out the layout: --as safetensors"
        )
    for name, weight in came.weights.items():
        if changed := [source for source in sources(recipes[name]) if not is_exact(source)]:
            raise ConfigError(
                f"an export as kept: {changed[0]!r} is no longer what {weight.uses[0]!r} holds, because it was trained "
                "or its blocks are in a format that rounds it. storage='kept' with trainable= of other parameters "
                "keeps codes; or leave out the layout: --as safetensors"
            )
    return {name: weight.uses for name, weight in came.weights.items()}


def with_codes(outputs: Mapping[str, Spec], parts: Mapping[str, tuple[str, ...]], came: Came) -> dict[str, Spec]:
    """What is written instead: the files' tensors in place of the weights that are made of them."""
    plain = {name: spec for name, spec in outputs.items() if name not in parts}
    return plain | {name: came.files.specs[name] for name in _raw(parts, came)}


def write(
    parts: Mapping[str, tuple[str, ...]], came: Came, put: Callable[[str, int, Tensor], None],
    end: Callable[[str], None],
) -> None:  # fmt: skip
    """Copy the files' tensors, a chunk at a time. put: (name, first element, elements); end: a tensor is complete."""
    for name in _raw(parts, came):
        numel = came.files.specs[name].numel
        for start in range(0, numel, CHUNK):
            put(name, start, came.files.part(name, start, min(CHUNK, numel - start)))
        end(name)


def restore_settings(work: Path, source: Path) -> None:
    """Give an export its checkpoint's quantization settings: in config.json where they were there, and their files."""
    for name in SETTINGS:
        if (source / name).is_file():
            shutil.copyfile(source / name, work / name)
    config = json.loads((work / "config.json").read_bytes())
    _put_back(config, json.loads((source / "config.json").read_bytes()))
    write_json(work / "config.json", config)


def _put_back(config: dict[str, Any], original: Mapping[str, Any]) -> None:
    for key, value in original.items():
        if key == _KEY:
            config[key] = value
        elif isinstance(value, dict) and isinstance(config.get(key), dict):
            _put_back(config[key], value)


def _raw(parts: Mapping[str, tuple[str, ...]], came: Came) -> Iterable[str]:
    """Each tensor once: several weights may use the same."""
    return dict.fromkeys([*(name for uses in parts.values() for name in uses), *came.beside])
