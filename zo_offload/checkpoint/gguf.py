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
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..hf import AutoConfig, PreTrainedModel, modeling_auto, transformers
from ..quantized.base import Decoded
from ..quantized.files import Files
from ..quantized.gguf_blocks import BLOCKS
from ..quantized.gguf_file import GGUFFile
from .architecture import MAX_COUNT, find_class, read_config
from .dequantized import without_settings
from .files import CONFIG, carried_files, has_weights
from .gguf_names import Naming
from .kept import made_of
from .meta_model import construct
from .recipe import Join, Reader, Recipe, Source, Turn
from .safetensors_io import Entry

_log = logging.getLogger(__name__)

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_COUNTS = re.compile(r"block_count|expert_count|head_count|layer")
_IN_FORWARD: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",), "rope.scaling.factor": (0.0, 1.0), "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,), "final_logit_softcapping": (0.0,), "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0), "residual_scale": (0.0, 1.0), "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,), "attention.causal": (True,),
}  # fmt: skip
"""Settings by which llama.cpp computes otherwise, and the values with which it does not."""
FACTORS = "rope_freqs.weight"  # of rotary positions, computed from the config by the model


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
        config = read_gguf_config(files[0], overrides or {})
        if unused := tensors.unused_settings(config):
            _log.warning(
                "%s: its forward is not that of llama.cpp: transformers does not read %s. For a config with them, put "
                "the model's config.json next to the file",
                files[0], ", ".join(unused),
            )  # fmt: skip
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


def read_gguf_config(file: Path, overrides: Mapping[str, Any] = MappingProxyType({})) -> Any:
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

    def unused_settings(self, config: Any) -> list[str]:
        """Settings of the header that change a forward, and that transformers' config lacks."""
        values = self._files[0].values
        found = []
        for name, neutral in _IN_FORWARD.items():
            value = values.get(f"{self.arch}.{name}")
            known = getattr(config, name.rpartition(".")[2], None)
            if value is not None and value not in neutral and value != known:
                found.append(f"{self.arch}.{name}={value!r:.40}")
        return found

    def name_as(self, cls: type[PreTrainedModel], config: Any) -> None:
        """Rename the tensors as in a model. Raises CheckpointError if transformers has no names for it."""
        model = construct(cls, config, torch.float32, most=64 * len(self._owner) + 8192)
        naming = Naming.of(model, self.arch, config, self.path)
        joined: dict[str, dict[str, str]] = {}
        for name in self._owner:
            if name == FACTORS:
                _log.warning("%s: %s is not used; the config's own rotary scaling is", self.path, name)
            elif part := naming.part(name):
                joined.setdefault(naming.names[name], {})[part] = name
            else:
                self._add(naming.names.get(name, name), name, naming, config)
        for target, both in joined.items():
            self._join(target, both)

    @property
    def arch(self) -> str:
        return str(self._files[0].values.get("general.architecture", ""))

    def _add(self, target: str, name: str, naming: Naming, config: Any) -> None:
        spec = self._owner[name].tensors[name].spec
        recipe: Recipe = Source(name, spec.numel, spec.dtype)
        if heads := naming.heads(name, config):
            half, left = divmod(spec.shape[0], 2 * heads)
            if left:
                raise CheckpointError(f"{self.path}: {name!r} is {spec}, and has {heads} heads.")
            recipe = Turn(heads, recipe, (half, 2, spec.numel // spec.shape[0]), (1, 0, 2))
        if naming.is_plus_one(name):
            self._less_one.add(target)
        self._enter(target, recipe, (1, *spec.shape) if naming.is_one_row(name) else spec.shape)

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

    def number_of(self, name: str) -> int | None:
        """The type, as files number them, of a quantized tensor by its name in the files; None: it is none of those."""
        kind = self._owner[name].tensors[name].kind if name in self._owner else None
        return None if kind is None else next(number for number, known in BLOCKS.items() if known is kind)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor by its name in the files."""
        return self._owner[name].tensors[name].spec.shape

    def bytes_of(self, name: str, start: int, count: int) -> Tensor:
        """Bytes [start, start + count) of a tensor as the files have them, by its name there."""
        out = torch.empty(count, dtype=torch.uint8, device="cpu")
        self._owner[name].bytes_into(name, start, out)
        return out

    def close(self) -> None:
        for file in self._files:
            file.close()
