"""Hollow models: parameters keep name, shape and device, while their weights are elsewhere.

A placeholder takes a few bytes and gives NaN if it is used. A parameter keeps its identity; its data is changed by
`set_data`, which no mode of torch sees.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from .serving import Frame

set_data: Callable[[nn.Parameter, Tensor], None] = torch.Tensor.data.__set__  # type: ignore[attr-defined]


def placeholder(like: Tensor, device: torch.device | str | None = None) -> Tensor:
    """NaN (integers: the lowest value) expanded to a tensor's shape: takes a few bytes, and shows up if used."""
    if like.dtype.is_floating_point or like.dtype.is_complex:
        value: float = float("nan")
    else:
        value = 0 if like.dtype is torch.bool else torch.iinfo(like.dtype).min
    return torch.full((), value, dtype=like.dtype, device=device or like.device).expand(like.shape)


def hollow(model: nn.Module, device: torch.device | str = "cpu", names: Collection[str] | None = None) -> None:
    """Give parameters (all, or those of these canonical names) placeholders on `device` instead of their values.

    Ties stay ties. Parameters that are on that device keep their identity; others (on meta) are replaced in every
    module that holds them. Afterwards only lanes can run the model.
    """
    device = torch.device(device)
    fresh: dict[int, nn.Parameter] = {}
    keep: list[nn.Parameter] = []  # an id is only an id while its object lives
    chosen = {id(p) for name, p in model.named_parameters() if names is None or name in names}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(p) not in chosen:
                continue
            if p.device == device or (p.device.type == device.type and device.index is None):
                set_data(p, placeholder(p))
                continue
            if id(p) not in fresh:
                keep.append(p)
                fresh[id(p)] = nn.Parameter(placeholder(p, device), requires_grad=p.requires_grad)
            setattr(module, name, fresh[id(p)])  # not _parameters[name]: nn.RNN looks on


def install(frame: Frame) -> None:
    """Give an owner's parameters the weights of one lane."""
    for p, w in zip(frame.portion.params, frame.weights, strict=True):
        set_data(p, w)


def uninstall(frames: list[Frame]) -> None:
    """Give the parameters of these owners their placeholders."""
    for frame in frames:
        for p, rest in zip(frame.portion.params, frame.portion.resting, strict=True):
            set_data(p, rest)
