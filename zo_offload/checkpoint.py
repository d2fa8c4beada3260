"""A transformers checkpoint, opened without loading it.

`Checkpoint.build_model` gives the model with its parameters on meta and everything else real (buffers, ties, config);
`Checkpoint.load` then gives one parameter at a time: bit for bit what `from_pretrained` would have put there, in the
dtype of the file. Names are canonical: the first name of a parameter in `model.named_parameters()`; persistent buffers
go by their name in `named_buffers()`. At most one group of tensors that transformers converts together is in memory.

Parameters the files lack (a fresh classification head) are made by the model's own `_init_weights`, in fp32 and then
rounded to the checkpoint's dtype, with a generator seeded per module by (seed, module path): the same values whatever
else is missing and whatever dtype the model is built in.

The digest of a checkpoint is independent of sharding, of the order of reading and of the names in the files:
    per tensor   blake2b-8 of "<canonical name> <dtype> <shape> <crc32 of its bytes>"
    together     blake2b-8 of the lines "<name> <digest of the tensor>" in order of names
Every `load` notes the crc of what it returned, so after an ingestion `digest()` reads nothing again.
"""

from __future__ import annotations

import copy
import hashlib
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from .checkpoint_files import carried_files, find_weights, resolve_path
from .conversion import Group, loading_groups
from .errors import CheckpointError
from .export import save_pretrained
from .meta_model import construct, keep_in_fp32, make_real
from .safetensors_io import SafetensorsFile, as_bytes

__all__ = ["Checkpoint", "save_pretrained", "tensor_digest"]


@dataclass
class _Layout:
    """Where the entries of one built model come from."""

    model: PreTrainedModel  # conversions may look up shapes in it; its tensors' data is not used
    canonical: dict[str, str]  # every name in the state dict -> canonical name
    metas: dict[str, Tensor]  # canonical name -> meta tensor as `load` returns it
    groups: dict[str, tuple[Group, str]]  # canonical name -> its group and its name there
    fresh: dict[str, Tensor] = field(default_factory=dict)  # initialised, not in the files
    parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


class Checkpoint:
    """See the module. `load` may be called from several threads; building is for one."""

    def __init__(self, config: Any, path: Path | None, files: list[SafetensorsFile], carried: list[Path]):
        """Use `open`."""
        self.config = config  # as read; never modified
        self.path = path
        self.carried = carried  # tokenizer, generation config, chat template, ...: to go along with an export
        self._file_of = {name: file for file in files for name in file.entries}
        self._layout: _Layout | None = None
        self._crcs: dict[str, int] = {}
        self._leftover: dict[str, Tensor] = {}  # outputs of the last converted group nobody has asked for yet

    @classmethod
    def open(cls, path: str | Path | Any, *, weights: bool = True) -> Checkpoint:
        """Opens a directory, a hub id ("org/name") or a transformers config object; reads headers only.

        weights=False, or a config object: no weights are looked for; such a checkpoint can be built and planned with,
        not loaded from. A hub id goes through `huggingface_hub.snapshot_download` with its default settings (cache,
        HF_HUB_OFFLINE); a directory is never looked up anywhere else. Code that comes with a checkpoint is not run.
        Raises CheckpointError.
        """
        if isinstance(path, transformers.PretrainedConfig):
            return cls(copy.deepcopy(path), None, [], [])
        directory = resolve_path(path, weights=weights)
        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{directory / 'config.json'}: transformers {transformers.__version__} cannot use it: {error}"
            ) from error
        quantization = getattr(config, "quantization_config", None)
        if quantization is not None and weights:
            how = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise CheckpointError(
                f"{directory}: its weights are quantized ({how}), which is not supported. Load it in transformers "
                "with a quantization config that dequantizes, save_pretrained it, and use that directory."
            )
        files = [SafetensorsFile(file) for file in find_weights(directory)] if weights else []
        return cls(config, directory, files, carried_files(directory))

    @property
    def has_weights(self) -> bool:
        return bool(self._file_of)

    @property
    def dtype(self) -> torch.dtype:
        """What `from_pretrained(dtype="auto")` would use: the config's dtype, else that of the first float tensor."""
        configured = getattr(self.config, "dtype", None)
        if configured is not None:
            found: torch.dtype = getattr(torch, configured) if isinstance(configured, str) else configured
            return found
        entries = (file.entries[name] for name, file in self._file_of.items())
        return next((e.dtype for e in entries if e.dtype.is_floating_point), torch.float32)

    def build_model(
        self,
        dtype: torch.dtype | str = "auto",
        model_class: type[PreTrainedModel] | str | None = None,
        *,
        seed: int = 0,
    ) -> PreTrainedModel:
        """The model with its parameters on meta, buffers real, ties made, in eval mode, its config's use_cache off.

        dtype: of the parameters ("auto": `self.dtype`); some models keep a few in fp32, as in `from_pretrained`.
        model_class: a class, the name of one, or of an auto class ("AutoModelForCausalLM"); default: the first of
        config.architectures. seed: for parameters the files lack; `missing` names them. What `load`, `missing` and
        the rest say is about the model built last. Raises CheckpointError: unknown class, shapes that do not match,
        nothing in the files that fits the class.
        """
        cls = self._model_class(model_class)
        parameter_dtype = self.dtype if dtype == "auto" else dtype
        if not isinstance(parameter_dtype, torch.dtype):
            raise CheckpointError(f"dtype={dtype!r}: expected 'auto' or a torch.dtype such as torch.bfloat16")
        model = construct(cls, self.config, parameter_dtype)
        groups, unexpected, used = loading_groups(model, self._file_metas())
        sources = {name: group for group in groups for name in group.outputs}
        self._check_shapes(model, sources)
        if self.has_weights:
            # transformers' own save_pretrained, and ours, undo these
            model._weight_conversions = used  # type: ignore[assignment]
            keep_in_fp32(model, parameter_dtype, sources)
        layout = self._layout = self._lay_out(model, sources, unexpected)
        self._crcs, self._leftover = {}, {}
        absent = [name for name in layout.metas if name not in layout.groups] if self.has_weights else []
        loaded = {name: self.load(name) for name in layout.buffers if name in layout.groups}
        fresh = make_real(model, loaded, [name for name in absent if name in layout.parameters], seed)
        layout.fresh = {name: value.to(layout.metas[name].dtype) for name, value in fresh.items()}
        layout.fresh.update((name, model.get_buffer(name)) for name in absent if name in layout.buffers)
        self._set_generation_config(model)
        model.train(False)
        return model

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of all parameters, in the order of `named_parameters`."""
        return self._built().parameters

    @property
    def buffer_names(self) -> tuple[str, ...]:
        """Names of the persistent buffers; `build_model` has already filled these in."""
        return self._built().buffers

    @property
    def missing(self) -> tuple[str, ...]:
        """Names the files lack, initialised afresh (less those that transformers knows to be harmless)."""
        return self._built().missing

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Names in the files that the model has no use for (less those that transformers knows to be harmless)."""
        return self._built().unexpected

    def shape_of(self, name: str) -> torch.Size:
        return self._meta(name).shape

    def dtype_of(self, name: str) -> torch.dtype:
        return self._meta(name).dtype

    def numel(self, name: str) -> int:
        return self._meta(name).numel()

    def bytes_of(self, name: str) -> int:
        return self._meta(name).nbytes

    def load(self, name: str) -> Tensor:
        """One parameter or persistent buffer, contiguous, in memory of its own, in the dtype of the file."""
        if not self.has_weights:
            raise CheckpointError(
                f"{name!r} was asked of a checkpoint opened without weights: {self.path or 'a config'}"
            )
        layout = self._built()
        name = layout.canonical.get(name, name)
        meta = self._meta(name)
        fresh = layout.fresh.get(name)
        tensor = self._load_from_group(layout, name) if fresh is None else fresh.clone()
        tensor = tensor.contiguous()
        assert (tensor.shape, tensor.dtype) == (meta.shape, meta.dtype), (name, tensor.shape, meta.shape)
        if name not in self._crcs:
            self._crcs[name] = _crc(tensor)
        return tensor

    def digest(self) -> str:
        """16 hex digits over names, dtypes, shapes and contents; reads only what `load` has not read before."""
        layout = self._built()
        lines = []
        for name in sorted((*layout.parameters, *layout.buffers)):
            if name not in self._crcs:
                self.load(name)
            meta = layout.metas[name]
            lines.append(f"{name} {_entry_digest(name, meta.dtype, meta.shape, self._crcs[name])}\n")
        return hashlib.blake2b("".join(lines).encode(), digest_size=8).hexdigest()

    def close(self) -> None:
        for file in set(self._file_of.values()):
            file.close()

    def _built(self) -> _Layout:
        if self._layout is None:
            self.build_model()
        assert self._layout is not None
        return self._layout

    def _meta(self, name: str) -> Tensor:
        layout = self._built()
        meta = layout.metas.get(layout.canonical.get(name, name))
        if meta is None:
            raise CheckpointError(f"{type(layout.model).__name__} has no parameter or persistent buffer {name!r}.")
        return meta

    def _file_metas(self) -> dict[str, Tensor]:
        entries = (file.entries[name] for name, file in self._file_of.items())
        return {e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for e in entries}

    def _read(self, source: str) -> Tensor:
        return self._file_of[source].read(source)

    def _load_from_group(self, layout: _Layout, name: str) -> Tensor:
        group, output = layout.groups[name]
        if len(group.outputs) == 1:
            return group.run(self._read, layout.model)[output]
        # a fused tensor is read once for all its parts, if they are asked for in turn; dict.pop is atomic
        tensor = self._leftover.pop(output, None)
        if tensor is None:
            made = group.run(self._read, layout.model)
            tensor = made.pop(output)
            self._leftover = made
        return tensor

    def _model_class(self, given: type[PreTrainedModel] | str | None) -> type[PreTrainedModel]:
        if isinstance(given, type):
            if not issubclass(given, PreTrainedModel):
                raise CheckpointError(f"model_class={given.__name__} is not a transformers model class.")
            return given
        architectures = getattr(self.config, "architectures", None) or []
        name = given or (architectures[0] if architectures else None)
        if name is None:
            raise CheckpointError(
                f"config.json names no architectures (model_type {self.config.model_type!r}): pass model_class, for "
                "example 'AutoModelForCausalLM'."
            )
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
        mapping = getattr(found, "_model_mapping", None)
        if mapping is None:
            raise CheckpointError(
                f"transformers {transformers.__version__} has no model class {name!r}; code inside checkpoints is "
                "not run. Pass model_class, for example 'AutoModelForCausalLM'."
            )
        if type(self.config) not in mapping:
            raise CheckpointError(f"{name} has no model of type {self.config.model_type!r}; pass another model_class.")
        choice = mapping[type(self.config)]
        choices: list[type[PreTrainedModel]] = list(choice) if isinstance(choice, (list, tuple)) else [choice]
        return next((c for c in choices if c.__name__ in architectures), choices[0])

    def _check_shapes(self, model: PreTrainedModel, sources: dict[str, Group]) -> None:
        entries = model.state_dict()
        if self.has_weights and not any(name in entries for name in sources):
            some = ", ".join(sorted(self._file_of)[:3])
            raise CheckpointError(
                f"{self.path}: none of its {len(self._file_of)} tensors ({some}, ...) fits {type(model).__name__}; "
                "the config and the weights are of different models, or model_class is wrong."
            )
        for name, group in sources.items():
            if name in entries and group.outputs[name].shape != entries[name].shape:
                raise CheckpointError(
                    f"{self.path}: {name!r} is {list(group.outputs[name].shape)} in the files and "
                    f"{list(entries[name].shape)} in {type(model).__name__} built from config.json. Correct the config "
                    "(vocab_size, num_labels, ...)."
                )

    def _lay_out(self, model: PreTrainedModel, sources: dict[str, Group], unexpected: set[str]) -> _Layout:
        """Ties the model and says where each of its entries comes from."""
        absent = {name for name in model.state_dict() if name not in sources}
        if self.has_weights:
            self._untie_what_differs(model, sources, absent)
        model.tie_weights(missing_keys=set(absent) if self.has_weights else None, recompute_mapping=False)
        names_of: dict[int, list[str]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor):
                names_of.setdefault(id(tensor), []).append(name)
        report = SimpleNamespace(missing_keys=set(), unexpected_keys=set(unexpected))
        layout = _Layout(model, {}, {}, {})
        parameters = {id(p): name for name, p in model.named_parameters()}
        buffers = {id(b): name for name, b in model.named_buffers()}
        for key, names in names_of.items():
            canonical = parameters.get(key) or buffers[key]
            layout.canonical.update(dict.fromkeys(names, canonical))
            output = next((name for name in names if name in sources and name not in absent), None)
            if output is not None:
                group = sources[output]
                layout.groups[canonical] = (group, output)
                layout.metas[canonical] = group.outputs[output]
            else:
                report.missing_keys.add(canonical)
                tensor = model.get_parameter_or_buffer(canonical)
                dtype = self.dtype if canonical == parameters.get(key) else tensor.dtype
                layout.metas[canonical] = torch.empty(tensor.shape, dtype=dtype, device="meta")
        layout.parameters = tuple(name for name in parameters.values() if name in layout.metas)
        layout.buffers = tuple(name for name in buffers.values() if name in layout.metas)
        model._adjust_missing_and_unexpected_keys(report)  # type: ignore[arg-type]
        layout.missing = tuple(sorted(report.missing_keys)) if self.has_weights else ()
        layout.unexpected = tuple(sorted(report.unexpected_keys))
        return layout

    def _untie_what_differs(self, model: PreTrainedModel, sources: dict[str, Group], absent: set[str]) -> None:
        """A declared tie whose two sides are both in the files holds only if they are equal, as in from_pretrained."""
        for target, source in list(model.all_tied_weights_keys.items()):
            if target not in sources or source not in sources:
                continue
            one, other = (sources[name].run(self._read, model)[name] for name in (target, source))
            if one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other):
                absent.add(target)
            else:
                del model.all_tied_weights_keys[target]

    def _set_generation_config(self, model: PreTrainedModel) -> None:
        if self.path is not None and model.can_generate() and (self.path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.path, local_files_only=True)


def tensor_digest(name: str, tensor: Tensor) -> str:
    """The digest of one tensor as it enters `Checkpoint.digest` (16 hex digits)."""
    return _entry_digest(name, tensor.dtype, tensor.shape, _crc(tensor))


def _crc(tensor: Tensor) -> int:
    crc = 0
    for piece in as_bytes(tensor):
        crc = zlib.crc32(piece, crc)
    return crc


def _entry_digest(name: str, dtype: torch.dtype, shape: torch.Size, crc: int) -> str:
    line = f"{name} {str(dtype).removeprefix('torch.')} {list(shape)} {crc:08x}"
    return hashlib.blake2b(line.encode(), digest_size=8).hexdigest()
