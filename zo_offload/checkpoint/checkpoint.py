"""A transformers checkpoint, opened without loading it.

`Checkpoint.build_model` gives the model with its parameters on meta and everything else real (buffers, ties, config);
`Checkpoint.read_into` then reads any range of a parameter's elements: bit-equal to `from_pretrained`'s, in the dtype of
the file. Names are canonical: the first name of a parameter in `model.named_parameters()`; persistent buffers have
their name in `named_buffers()`. Memory: the requested elements, and a few MB. Only if transformers transposes a whole
tensor, or computes with it, are the tensors of that conversion in memory together, until their last element was read;
and parameters that the files lack stay in memory.

Parameters the files lack (a fresh classification head) are made by the model's own `_init_weights`, in fp32 and then
rounded to the checkpoint's dtype, with a generator seeded per module by (seed, module path): the same values whatever
else is missing and whatever dtype the model is built in.

The files must hold the whole model and nothing that it would ignore (`completeness.py`): otherwise CheckpointError is
raised before a weight is read. New or unused tensors that are allowed are in `notes`, and logged.

The digest of a checkpoint (`weights.py`) is independent of sharding, of the order of reading and of the names in the
files. Every read records the crc of its elements, so after an ingestion `digest()` reads nothing again.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..hf import PreTrainedModel, transformers
from ..quantized.base import Settings
from . import completeness
from .architecture import find_class, read_config, read_generation_config, sibling_classes
from .conversion import Group, loading_groups
from .dequantized import TensorFile, dequantized, take_settings
from .export import save_pretrained
from .files import carried_files, find_weights, resolve_path
from .gguf import find_gguf, open_gguf
from .kept import KeepsCodes
from .meta_model import MAX_REGISTRATIONS, construct, keep_in_fp32, make_real
from .pickled_io import open_weights
from .recipe import Reader, Recipe, as_floats
from .safetensors_io import SafetensorsFile, files_by_tensor
from .weights import Crcs, chunks, entry_digest, tensor_digest, together

__all__ = ["Checkpoint", "save_pretrained", "tensor_digest"]

_log = logging.getLogger(__name__)


@dataclass
class _Layout:
    """The sources of the entries of one built model."""

    model: PreTrainedModel  # conversions may look up shapes in it; its tensors' data is not used
    canonical: dict[str, str]  # every name in the state dict -> canonical name
    metas: dict[str, Tensor]  # canonical name -> meta tensor as `load` returns it
    recipes: dict[str, Recipe]  # canonical name -> how it comes from the files
    fresh: dict[str, Tensor] = field(default_factory=dict)  # initialised, not in the files
    parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    differences: completeness.Differences = field(default_factory=completeness.Differences)


class Checkpoint(KeepsCodes):
    """See the module. Reading may be done from several threads; building is for one."""

    def __init__(
        self, config: Any, path: Path | None, files: list[SafetensorsFile], carried: list[Path],
        trust_remote_code: bool = False, gguf: Path | None = None, settings: Settings = MappingProxyType({}),
    ) -> None:  # fmt: skip
        """Use `open`."""
        self.config = config  # as read; never changed
        self.path = path
        self.trust_remote_code = trust_remote_code
        self.carried = carried  # tokenizer, generation config, chat template, ...: copied into exports
        self._file_of: dict[str, TensorFile] = dict(files_by_tensor(files))
        self.gguf = gguf  # the file with the tokenizer, for a GGUF model that has one
        self.settings = settings  # the quantization settings of its files
        self._layout: _Layout | None = None
        self._crcs = Crcs()
        self._reader = Reader(self._read_into)

    @classmethod
    def open(
        cls,
        path: str | Path | Any,
        *,
        weights: bool = True,
        trust_remote_code: bool = False,
        overrides: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """Opens a directory, a GGUF file, a hub id ("org/name") or a transformers config object; reads headers only.

        weights=False, or a config object: weights are not searched for; such a checkpoint can be built and planned, but
        not loaded. A hub id goes through `huggingface_hub.snapshot_download` with its default settings (cache,
        HF_HUB_OFFLINE); a directory is never looked up on the hub. trust_remote_code: the checkpoint's own code may
        run, and its classes are then built. overrides: settings of config.json to replace (num_labels,
        attn_implementation, ...). Raises CheckpointError.
        """
        if isinstance(path, transformers.PretrainedConfig):
            config = copy.deepcopy(path)
            return cls(config, None, [], [], settings=take_settings(config, None))
        if gguf := find_gguf(path):
            read = open_gguf(gguf, trust_remote_code=trust_remote_code, overrides=overrides)
            checkpoint = cls(read.config, gguf[0].parent, [], read.carried, trust_remote_code, read.tokenizer)
            return checkpoint._holding(dict.fromkeys(read.tensors.entries, read.tensors) if weights else {})
        directory = resolve_path(path, weights=weights, code=trust_remote_code)
        config = read_config(directory, trust_remote_code=trust_remote_code, overrides=overrides)
        settings = take_settings(config, directory)
        files = [open_weights(file) for file in find_weights(directory)] if weights else []
        carried = carried_files(directory, code=trust_remote_code)
        checkpoint = cls(config, directory, files, carried, trust_remote_code, settings=settings)
        return checkpoint._holding(dequantized(checkpoint._file_of, settings, checkpoint.dtype, directory))

    def _holding(self, file_of: dict[str, TensorFile]) -> Checkpoint:
        self._file_of = file_of
        return self

    @property
    def has_weights(self) -> bool:
        return bool(self._file_of)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `from_pretrained(dtype="auto")`: the config's dtype, else that of the first float tensor."""
        configured = getattr(self.config, "dtype", None)
        if configured is not None:
            found = getattr(torch, configured, None) if isinstance(configured, str) else configured
            if not isinstance(found, torch.dtype):
                raise CheckpointError(f"{self.path}: config.json has dtype {configured!r}, which torch does not have.")
            return torch.float32 if found is torch.float64 else found
        entries = (file.entries[name] for name, file in self._file_of.items())
        return next((e.dtype for e in entries if e.dtype.is_floating_point and 1 < e.dtype.itemsize < 8), torch.float32)

    def build_model(
        self,
        dtype: torch.dtype | str = "auto",
        model_class: type[PreTrainedModel] | str | None = None,
        *,
        seed: int = 0,
    ) -> PreTrainedModel:
        """The model with its parameters on meta, buffers real, ties made, in eval mode, its config's use_cache off.

        dtype: the parameters' ("auto": `self.dtype`); some models keep a few in fp32, as in `from_pretrained`.
        model_class: a class, its name, or that of an auto class ("AutoModelForCausalLM"); default: the first of
        config.architectures. seed: for the parameters of a new head; `missing` names them. `load`, `missing` and the
        other methods refer to the model built last. Raises CheckpointError: unknown class, shapes that do not match,
        tensors that the files lack or that have no place in the model.
        """
        cls = find_class(self.config, model_class, self.path, trust_remote_code=self.trust_remote_code)
        parameter_dtype = self.dtype if dtype == "auto" else dtype
        if not isinstance(parameter_dtype, torch.dtype):
            raise CheckpointError(f"dtype={dtype!r}: expected 'auto' or a torch.dtype such as torch.bfloat16")
        model = self._construct(cls, parameter_dtype)
        groups, unexpected, used = loading_groups(model, self._file_metas())
        completeness.check_quantized(unexpected, self.path, str(self.settings.get("quant_method") or ""))
        sources = {name: group for group in groups for name in group.outputs}
        self._check_shapes(model, sources)
        if self.has_weights:
            # transformers' own save_pretrained, and ours, undo these
            model._weight_conversions = used  # type: ignore[assignment]
            keep_in_fp32(model, parameter_dtype, sources)
        layout = self._layout = self._lay_out(model, sources, unexpected)
        self._check_whole(model, layout)
        self._crcs, self._reader = Crcs(), Reader(self._read_into)
        absent = [name for name in layout.metas if name not in layout.recipes] if self.has_weights else []
        loaded = {name: self.load(name) for name in layout.buffers if name in layout.recipes}
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
        """Names of a new head's tensors: the files lack them, and they are initialised."""
        return self._built().differences.new

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Names in the files that the model does not use (without those that transformers knows to be harmless)."""
        return self._built().differences.unused

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user: a new head, unused tensors."""
        return completeness.notes(self._built().differences)

    def shape_of(self, name: str) -> torch.Size:
        return self._meta(name).shape

    def dtype_of(self, name: str) -> torch.dtype:
        return self._meta(name).dtype

    def numel(self, name: str) -> int:
        return self._meta(name).numel()

    def bytes_of(self, name: str) -> int:
        return self._meta(name).nbytes

    def load(self, name: str) -> Tensor:
        """A parameter or persistent buffer, contiguous, in its own memory, in the dtype of the file."""
        meta = self._meta(name)
        out = torch.empty(meta.shape, dtype=meta.dtype, device="cpu")
        self.read_into(name, 0, out.view(-1))
        return out

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Read elements [start, start + len(out)) of a tensor into `out`: 1-D, contiguous, in the file's dtype."""
        name, meta = self._built().canonical.get(name, name), self._meta(name)
        self._fill(name, start, out)
        self._crcs.add(name, start * meta.dtype.itemsize, out, meta.nbytes)

    def peek(self, name: str, start: int, out: Tensor) -> None:
        """`read_into` of elements that will be read again: they do not count for the digest."""
        self._fill(self._built().canonical.get(name, name), start, out)

    def _fill(self, name: str, start: int, out: Tensor) -> None:
        if not self.has_weights:
            raise CheckpointError(
                f"{name!r} was asked of a checkpoint opened without weights: {self.path or 'a config'}"
            )
        layout, meta = self._built(), self._meta(name)
        assert out.dtype == meta.dtype and start + len(out) <= meta.numel(), (name, start, len(out), out.dtype)
        fresh = layout.fresh.get(name)
        if fresh is None:
            layout.recipes[name].fill(self._reader, start, out)
        else:
            out.copy_(fresh.reshape(-1)[start : start + len(out)])

    def _recipe_of(self, name: str) -> Recipe | None:
        return self._built().recipes.get(self._built().canonical.get(name, name))

    def digest_of(self, name: str) -> str:
        """16 hex digits over a tensor's name, dtype, shape and content; reads it unless all of it was read before."""
        meta = self._meta(name)

        def read() -> Iterator[Tensor]:
            fill = partial(self._fill, name)
            return (values for _, values in chunks(fill, meta.dtype, 0, meta.numel()))

        return entry_digest(name, meta.dtype, meta.shape, self._crcs.of(name, read))

    def digest(self) -> str:
        """16 hex digits over all names, dtypes, shapes and contents; reads only elements that were not read before."""
        layout = self._built()
        return together({name: self.digest_of(name) for name in (*layout.parameters, *layout.buffers)})

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

    def _read_into(self, source: str, start: int, out: Tensor) -> None:
        self._file_of[source].read_into(source, start, out)

    def _construct(self, cls: type[PreTrainedModel], dtype: torch.dtype) -> PreTrainedModel:
        """Build the model on meta, no larger than the files can hold, whatever numbers config.json has."""
        most = 64 * len(self._file_of) + 8192 if self.has_weights else MAX_REGISTRATIONS
        return construct(cls, self.config, dtype, most=most)

    def _check_whole(self, model: PreTrainedModel, layout: _Layout) -> None:
        found = layout.differences
        if self.has_weights:
            shapes = {**self._file_metas(), **model.state_dict(), **layout.metas}
            completeness.check(found, model, self.path, shapes, len(self._file_of))
        for note in completeness.notes(found):
            _log.log(logging.WARNING if found.new else logging.INFO, "%s: %s", self.path, note)

    def _siblings(self, model: PreTrainedModel) -> tuple[PreTrainedModel | None, list[PreTrainedModel]]:
        """Models of other classes for this config, on meta, to compare names with."""

        def build(cls: type[PreTrainedModel]) -> PreTrainedModel | None:
            try:
                return model if cls is type(model) else self._construct(cls, torch.float32)
            except CheckpointError:
                return None  # a class that cannot be built from this config knows nothing of its names

        try:
            own = find_class(self.config, None, self.path, trust_remote_code=self.trust_remote_code)
            declared = build(own)
        except CheckpointError:
            declared = None
        others = [build(cls) for cls in sibling_classes(self.config)]
        return declared, [other for other in others if other is not None]

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
        """Tie the model and find the source of each of its entries."""
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
                found = sources[output].recipes[output], sources[output].outputs[output]
                if canonical == parameters.get(key):
                    found = as_floats(*found, model.get_parameter(canonical).dtype, f"{self.path}: {canonical!r}")
                layout.recipes[canonical], layout.metas[canonical] = found
            else:
                report.missing_keys.add(canonical)
                tensor = model.get_parameter_or_buffer(canonical)
                dtype = self.dtype if canonical == parameters.get(key) else tensor.dtype
                layout.metas[canonical] = torch.empty(tensor.shape, dtype=dtype, device="meta")
        layout.parameters = tuple(name for name in parameters.values() if name in layout.metas)
        layout.buffers = tuple(name for name in buffers.values() if name in layout.metas)
        model._adjust_missing_and_unexpected_keys(report)  # type: ignore[arg-type]
        if self.has_weights:
            layout.differences = completeness.differences(
                model,
                report.missing_keys,
                report.unexpected_keys,
                lambda: self._siblings(model),
                self._file_metas(),
            )
        return layout

    def _untie_what_differs(self, model: PreTrainedModel, sources: dict[str, Group], absent: set[str]) -> None:
        """A declared tie whose two sides are both in the files holds only if they are equal, as in from_pretrained."""
        for target, source in list(model.all_tied_weights_keys.items()):
            if target not in sources or source not in sources:
                continue
            one, other = (sources[name].outputs[name] for name in (target, source))
            if (
                one.shape == other.shape
                and one.dtype == other.dtype
                and self._are_equal(sources[target].recipes[target], sources[source].recipes[source])
            ):
                absent.add(target)
            else:
                del model.all_tied_weights_keys[target]

    def _are_equal(self, one: Recipe, other: Recipe) -> bool:
        """Whether two tensors of the files have the same elements; reads no further than they do."""
        both = [chunks(partial(r.fill, Reader(self._read_into)), r.dtype, 0, r.numel) for r in (one, other)]
        return all(torch.equal(a, b) for (_, a), (_, b) in zip(*both, strict=True))

    def _set_generation_config(self, model: PreTrainedModel) -> None:
        if self.path is not None and model.can_generate() and (self.path / "generation_config.json").is_file():
            model.generation_config = read_generation_config(self.path)
