"""8-bit codes, one per element, times scales: per block, row, group in a row, or tensor.

DeepSeek-V3 and Qwen3 (fp8, `weight_scale_inv` of 128 x 128 blocks), fbgemm, Model Optimizer and AutoRound (fp8, a scale
per row or tensor), compressed-tensors (fp8 and int8, with zero points if int8 is asymmetric). The scale is a factor,
even if its name says inverse:

    weight = RN(RN32(float32(code - zero) * float32(scale)))

where RN rounds to the given dtype. In compressed-tensors that is the scale's own; there the product is exact in
float32, so its library, which multiplies in that dtype, gives the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import CheckpointError
from .base import FLOATS, RUN, Codes, Decoded, Kept, Settings, Wanted, by_rows, is_exact, kept_as, kept_rows, need
from .bits import exponents, scales
from .files import Files, Spec

CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
_SCALES = (*FLOATS, torch.float8_e8m0fnu, torch.uint8)
_ENDINGS = (
    ("weight", "weight_scale_inv"),
    ("weight", "scale"),
    ("weight", "qscale_weight"),
    ("weight", "weight_scale"),
)


class ScaledFP8:
    """fp8 with scales, as in all libraries but compressed-tensors."""

    name: ClassVar[str] = "fp8"
    methods: ClassVar[tuple[str, ...]] = ("fp8", "fbgemm_fp8", "auto-round", "intel/auto-round", "modelopt")

    def find(self, files: Files, wanted: Wanted) -> Iterator[Decoded]:
        if wanted.settings.get("expert_dtype") == "fp4":
            raise CheckpointError("fp8 checkpoints whose experts are fp4 (expert_dtype) are not supported.")
        for name, spec in files.specs.items():
            if spec.dtype not in CODES[:2] or not spec.shape or name.endswith(("_scale", ".scale")):
                continue  # NVFP4's scales are fp8 too
            yield scaled(files, name, scale_name(files, name), wanted.dtype, block_of(wanted.settings))


def scale_name(files: Files, name: str) -> str:
    """The name of a weight's scales. CheckpointError: there are none."""
    stem, _, last = name.rpartition(".")
    found = [f"{stem}.{scale}" for weight, scale in _ENDINGS if last == weight and f"{stem}.{scale}" in files]
    found += [f"{name}{ending}" for ending in ("_scale_inv", "_scale") if f"{name}{ending}" in files]
    if not found:
        raise CheckpointError(
            f"{name!r} is {files.specs[name]}, and its scales are missing (looked for {name}_scale_inv, {name}_scale, "
            f"{stem}.scale)."
        )
    return found[0]


def block_of(settings: Settings) -> tuple[int, int] | None:
    """Rows and columns that share a scale, from the settings."""
    given = settings.get("weight_block_size")
    if given is None:
        return None
    if (
        not isinstance(given, (list, tuple))
        or len(given) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in given)
    ):
        raise CheckpointError(f"quantization_config: weight_block_size={given!r:.60}; expected two numbers above 0.")
    return given[0], given[1]


def scaled(
    files: Files, name: str, scale: str, dtype: torch.dtype, block: tuple[int, int] | None, *, zero: str | None = None
) -> Decoded:
    """The weight with codes `name`, scales `scale` and zero points `zero`. CheckpointError: shapes that do not fit."""
    spec, grid = files.specs[name], need(files, scale, name, None, *_SCALES)
    if spec.numel == 0 or not spec.shape:
        raise CheckpointError(f"{name!r} is {spec}; a matrix of codes is expected beside {scale!r}.")
    if spec.dtype == torch.int8 and grid.dtype not in FLOATS:
        raise CheckpointError(f"{scale!r} is {grid}: exponents are scales of floats, and {name!r} is {spec}.")
    lead, rows, width = math.prod(spec.shape[:-2]), *((1, *spec.shape)[-2:])
    tall, wide = block_shape(name, spec, scale, grid, block)
    up, across = -(-rows // tall), -(-width // wide)  # scales of one matrix, a grid
    if zero is not None:
        need(files, zero, name, grid.shape, torch.int8)

    def of_rows(files: Files, first: int, last: int) -> Tensor:
        index = torch.arange(first, last, device="cpu")
        index = index.div(rows, rounding_mode="floor") * up + index.remainder(rows).div(tall, rounding_mode="floor")
        if lead * up * across == 1:
            index = torch.zeros_like(index)
        begin, end = int(index[0]), int(index[-1]) + 1
        codes = files.rows(name, first, last).float()
        for start in range(0, width, _COLUMNS):  # never a grid of scales as large as the weight
            stop = min(start + _COLUMNS, width)
            column = torch.arange(start, stop, device="cpu").div(wide, rounding_mode="floor")
            part = codes[:, start:stop]
            if zero is not None:
                part -= (
                    files.part(zero, begin * across, (end - begin) * across)
                    .view(-1, across)
                    .float()[index - begin][:, column]
                )
            values = scales(files.part(scale, begin * across, (end - begin) * across)).view(-1, across)
            part *= values[index - begin][:, column]
        return codes.to(dtype)

    def kept(files: Files, first: int, last: int) -> Codes:
        index = torch.arange(first, last, device="cpu")
        index = index.div(rows, rounding_mode="floor") * up + index.remainder(rows).div(tall, rounding_mode="floor")
        if lead * up * across == 1:
            index = torch.zeros_like(index)
        begin, end = int(index[0]), int(index[-1]) + 1
        values = scales(files.part(scale, begin * across, (end - begin) * across)).view(-1, across)
        values = values[index - begin][:, places]
        codes = files.rows(name, first, last).view(torch.uint8)
        if zero is None:
            return codes, values, None
        given = files.part(zero, begin * across, (end - begin) * across).view(-1, across)[index - begin][:, places]
        return codes ^ 0x80, values, -(values * (given.float() + 128))  # codes from 0 up

    def kept_exponents(files: Files, first: int, last: int) -> Codes:
        codes, values, _ = kept(files, first, last)
        return codes, exponents(values), None

    uses = (name, scale) + ((zero,) if zero else ())
    keeps: tuple[Kept, ...] = ()
    group = width if across == 1 else math.gcd(width, wide)  # the last block may be shorter
    places = torch.arange(0, width, max(1, group), device="cpu").div(wide, rounding_mode="floor")
    if spec.dtype == torch.int8:
        if zero is None:
            keeps = kept_as("int8", group, kept_rows(width, kept))
        elif is_exact(grid):
            keeps = kept_as("int8f", group, kept_rows(width, kept))
    elif spec.dtype == torch.float8_e4m3fn:
        keeps = kept_as("fp8_e4m3", group, kept_rows(width, kept_exponents), fits=lambda f: _powers(f, scale))
        keeps += kept_as("fp8f", group, kept_rows(width, kept))
    return Decoded(name, spec.shape, dtype, uses, by_rows(width, of_rows), keeps)


def _powers(files: Files, scale: str) -> bool:
    """Whether all scales are powers of two that our exponent byte can hold."""
    for start in range(0, files.specs[scale].numel, RUN):
        values = scales(files.part(scale, start, min(RUN, files.specs[scale].numel - start)))
        if bool(((values.view(torch.int32) & 0x7FFFFF) != 0).any()) or not bool(
            ((values > 1e-37) & (values < 1e36)).all()
        ):
            return False
    return True


_COLUMNS = 1 << 14


def block_shape(name: str, spec: Spec, scale: str, grid: Spec, block: tuple[int, int] | None) -> tuple[int, int]:
    """(rows, columns) that share a scale, from the shapes; `block` if scales are per block. CheckpointError."""
    rows, width = (1, *spec.shape)[-2:]
    lead, shape = spec.shape[:-2], grid.shape
    if grid.numel == 1 and not lead:
        return rows, width
    if shape in ((*lead, rows), (*lead, rows, 1)):
        return 1, width
    if lead and shape in (lead, (*lead, 1), (*lead, 1, 1)):
        return rows, width
    if shape[:-1] == (*lead, rows) and shape[-1] and width % shape[-1] == 0 and (block is None or block[0] == 1):
        return 1, width // shape[-1]
    for tall, wide in (block,) if block is not None else ((128, 128),):
        if shape == (*lead, -(-rows // tall), -(-width // wide)):
            return tall, wide
    expected = f"blocks of {block[0]} x {block[1]}" if block else "one scale, one a row, or one for 128 x 128"
    raise CheckpointError(f"{scale!r} is {grid}, which does not fit {name!r} ({spec}): {expected} are expected.")
