"""int8 and int8+8: integers times a float32 scale for each 128 of them.

The scale is the group's largest value / 127 when a parameter is first encoded. Writing updates back keeps it, so that
unchanged values keep their codes, until the group's largest value leaves the grid; then it is set from that value.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import Format, from_bits, sign_extended
from .grouped import INFINITE, LEAST_SCALE, each, float_scales, largest_bits, pack, values_plane

_INVERSE_127 = torch.tensor(1 / 127, dtype=torch.float32, device="cpu")
_CODE_RMS = {128: 45.7, 64: 49.9, 32: 55.3, 16: 62.1}
LARGEST = 32639 / 256  # in scales: still rounds to 127, and to the largest 16-bit master


class _Integers(Format):
    torch_dtype: ClassVar[torch.dtype] = torch.bfloat16
    value_bits: ClassVar[int] = 8
    group: int = 128
    scale_bytes: ClassVar[int] = 4

    def decode(self, stored: Tensor, numel: int | None = None) -> Tensor:
        n = self.size_of(stored, numel)
        codes = sign_extended(values_plane(self, stored, n).to(torch.int64), 8)
        return codes.float() * each(float_scales(self, stored, n), self.group, n)

    def grid(self, values: Tensor, like: Tensor | None) -> Tensor:
        """The scale of each group, float32: that of `like` if every value fits it."""
        bits = largest_bits(values, self.group)
        largest = from_bits(bits)
        fresh = (largest * _INVERSE_127).clamp(min=LEAST_SCALE)
        if like is not None:
            old = float_scales(self, like, values.numel())
            fresh = torch.where(largest <= old * LARGEST, old, fresh)
        return torch.where(bits >= INFINITE, float("nan"), fresh)

    def rounded(self, values: Tensor, scales: Tensor, limit: float, fraction: int, sr_bits: Tensor | None) -> Tensor:
        """values / scale as whole numbers, at most `limit`; stochastic rounding sees `fraction` bits below the point.

        Those bits are rounded, not cut: a value on the grid divided by scale may be an ulp off a whole number.
        """
        inverse = each(1.0 / scales, self.group, values.numel())
        steps = torch.where(inverse.isnan(), 0.0, values * inverse).clamp(-limit, limit).double()
        if sr_bits is None:
            return steps.round().to(torch.int64)
        fine = (steps * float(1 << fraction)).round().to(torch.int64)
        return fine + (sr_bits.to(torch.int64) >> (16 - fraction)) >> fraction


class Int8(_Integers):
    """1.031 bytes per parameter: codes -127..127, and a float32 scale for each 128.

    Error up to half a scale: the group's largest value / 254 (0.65 % rms of normal weights). A NaN or infinity makes
    its group NaN, by the scale; values beyond the grid change the scale instead of saturating.
    """

    code: ClassVar[int] = 5
    trains_scales: ClassVar[bool] = True

    def __init__(self, group: int = 128) -> None:
        """group: 64, 32 and 16 are for checkpoints whose codes are in such groups."""
        if group not in _CODE_RMS:
            raise ConfigError(f"int8 with groups of {group}: the kernels know groups of 16, 32, 64 and 128")
        self.group = group
        self.code_rms = _CODE_RMS[group]  # type: ignore[misc]
        self.name = "int8" if group == 128 else f"int8_g{group}"  # type: ignore[misc]

    @property
    def kernel(self) -> str:
        return "int8"  # the group is an argument

    def encode(self, values: Tensor, sr_bits: Tensor | None = None, like: Tensor | None = None) -> Tensor:
        scales = self.grid(values, like)
        codes = self.rounded(values, scales, 127.0, 12, sr_bits)
        return pack(self, values.numel(), codes.to(torch.int8).view(torch.uint8), scales.view(torch.uint8))


class Int8Plus8(_Integers):
    """1.031 bytes per parameter streamed, 1 more held: a master of 16-bit integers in steps of scale / 256.

    Lanes see the nearest int8 (a half goes up). The master's error is at most the group's largest value / 65024; NaN
    and infinity as in int8.
    """

    name: ClassVar[str] = "int8+8"
    code: ClassVar[int] = 10
    residual_bytes: ClassVar[int] = 1

    def encode(self, values: Tensor, sr_bits: Tensor | None = None, like: Tensor | None = None) -> Tensor:
        return self.split(values, sr_bits, like)[0]

    def join(self, stored: Tensor, residual: Tensor, numel: int | None = None) -> Tensor:
        n = residual.numel()
        coarse = sign_extended(values_plane(self, stored, n).to(torch.int64), 8)
        master = (coarse << 8) + sign_extended(residual.to(torch.int64), 8)
        return master.float() * each(float_scales(self, stored, n) / 256, self.group, n)

    def split(self, values: Tensor, sr_bits: Tensor | None = None, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scales = self.grid(values, like)
        master = self.rounded(values, scales / 256, 32639.0, 6, sr_bits)
        coarse = (master + 128 >> 8).to(torch.int8).view(torch.uint8)
        stored = pack(self, values.numel(), coarse, scales.view(torch.uint8))
        return stored, (master & 0xFF).to(torch.uint8)
