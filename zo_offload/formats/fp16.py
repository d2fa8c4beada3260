"""IEEE half storage: finer than bf16 near one, but 65504 is its largest value and 6e-8 its smallest step."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import Format, bits_of, to_bytes16

_SMALLEST_NORMAL = 2.0**-14


class FP16(Format):
    """2 bytes per parameter; relative error up to 2**-12 (0.02 % rms) from 6.1e-5 up, steps of 6e-8 below.

    Bit-equal to torch's cast. From 65520 up nearest rounding gives infinity; infinities stay, every NaN becomes 0x7e00.
    """

    name: ClassVar[str] = "fp16"
    code: ClassVar[int] = 2
    torch_dtype: ClassVar[torch.dtype] = torch.float16
    value_bits: ClassVar[int] = 16

    def decode(self, stored: Tensor, numel: int | None = None) -> Tensor:
        return stored.clone().view(torch.float16).to(torch.float32)  # a copy: the bytes may be at any address

    def encode(self, values: Tensor, sr_bits: Tensor | None = None, like: Tensor | None = None) -> Tensor:
        if sr_bits is None:
            codes = values.to(torch.float16).view(torch.int16).to(torch.int64) & 0xFFFF
        else:
            codes = _stochastic(values, sr_bits.to(torch.int64))
        return to_bytes16(torch.where(values.isnan(), 0x7E00, codes))


def _stochastic(values: Tensor, sr_bits: Tensor) -> Tensor:
    bits = bits_of(values)
    magnitude, sign = bits & 0x7FFFFFFF, (bits >> 16) & 0x8000
    # normal: 13 bits are dropped, against the upper 13 random bits; the exponent bias goes from 127 to 15
    normal = (magnitude - (112 << 23) + (sr_bits >> 3)) >> 13
    # subnormal: count steps of 2**-24 with 16 fractional bits (lower bits are cut) against 16 random bits
    small = torch.where(values.abs() < _SMALLEST_NORMAL, values.abs(), 0.0)
    subnormal = ((small * 2.0**40).to(torch.int64) + sr_bits) >> 16
    code = torch.where(values.abs() < _SMALLEST_NORMAL, subnormal, normal)
    return torch.clamp(code, max=0x7C00) | sign
