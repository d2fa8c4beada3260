"""bfloat16 storage: the upper half of a float32."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import Format, bits_of, to_bytes16


class BF16(Format):
    """2 bytes per parameter; relative error up to 2**-9 (0.17 % rms), the range of float32.

    Bit-equal to torch's cast. Above 3.39e38 nearest rounding gives infinity; infinities stay, every NaN becomes 0x7fc0.
    """

    name: ClassVar[str] = "bf16"
    code: ClassVar[int] = 1
    torch_dtype: ClassVar[torch.dtype] = torch.bfloat16
    value_bits: ClassVar[int] = 16

    def decode(self, stored: Tensor, numel: int | None = None) -> Tensor:
        return stored.clone().view(torch.bfloat16).to(torch.float32)  # a copy: the bytes may be at any address

    def encode(self, values: Tensor, sr_bits: Tensor | None = None, like: Tensor | None = None) -> Tensor:
        bits = bits_of(values)
        # one rule for normal and subnormal values: a carry out of the mantissa is the next exponent
        up = 0x7FFF + ((bits >> 16) & 1) if sr_bits is None else torch.where(values.isinf(), 0, sr_bits)
        codes = torch.where(values.isnan(), 0x7FC0, (bits + up) >> 16)
        return to_bytes16(codes)
