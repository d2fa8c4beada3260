"""GGUF models: configuration and tokenizer are read by transformers, tensors are streamed.

transformers (with the package gguf) gives a file's config, and the model's name of each of its tensors; it loads no
tensors. Its conversions are done here on chunks of elements: rows of q and k in Llama's family are put back in order, 1
is subtracted from norms that are stored plus one, an expert's gate and up are joined. Architectures for which it does
more are an error that names them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..hf import (
    TENSOR_PROCESSORS,
    AutoConfig,
    PreTrainedModel,
    TensorProcessor,
    get_gguf_hf_weights_map,
    modeling_auto,
    transformers,
)
from ..quantized.base import Decoded
from ..quantized.files import Files
from ..quantized.gguf_file import GGUFFile
from .architecture import MAX_COUNT, find_class, read_config
from .dequantized import without_settings
from .files import CONFIG, carried_files, has_weights
from .kept import made_of
from .meta_model import construct
from .recipe import Join, Reader, Recipe, Source, Turn
from .safetensors_io import Entry

_log = logging.getLogger(__name__)

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_COUNTS = re.compile(r"block_count|expert_count|head_count|layer")
_DONE = ("TensorProcessor", "LlamaTensorProcessor", "NemotronTensorProcessor", "Gemma2TensorProcessor",
         "Qwen2MoeTensorProcessor")  # fmt: skip
"""transformers' tensor processors whose conversions are also implemented here."""
_FACTORS = "rope_freqs.weight"  # of rotary positions, computed from the config by the model


@dataclass(frozen=True)
class OpenedGGUF:
    config: Any
    tensors: GGUFWeights
    carried: list[Path]
    """Small files to copy into an export."""
    tokenizer: Path | None
    """The file with the tokenizer."""


def open_gguf(
    files: list[Path], *, trust_remote_code: bool = False, overrides: Mapping[str, Any] | None = None
) -> OpenedGGUF:
    """A GGUF model, its tensors named as transformers' model names them; reads headers. A config.json and a tokenizer
    next to the files override those inside. Raises CheckpointError."""
    tensors, directory = GGUFWeights(files), files[0].parent
    beside = (directory / CONFIG).is_file()
    if beside:
        config = read_config(directory, trust_remote_code=trust_remote_code, overrides=overrides)
    else:
        config = _read_config(files[0], dict(overrides or {}))
    without_settings(config)
    tensors.name_as(find_class(config, None, directory, trust_remote_code=trust_remote_code), config)
    carried = carried_files(directory, code=trust_remote_code) if beside else []
    return OpenedGGUF(config, tensors, carried, files[0] if tensors.has_tokenizer else None)


def find_gguf(path: str | Path) -> list[Path]:
    """The files of the GGUF model at a path; [] if there is none. Raises CheckpointError: several, a part missing."""
    given = Path(path).expanduser()
    if given.is_file() and given.suffix == ".gguf":
        return _parts(given)
    if not given.is_dir() or has_weights(given):
        return []
    found = sorted(given.glob("*.gguf"))
    if not found:
        return []
    models = {tuple(_parts(file)) for file in found}
    if len(models) > 1:
        names = ", ".join(sorted(parts[0].name for parts in models)[:6])
        raise CheckpointError(f"{given} holds {len(models)} GGUF models ({names}): give the path of one of them.")
    return list(models.pop())


def _parts(file: Path) -> list[Path]:
    match = _SPLIT.fullmatch(file.name)
    if match is None:
        return [file]
    count = int(match[3])
    if not 0 < count <= MAX_COUNT:
        raise CheckpointError(f"{file}: a part of {count} files.")
    parts = [file.with_name(f"{match[1]}-{i + 1:05d}-of-{match[3]}.gguf") for i in range(count)]
    if missing := [part for part in parts if not part.is_file()]:
        raise CheckpointError(f"{missing[0]} is missing: the model is in {count} files. Download or copy it.")
    return parts


def _read_config(file: Path, overrides: Mapping[str, Any]) -> Any:
    """transformers' config of the model in a GGUF file. CheckpointError: it cannot make one."""
    try:
        config, unknown = AutoConfig.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True, return_unused_kwargs=True, **overrides
        )
    except ImportError as error:
        raise CheckpointError(f"{file}: reading GGUF takes the package gguf (pip install gguf): {error}") from error
    except Exception as error:  # whatever transformers makes of a stranger's file
        raise CheckpointError(
            f"{file}: transformers {transformers.__version__} cannot use it: {type(error).__name__}: {error}"
        ) from error
    unknown.pop("gguf_file", None)
    if unknown:
        raise CheckpointError(
            f"{type(config).__name__} has no setting {', '.join(sorted(unknown))} (config_overrides)."
        )
    if not getattr(config, "architectures", None):
        model = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        config.architectures = [model.__name__] if isinstance(model, type) else None
    return config


class Tower:
    """A model for transformers' naming code, without the modules inside its layers.

    transformers makes a table of all layers' names again for every module: quadratic in the layers, and minutes for
    eighty. A layer's parts have no names of their own in a GGUF file; modules that contain layers may (a file of
    BloomModel, opened as BloomForCausalLM).
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self.config = module, getattr(module, "config", None)

    def state_dict(self) -> dict[str, Tensor]:
        return self._module.state_dict()

    def named_children(self) -> list[tuple[str, Tower]]:
        return [
            (name, Tower(child))
            for name, child in self._module.named_children()
            if not isinstance(child, nn.ModuleList) and any(isinstance(m, nn.ModuleList) for m in child.modules())
        ]


def _part(name: str, files: Files, start: int, count: int) -> Tensor:
    return files.part(name, start, count)


class GGUFWeights:
    """The tensors of GGUF files, with the names and the row order of transformers' model."""

    def __init__(self, files: list[Path]) -> None:
        self._files = [GGUFFile(file) for file in files]
        self.path, self.entries = files[0], dict[str, Entry]()
        self._recipes: dict[str, Recipe] = {}
        self._less_one: set[str] = set()
        self._owner: dict[str, GGUFFile] = {}
        for file in self._files:
            for name in file.tensors:
                if self._owner.setdefault(name, file) is not file:
                    raise CheckpointError(f"{name!r} is in {self._owner[name].path.name} and in {file.path.name}.")
            for key, value in file.values.items():
                if _COUNTS.search(key) and isinstance(value, int) and value > MAX_COUNT:
                    raise CheckpointError(f"{file.path}: {key}={value}; at most {MAX_COUNT} are taken.")

    @property
    def has_tokenizer(self) -> bool:
        return "tokenizer.ggml.model" in self._files[0].values

    def name_as(self, cls: type[PreTrainedModel], config: Any) -> None:
        """Rename the tensors as in a model. Raises CheckpointError if transformers has no names for it."""
        arch = str(self._files[0].values.get("general.architecture", ""))
        processor: Any = TENSOR_PROCESSORS.get(arch, TensorProcessor)
        processor = processor(config=config.to_dict())
        kind = type(processor).__name__
        if kind not in _DONE:
            raise CheckpointError(
                f"{self.path}: GGUF of architecture {arch!r} is not supported: transformers computes with its tensors "
                f"({kind}). Convert it to safetensors there."
            )
        model = construct(cls, config, torch.float32, most=64 * len(self._owner) + 8192)
        try:
            names = get_gguf_hf_weights_map(Tower(model), processor)
        except Exception as error:  # an architecture that the package gguf does not know
            raise CheckpointError(f"{self.path}: {type(error).__name__}: {error}") from error
        joined: dict[str, dict[str, str]] = {}
        for name in self._owner:
            target = names.get(name, name)
            if name == _FACTORS:
                _log.warning("%s: %s is not used; the config's own rotary scaling is", self.path, name)
            elif target.endswith("gate_up_proj"):
                joined.setdefault(target, {})["gate" if "ffn_gate" in name else "up"] = name
            else:
                self._add(target, name, kind, config)
        for target, both in joined.items():
            self._join(target, both)

    def _add(self, target: str, name: str, kind: str, config: Any) -> None:
        spec = self._owner[name].tensors[name].spec
        recipe: Recipe = Source(name, spec.numel, spec.dtype)
        if kind == "LlamaTensorProcessor" and (part := re.search(r"\.attn_([qk])\.", name)):
            heads = config.num_attention_heads
            heads = getattr(config, "num_key_value_heads", None) or heads if part[1] == "k" else heads
            half, left = divmod(spec.shape[0], 2 * heads)
            if left:
                raise CheckpointError(f"{self.path}: {name!r} is {spec}, and has {heads} heads.")
            recipe = Turn(heads, recipe, (half, 2, spec.numel // spec.shape[0]), (1, 0, 2))
        if kind in ("NemotronTensorProcessor", "Gemma2TensorProcessor") and "norm.weight" in name:
            self._less_one.add(target)
        shape = (1, *spec.shape) if "ffn_gate_inp_shexp" in name else spec.shape
        self._enter(target, recipe, shape)

    def _join(self, target: str, both: dict[str, str]) -> None:
        """[experts, gate and up rows, in]"""
        specs = [self._owner[both[part]].tensors[both[part]].spec for part in ("gate", "up") if part in both]
        if len(specs) != 2 or specs[0] != specs[1] or len(specs[0].shape) != 3:
            raise CheckpointError(f"{self.path}: {target!r} is made of two stacks alike; there are {both} ({specs}).")
        experts, rows, width = specs[0].shape
        parts = [Source(both[part], specs[0].numel, specs[0].dtype) for part in ("gate", "up")]
        self._enter(target, Join(experts, parts), (experts, 2 * rows, width))

    def _enter(self, target: str, recipe: Recipe, shape: tuple[int, ...]) -> None:
        if target in self.entries:
            raise CheckpointError(f"{self.path}: two tensors are {target!r}.")
        self._recipes[target] = recipe
        self.entries[target] = Entry(target, recipe.dtype, shape, 0, recipe.numel * recipe.dtype.itemsize)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Elements [start, start + len(out)) of a tensor into `out`, 1-D, of its dtype."""
        self._recipes[name].fill(Reader(self._read), start, out)
        if name in self._less_one:
            out -= 1

    def _read(self, name: str, start: int, out: Tensor) -> None:
        self._owner[name].read_into(name, start, out)

    @cached_property
    def files(self) -> Files:
        """The tensors as the files name them, decoded."""
        specs = {name: owner.tensors[name].spec for name, owner in self._owner.items()}
        return Files(specs, self._read)

    @cached_property
    def weights(self) -> dict[str, Decoded]:
        """Those of the model's tensors that are quantized, with their own codes."""
        inner = {
            name: Decoded(name, spec.shape, spec.dtype, (name,), partial(_part, name), self._owner[name].kept(name))
            for name, spec in self.files.specs.items()
        }
        return {
            name: Decoded(name, self.entries[name].shape, recipe.dtype, (), partial(_part, name), kept)
            for name, recipe in self._recipes.items()
            if name not in self._less_one and (kept := made_of(recipe, inner))
        }

    def close(self) -> None:
        for file in self._files:
            file.close()
