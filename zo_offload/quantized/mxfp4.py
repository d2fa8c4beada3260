"""mxfp4 as in gpt-oss: experts in 4-bit floats, 32 of them under a power of two.

X_blocks  uint8 [E, out, in / 32, 16]    element 2 i of a block is the low half of byte i
X_scales  uint8 [E, out, in / 32]        e: 2 ** (e - 127); 255 is NaN

X [E, in, out]: the model's parameter has inputs before outputs. Exact in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import CheckpointError
from .base import Decoded, Wanted, by_rows, need
from .bits import E2M1, nibbles, powers
from .files import Files


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


def _experts(files: Files, name: str, scales: str) -> Decoded:
    experts, outputs, groups, _ = files.specs[name].shape
    inputs = groups * 32

    def rows(files: Files, first: int, last: int) -> Tensor:
        """Inputs [first, last) of all experts' in a row, from a multiple of 32 on; [., outputs]"""
        parts = []
        while first < last:
            expert, begin = divmod(first, inputs)
            end = min(begin + last - first, inputs)
            low, high = begin // 32, -(-end // 32)
            raw = files.columns(name, low, high, matrix=expert)
            values = E2M1[nibbles(raw)].view(outputs, high - low, 32)
            values *= powers(files.columns(scales, low, high, matrix=expert)).unsqueeze(2)
            parts.append(values.view(outputs, -1)[:, : end - begin].T)
            first += end - begin
        return torch.cat(parts).to(torch.bfloat16)

    plain = name.removesuffix("_blocks")
    return Decoded(plain, (experts, inputs, outputs), torch.bfloat16, (name, scales), by_rows(outputs, rows, 32))
