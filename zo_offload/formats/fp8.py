"""fp8 storage: 8-bit floats with one power-of-two scale for each 128 of them; fp8+8: 8 more bits in a residual part.

The scale is the least power of two that brings the group's largest value into range, so no value is clipped and scaling
rounds nothing. It is a function of the group's values alone, computed again at each write-back. Encoding stored values
again changes none of them: at most the scale halves, if the group's largest value was rounded down.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import Format, sign_extended
from .grouped import each, exponents, pack, power_of_two, scaled_down, scales_plane, values_plane
from .small_float import SmallFloat, sign_bits, signed


class _FP8(Format):
    torch_dtype: ClassVar[torch.dtype] = torch.bfloat16
    value_bits: ClassVar[int] = 8
    group: int = 128
    scale_bytes: ClassVar[int] = 1
    kind: ClassVar[SmallFloat]
    top: ClassVar[int]
    """The largest value is 1.75 * 2**top."""

    def decode(self, stored: Tensor, numel: int | None = None) -> Tensor:
        n = self.size_of(stored, numel)
        codes = values_plane(self, stored, n).to(torch.int64)
        scale = power_of_two(scales_plane(self, stored, n).to(torch.int64))
        values = signed(self.kind.value(codes & 0x7F), codes >> 7)
        values = torch.where(codes & 0x7F > self.kind.largest, self.special(codes), values)
        return (values * each(scale.double(), self.group, n)).float()

    def encode(self, values: Tensor, sr_bits: Tensor | None = None, like: Tensor | None = None) -> Tensor:
        exponent = exponents(values, self.group, self.top)
        inside = scaled_down(values, exponent, self.group)
        codes = self.kind.round(inside, sr_bits) | sign_bits(inside) << 7
        return pack(self, values.numel(), codes.to(torch.uint8), exponent.to(torch.uint8))

    @staticmethod
    def special(codes: Tensor) -> Tensor:
        """torch's values of the codes above the largest finite one; never written here."""
        raise NotImplementedError


class FP8E4M3(_FP8):
    """1.008 bytes per parameter: 8 bits (4 exponent, 3 mantissa) and a scale byte for each 128.

    Relative error up to 2**-4 (2.7 % rms) for values from the group's largest / 14336 up, steps of its largest /
    114688 or finer below. A code is torch's float8_e4m3fn cast of value / scale, which is at most 448. A NaN or
    infinity makes its group NaN (scale byte 255); finite values above 2.97e38 saturate there.
    """

    name: ClassVar[str] = "fp8_e4m3"
    code: ClassVar[int] = 3
    kind: ClassVar[SmallFloat] = SmallFloat(mantissa=3, bias=7, largest=0x7E)
    top: ClassVar[int] = 8

    @staticmethod
    def special(codes: Tensor) -> Tensor:
        return torch.full(codes.shape, float("nan"), dtype=torch.float64, device="cpu")


class FP8E5M2(_FP8):
    """1.008 bytes per parameter: 8 bits (5 exponent, 2 mantissa) and a scale byte for each 128.

    Relative error up to 2**-3 (5.3 % rms) for values from the group's largest / 2**28 up. A code is torch's
    float8_e5m2 cast of value / scale, which is at most 57344. A NaN or infinity makes its group NaN (scale byte 255).
    """

    name: ClassVar[str] = "fp8_e5m2"
    code: ClassVar[int] = 4
    kind: ClassVar[SmallFloat] = SmallFloat(mantissa=2, bias=15, largest=0x7B)
    top: ClassVar[int] = 15

    @staticmethod
    def special(codes: Tensor) -> Tensor:
        infinite = torch.where(codes >> 7 != 0, -float("inf"), float("inf")).double()
        return torch.where(codes & 0x7F == 0x7C, infinite, float("nan"))


class FP8Plus8(FP8E4M3):
    """1.008 bytes per parameter streamed, 1 more held: a master of 16 bits, 4 of exponent and 11 of mantissa.

    Lanes see its nearest fp8_e4m3 (a half goes away from zero). The master's relative error is 2**-12 at most from the
    group's largest / 14336 up, its steps are the group's largest / 2**24 or finer below; scales, NaN and infinity as in
    fp8_e4m3.
    """

    name: ClassVar[str] = "fp8+8"
    code: ClassVar[int] = 11
    residual_bytes: ClassVar[int] = 1
    master: ClassVar[SmallFloat] = SmallFloat(mantissa=11, bias=7, largest=0x7E00)

    def encode(self, values: Tensor, sr_bits: Tensor | None = None, like: Tensor | None = None) -> Tensor:
        return self.split(values, sr_bits)[0]

    def join(self, stored: Tensor, residual: Tensor, numel: int | None = None) -> Tensor:
        n = residual.numel()
        codes = (values_plane(self, stored, n).to(torch.int64) << 8) + sign_extended(residual.to(torch.int64), 8)
        scale = power_of_two(scales_plane(self, stored, n).to(torch.int64))
        values = signed(self.master.value(codes & 0x7FFF), codes >> 15)
        return (values * each(scale.double(), self.group, n)).float()

    def split(self, values: Tensor, sr_bits: Tensor | None = None, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        exponent = exponents(values, self.group, self.top)
        inside = scaled_down(values, exponent, self.group)
        master = self.master.round(inside, sr_bits) | sign_bits(inside) << 15
        coarse = (master + 0x80 >> 8).to(torch.uint8)
        return pack(self, values.numel(), coarse, exponent.to(torch.uint8)), (master & 0xFF).to(torch.uint8)
