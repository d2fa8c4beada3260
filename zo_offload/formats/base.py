"""What a storage format is: bytes <-> float32 values."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Format(Protocol):
    """One way to store a parameter; the obvious torch version of csrc/formats.h.

    `encode` rounds to nearest (ties to even), or stochastically when given `sr_bits`: 16 random bits an element that
    are compared with the part to be dropped, so a value goes up with a chance equal to that part. Infinities stay
    infinite and every NaN is stored as the one quiet NaN of the format. What a format can hold exactly is stored
    exactly in either mode.
    """

    name: ClassVar[str]
    code: ClassVar[int]
    """The integer csrc/formats.h knows this format by."""
    torch_dtype: ClassVar[torch.dtype]
    """The dtype a parameter so stored has in a checkpoint."""

    def nbytes(self, numel: int) -> int:
        """Bytes of `numel` elements."""
        ...

    def decode(self, stored: Tensor) -> Tensor:
        """uint8 [nbytes(n)] -> float32 [n], always exact."""
        ...

    def encode(self, values: Tensor, sr_bits: Tensor | None) -> Tensor:
        """float32 [n] (and int32 [n] in [0, 65536) for stochastic rounding) -> uint8 [nbytes(n)]."""
        ...


def bits_of(values: Tensor) -> Tensor:
    """float32 values as their bit patterns, int64 in [0, 2**32): shifts and sums cannot wrap."""
    return values.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def to_bytes16(codes: Tensor) -> Tensor:
    """16-bit codes held in int64 -> uint8, little endian."""
    wrapped = torch.where(codes >= 0x8000, codes - 0x10000, codes)
    return wrapped.to(torch.int16).view(torch.uint8)
