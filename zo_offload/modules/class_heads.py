"""The last layer of a head on classes computes in float32 where forwards have 16 bits.

A step learns from the differences of its lanes' losses, often a thousandth of them, and bfloat16 has 8 bits. A head on
a vocabulary makes its loss in float32. One on classes leaves its logits, and so its loss, in the forward's dtype; but
its last layer is small, and can multiply in float32, with its weights as they are in the lane. Logits and loss are
float32 then. Nothing changes in float32 forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import JournalError
from .kind import kind_of, unwrapped
from .tree import is_plain_linear

_NARROW = (torch.bfloat16, torch.float16)
_WIDTHS = {"questions": 2, "choice": 1}


def class_heads(model: nn.Module) -> tuple[str, ...]:
    """The path of the last layer of transformers' head on classes, if its weights have 16 bits; else nothing."""
    kind, inner = kind_of(model), unwrapped(model)
    if kind.name not in ("classification", "tokens", *_WIDTHS):
        return ()
    base: Any = getattr(inner, "base_model", inner)
    body = set(base.modules())
    width = _WIDTHS.get(kind.name, kind.classes)
    found = [
        name
        for name, module in model.named_modules()
        if module not in body and is_plain_linear(module) and module.out_features == width
    ]
    return tuple(name for name in found[-1:] if model.get_submodule(name).weight.dtype in _NARROW)


def wide_of(header: Mapping[str, Any], model: nn.Module) -> tuple[str, ...]:
    """The layers that compute in float32 in a run; none in runs of earlier versions. Raises JournalError."""
    paths, modules = header.get("wide", []), dict(model.named_modules())
    if not isinstance(paths, list) or not all(isinstance(modules.get(path), nn.Linear) for path in paths):
        raise JournalError(f"the journal's header has wide={paths!r}: these are not linear layers of this model")
    return tuple(paths)


def in_float32(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The layer's forward, computed in float32."""

    def forward(input: Tensor) -> Tensor:
        return F.linear(input.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())

    return forward
