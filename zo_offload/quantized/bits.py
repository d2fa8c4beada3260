"""Unpacks codes and small floats."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], device="cpu")
"""Values of the 4-bit float of the OCP microscaling formats (MX v1.0, 5.3.3)."""


def stream(words: Tensor, bits: int) -> Tensor:
    """[..., n] words -> [..., codes] int16: each row a little-endian stream of codes of `bits` bits, 1 .. 8."""
    raw = words.contiguous().view(torch.uint8)
    if bits == 8:
        return raw.to(torch.int16)
    if bits in (2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device="cpu")
        return (raw.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(-2).to(torch.int16)
    single = np.unpackbits(raw.numpy(), axis=-1, bitorder="little")
    count = single.shape[-1] // bits
    grouped = single[..., : count * bits].reshape(*single.shape[:-1], count, bits)
    return torch.from_numpy(grouped @ (1 << np.arange(bits, dtype=np.int16)))


def padded_words(words: Tensor, bits: int) -> Tensor:
    """The same if each 32-bit word holds 32 // bits codes and its upper bits are unused."""
    each = 32 // bits
    shifts = torch.arange(each, dtype=torch.int64, device="cpu") * bits
    return (words.to(torch.int64).unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(-2).to(torch.int16)


def halves(raw: Tensor, *, high_first: bool = False) -> Tensor:
    """[..., n] bytes -> [..., 2 n] codes 0 .. 15 (uint8), the low half of a byte first."""
    both = [raw >> 4, raw & 15] if high_first else [raw & 15, raw >> 4]
    return torch.stack(both, -1).flatten(-2)


def nibbles(raw: Tensor) -> Tensor:
    """The same as indices of a table (int64)."""
    return halves(raw).long()


def powers(exponents: Tensor) -> Tensor:
    """E8M0 bytes e as 2 ** (e - 127), float32; 255 is NaN."""
    e = exponents.view(torch.uint8).to(torch.int32)
    # 2 ** -127 is a subnormal
    bits = torch.where(e == 0, 1 << 22, torch.where(e == 255, 0x7FC00000, e << 23))
    return bits.to(torch.int32).view(torch.float32)


def exponents(factors: Tensor) -> Tensor:
    """The inverse of `powers`, for normal powers of two."""
    return (factors.view(torch.int32) >> 23 & 255).to(torch.uint8)


def scales(raw: Tensor) -> Tensor:
    """Scales of any dtype in files, as float32: bytes are exponents."""
    if raw.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return powers(raw)
    return raw.float()
