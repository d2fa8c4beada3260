"""GPTQ (AutoGPTQ, GPTQModel, AutoRound's gptq packing): codes along the inputs, zero points along the outputs.

qweight  int32 [in * bits / 32, out]    column n: a little-endian stream of the codes of output n
qzeros   int32 [groups, out * bits / 32]    row g: a stream of the zero points; version 1 stores them minus 1
scales   [groups, out]        g_idx  int32 [in], the group of each input (act-order); absent: in order

weight[n, k] = RN(scale[g, n] * (code[k, n] - zero[g, n])), g = g_idx[k], in the dtype of the scales
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import CheckpointError
from .base import FLOATS, Codes, Decoded, Kept, Wanted, by_rows, is_exact, kept_as, kept_rows, need, run_length
from .bits import stream
from .files import Files

_ALIGN = 32  # outputs whose zero points are whole words, for any number of bits


class GPTQ:
    name: ClassVar[str] = "gptq"
    methods: ClassVar[tuple[str, ...]] = ("gptq", "awq", "auto-round", "intel/auto-round")

    def find(self, files: Files, wanted: Wanted) -> Iterator[Decoded]:
        for name, spec in files.specs.items():
            module, _, last = name.rpartition(".")
            if last != "qweight" or spec.dtype != torch.int32 or len(spec.shape) != 2:
                continue
            scales = need(files, f"{module}.scales", name, None, *FLOATS)
            if len(scales.shape) == 2 and scales.shape[1] == spec.shape[1]:
                _check_layout(wanted.settings)
                yield _weight(files, module, wanted.settings)


def _check_layout(settings: Mapping[str, Any]) -> None:
    if settings.get("rotation"):
        raise CheckpointError(
            f"GPTQ with rotation={settings['rotation']!r:.40} is not supported: forwards may have to rotate activations"
        )
    layout = str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"GPTQ in the layout {layout!r} is not supported: its codes are permuted for a kernel. Supported: gptq, "
            "gptq_v2. GPTQModel converts between them."
        )


def _weight(files: Files, module: str, settings: Mapping[str, Any]) -> Decoded:
    name = f"{module}.qweight"
    words, outputs = files.specs[name].shape
    zeros = need(files, f"{module}.qzeros", name, None, torch.int32)
    groups = files.specs[f"{module}.scales"].shape[0]
    bits = math.prod(zeros.shape[1:]) * 32 // max(1, outputs)
    if not groups or zeros.shape != (groups, outputs * bits // 32) or bits not in (2, 3, 4, 8) or outputs * bits % 32:
        raise CheckpointError(
            f"'{module}.qzeros' is {zeros}, which does not fit {name!r} ({files.specs[name]}) and {groups} groups "
            "at 2, 3, 4 or 8 bits."
        )
    of_module = {**settings, **_override(settings.get("dynamic"), module)}
    named = of_module.get("bits", of_module.get("wbits", bits))
    if named != bits or words * 32 % bits:
        raise CheckpointError(
            f"{name!r} is {files.specs[name]} with zero points of {bits} bits; the settings say {named}."
        )
    inputs = words * 32 // bits
    index = _groups(files, module, inputs, groups, of_module)
    dtype = files.specs[f"{module}.scales"].dtype
    is_v2 = _is_v2(settings)
    middle = 1 << bits - 1
    symmetric = of_module.get("sym") is True

    def parts(files: Files, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """codes [n, inputs], zero points and scales [n, groups] of outputs [first, last)"""
        codes = stream(files.columns(name, first, last).T, bits)
        low = first // _ALIGN * _ALIGN
        packed = files.columns(f"{module}.qzeros", low * bits // 32, -(-last * bits // 32))
        stored = stream(packed, bits)[:, first - low : last - low]
        zero = stored if is_v2 else (stored + 1) % (1 << bits)
        if symmetric and bool((zero != middle).any()):
            other = (stored + 1) % (1 << bits) if is_v2 else stored  # a file whose settings have the wrong version
            if bool((other != middle).any()):
                raise CheckpointError(f"'{module}.qzeros': the settings say sym, and zero points are not all {middle}.")
            zero = other
        return codes, zero.T, files.columns(f"{module}.scales", first, last).T.float()

    def rows(files: Files, first: int, last: int) -> Tensor:
        codes, zero, scale = parts(files, first, last)
        return scale[:, index].mul_(codes - zero[:, index]).to(dtype)

    def signed(files: Files, first: int, last: int) -> Codes:
        codes, zero, scale = parts(files, first, last)
        return (codes - zero[:, index]).to(torch.int8).view(torch.uint8), scale[:, index[::group]], None

    def above(files: Files, first: int, last: int) -> Codes:
        codes, zero, scale = parts(files, first, last)
        return codes.to(torch.uint8), scale[:, index[::group]], -(scale * zero)[:, index[::group]]

    uses = tuple(f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx") if f"{module}.{part}" in files)
    keeps: tuple[Kept, ...] = ()
    group, exact = run_length(index), is_exact(files.specs[f"{module}.scales"])
    if bits <= 4 and exact:
        keeps += kept_as("int4f", group, kept_rows(inputs, above))
    if bits <= 4 or symmetric:
        keeps += kept_as("int8", group, kept_rows(inputs, signed))
    if bits == 8 and exact:
        keeps += kept_as("int8f", group, kept_rows(inputs, above))
    return Decoded(f"{module}.weight", (outputs, inputs), dtype, uses, by_rows(inputs, rows), keeps)


def _groups(files: Files, module: str, inputs: int, groups: int, settings: Mapping[str, Any]) -> Tensor:
    """The group of each input, int64 [inputs]."""
    name = f"{module}.g_idx"
    if name in files:
        need(files, name, f"{module}.qweight", (inputs,), torch.int32, torch.int64)
        index = files.small(name).long()
        if bool((index < 0).any()) or bool((index >= groups).any()):
            raise CheckpointError(
                f"{name!r} names groups {int(index.min())} .. {int(index.max())}; there are {groups}."
            )
        return index
    if settings.get("desc_act") is True and groups > 1 and settings.get("static_groups") is not True:
        raise CheckpointError(
            f"{name!r} is missing, and the settings say desc_act: the order of its groups is unknown."
        )
    size = settings.get("group_size", settings.get("q_group_size"))
    if not isinstance(size, int) or size <= 0:
        size = inputs // groups if size is None and inputs % groups == 0 else inputs
    if -(-inputs // size) != groups:
        raise CheckpointError(f"'{module}.scales' has {groups} groups; {inputs} inputs in groups of {size} are others.")
    return torch.arange(inputs, device="cpu") // size


def _is_v2(settings: Mapping[str, Any]) -> bool:
    packing = settings.get("packing_format")
    if packing is not None:  # AutoRound's
        return packing in ("auto_round", "auto_round:gptqmodel", "auto_round:gptq_v2")
    return (settings.get("checkpoint_format") or settings.get("format")) == "gptq_v2"


def _override(dynamic: Any, module: str) -> Mapping[str, Any]:
    """GPTQModel's settings of single modules: the first pattern that matches the name's beginning."""
    for pattern, values in dynamic.items() if isinstance(dynamic, dict) else ():
        try:
            if re.match(str(pattern).removeprefix("+:"), module) and isinstance(values, dict):
                return values
        except re.error as error:
            raise CheckpointError(
                f"quantization_config: dynamic has {pattern!r:.80}, no expression: {error}"
            ) from error
    return {}
