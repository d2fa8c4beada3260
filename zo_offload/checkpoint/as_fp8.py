"""An export whose linear layers are fp8 in blocks of 128 x 128 with a float32 scale each, as DeepSeek-V3's files are.

Each block's scale is its largest magnitude / 448; a code is the nearest float8_e4m3fn of value / scale. Both are made
of 128 rows at a time. A layer is in fp8 if both of its sizes are multiples of 128, which transformers' reader asks for;
the output layer, embeddings and all else stay as they are, and config.json names the linear layers among them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..modules.compiled import plain_name
from ..quantized.files import Spec
from .recipe import Reader, Recipe

BLOCK = 128
LARGEST = 448.0
_LEAST = 2.0**-100  # of a scale
SCALES = "_scale_inv"  # to be multiplied with, in spite of its name


def names_in_fp8(model: nn.Module, outputs: Mapping[str, Spec]) -> frozenset[str]:
    """The tensors of an export that become fp8. ConfigError: there are none, or experts are stacked."""
    if experts := [name for name, spec in outputs.items() if len(spec.shape) == 3 or ".experts." in name]:
        raise ConfigError(
            f"an export as fp8 is of linear layers, and {experts[0]!r} is of stacked experts: not supported"
        )
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    found = frozenset(
        f"{name}.weight"
        for name, module in _linear(model)
        if module is not head and _fits(outputs.get(f"{name}.weight"))
    )
    if not found:
        raise ConfigError(
            f"an export as fp8 is of linear layers with sizes that are multiples of {BLOCK}; there are none"
        )
    return found


def _linear(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(plain_name(name), module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _fits(spec: Spec | None) -> bool:
    return spec is not None and len(spec.shape) == 2 and not any(size % BLOCK for size in spec.shape)


def with_scales(outputs: Mapping[str, Spec], names: Collection[str]) -> dict[str, Spec]:
    """What is written instead: codes under the same names, and their scales."""
    found = dict(outputs)
    for name in names:
        rows, width = outputs[name].shape
        found[name] = Spec(torch.float8_e4m3fn, (rows, width))
        found[f"{name}{SCALES}"] = Spec(torch.float32, (rows // BLOCK, width // BLOCK))
    return found


def settings(model: nn.Module, names: Collection[str]) -> dict[str, Any]:
    """quantization_config for transformers."""
    linear = [name for name, _ in _linear(model)]
    return {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": [name for name in linear if f"{name}.weight" not in names],
    }  # fmt: skip


def write(name: str, spec: Spec, recipe: Recipe, reader: Reader, put: Callable[[str, int, Tensor], None]) -> None:
    """A tensor's codes and scales through `put`(name, start, values), 128 rows at a time."""
    rows, width = spec.shape
    across = width // BLOCK
    for first in range(0, rows, BLOCK):
        values = recipe.part(reader, first * width, BLOCK * width).float().view(BLOCK, across, BLOCK)
        scale = (values.abs().amax((0, 2)) / LARGEST).clamp_(min=_LEAST)
        codes = (values / scale.view(1, -1, 1)).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        put(name, first * width, codes.view(-1))
        put(f"{name}{SCALES}", first // BLOCK * across, scale)
