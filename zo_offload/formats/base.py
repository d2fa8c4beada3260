"""What a storage format is: bytes <-> float32 values, in one, two or three planes.

streamed part   values, or the coarse half of a split master; then, from the next multiple of 64 bytes, one scale
                a group (and one minimum a group), where there are groups
residual part   of split formats only: what the coarse plane leaves out; read where updates are folded
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError

PLANE_ALIGN = 64


class Format:
    """One way to store a parameter; the obvious torch version of csrc/formats.h.

    `encode` rounds to nearest (ties to even), or stochastically when given `sr_bits`: 16 random bits an element that
    are compared with the part to be dropped, so a value goes up with a chance equal to that part. What a format can
    hold exactly is stored exactly in either mode.

    NaN and infinity: formats without groups keep infinities, and store every NaN as the one quiet NaN of the format.
    In a format with groups one such value makes its whole group NaN, by a NaN scale: nothing is saturated in silence.

    Groups are `group` consecutive elements of the flattened parameter, counted from its first; the last may be short.
    """

    name: ClassVar[str]
    code: ClassVar[int]
    """The integer csrc/formats.h knows this format by."""
    torch_dtype: ClassVar[torch.dtype]
    """The dtype a parameter so stored has in a checkpoint that is exported."""
    value_bits: ClassVar[int]
    """Bits an element in the values plane."""
    group: int = 0
    """Elements a scale; 0: no scales."""
    scale_bytes: ClassVar[int] = 0
    minimum_bytes: ClassVar[int] = 0
    residual_bytes: ClassVar[int] = 0
    """Bytes an element in the residual plane; 0: not a split format."""
    encodes: ClassVar[bool] = True
    """False: it holds a checkpoint's own codes, and nothing else."""
    trains: ClassVar[bool] = True
    """False: values are encoded once and never rewritten; what trains is elsewhere, or the scales."""
    trains_scales: ClassVar[bool] = False
    """True: float32 scales that `fused_pass(target="scales")` can train."""
    code_rms: ClassVar[float] = 0.0
    """Of formats that train scales: how much the weights of a group change, on average, where its scale changes by 1:
    the root mean square of the codes that normally distributed weights get."""
    centred: bool = False
    """What is kept beside a group's scale is its centre, not its minimum."""

    @property
    def kernel(self) -> str:
        """What the kernels of this format's code are called (csrc/cuda_kernels.h)."""
        return self.name.replace("+", "_")

    @property
    def about_centre(self) -> Format:
        """The same codes such that a changed scale moves each group about its centre; itself, where it does."""
        return self

    def values_nbytes(self, numel: int) -> int:
        return -(-numel * self.value_bits // 8)

    def num_groups(self, numel: int) -> int:
        return -(-numel // self.group) if self.group else 0

    def scales_span(self, numel: int) -> tuple[int, int]:
        """(offset, nbytes) of the scales in the streamed part."""
        start = -(-self.values_nbytes(numel) // PLANE_ALIGN) * PLANE_ALIGN
        return start, self.scale_bytes * self.num_groups(numel)

    def minima_span(self, numel: int) -> tuple[int, int]:
        """(offset, nbytes) of the minima, right behind the scales."""
        return sum(self.scales_span(numel)), self.minimum_bytes * self.num_groups(numel)

    def nbytes(self, numel: int) -> int:
        """Bytes of the streamed part of `numel` elements."""
        return sum(self.minima_span(numel)) if self.group else self.values_nbytes(numel)

    def residual_nbytes(self, numel: int) -> int:
        """Bytes of the residual part; 0 unless split."""
        return self.residual_bytes * numel

    def decode(self, stored: Tensor, numel: int | None = None) -> Tensor:
        """Streamed part, uint8 [nbytes(n)] -> float32 [n], what lanes see. `numel` is needed where there are groups."""
        raise NotImplementedError

    def encode(self, values: Tensor, sr_bits: Tensor | None = None, like: Tensor | None = None) -> Tensor:
        """float32 [n] (and int32 [n] in [0, 65536) for stochastic rounding) -> streamed part, uint8 [nbytes(n)].

        like: the streamed part these values were made from, whose scales are kept where the format keeps them.
        """
        raise NotImplementedError

    def join(self, stored: Tensor, residual: Tensor, numel: int | None = None) -> Tensor:
        """Both parts of a split format -> float32 [n], the master."""
        raise ConfigError(f"{self.name} is not a split format: it has no residual to join")

    def split(self, values: Tensor, sr_bits: Tensor | None = None, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """float32 [n], rounded to the master's width -> (streamed part, residual part)."""
        raise ConfigError(f"{self.name} is not a split format: it has no residual to split off")

    def size_of(self, stored: Tensor, numel: int | None) -> int:
        """Elements in a streamed part."""
        if numel is None and self.group:
            raise ConfigError(f"{self.name}: the number of elements does not follow from the bytes; give numel")
        return stored.numel() * 8 // self.value_bits if numel is None else numel


def bits_of(values: Tensor) -> Tensor:
    """float32 values as their bit patterns, int64 in [0, 2**32): shifts and sums cannot wrap."""
    return values.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def from_bits(bits: Tensor) -> Tensor:
    """The inverse of `bits_of`."""
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def to_bytes16(codes: Tensor) -> Tensor:
    """16-bit codes held in int64 -> uint8, little endian."""
    wrapped = torch.where(codes >= 0x8000, codes - 0x10000, codes)
    return wrapped.to(torch.int16).view(torch.uint8)


def from_bytes16(stored: Tensor) -> Tensor:
    """The inverse of `to_bytes16`; the bytes may lie at any address."""
    return stored.clone().view(torch.int16).to(torch.int64) & 0xFFFF


def sign_extended(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes of `bits` bits as the signed numbers they mean."""
    return torch.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes)
