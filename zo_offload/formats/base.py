"""The interface of storage formats: bytes <-> float32 values, in one, two or three planes.

streamed part   values, or the coarse half of a split master; then, in formats with groups, from the next multiple of
                64 bytes, one scale (and one minimum) per group
residual part   only in split formats: the difference from the coarse plane to the master; read when updates fold
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError

PLANE_ALIGN = 64


class Format:
    """One way to store a parameter; the obvious torch version of csrc/formats.h.

    `encode` rounds to nearest (ties to even), or stochastically when given `sr_bits`: 16 random bits per element that
    are compared with the dropped part, so a value is rounded up with a probability equal to that part. Values that a
    format can hold exactly are stored exactly in either mode.

    NaN and infinity: formats without groups keep infinities, and store every NaN as the one quiet NaN of the format.
    In a format with groups one such value makes its whole group NaN, by a NaN scale: nothing saturates silently.

    Groups are `group` consecutive elements of the flattened parameter, counted from its first; the last may be short.
    A group has one scale, and one minimum; two formats of checkpoints' codes differ (`banded.py`): there a group is the
    elements that several scales belong to.
    """

    name: ClassVar[str]
    code: ClassVar[int]
    """The format's integer in csrc/formats.h."""
    torch_dtype: ClassVar[torch.dtype]
    """The dtype of such parameters in exported checkpoints."""
    value_bits: ClassVar[int]
    """Bits per element in the values plane."""
    group: int = 0
    """Elements of a group; 0: no scales. A parameter's pieces and ranges begin at multiples of it."""
    across: int = 0
    """Elements of a row, in a format that needs to know (`banded.py`)."""
    scale_bytes: ClassVar[int] = 0
    minimum_bytes: ClassVar[int] = 0
    residual_bytes: ClassVar[int] = 0
    """Bytes per element in the residual plane; 0: not a split format."""
    encodes: ClassVar[bool] = True
    """False: it holds only a checkpoint's own codes."""
    trains: ClassVar[bool] = True
    """False: values are encoded once and never rewritten; other parameters train, or the scales."""
    rounds: ClassVar[bool] = True
    """False: every float32 is stored exactly, so that both ways of rounding are the same."""
    trains_scales: ClassVar[bool] = False
    """True: float32 scales that `fused_pass(target="scales")` can train."""
    code_rms: ClassVar[float] = 0.0
    """In formats that train scales: the mean change of a group's weights when its scale changes by 1, that is the root
    mean square of the codes of normally distributed weights."""
    centred: bool = False
    """A group has a scale and a centre, not a minimum."""

    @property
    def kernel(self) -> str:
        """The name of the kernels of this format's code (csrc/cuda_kernels.h)."""
        return self.name.replace("+", "_")

    @property
    def kernel_group(self) -> int:
        """Elements per scale as the kernels take it; 0: none, or the scales are not of neighbours."""
        return self.group

    @property
    def about_centre(self) -> Format:
        """The format with the same codes in which a changed scale moves each group about its centre; may be itself."""
        return self

    def values_nbytes(self, numel: int) -> int:
        return -(-numel * self.value_bits // 8)

    def num_groups(self, numel: int) -> int:
        return -(-numel // self.group) if self.group else 0

    def scales_nbytes(self, numel: int) -> int:
        """Bytes of the scales of as many elements, from a group's first."""
        return self.scale_bytes * self.num_groups(numel)

    def minima_nbytes(self, numel: int) -> int:
        """Bytes of the minima of as many elements, from a group's first."""
        return self.minimum_bytes * self.num_groups(numel)

    def scales_span(self, numel: int) -> tuple[int, int]:
        """(offset, nbytes) of the scales in the streamed part."""
        start = -(-self.values_nbytes(numel) // PLANE_ALIGN) * PLANE_ALIGN
        return start, self.scales_nbytes(numel)

    def minima_span(self, numel: int) -> tuple[int, int]:
        """(offset, nbytes) of the minima, directly after the scales."""
        return sum(self.scales_span(numel)), self.minima_nbytes(numel)

    def scales_of(self, each: Tensor) -> Tensor:
        """The plane of scales, from the scale of each element."""
        return each[:: self.group]

    def minima_of(self, each: Tensor) -> Tensor:
        """The plane of minima, from the minimum of each element."""
        return each[:: self.group]

    def nbytes(self, numel: int) -> int:
        """Bytes of the streamed part of `numel` elements."""
        return sum(self.minima_span(numel)) if self.group else self.values_nbytes(numel)

    def residual_nbytes(self, numel: int) -> int:
        """Bytes of the residual part; 0 unless split."""
        return self.residual_bytes * numel

    def decode(self, stored: Tensor, numel: int | None = None) -> Tensor:
        """Streamed part, uint8 [nbytes(n)] -> float32 [n], as lanes see it. Formats with groups need `numel`."""
        raise NotImplementedError

    def encode(self, values: Tensor, sr_bits: Tensor | None = None, like: Tensor | None = None) -> Tensor:
        """float32 [n] (and int32 [n] in [0, 65536) for stochastic rounding) -> streamed part, uint8 [nbytes(n)].

        like: the streamed part of these values before; its scales are kept if the format keeps scales.
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
    """The inverse of `to_bytes16`; the bytes may be at any address."""
    return stored.clone().view(torch.int16).to(torch.int64) & 0xFFFF


def sign_extended(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes of `bits` bits, read as signed numbers."""
    return torch.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes)
