"""Moves a model's buffers and a batch's tensors to the compute device, without waiting for it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..hf import PreTrainedModel
from ..modules.parameters import is_plain, laid_out
from . import Device
from .known import known


def move_what_stays(model: nn.Module, device: torch.device, kept: Collection[str] = ()) -> None:
    """Move every buffer, and the parameters `kept`, to `device`; shared ones stay shared. `hollow` handles the other
    parameters."""
    moved: dict[int, Tensor] = {}
    keep: list[Tensor] = []  # an id is valid only while its object lives
    staying = {id(p) for name, p in model.named_parameters() if name in kept}
    for module in model.modules():
        for name, tensor in _held_by(module):
            if tensor.device == device or (isinstance(tensor, nn.Parameter) and id(tensor) not in staying):
                continue
            keep.append(tensor)
            if id(tensor) not in moved:
                moved[id(tensor)] = _moved(tensor, device)
            setattr(module, name, moved[id(tensor)])


def _held_by(module: nn.Module) -> list[tuple[str, Tensor]]:
    buffers: list[tuple[str, Tensor]] = list(module.named_buffers(recurse=False, remove_duplicate=False))
    return [*buffers, *module.named_parameters(recurse=False, remove_duplicate=False)]


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    moved = tensor.to(device)
    if isinstance(tensor, nn.Parameter) and not isinstance(
        moved, nn.Parameter
    ):  # those of quantized layers stay parameters
        return nn.Parameter(moved.detach(), requires_grad=tensor.requires_grad)
    return moved


class Homes:
    """The devices of a model's parameters and buffers, and parameters' strides, to restore them; those on meta return
    to the host."""

    def __init__(self, model: nn.Module) -> None:
        found = [*model.named_parameters(), *model.named_buffers()]
        self._of = {name: torch.device("cpu") if t.is_meta else t.device for name, t in found}
        self._strides = {name: p.stride() for name, p in model.named_parameters() if is_plain(p)}

    def bring_back(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Give parameters their `values`; those that moved to another device become new ones, ties stay ties."""
        new: dict[int, Tensor] = {}
        for name, p in model.named_parameters():
            home = self._of[name]
            if name not in values:
                if p.device != home and not p.is_meta:
                    new[id(p)] = _moved(p, home)
                continue
            value = laid_out(values[name].to(home, p.dtype), self._strides[name])
            if p.device == home:
                p.data = value
            else:
                new[id(p)] = nn.Parameter(value, requires_grad=p.requires_grad)
        for name, buffer in model.named_buffers():
            if buffer.device != self._of.get(name, buffer.device):
                new[id(buffer)] = buffer.to(self._of[name])
        for module in model.modules():
            for name, tensor in _held_by(module):
                if id(tensor) in new:
                    setattr(module, name, new[id(tensor)])


class PlacedBatches:
    """Batches on the device, each moved once for all lanes, with the host's copies."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._placed: dict[
            int, tuple[Any, Any]
        ] = {}  # id -> (the batch, which keeps its id valid; the batch on the device)
        self._host: dict[tuple[int, int], Tensor] = {}

    def place(self, batch: Any) -> Any:
        """The batch with its tensors on the device."""
        if self._device.torch_device.type == "cpu":
            return batch
        if id(batch) not in self._placed:
            as_dict = dict(batch) if isinstance(batch, Mapping) else batch
            moved = tree_map_only(Tensor, self._move, as_dict)
            if isinstance(moved, dict):
                moved = {name: self._answering(name, value) for name, value in moved.items()}
            self._placed[id(batch)] = (batch, moved)
        return self._placed[id(batch)][1]

    def host_of(self, tensor: Tensor) -> Tensor | None:
        """The host's copy of a batch tensor, or of a view of all of it; None for anything else."""
        if not tensor.is_contiguous():
            return None
        found = self._host.get((tensor.data_ptr(), tensor.numel()))
        return None if found is None else found.view(tensor.shape)

    def _answering(self, name: str, value: Any) -> Any:
        """A mask or positions that model code can ask without waiting for the device; any other value as it is."""
        asked = name.endswith("attention_mask") or name == "position_ids"
        host = self.host_of(value) if asked and isinstance(value, Tensor) else None
        return value if host is None else known(value, host)

    def _move(self, tensor: Tensor) -> Tensor:
        moved = self._device.upload(tensor.contiguous())
        if not tensor.is_floating_point() and tensor.device.type == "cpu":
            self._host[moved.data_ptr(), moved.numel()] = tensor.contiguous()
        return moved


def input_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of features that the model accepts: that of its parameters.

    If they have several, the dtype of most elements in transformers' models, which keep a few layers in float32; None
    for other modules, whose authors must decide.
    """
    elements: dict[torch.dtype, int] = {}
    for p in model.parameters():
        if p.dtype.is_floating_point and p.dtype.itemsize > 1:
            elements[p.dtype] = elements.get(p.dtype, 0) + p.numel()
    if len(elements) > 1 and not any(isinstance(module, PreTrainedModel) for module in model.modules()):
        return None
    return max(elements, key=lambda dtype: elements[dtype], default=None)


def as_inputs(inputs: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Features (floating, two dimensions or more) in `dtype`; float64 only for a float64 model.

    Labels, and numbers such as times with one per row, keep their 32 bits.
    """
    return {name: _as_input(name, value, dtype) for name, value in inputs.items()}


def _as_input(name: str, value: Any, dtype: torch.dtype | None) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point() or dtype is None or value.dtype is dtype:
        return value
    if value.dim() > 1 and "label" not in name:
        return value.to(dtype)
    return value.float() if value.dtype is torch.float64 else value


@contextmanager
def inputs_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """While open, the model is called with inputs converted by `as_inputs`."""
    if dtype is None:
        yield
        return

    def cast(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(_as_input("", value, dtype) for value in args), as_inputs(kwargs, dtype)

    handle = model.register_forward_pre_hook(cast, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def matmul_precision(compute: str | None) -> Iterator[None]:
    """compute="tf32": float32 products on the matrix units during a forward; afterwards torch's former setting."""
    if compute != "tf32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
