"""Models whose weights hooks of accelerate hold: loaded with device_map, or given to cpu_offload or disk_offload.

Such a parameter is on meta. Before each forward its module's hook reads it from a mapping (`weights_map`: a state dict
in host memory, or files on the disk), and afterwards puts it on meta again. For an engine the mapping is the source of
the weights, read one tensor at a time. While the model is traced and while the engine runs it, the hooks are set aside:
the forwards are those of the same model without hooks. Afterwards the model has its own parameters and hooks again.
Trained weights go into the mapping's tensors in host memory: files are never written, they may be the checkpoint.

accelerate separates tied parameters that it offloads. They are tied again here if their tensors have the same memory,
or if transformers names them as tied and they have the same values.
"""

from __future__ import annotations

import filecmp
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointError, PlanError
from ..system.units import show_bytes
from .watch import storage_key

_log = logging.getLogger(__name__)

_OF_HOOKS = ("_hf_hook", "_old_forward", "forward", "to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa")
"""Attributes that accelerate sets on a module with a hook."""


@dataclass(frozen=True)
class Held:
    """One tensor that a hook holds, and its place in the model."""

    module: nn.Module
    attribute: str
    name: str
    """Its dotted name in the model."""
    like: Tensor
    """The parameter or buffer in the model: on meta, but for some that were tied."""
    weights: Any
    """A dict of tensors, or accelerate's OffloadedWeightsLoader."""
    key: str
    """Its name in `weights`."""

    @property
    def file(self) -> Path | None:
        """The file that it is read from; None if it is in host memory."""
        loader: Any = self.weights
        if isinstance(loader, dict) or self.key in loader.state_dict or self.key not in loader.index:
            return None
        named = loader.index[self.key].get("safetensors_file")
        return Path(named) if named is not None else Path(loader.save_folder or ".") / f"{self.key}.dat"

    def in_memory(self) -> Tensor | None:
        """The tensor, if it is in host memory."""
        return self._table.get(self.key)

    @property
    def _table(self) -> dict[str, Tensor]:
        table: Any = self.weights if isinstance(self.weights, dict) else self.weights.state_dict
        return table  # type: ignore[no-any-return]

    def check(self) -> None:
        """Raise CheckpointError, before anything is read, if it is missing or has another shape."""
        if (value := self.in_memory()) is not None:
            self._check_shape(tuple(value.shape))
        elif (file := self.file) is not None:
            self._check_file(file)
        else:
            folder = getattr(self.weights, "save_folder", None)
            where = f"in the index of {folder}" if folder else "in their state dict"
            raise CheckpointError(
                f"accelerate's hooks hold no weight {self.key!r} {where}, for parameter {self.name!r}. Offload the "
                "model again, to an empty folder, or give the engine the checkpoint's directory"
            )

    def _check_shape(self, found: tuple[int, ...]) -> None:
        if found != tuple(self.like.shape):
            raise CheckpointError(
                f"the offloaded weight {self.key!r} ({self.file or 'in host memory'}) has shape {found}, and parameter "
                f"{self.name!r} has {tuple(self.like.shape)}: it is of another model"
            )

    def _check_file(self, file: Path) -> None:
        info: Mapping[str, Any] = self.weights.index[self.key]
        if not file.is_file():
            raise CheckpointError(
                f"{file}, to which accelerate offloaded parameter {self.name!r}, does not exist. Offload the model "
                "again from its checkpoint, or give the engine the checkpoint's directory"
            )
        if info.get("safetensors_file") is not None:
            try:
                with safe_open(file, framework="pt") as opened:
                    shape = opened.get_slice(info.get("weight_name", self.key)).get_shape()
            except SafetensorError as error:
                raise CheckpointError(f"{file}, with the offloaded parameter {self.name!r}: {error}") from error
            return self._check_shape(tuple(shape))
        self._check_shape(tuple(info["shape"]))
        dtype = getattr(torch, info["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(
                f"the index beside {file} gives {self.key!r} the dtype {info['dtype']!r}, unknown to torch"
            )
        wanted, found = prod(self.like.shape) * dtype.itemsize, file.stat().st_size
        if found != wanted:
            raise CheckpointError(
                f"{file} has {show_bytes(found)}, and {self.key!r} takes {show_bytes(wanted)} ({info['dtype']}, "
                f"{tuple(self.like.shape)}): it is damaged, or of another model"
            )

    def read(self) -> Tensor:
        """The tensor on the host, in the parameter's dtype, as the hook would give it to a forward."""
        self.check()
        try:
            value: Tensor = self.weights[self.key]
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{self.file or self.key}, with the offloaded {self.name!r}: {error}") from error
        return value.detach().to("cpu", self.like.dtype)

    def write(self, value: Tensor) -> None:
        """Put a value into the mapping, in host memory. A loader takes it from there instead of from its file."""
        self._table[self.key] = value


class Offloaded:
    """The offloaded weights of one model, and its hooks. All methods may be interrupted and called again."""

    def __init__(self, model: nn.Module, hooked: list[nn.Module], held: list[Held]) -> None:
        self._hooked = [(module, {n: vars(module)[n] for n in _OF_HOOKS if n in vars(module)}) for module in hooked]
        self._held = {one.name: one for one in held}
        for one in held:
            one.check()
        self._own = dict(_named_tensors(model))
        self._ties = _ties(model, self._held, self._own)
        for names in _copies(self._held, self._ties):
            _log.warning(
                "the files that accelerate offloaded %s to are equal: if they were tied, they train apart now. Tie "
                "them after loading and use cpu_offload, or give the engine the model before it is offloaded",
                " and ".join(names),
            )

    @classmethod
    def of(cls, model: nn.Module) -> Offloaded | None:
        """What hooks hold of a model; None if it has no hook of accelerate's that moves weights. Raises PlanError,
        CheckpointError if weights are missing, or a hook does more than move them."""
        hooked = [m for m in model.modules() if "_hf_hook" in vars(m) and {"_old_forward", "forward"} <= vars(m).keys()]
        hooked = [module for module in hooked if _moves_only(module)]
        if not hooked:
            return None
        held: dict[str, Held] = {}
        paths = {id(module): path for path, module in model.named_modules()}
        for module in hooked:
            for hook in _parts_of(vars(module)["_hf_hook"]):
                for one in _held_by(hook, module, paths[id(module)]):
                    held.setdefault(one.name, one)
        return cls(model, hooked, list(held.values()))

    @property
    def places(self) -> str:
        """Where the weights are, in words."""
        files = {str(one.file.parent) for one in self._held.values() if one.file is not None}
        return " and ".join([*sorted(files), *(["host memory"] if len(self._of_files()) < len(self._held) else [])])

    @property
    def names(self) -> frozenset[str]:
        """The parameters, by canonical name, that are read from hooks."""
        return frozenset(n for n, one in self._held.items() if isinstance(one.like, nn.Parameter)) - self._ties.keys()

    @property
    def file_bytes(self) -> int:
        """Bytes of the weights that are in files: so much host memory they take once they are given back."""
        return sum(one.like.nbytes for one in self._of_files())

    def read(self, name: str) -> Tensor:
        return self._held[name].read()

    def set_aside(self) -> None:
        """The model without hooks, its tied parameters tied, offloaded buffers in host memory."""
        hooks = import_module("accelerate.hooks")
        for module, kept in self._hooked:
            hooks.add_hook_to_module(module, hooks.ModelHook())  # the other's detach_hook would read all its weights
            hooks.remove_hook_from_module(module)
            if getattr(kept["_old_forward"], "__func__", None) is type(module).forward:
                vars(module).pop("forward", None)  # the class's own: as if there had never been a hook
        for one in self._held.values():
            if not isinstance(one.like, nn.Parameter):
                setattr(one.module, one.attribute, one.read().clone())
            elif not one.like.is_meta:
                absent = nn.Parameter(torch.empty_like(one.like, device="meta"), one.like.requires_grad)
                setattr(one.module, one.attribute, absent)
        for name, canonical in self._ties.items():
            _set(self._own[name][0], name, self._current(canonical))

    def put_back(self) -> None:
        """The model's own parameters and hooks, as they were."""
        for one in self._held.values():
            setattr(one.module, one.attribute, one.like)
        for name in self._ties:
            module, tensor = self._own[name]
            _set(module, name, tensor)
        for module, kept in self._hooked:
            vars(module).update(kept)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While open, the hooks are set aside."""
        try:
            self.set_aside()
            yield
        finally:
            self.put_back()

    def give(self, values: Mapping[str, Tensor]) -> None:
        """Put trained values where the hooks, and tied parameters in the model, take them from."""
        with torch.no_grad():
            for name, one in self._held.items():
                canonical = self._ties.get(name, name)
                if canonical in values:
                    one.write(values[canonical].to(one.like.dtype))
                    if not one.like.is_meta:
                        one.like.data = values[canonical].to(one.like.device, one.like.dtype)
            for name, canonical in self._ties.items():
                if name not in self._held and canonical in values:
                    own = self._own[name][1]
                    own.data = values[canonical].to(own.device, own.dtype)

    def _current(self, name: str) -> Tensor:
        module, tensor = self._own[name]
        found = getattr(module, name.rpartition(".")[2])
        return found if isinstance(found, nn.Parameter) else tensor

    def _of_files(self) -> list[Held]:
        return [one for one in self._held.values() if one.file is not None]


def _parts_of(hook: Any) -> list[Any]:
    return list(hook.hooks) if type(hook).__name__ == "SequentialHook" else [hook]


def _moves_only(module: nn.Module) -> bool:
    """Whether a module's hook only moves weights and inputs. One that does more stays, if it holds no weights."""
    hooks = import_module("accelerate.hooks")
    parts = _parts_of(vars(module)["_hf_hook"])
    others = [part for part in parts if type(part) not in (hooks.AlignDevicesHook, hooks.CpuOffload)]
    holding = [part for part in parts if getattr(part, "offload", False) is True]
    if others and holding:
        raise PlanError(
            f"{type(module).__name__} has a hook of the class {type(others[0]).__name__} beside the one that offloads "
            "its weights. Forwards here run without accelerate's hooks: remove it, or give the engine the checkpoint's "
            "directory"
        )
    return not others


def _held_by(hook: Any, module: nn.Module, path: str) -> Iterator[Held]:
    """The tensors that a hook puts into its module for a forward."""
    if getattr(hook, "offload", False) is not True or hook.weights_map is None:
        return
    inside = module.named_modules() if hook.place_submodules else [("", module)]
    for below, part in inside:
        tensors = [*part.named_parameters(recurse=False, remove_duplicate=False)]
        if hook.offload_buffers:
            passing = part._non_persistent_buffers_set
            tensors += [(n, t) for n, t in part.named_buffers(recurse=False) if n not in passing]
        for attribute, tensor in tensors:
            own = ".".join(filter(None, (below, attribute)))
            name = ".".join(filter(None, (path, own)))
            if type(tensor) not in (nn.Parameter, Tensor):
                raise PlanError(
                    f"parameter {name!r} is a {type(tensor).__name__}, which accelerate offloaded: only plain tensors "
                    "can be read from its hooks. Give the engine the checkpoint's directory, or the model loaded whole"
                )
            weights, key = hook.weights_map, own
            while hasattr(weights, "dataset") and hasattr(weights, "prefix"):
                weights, key = weights.dataset, f"{weights.prefix}{key}"
            if not isinstance(weights, dict) and not {"index", "state_dict"} <= vars(weights).keys():
                raise PlanError(
                    f"accelerate's hooks read parameter {name!r} from a {type(weights).__name__}: known are a dict and "
                    "OffloadedWeightsLoader. Give the engine the checkpoint's directory, or the model loaded whole"
                )
            yield Held(part, attribute, name, tensor, weights, key)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, nn.Parameter]]]:
    """(name, (module that holds it, parameter)) under every name."""
    for path, module in model.named_modules():
        for attribute, p in module.named_parameters(recurse=False, remove_duplicate=False):
            yield ".".join(filter(None, (path, attribute))), (module, p)


def _set(module: nn.Module, name: str, p: Tensor) -> None:
    setattr(module, name.rpartition(".")[2], p)


def _ties(
    model: nn.Module, held: Mapping[str, Held], own: Mapping[str, tuple[nn.Module, nn.Parameter]]
) -> dict[str, str]:
    """name -> canonical name, for parameters that are to be one and are several since some of them were offloaded."""
    first: dict[Any, str] = {}
    found: dict[str, str] = {}
    for name, (_, p) in own.items():
        value = held[name].in_memory() if name in held else p
        if value is None or value.numel() == 0 or (name not in held and p.is_meta):
            continue
        same = (storage_key(value), value.storage_offset(), value.shape, value.stride(), value.dtype)
        canonical = first.setdefault(same, name)
        if canonical != name and (name in held or canonical in held):
            found[name] = canonical
    order = {name: i for i, name in enumerate(own)}
    for path, module in model.named_modules():
        for target, source in getattr(module, "all_tied_weights_keys", {}).items():
            names = sorted(
                (".".join(filter(None, (path, n))) for n in (target, source)), key=lambda n: order.get(n, -1)
            )
            canonical, name = found.get(names[0], names[0]), names[1]
            apart = {canonical, name} <= own.keys() and own[canonical][1] is not own[name][1] and name not in found
            if apart and not held.keys().isdisjoint((canonical, name)) and _equal(canonical, name, held, own):
                found[name] = canonical
    return found


def _copies(held: Mapping[str, Held], ties: Mapping[str, str]) -> Iterator[list[str]]:
    """Names of matrices whose files are equal, and not zero from the start."""
    alike: dict[Any, list[str]] = {}
    for name, one in held.items():
        if one.like.dim() < 2 or name in ties or one.file is None or one.file.suffix != ".dat":
            continue
        with open(one.file, "rb") as file:
            begins = file.read(4096)
        if any(begins):
            alike.setdefault((one.like.shape, one.like.dtype, begins), []).append(name)
    for first, *others in alike.values():
        found = [name for name in others if filecmp.cmp(held[first].file or "", held[name].file or "", shallow=False)]
        if found:
            yield [first, *found]


def _equal(one: str, other: str, held: Mapping[str, Held], own: Mapping[str, tuple[nn.Module, nn.Parameter]]) -> bool:
    if own[one][1].shape != own[other][1].shape or own[one][1].dtype != own[other][1].dtype:
        return False
    values = [held[n].read() if n in held else own[n][1].detach().cpu() for n in (one, other)]
    return torch.equal(*values)
