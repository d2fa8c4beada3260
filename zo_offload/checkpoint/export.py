"""Writes a model as a transformers checkpoint, with one chunk of elements in memory at a time.

Names, splits and ties are those of transformers' own `save_pretrained` for the model, so that plain `from_pretrained`
gives the same weights bit for bit. All headers are known before a weight is read; elements are then read in the order
of their blocks, and each is written to its place in its file. Only if transformers transposes a whole tensor or
computes with it are the tensors of that conversion in memory together.

`publish.py` moves a finished export into place atomically. For a PEFT model the adapter is written, in peft's form
(`adapters.py`).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..hf import PreTrainedModel
from ..modules.away import is_away
from ..modules.parameters import streams
from ..quantized.files import Spec
from ..system.plain import user_path
from . import as_fp8, as_gguf, as_kept, tokenizers
from .adapters import USUAL, Run, is_peft, save_adapter
from .conversion import Group, names_to_save, saving_groups
from .files import INDEX, SINGLE, is_run
from .gguf import GGUFWeights
from .publish import PRODUCER, earlier_files, publish, workplace
from .recipe import Reader, Recipe
from .safetensors_io import Shard, ShardWriter, header_bound
from .small_files import Origin, write_json, write_small_files
from .weights import Placed, Weights, chunks

SCHEMES = ("fp8", as_kept.NAME, *as_gguf.SCHEMES)
"""Layouts besides safetensors in the weights' own dtypes."""
METADATA = {"format": "pt", "producer": PRODUCER}


def save_pretrained(
    directory: str | os.PathLike[str],
    *,
    model: nn.Module,
    names: Iterable[str] | None = None,
    weights: Weights | None = None,
    checkpoint: Origin | None = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
    tokenizer: Any = None,
    run: Run | None = None,
    scheme: str | None = None,
    as_read: Collection[str] = (),
) -> list[Path]:
    """Writes `model` to `directory`; returns the files, weights first.

    names, weights: canonical names of the parameters (and of any buffers) that `weights` has; each element is read
    once, in its dtype in the file. They must cover every parameter. Other buffers, and everything if both are None, are
    taken from the model. checkpoint: the model's original checkpoint; its config and small files (tokenizer, generation
    config, chat template, licence) are copied. Without it the model's own configs are written. tokenizer (anything with
    a `save_pretrained`): written in place of the checkpoint's. A model that is not a PreTrainedModel becomes plain
    safetensors of its state dict; for a PeftModel its adapters are written, as peft does. run: see
    `adapters.save_adapter`. scheme: another layout than safetensors in the weights' own dtypes, one of SCHEMES: fp8
    (`as_fp8.py`), the quantized files' own (`as_kept.py`), GGUF (`as_gguf.py`, one file whatever its size). as_read:
    names of parameters that hold exactly what the checkpoint's files hold.

    A shard holds at most max_shard_bytes of tensors, or one tensor. The config's dtype is that of most elements. Raises
    CheckpointError: target not empty (unless overwrite), disk full, a parameter without a value.
    """
    given = user_path(directory)
    target = given.resolve()
    _check_target(target, checkpoint, overwrite)
    known = None if names is None else set(names)
    check_scheme(scheme)
    if scheme == as_kept.NAME and is_peft(model):
        raise ConfigError("an adapter leaves its base as it came: without a layout the adapter alone is written")
    if scheme is not None and is_peft(model):
        raise ConfigError(f"an adapter is not exported as {scheme}; with merge=True (--merge) the merged model is")
    if scheme in as_gguf.SCHEMES:
        as_gguf.check(model)
    if scheme == as_kept.NAME:
        as_kept.check(model, checkpoint)
    entries = None if is_peft(model) else _Entries(model, known, weights)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with workplace(target) as work:
            if entries is None:
                if tokenizer is not None:
                    tokenizers.save(tokenizer, work)
                save_adapter(work, model, weights, METADATA, run)
            else:
                _write(work, model, entries, checkpoint, tokenizer, int(max_shard_bytes), target, scheme, as_read)
            return [given / file.relative_to(target) for file in publish(work, target)]
    except OSError as error:
        raise CheckpointError(
            f"could not write {target}: {error.strerror or error} "
            f"({shutil.disk_usage(target.parent).free / 1e9:.2f} GB free there). "
            "What was written is removed, and what was there is as it was; free space or choose another place."
        ) from error


def check_scheme(scheme: str | None) -> None:
    """Raise ConfigError for a layout that is not written."""
    if scheme is not None and scheme not in (known := (*USUAL, *SCHEMES)):
        raise ConfigError(f"an export as {scheme!r} is not known; {', '.join(known)} are")


def _write(
    work: Path, model: nn.Module, entries: _Entries, checkpoint: Origin | None, tokenizer: Any,
    max_shard_bytes: int, target: Path, scheme: str | None, as_read: Collection[str],
) -> None:  # fmt: skip
    """Write all files of an export into `work`: the small ones first, so that the weights' metadata can list them."""
    if scheme in as_gguf.SCHEMES:
        _write_gguf(work, model, entries, checkpoint, tokenizer, target, scheme, as_read)
        return
    groups, outputs = _outputs(model, entries)
    narrow = as_fp8.names_in_fp8(model, outputs) if scheme == "fp8" else frozenset[str]()
    settings = as_fp8.settings(model, narrow) if narrow else None
    came = as_kept.check(model, checkpoint) if scheme == as_kept.NAME else None
    write_small_files(work, model, checkpoint, None if came else _main_dtype(outputs), tokenizer, settings)
    parts: dict[str, tuple[str, ...]] = {}
    written = as_fp8.with_scales(outputs, narrow)
    if came is not None:
        recipes = {name: recipe for group in groups for name, recipe in group.recipes.items()}
        parts = as_kept.parts_of(recipes, came, lambda name: entries.canonical(name) in as_read)
        written = as_kept.with_codes(outputs, parts, came)
        assert checkpoint is not None and checkpoint.path is not None
        as_kept.restore_settings(work, checkpoint.path)
    small = sorted(file.relative_to(work).as_posix() for file in work.rglob("*") if file.is_file())
    metadata = {**METADATA, "files": json.dumps(small)}
    shards = _into_shards(written, max_shard_bytes, metadata)
    files = _shard_names(len(shards), target)
    if target.exists():
        earlier_files(target, files)  # raises for weights of others, before ours are written
    with _Files(work, shards, files, metadata) as writing:
        reader = Reader(entries.read_into)
        if came is not None:
            as_kept.write(parts, came, writing.write, writing.end)
        for name, recipe in _in_order(groups, entries):
            if name in parts:
                continue
            if name in narrow:
                as_fp8.write(name, outputs[name], recipe, reader, writing.write)
                writing.end(f"{name}{as_fp8.SCALES}")
            else:
                for start, values in chunks(partial(recipe.fill, reader), recipe.dtype, 0, recipe.numel):
                    writing.write(name, start, values)
            writing.end(name)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard.tensors}
        total = {"total_size": sum(shard.nbytes for shard in shards)}
        write_json(work / INDEX, {"metadata": total, "weight_map": dict(sorted(weight_map.items()))})


def _write_gguf(
    work: Path, model: nn.Module, entries: _Entries, checkpoint: Origin | None, tokenizer: Any, target: Path,
    scheme: str, as_read: Collection[str],
) -> None:  # fmt: skip
    """The same for one GGUF file. Its tokenizer is the given one, a copy of that in the model's own GGUF file, or made
    of the tokenizer's files."""
    dtypes = {name: Spec(meta.dtype, tuple(meta.shape)) for name, meta in entries.metas().items()}
    write_small_files(work, model, checkpoint, _main_dtype(dtypes), tokenizer, None)
    if target.exists():
        earlier_files(target, [as_gguf.NAME])
    if tokenizer is None and checkpoint is not None and checkpoint.gguf is not None:
        tokenizer = checkpoint.gguf
    elif tokenizer is None and tokenizers.has_tokenizer(work):
        trusted = checkpoint is not None and checkpoint.trust_remote_code
        tokenizer = tokenizers.load_tokenizer(work, trust_remote_code=trusted)
    config = model.config if checkpoint is None else checkpoint.config
    name = "" if checkpoint is None or checkpoint.path is None else checkpoint.path.name
    coded = None if checkpoint is None else checkpoint.coded()
    source = coded if isinstance(coded, GGUFWeights) else None
    as_gguf.write(work, model, config, entries, scheme, name=name, tokenizer=tokenizer, source=source, as_read=as_read)


class _Entries:
    """State dict entries by their names in the files, from `weights` or from the model."""

    def __init__(self, model: nn.Module, names: set[str] | None, weights: Weights | None):
        self._tensors = names_to_save(model)
        self._weights = weights
        canonical = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
        self._given: dict[str, str] = {}  # name -> canonical name, for entries read from `weights`
        if (names is None) != (weights is None):
            raise CheckpointError("save_pretrained needs both names and weights, or neither.")
        for name, tensor in self._tensors.items():
            which = canonical.get(id(tensor), name)  # quantized layers add entries of their own
            if names is not None and weights is not None and which in names:
                self._given[name] = which
                if weights.shape_of(which) != tensor.shape:
                    found, expected = list(weights.shape_of(which)), list(tensor.shape)
                    raise CheckpointError(f"{which!r} was read with shape {found}; the model has {expected}.")
            elif tensor.is_meta or (names is not None and isinstance(tensor, nn.Parameter) and _leaves(tensor)):
                where = "on meta" if tensor.is_meta else "not among the names to read"
                raise CheckpointError(f"parameter or buffer {which!r} cannot be saved: it is {where}.")

    def metas(self) -> dict[str, Tensor]:
        """Shapes and dtypes in the files."""
        return {
            name: torch.empty(tensor.shape, dtype=self._dtype(name, tensor), device="meta")
            for name, tensor in self._tensors.items()
        }

    def _dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        if name not in self._given:
            return tensor.dtype
        assert self._weights is not None
        return self._weights.dtype_of(self._given[name])

    def canonical(self, name: str) -> str:
        """The parameter's canonical name of an entry."""
        return self._given.get(name, name)

    def place_of(self, name: str, element: int) -> int:
        """The block of an element, if `weights` come in blocks."""
        placed = self._weights if name in self._given else None
        return placed.place_of(self._given[name], element) if isinstance(placed, Placed) else 0

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        if name in self._given:
            assert self._weights is not None
            self._weights.read_into(self._given[name], start, out)
        else:
            out.copy_(self._tensors[name].detach().reshape(-1)[start : start + len(out)])


def _leaves(p: nn.Parameter) -> bool:
    """Whether an engine takes this parameter out of the model."""
    return streams(p) or is_away(p)


def _outputs(model: nn.Module, entries: _Entries) -> tuple[list[Group], dict[str, Spec]]:
    """The groups and tensors to write, by their final names."""
    metas = entries.metas()
    if isinstance(model, PreTrainedModel):
        groups = saving_groups(model, metas)
    else:
        groups = [Group.plain(name, meta) for name, meta in metas.items()]
    outputs = {name: Spec(t.dtype, tuple(t.shape)) for group in groups for name, t in group.outputs.items()}
    if not outputs:
        raise CheckpointError(f"{type(model).__name__} has no parameters or buffers to save.")
    return groups, outputs


def _main_dtype(outputs: Mapping[str, Spec]) -> torch.dtype | None:
    """The dtype of most floating elements."""
    elements: Counter[torch.dtype] = Counter()
    for tensor in outputs.values():
        if tensor.dtype.is_floating_point:
            elements[tensor.dtype] += tensor.numel
    return elements.most_common(1)[0][0] if elements else None


def _in_order(groups: list[Group], entries: _Entries) -> list[tuple[str, Recipe]]:
    """All tensors to write, in the order of their blocks, and in a block of their elements. So each block is fetched
    once, even if several tensors are interleaved in it (experts) or one becomes many."""
    found = [
        (entries.place_of(*recipe.origin()), index, recipe.origin(), name, recipe)
        for index, group in enumerate(groups)
        for name, recipe in group.recipes.items()
    ]
    return [(name, recipe) for *_, name, recipe in sorted(found, key=lambda entry: entry[:3])]


def _into_shards(outputs: Mapping[str, Spec], max_bytes: int, metadata: dict[str, str]) -> list[Shard]:
    # wide elements first: otherwise a mask's bytes could misalign the next tensor, which would start another shard
    outputs = dict(sorted(outputs.items(), key=lambda entry: -entry[1].dtype.itemsize))
    shards: list[Shard] = []
    waiting = {name: tensor.shape for name, tensor in outputs.items()}
    for name, tensor in outputs.items():
        if not shards or not shards[-1].fits(tensor, max_bytes):
            shards.append(Shard(header_bound(_first_bytes(waiting, max_bytes), metadata)))
        shards[-1].add(name, tensor)
        del waiting[name]
    return shards


class _Files:
    """The shards' files while they are written; each is open from its first element to its last."""

    def __init__(self, work: Path, shards: list[Shard], names: list[str], metadata: dict[str, str]) -> None:
        self._paths, self._shards, self._metadata = [work / name for name in names], shards, metadata
        self._shard_of = {name: index for index, shard in enumerate(shards) for name in shard.tensors}
        self._lacking = [len(shard.tensors) for shard in shards]
        self._open: dict[int, ShardWriter] = {}

    def write(self, name: str, start: int, values: Tensor) -> None:
        self._file(self._shard_of[name]).write(name, start, values)

    def end(self, name: str) -> None:
        """The tensor's last element was written."""
        index = self._shard_of[name]
        self._lacking[index] -= 1
        if not self._lacking[index]:
            self._file(index).finish()
            del self._open[index]

    def _file(self, index: int) -> ShardWriter:
        if index not in self._open:
            self._open[index] = ShardWriter(self._paths[index], self._shards[index], self._metadata)
        return self._open[index]

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._open.values():
            file.abandon()


def _first_bytes(shapes: dict[str, tuple[int, ...]], max_bytes: int) -> dict[str, tuple[int, ...]]:
    """The first tensors that one shard could hold if all had one byte per element."""
    taken: dict[str, tuple[int, ...]] = {}
    total = 0
    for name, shape in shapes.items():
        if total > 0 and total + math.prod(shape) > max_bytes:
            break
        total += math.prod(shape)
        taken[name] = shape
    return taken


def _shard_names(count: int, target: Path) -> list[str]:
    """File names of the weights. Shards get new names in `target`: a reader of the old export must not mix them."""
    if count == 1:
        return [SINGLE]
    taken = {file.name for file in target.glob("model-*.safetensors")} if target.exists() else set()
    for version in itertools.count(1):
        stem = SINGLE.removesuffix(".safetensors") + (f"-v{version}" if version > 1 else "")
        names = [f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
        if not taken.intersection(names):
            return names
    raise AssertionError


def _check_target(target: Path, checkpoint: Origin | None, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; give a directory to write to.")
    if is_run(target) or (target.name == "blocks" and is_run(target.parent)):
        raise CheckpointError(f"{target} is a run's directory, which an export would destroy. Give another directory.")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        some = ", ".join(sorted(p.name for p in target.iterdir())[:4])
        raise CheckpointError(f"{target} is not empty (it holds {some}). Give a fresh directory, or overwrite=True.")
    if checkpoint is not None and checkpoint.path is not None and target.samefile(checkpoint.path):
        raise CheckpointError(f"{target} is the checkpoint this model is read from. Give another directory.")
