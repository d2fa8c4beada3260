"""Formats that hold a quantized checkpoint's own codes (`storage="kept"`). Nothing is encoded into them.

Their scales and minima are float32 where the libraries compute with float32, so that a decoded value is the library's
value before rounding to 16 bits. A file's float16 scale, or a product of two of its scales, is exact in float32.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels.float32 import fma
from .base import Format, from_bits
from .four_bits import FourBits
from .grouped import NAN_EXPONENT, each, float_scales, minima_plane, scales_plane, values_plane

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""OCP microscaling formats, MX v1.0, 5.3.3."""
_TWELFTHS = (0, 0.0625, 8, 12, 4, 6, 2, 3)
FP4_VALUES = (*(n / 12 for n in _TWELFTHS), *(-n / 12 + 0.0 for n in _TWELFTHS))
"""bitsandbytes' table; rounded to float32."""
GROUPS = (16, 32, 64, 128)


INVERSE_127 = 7.874015718698502e-3
"""1/127, rounded to float32."""


def numbers_of(table: tuple[float, ...], codes: Tensor) -> Tensor:
    """The table's entries for int64 codes, float32."""
    return torch.tensor(table, dtype=torch.float32, device="cpu")[codes]


def power_factors(exponents: Tensor) -> Tensor:
    """2 ** (e - 127) of bytes, float32; NaN for 255."""
    wide = exponents.to(torch.int64)
    bits = torch.where(wide == 0, 1 << 22, wide << 23)  # 2**-127 is subnormal
    return torch.where(wide == NAN_EXPONENT, float("nan"), from_bits(bits))


def not_encoded(fmt: Format) -> str:
    return f"{fmt.name} holds a checkpoint's own codes (storage='kept'): nothing is encoded into it"


class Kept(Format):
    """A format that only holds a checkpoint's own codes."""

    torch_dtype: ClassVar[torch.dtype] = torch.bfloat16
    scale_bytes: ClassVar[int] = 4
    encodes: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    trains_scales: ClassVar[bool] = False
    usual: ClassVar[int]
    """The group of the format without a suffix."""
    kind: ClassVar[str]

    def __init__(self, group: int | None = None) -> None:
        self.group = self.usual if group is None else group
        if self.group not in GROUPS:
            raise ConfigError(f"{self.kind} with groups of {group}: the kernels know groups of 16, 32, 64 and 128")
        self.name = self.kind + ("" if self.group == self.usual else f"_g{self.group}")  # type: ignore[misc]

    @property
    def kernel(self) -> str:
        return self.kind

    def encode(self, values: Tensor, sr_bits: Tensor | None = None, like: Tensor | None = None) -> Tensor:
        raise ConfigError(not_encoded(self))


class _FourBits(Kept, FourBits):
    trains_scales: ClassVar[bool] = False


class _AboveMinimum(Kept):
    minimum_bytes: ClassVar[int] = 4

    def above(self, codes: Tensor, stored: Tensor, numel: int) -> Tensor:
        """fma(code, scale, minimum): one rounding to float32."""
        minima = minima_plane(self, stored, numel).clone().view(torch.float32)
        wide = each(float_scales(self, stored, numel), self.group, numel)
        return torch.from_numpy(fma(codes.float().numpy(), wide.numpy(), each(minima, self.group, numel).numpy()))


class Int4F(_AboveMinimum, _FourBits):
    """0.5625 bytes per parameter (group 64: 0.625, 32: 0.75, 16: 1): codes 0..15 times a float32 scale, plus a float32
    minimum. GPTQ, AWQ, compressed-tensors up to 4 bits; GGUF's Q4_0, Q4_1, Q4_K, Q2_K."""

    kind: ClassVar[str] = "int4f"
    code: ClassVar[int] = 12
    usual: ClassVar[int] = 128

    def decode(self, stored: Tensor, numel: int | None = None) -> Tensor:
        n = self.size_of(stored, numel)
        return self.above(self.codes(stored, n), stored, n)


class Int8F(_AboveMinimum):
    """1.0625 bytes per parameter (group 64: 1.125, 32: 1.25): codes 0..255 times a float32 scale, plus a float32
    minimum. Asymmetric 8-bit GPTQ; GGUF's Q5_1, Q5_K."""

    kind: ClassVar[str] = "int8f"
    code: ClassVar[int] = 13
    usual: ClassVar[int] = 128
    value_bits: ClassVar[int] = 8

    def decode(self, stored: Tensor, numel: int | None = None) -> Tensor:
        n = self.size_of(stored, numel)
        return self.above(values_plane(self, stored, n), stored, n)


class FP8F(Kept):
    """1.031 bytes per parameter (group 64: 1.0625, 32: 1.125): float8_e4m3fn times a float32 scale for each 128. fp8
    whose scales are not powers of two."""

    kind: ClassVar[str] = "fp8f"
    code: ClassVar[int] = 14
    usual: ClassVar[int] = 128
    value_bits: ClassVar[int] = 8

    def decode(self, stored: Tensor, numel: int | None = None) -> Tensor:
        n = self.size_of(stored, numel)
        numbers = values_plane(self, stored, n).clone().view(torch.float8_e4m3fn).float()
        return numbers * each(float_scales(self, stored, n), self.group, n)


class Int8By127(Kept):
    """1.031 bytes per parameter (group 64: 1.062, 32: 1.125): codes -127..127 times a float32 scale, times 1/127,
    rounded to float32 after each product. bitsandbytes' LLM.int8, whose scale is the largest value of a row."""

    kind: ClassVar[str] = "int8_127"
    code: ClassVar[int] = 20
    usual: ClassVar[int] = 128
    value_bits: ClassVar[int] = 8

    def decode(self, stored: Tensor, numel: int | None = None) -> Tensor:
        n = self.size_of(stored, numel)
        numbers = values_plane(self, stored, n).view(torch.int8).float()
        return numbers * each(float_scales(self, stored, n), self.group, n) * INVERSE_127


class _Table(_FourBits):
    table: ClassVar[tuple[float, ...]]

    def decode(self, stored: Tensor, numel: int | None = None) -> Tensor:
        n = self.size_of(stored, numel)
        return numbers_of(self.table, self.codes(stored, n)) * each(self.factors(stored, n), self.group, n)

    def factors(self, stored: Tensor, numel: int) -> Tensor:
        """The factor of each group's numbers, float32 [groups]."""
        return float_scales(self, stored, numel)


class MXFP4(_Table):
    """0.531 bytes per parameter: 4-bit floats (e2m1) times a power of two, a byte for each 32 of them. mxfp4 along the
    inputs; GGUF's MXFP4."""

    kind: ClassVar[str] = "mxfp4"
    code: ClassVar[int] = 15
    usual: ClassVar[int] = 32
    scale_bytes: ClassVar[int] = 1
    table: ClassVar[tuple[float, ...]] = E2M1_VALUES

    def factors(self, stored: Tensor, numel: int) -> Tensor:
        return power_factors(scales_plane(self, stored, numel))


class NVFP4(_Table):
    """0.75 bytes per parameter: 4-bit floats (e2m1) times a float32 scale for each 16: the file's two, multiplied."""

    kind: ClassVar[str] = "nvfp4"
    code: ClassVar[int] = 16
    usual: ClassVar[int] = 16
    table: ClassVar[tuple[float, ...]] = E2M1_VALUES


class FP4(_Table):
    """0.5625 bytes per parameter (group 32: 0.625): bitsandbytes' 4-bit floats times a float32 scale for each 64."""

    kind: ClassVar[str] = "fp4"
    code: ClassVar[int] = 17
    usual: ClassVar[int] = 64
    table: ClassVar[tuple[float, ...]] = FP4_VALUES
