"""4-bit floats along the inputs, two per byte: NVFP4 of compressed-tensors and Model Optimizer, mxfp4 of the former.

weight_packed (Model Optimizer: weight)  uint8 [out, in / 2]   element 2 i is the low half of byte i
weight_scale                    nvfp4: e4m3 [out, in / 16]; mxfp4: uint8 [out, in / 32], e: 2 ** (e - 127)
weight_global_scale (compressed-tensors)   float32, divides
weight_scale_2 (Model Optimizer)           float32, multiplies

weight = RN(e2m1 * RN32(scale / global))    or    RN(e2m1 * RN32(scale * scale_2)),    RN to bf16
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import CheckpointError
from .base import RUN, Codes, Decoded, Kept, Wanted, by_rows, kept_as, kept_rows, need
from .bits import E2M1, halves, nibbles, powers
from .files import Files


class ModelOptimizer:
    """NVFP4 with the tensor names of NVIDIA's Model Optimizer."""

    name: ClassVar[str] = "modelopt nvfp4"
    methods: ClassVar[tuple[str, ...]] = ("modelopt", "modelopt_fp4", "nvfp4")

    def find(self, files: Files, wanted: Wanted) -> Iterator[Decoded]:
        for name, spec in files.specs.items():
            if name.endswith(".weight") and spec.dtype == torch.uint8 and f"{name}_scale" in files:
                need(files, f"{name}_scale_2", name, None, torch.float32)
                if f"{name.removesuffix('weight')}pre_quant_scale" in files:
                    raise CheckpointError(f"{name!r}: AWQ scales of the inputs (pre_quant_scale) are not supported.")
                yield packed_float(files, name, name, f"{name}_scale_2")


LARGEST_EXPONENT = 252
"""The largest of mxfp4's scales: 6 * 2 ** (252 - 127) is finite."""


def all_finite(files: Files, scale: str) -> bool:
    """Whether no mxfp4 code with these exponents is infinite or NaN."""
    many = files.specs[scale].numel
    runs = (files.part(scale, start, min(RUN, many - start)) for start in range(0, many, RUN))
    return all(int(run.view(torch.uint8).max()) <= LARGEST_EXPONENT for run in runs)


def packed_float(files: Files, codes: str, name: str, whole: str | None) -> Decoded:
    """The weight `name`; whole: the name of the tensor's global scale. CheckpointError: shapes that do not fit."""
    spec, scale = files.specs[codes], f"{name}_scale"
    if len(spec.shape) not in (2, 3):
        raise CheckpointError(f"{codes!r} is {spec}; [outputs, inputs / 2] is expected of 4-bit floats.")
    group = 16 if whole is not None else 32
    width = 2 * spec.shape[-1]
    if width % group:
        raise CheckpointError(f"{codes!r} is {spec}: {width} inputs are not in groups of {group}.")
    dtype = torch.float8_e4m3fn if whole is not None else torch.uint8
    need(files, scale, codes, (*spec.shape[:-1], width // group), dtype)
    if whole is not None and need(files, whole, codes, None, torch.float32).numel != 1:
        raise CheckpointError(f"{whole!r} is {files.specs[whole]}; one number is expected.")
    divides = whole is not None and whole.endswith("global_scale")

    def factors(files: Files, first: int, last: int) -> Tensor:
        """[n, width / group], float32"""
        raw = files.rows(scale, first, last)
        if whole is None:
            return powers(raw)
        all_of_it = files.part(whole, 0, 1)
        return raw.float() / all_of_it if divides else raw.float() * all_of_it

    def rows(files: Files, first: int, last: int) -> Tensor:
        values = E2M1[nibbles(files.rows(codes, first, last))].view(last - first, -1, group)
        return values.mul_(factors(files, first, last).unsqueeze(2)).view(last - first, width).to(torch.bfloat16)

    def kept(files: Files, first: int, last: int) -> Codes:
        both = halves(files.rows(codes, first, last))
        return both, files.rows(scale, first, last) if whole is None else factors(files, first, last), None

    def own(files: Files, first: int, last: int) -> Codes:
        """With both scales as they are in the files."""
        assert whole is not None
        both = halves(files.rows(codes, first, last))
        factor = files.part(whole, 0, 1) * (-1 if divides else 1)
        return both, files.rows(scale, first, last).view(torch.uint8), factor.expand(last - first, 1)

    def one_sign(files: Files) -> bool:
        assert whole is not None
        return bool((files.part(whole, 0, 1) > 0).all())

    kind = "mxfp4" if whole is None else "nvfp4"
    keeps: tuple[Kept, ...] = ()
    if whole is not None:
        keeps = (Kept("nvfp4_two", kept_rows(width, own), one_sign),)
    keeps += kept_as(kind, group, kept_rows(width, kept), fits=lambda f: whole is not None or all_finite(f, scale))

    uses = (codes, scale) + ((whole,) if whole is not None else ())
    return Decoded(name, (*spec.shape[:-1], width), torch.bfloat16, uses, by_rows(width, rows), keeps)
