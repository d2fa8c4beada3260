"""bf16+16 and bf16+8: a float32 master, or its upper 24 bits, as a streamed bfloat16 and a residual.

The coarse half is the master rounded to bfloat16, *half away from zero*: with ties to even two masters would share
one pair of halves. The residual is the master's low bits; read as a signed number it is the rounding error, so
master = coarse << bits + residual, an integer sum on the bit patterns.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import Format, bits_of, from_bits, from_bytes16, sign_extended, to_bytes16


class _SplitBF16(Format):
    value_bits: ClassVar[int] = 16

    def decode(self, stored: Tensor, numel: int | None = None) -> Tensor:
        return from_bits(from_bytes16(stored) << 16)

    def encode(self, values: Tensor, sr_bits: Tensor | None = None, like: Tensor | None = None) -> Tensor:
        return self.split(values, sr_bits)[0]


class BF16Plus16(_SplitBF16):
    """2 bytes per parameter streamed, 2 more held: an exact float32 master in either rounding mode.

    Lanes see the master to 2**-9. Infinities stay, every NaN becomes 0x7fc00000. A finite master above 3.39e38 streams
    as infinity; `encode_values` refuses it, a fold keeps it exactly.
    """

    name: ClassVar[str] = "bf16+16"
    code: ClassVar[int] = 8
    torch_dtype: ClassVar[torch.dtype] = torch.float32
    residual_bytes: ClassVar[int] = 2
    rounds: ClassVar[bool] = False

    def join(self, stored: Tensor, residual: Tensor, numel: int | None = None) -> Tensor:
        return from_bits((from_bytes16(stored) << 16) + sign_extended(from_bytes16(residual), 16))

    def split(self, values: Tensor, sr_bits: Tensor | None = None, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        master = torch.where(values.isnan(), 0x7FC00000, bits_of(values))
        return to_bytes16((master + 0x8000) >> 16), to_bytes16(master & 0xFFFF)


class BF16Plus8(_SplitBF16):
    """2 bytes per parameter streamed, 1 more held: a master of 24 bits (16 of mantissa), relative error up to 2**-17.

    Lanes see the master to 2**-9. Infinities stay, every NaN becomes 0x7fc00000; nearest rounding gives infinity from
    3.4028e38 up.
    """

    name: ClassVar[str] = "bf16+8"
    code: ClassVar[int] = 9
    torch_dtype: ClassVar[torch.dtype] = torch.bfloat16
    residual_bytes: ClassVar[int] = 1

    def join(self, stored: Tensor, residual: Tensor, numel: int | None = None) -> Tensor:
        return from_bits(((from_bytes16(stored) << 8) + sign_extended(residual.to(torch.int64), 8)) << 8)

    def split(self, values: Tensor, sr_bits: Tensor | None = None, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        bits = bits_of(values)
        up = 0x7F + ((bits >> 8) & 1) if sr_bits is None else torch.where(values.isinf(), 0, sr_bits >> 8)
        master = torch.where(values.isnan(), 0x7FC000, (bits + up) >> 8)
        return to_bytes16((master + 0x80) >> 8), (master & 0xFF).to(torch.uint8)
