"""Floats of fewer bits than 16, and of 16 with few exponent bits: magnitude codes <-> values, sign apart.

A code is exponent << mantissa | mantissa bits; exponent 0 is subnormal. Rounding never gives infinity: it stops at the
largest code given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import bits_of


@dataclass(frozen=True)
class SmallFloat:
    mantissa: int
    """Mantissa bits stored."""
    bias: int
    largest: int
    """Largest finite code."""

    def round(self, values: Tensor, sr_bits: Tensor | None) -> Tensor:
        """Finite float32 [n] -> magnitude codes, int64 [n]; nearest even, or against 16 random bits."""
        magnitude = bits_of(values) & 0x7FFFFFFF
        drop = 23 - self.mantissa
        normal = magnitude - ((127 - self.bias) << 23)
        least = 2.0 ** (1 - self.bias)  # smallest normal value
        small = torch.where(values.abs() < least, values.abs(), 0.0).double()
        steps = small * 2.0 ** (self.bias - 1 + self.mantissa)  # in subnormal steps, exact
        if sr_bits is None:
            normal = (normal + (1 << (drop - 1)) - 1 + ((normal >> drop) & 1)) >> drop
            subnormal = steps.round().to(torch.int64)
        else:
            random = sr_bits.to(torch.int64)
            normal = (normal + ((random << 7) >> (23 - drop))) >> drop  # the uppermost of `drop` random bits
            subnormal = ((steps * 65536.0).to(torch.int64) + random) >> 16  # lower bits are cut
        return torch.where(values.abs() < least, subnormal, normal).clamp(max=self.largest)

    def value(self, codes: Tensor) -> Tensor:
        """Magnitude codes -> float64 [n]."""
        exponent, fraction = codes >> self.mantissa, codes & ((1 << self.mantissa) - 1)
        hidden = (exponent > 0).to(torch.int64) << self.mantissa
        power = exponent.clamp(min=1) - self.bias - self.mantissa
        return torch.ldexp((fraction + hidden).double(), power)


def sign_bits(values: Tensor) -> Tensor:
    """1 where the sign bit is set, int64."""
    return bits_of(values) >> 31


def signed(magnitude: Tensor, sign: Tensor) -> Tensor:
    """float64 magnitudes with their signs; keeps -0."""
    return torch.where(sign != 0, -magnitude, magnitude)
