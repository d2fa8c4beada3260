"""mxfp4 as in gpt-oss: experts in 4-bit floats, 32 of them with one power-of-two scale.

X_blocks  uint8 [E, out, in / 32, 16]    element 2 i of a block is the low half of byte i
X_scales  uint8 [E, out, in / 32]        e: 2 ** (e - 127); 255 is NaN

X [E, in, out]: the model's parameter has inputs before outputs, so that groups lie across its rows. Exact in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..formats.codec import encode_values
from ..formats.fp8 import FP8E4M3
from ..formats.grouped import each, scales_plane
from .base import RUN, Codes, Decoded, Kept, Wanted, by_rows, kept_rows, need
from .bits import E2M1, powers
from .files import Files
from .packed_float import all_finite


class MXFP4:
    name: ClassVar[str] = "mxfp4"
    methods: ClassVar[tuple[str, ...]] = ("mxfp4",)

    def find(self, files: Files, wanted: Wanted) -> Iterator[Decoded]:
        for name, spec in files.specs.items():
            if not name.endswith("_blocks") or spec.dtype != torch.uint8:
                continue
            if len(spec.shape) != 4 or spec.shape[3] != 16:
                raise CheckpointError(f"{name!r} is {spec}; [experts, outputs, inputs / 32, 16] is expected of mxfp4.")
            scales = f"{name.removesuffix('_blocks')}_scales"
            need(files, scales, name, spec.shape[:3], torch.uint8)
            yield _experts(files, name, scales)


_E2M1 = E2M1.to(torch.bfloat16)
_FP8 = FP8E4M3()
_SPREAD, _MOST = 14, 240  # the exponents' range; the largest exponent with a valid fp8 scale


def _fits(files: Files, name: str, scales: str, expert: int, outputs: int, groups: int) -> bool:
    """Whether fp8_e4m3 can hold an expert: the scales of each 128 neighbours, in rows of one block, are close."""
    many = outputs * groups
    found = files.part(scales, expert * many, many)
    if bool((found == 255).any()):
        return False
    if bool((found == 0).any()):  # usually in blocks of zeros, for which any scale will do
        codes = files.part(name, expert * many * 16, many * 16).view(many, 16)
        is_zero = ((codes & 0x77) == 0).all(1)
        found = torch.where(is_zero, 255, found)
    again = _FP8.group // math.gcd(outputs, _FP8.group)  # rows until groups begin with a row again
    turned, at_once = found.view(outputs, groups).T, max(1, RUN // (again * outputs))
    for first in range(0, groups, at_once):
        grouped = turned[first : first + at_once].repeat(1, again).view(-1, _FP8.group).short()
        largest = torch.where(grouped == 255, 0, grouped).amax(1)
        if int(largest.max()) > _MOST or bool((largest - grouped.amin(1) > _SPREAD).any()):
            return False
    return True


def _experts(files: Files, name: str, scales: str) -> Decoded:
    experts, outputs, groups, _ = files.specs[name].shape
    inputs = groups * 32

    def parts(files: Files, first: int, last: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(inputs, blocks [outputs, 16 n], scales [outputs, n]) of inputs [first, last), counted through all experts
        from a multiple of 32 on, one expert's at a time."""
        while first < last:
            expert, begin = divmod(first, inputs)
            end = min(begin + last - first, inputs)
            low, high = begin // 32, -(-end // 32)
            raw = files.columns(name, low, high, matrix=expert)
            yield end - begin, raw, files.columns(scales, low, high, matrix=expert)
            first += end - begin

    def turned(raw: Tensor) -> Tensor:
        """The codes of blocks [outputs, 16 n], one row for each input. Moves bytes, not values."""
        both = raw.T.contiguous()  # a byte has two inputs
        return torch.stack([both & 15, both >> 4], 1).view(-1, outputs)

    def rows(files: Files, first: int, last: int) -> Tensor:
        """Inputs [first, last), from a multiple of 32 on; [., outputs]"""
        found = []
        for count, raw, exponents in parts(files, first, last):
            values = _E2M1[turned(raw).long()].view(-1, 32, outputs)
            values *= powers(exponents.T.contiguous()).to(torch.bfloat16).unsqueeze(1)
            found.append(values.view(-1, outputs)[:count])
        return torch.cat(found)

    def across(files: Files, first: int, last: int) -> Codes:
        """The codes themselves."""
        found = [
            (turned(raw)[:count], exponents.T.repeat_interleave(32, 0)[:count])
            for count, raw, exponents in parts(files, first, last)
        ]
        return torch.cat([codes for codes, _ in found]), torch.cat([factors for _, factors in found]), None

    def kept(files: Files, first: int, last: int) -> Codes:
        """Encoded as fp8_e4m3, which is exact if `fits`."""
        values = rows(files, first, last).float().reshape(-1)
        stored, _ = encode_values(values, _FP8)
        exponent = each(scales_plane(_FP8, stored, values.numel()), _FP8.group, values.numel())
        return stored[: values.numel()].view(-1, outputs), exponent.view(-1, outputs), None

    def fits(files: Files) -> bool:
        return all(_fits(files, name, scales, expert, outputs, groups) for expert in range(experts))

    plain = name.removesuffix("_blocks")
    keeps: tuple[Kept, ...] = ()
    if outputs % 8 == 0:
        own = kept_rows(outputs, across, 32)
        keeps = (Kept(f"mxfp4_across_{outputs}", own, fits=lambda f: all_finite(f, scales)),)
    if outputs % 4 == 0:  # groups end at the ends of blocks of 32 rows
        keeps += (Kept(_FP8.name, kept_rows(outputs, kept, 32), fits),)
    return Decoded(plain, (experts, inputs, outputs), torch.bfloat16, (name, scales), by_rows(outputs, rows, 32), keeps)
