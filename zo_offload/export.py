"""Writes a model as a transformers checkpoint, one group of tensors in memory at a time.

Names, splits and ties are those that transformers' own `save_pretrained` writes for the model, so that plain
`from_pretrained` gives the same weights bit for bit. Everything is written into a fresh directory beside the target and
then renamed: the target is complete or absent. With overwrite=True the files are moved into an existing directory one
by one, weights first and the index last; what was there under other names stays, save for weight files that an earlier
export of ours left and that would shadow or outlive the new ones.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .checkpoint_files import CONFIG, INDEX, SINGLE
from .conversion import Group, names_to_save, saving_groups
from .errors import CheckpointError
from .safetensors_io import ShardWriter, header_bound, read_header

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

METADATA = {"format": "pt", "producer": "zo_offload"}


def save_pretrained(
    directory: str | os.PathLike[str],
    *,
    model: nn.Module,
    names: Iterable[str] | None = None,
    read: Callable[[str], Tensor] | None = None,
    checkpoint: Checkpoint | None = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
    tokenizer: Any = None,
) -> list[Path]:
    """Writes `model` to `directory`; returns the files, weights first.

    names, read: canonical names of the parameters (and of any buffers) that `read` gives; each is read once, in the
    dtype it is to have in the file, on any device. They must cover every parameter. Buffers not among them, and
    everything if both are None, are taken from the model. checkpoint: where the model came from; its config and small
    files (tokenizer, generation config, chat template, licence) go along. Without it the model's own configs and
    `tokenizer` (anything with a `save_pretrained`) do. A model that is not a PreTrainedModel becomes plain
    safetensors of its state dict.

    A shard holds at most max_shard_bytes of tensors, or one tensor. The config's dtype is that of most elements.
    Raises CheckpointError: target not empty (unless overwrite), disk full, a parameter that nothing covers.
    """
    target = Path(directory).expanduser()
    _check_target(target, checkpoint, overwrite)
    reader = _Reader(model, None if names is None else set(names), read)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        config_dtype = _write_weights(work, model, reader, int(max_shard_bytes))
        _write_small_files(work, model, checkpoint, config_dtype)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        work.chmod(0o777 & ~_umask())
        written = sorted(work.rglob("*"), key=_moving_order)
        return _publish(work, [f for f in written if f.is_file()], target)
    except OSError as error:
        raise CheckpointError(
            f"could not write {target}: {error.strerror or error} "
            f"({shutil.disk_usage(target.parent).free / 1e9:.2f} GB free there). "
            "What was written is removed and the source is as it was; free space or choose another place."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)  # made above, by us alone


class _Reader:
    """State dict entries by the name they are saved under, from `read` or from the model."""

    def __init__(self, model: nn.Module, names: set[str] | None, read: Callable[[str], Tensor] | None):
        self.entries = names_to_save(model)
        self._names, self._read = names, read
        canonical = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
        self._canonical = {name: canonical[id(tensor)] for name, tensor in self.entries.items()}
        if (names is None) != (read is None):
            raise CheckpointError("save_pretrained needs both names and read, or neither.")
        for name, tensor in self.entries.items():
            covered = names is not None and self._canonical[name] in names
            if not covered and (tensor.is_meta or (names is not None and isinstance(tensor, nn.Parameter))):
                where = "on meta" if tensor.is_meta else "not among the names to read"
                raise CheckpointError(f"parameter or buffer {self._canonical[name]!r} cannot be saved: it is {where}.")

    def __call__(self, name: str) -> Tensor:
        canonical = self._canonical[name]
        if self._names is None or canonical not in self._names:
            return self.entries[name].detach()
        assert self._read is not None
        tensor = self._read(canonical)
        if tensor.shape != self.entries[name].shape:
            expected = list(self.entries[name].shape)
            raise CheckpointError(f"{canonical!r} was read with shape {list(tensor.shape)}; the model has {expected}.")
        return tensor.detach()


def _write_weights(work: Path, model: nn.Module, reader: _Reader, max_shard_bytes: int) -> torch.dtype | None:
    """Streams all groups into shards under their final names, with an index if there are several."""
    metas = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in reader.entries.items()}
    if isinstance(model, PreTrainedModel):
        groups = saving_groups(model, metas)
    else:
        groups = [Group.plain(name, meta) for name, meta in metas.items()]
    waiting = {name: tuple(meta.shape) for group in groups for name, meta in group.outputs.items()}
    elements: Counter[torch.dtype] = Counter()
    shards: list[ShardWriter] = []
    try:
        for name, tensor in _stream(groups, reader, model):
            if not shards or not shards[-1].fits(tensor, max_shard_bytes):
                if shards:
                    shards[-1].finish()
                room = header_bound(_first_bytes(waiting, max_shard_bytes), METADATA)
                shards.append(ShardWriter(work / f"shard-{len(shards)}", room, METADATA))
            shards[-1].add(name, tensor)
            del waiting[name]
            if tensor.is_floating_point():
                elements[tensor.dtype] += tensor.numel()
        if not shards:
            raise CheckpointError(f"{type(model).__name__} has no parameters or buffers to save.")
        shards[-1].finish()
    except BaseException:
        for shard in shards:
            shard.abandon()
        raise
    _name_shards(work, shards)
    return elements.most_common(1)[0][0] if elements else None


def _stream(groups: list[Group], reader: _Reader, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for group in groups:
        tensors = group.run(reader, model)
        while tensors:
            name = next(iter(tensors))
            yield name, tensors.pop(name)


def _first_bytes(shapes: dict[str, tuple[int, ...]], max_bytes: int) -> dict[str, tuple[int, ...]]:
    """The tensors, from the first on, that one shard could hold if all had one byte an element."""
    taken: dict[str, tuple[int, ...]] = {}
    total = 0
    for name, shape in shapes.items():
        if total > 0 and total + math.prod(shape) > max_bytes:
            break
        total += math.prod(shape)
        taken[name] = shape
    return taken


def _name_shards(work: Path, shards: list[ShardWriter]) -> None:
    if len(shards) == 1:
        shards[0].path.rename(work / SINGLE)
        return
    weight_map = {}
    for index, shard in enumerate(shards, start=1):
        final = SINGLE.replace(".safetensors", f"-{index:05d}-of-{len(shards):05d}.safetensors")
        shard.path.rename(work / final)
        weight_map.update(dict.fromkeys(shard.names, final))
    total = {"total_size": sum(shard.nbytes for shard in shards)}
    _write_json(work / INDEX, {"metadata": total, "weight_map": dict(sorted(weight_map.items()))})


def _write_small_files(work: Path, model: nn.Module, checkpoint: Checkpoint | None, dtype: torch.dtype | None) -> None:
    if checkpoint is not None and checkpoint.path is not None:
        for source in checkpoint.carried:
            copy_to = work / source.relative_to(checkpoint.path)
            copy_to.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, copy_to)
    if not isinstance(model, PreTrainedModel):
        return
    config = copy.deepcopy(model.config if checkpoint is None else checkpoint.config)
    config.architectures = [type(model).__name__]
    if dtype is not None:
        config.dtype = dtype
        for name in getattr(config, "sub_configs", {}):
            if (part := getattr(config, name, None)) is not None:
                part.dtype = dtype
    config.save_pretrained(work)
    if model.can_generate() and not (work / "generation_config.json").exists():
        model.generation_config.save_pretrained(work)


def _check_target(target: Path, checkpoint: Checkpoint | None, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; give a directory to write to.")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        some = ", ".join(sorted(p.name for p in target.iterdir())[:4])
        raise CheckpointError(f"{target} is not empty (it holds {some}). Give a fresh directory, or overwrite=True.")
    if checkpoint is not None and checkpoint.path is not None and target.samefile(checkpoint.path):
        raise CheckpointError(f"{target} is the checkpoint this model is read from. Give another directory.")


def _publish(work: Path, files: list[Path], target: Path) -> list[Path]:
    """Moves finished files into place."""
    relative = [file.relative_to(work) for file in files]
    if not target.exists() or not any(target.iterdir()):
        os.replace(work, target)  # replaces an empty directory, fails on any other
    else:
        stale = _stale_weights(target, {str(name) for name in relative})
        for name in relative:
            (target / name).parent.mkdir(exist_ok=True)
            os.replace(work / name, target / name)
        for file in stale:
            file.unlink()
    _sync_directory(target.parent)
    return [target / name for name in relative]


def _stale_weights(target: Path, new: set[str]) -> list[Path]:
    """Weight files of an earlier export of ours that the new one does not replace. Others' are an error."""
    old = [p for p in sorted(target.glob("model*.safetensors")) if p.name not in new]
    for file in old:
        if read_header(file)[0].get("producer") != METADATA["producer"]:
            raise CheckpointError(
                f"{target}: {file.name} was not written by an export of ours and would mix with the new weights. Move "
                "it away, or give another directory."
            )
    if old and INDEX not in new and (target / INDEX).exists():
        old.append(target / INDEX)
    return old


def _moving_order(file: Path) -> tuple[int, str]:
    """Weights, small files, config, index: a reader that finds an index finds all that it names."""
    rank = 0 if file.suffix == ".safetensors" else {CONFIG: 2, INDEX: 3}.get(file.name, 1)
    return rank, str(file)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _umask() -> int:
    current = os.umask(0o022)  # the only portable way to read it
    os.umask(current)
    return current


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
