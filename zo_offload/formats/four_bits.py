"""int4 and nf4: sixteen values per group. For frozen weights: encoded once, never rewritten; their scales can train."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..kernels.float32 import fma
from .base import Format, from_bits
from .bf16 import BF16
from .grouped import INFINITE, LEAST_SCALE, each, float_scales, largest_bits, minima_plane, pack, padded, values_plane

# Dettmers et al. 2023, "QLoRA", appendix E: quantiles of the normal distribution, 0 among them
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_INVERSE_15 = torch.tensor(1 / 15, dtype=torch.float32, device="cpu")


class FourBits(Format):
    torch_dtype: ClassVar[torch.dtype] = torch.bfloat16
    value_bits: ClassVar[int] = 4
    scale_bytes: ClassVar[int] = 4
    trains: ClassVar[bool] = False
    trains_scales: ClassVar[bool] = True

    def codes(self, stored: Tensor, numel: int) -> Tensor:
        """int64 [numel]; element 2 i is the low half of byte i."""
        both = values_plane(self, stored, numel).to(torch.int64)
        return torch.stack([both & 15, both >> 4], 1).reshape(-1)[:numel]

    def pack_codes(self, codes: Tensor) -> Tensor:
        even = F.pad(codes.to(torch.uint8), (0, codes.numel() % 2))
        both = even.view(torch.int16)  # two codes, the first in the low byte: whole vectors instead of every other byte
        return (both | both >> 4).to(torch.uint8)


class Int4(FourBits):
    """0.547 bytes per parameter (group 64: 0.594): codes 0..15 times a float32 scale, plus a bfloat16 minimum.

    Error up to half a scale: a 30th of the range of the group's values (10 % rms of normal weights; group 64: 9 %). A
    NaN or infinity makes its group NaN, by the scale.

    centred: (code - 7.5) times the scale, plus a bfloat16 centre. The same codes and error; but when the scale grows,
    the group grows about its centre, near zero, instead of moving away from its minimum as a whole.
    """

    code: ClassVar[int] = 6
    minimum_bytes: ClassVar[int] = 2

    def __init__(self, group: int = 128, centred: bool = False) -> None:
        if group not in (64, 128):
            raise ConfigError(f"int4 with groups of {group}: the kernels know groups of 64 and 128")
        self.group = group
        self.centred = centred
        self.code_rms = 3.03 if group == 128 else 3.35  # type: ignore[misc]
        self.name = ("int4c" if centred else "int4") + ("" if group == 128 else f"_g{group}")  # type: ignore[misc]

    @property
    def kernel(self) -> str:
        return "int4"  # the group and the kind of the minima plane are arguments

    @property
    def about_centre(self) -> Int4:
        return Int4(self.group, centred=True)

    def decode(self, stored: Tensor, numel: int | None = None) -> Tensor:
        n = self.size_of(stored, numel)
        return self.value(self.codes(stored, n), float_scales(self, stored, n), stored, n)

    def value(self, codes: Tensor, scales: Tensor, stored: Tensor, numel: int) -> Tensor:
        """fma(code, scale, minimum), or fma(code - 7.5, scale, centre): one rounding to float32."""
        minima = BF16().decode(minima_plane(self, stored, numel))
        wide, low = each(scales, self.group, numel), each(minima, self.group, numel)
        return torch.from_numpy(fma((codes.float() - 7.5 * self.centred).numpy(), wide.numpy(), low.numpy()))

    def encode(self, values: Tensor, sr_bits: Tensor | None = None, like: Tensor | None = None) -> Tensor:
        n = values.numel()
        lost = largest_bits(values, self.group) >= INFINITE
        rows = padded(values, self.group)
        real = padded(torch.ones_like(values), self.group) > 0
        low = torch.where(real, rows, float("inf")).amin(1) + 0.0  # + 0: no negative zero
        high = torch.where(real, rows, -float("inf")).amax(1)
        minima = BF16().encode(torch.where(lost, 0.0, low))
        low = BF16().decode(minima)
        scales = ((high - low) * _INVERSE_15).clamp(min=LEAST_SCALE)
        scales = torch.where(lost, float("nan"), scales)
        if self.centred:
            middle = torch.from_numpy(fma(np.float32(7.5), scales.numpy(), low.numpy())) + 0.0
            minima = BF16().encode(torch.where(lost, 0.0, middle))
            low = torch.from_numpy(fma(np.float32(-7.5), scales.numpy(), BF16().decode(minima).numpy()))
        above = (values - each(low, self.group, n)) * each(1.0 / scales, self.group, n)
        codes = torch.where(above.isnan(), 0.0, above).clamp(0, 15).round().to(torch.int64)
        return pack(self, n, self.pack_codes(codes), scales.view(torch.uint8), minima)


class NF4(FourBits):
    """0.5625 bytes per parameter: sixteen quantiles of a normal distribution times a float32 scale for each 64.

    The scale is the group's largest magnitude, as in bitsandbytes. 9.2 % rms error of normal weights, at most 15 % of
    the group's largest. A NaN or infinity makes its group NaN, by the scale.
    """

    code: ClassVar[int] = 7

    def __init__(self, group: int = 64) -> None:
        """group: 32 is for checkpoints whose codes are in such groups."""
        if group not in (32, 64):
            raise ConfigError(f"nf4 with groups of {group}: groups of 32 and 64 are known")
        self.group = group
        self.code_rms = 0.393 if group == 64 else 0.436  # type: ignore[misc]
        self.name = "nf4" if group == 64 else f"nf4_g{group}"  # type: ignore[misc]

    @property
    def kernel(self) -> str:
        return "nf4"

    def decode(self, stored: Tensor, numel: int | None = None) -> Tensor:
        n = self.size_of(stored, numel)
        return self.value(self.codes(stored, n), float_scales(self, stored, n), stored, n)

    def value(self, codes: Tensor, scales: Tensor, stored: Tensor, numel: int) -> Tensor:
        return torch.tensor(NF4_VALUES, device="cpu")[codes] * each(scales, self.group, numel)

    def encode(self, values: Tensor, sr_bits: Tensor | None = None, like: Tensor | None = None) -> Tensor:
        n = values.numel()
        bits = largest_bits(values, self.group)
        scales = torch.where(bits >= INFINITE, float("nan"), from_bits(bits).clamp(min=LEAST_SCALE))
        part = values * each(1.0 / scales, self.group, n)
        table = torch.tensor(NF4_VALUES, dtype=torch.float64, device="cpu")
        between = ((table[1:] + table[:-1]) / 2).float()
        codes = torch.where(part.isnan(), 0, (part.view(-1, 1) > between).sum(1))  # the midpoint of two goes down
        return pack(self, n, self.pack_codes(codes), scales.view(torch.uint8))
