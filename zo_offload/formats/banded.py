"""Kept formats in which several scales belong together: a *band* of elements is their group.

`kept.py` has the others. A band has as many bytes of scales whether it is whole or, at a parameter's end, short. So
parameters can be cut into pieces between bands, like those of any format between groups.
"""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import Format
from .four_bits import FourBits
from .grouped import minima_plane, scales_plane
from .kept import E2M1_VALUES, Kept, numbers_of, power_factors

ROWS = 32
"""Rows of a band of mxfp4 across rows: as many elements share a scale."""
NUMEL = 1024
"""Elements of a band of NVFP4."""
_EACH = 16


class _Banded(Kept, FourBits):
    trains_scales: ClassVar[bool] = False
    scale_bytes: ClassVar[int] = 1
    scales_a_band: int

    def scales_nbytes(self, numel: int) -> int:
        return self.scales_a_band * self.num_groups(numel)

    def decode(self, stored: Tensor, numel: int | None = None) -> Tensor:
        n = self.size_of(stored, numel)
        return numbers_of(E2M1_VALUES, self.codes(stored, n)) * self.factors(stored, n)

    def factors(self, stored: Tensor, numel: int) -> Tensor:
        """The factor of each element, float32 [numel]."""
        raise NotImplementedError


class MXFP4Across(_Banded):
    """0.531 bytes per parameter: mxfp4 whose groups lie across the rows of a matrix, as in gpt-oss.

    A scale belongs to 32 elements of one column, in rows next to each other. across: the elements of a row, a multiple
    of 8. A band is 32 rows, and its scales are one row, a byte each: 2 ** (e - 127).
    """

    kind: ClassVar[str] = "mxfp4_across"
    code: ClassVar[int] = 18

    def __init__(self, across: int) -> None:
        if across <= 0 or across % 8:
            raise ConfigError(f"{self.kind} in rows of {across} elements: a multiple of 8 is expected")
        self.across, self.group, self.scales_a_band = across, ROWS * across, across
        self.name = f"{self.kind}_{across}"  # type: ignore[misc]

    @property
    def kernel_group(self) -> int:
        return 0

    def factors(self, stored: Tensor, numel: int) -> Tensor:
        rows = power_factors(scales_plane(self, stored, numel)).view(-1, 1, self.across)
        return rows.expand(-1, ROWS, -1).reshape(-1)[:numel]

    def scales_of(self, each: Tensor) -> Tensor:
        return each.view(-1, ROWS, self.across)[:, 0].reshape(-1)


class NVFP4Two(_Banded):
    """0.566 bytes per parameter: NVFP4 with both of its scales, a float8_e4m3fn for each 16 elements and a float32.

    The product of the two, rounded to float32, is the factor of the numbers (e2m1). The float32 is stored once for each
    1024 elements; if it is negative, the byte is divided by its magnitude, as compressed-tensors does.
    """

    kind: ClassVar[str] = "nvfp4_two"
    name: ClassVar[str] = "nvfp4_two"
    code: ClassVar[int] = 19
    minimum_bytes: ClassVar[int] = 4
    group: int = NUMEL
    scales_a_band: int = NUMEL // _EACH

    def __init__(self) -> None: ...

    @property
    def kernel_group(self) -> int:
        return _EACH

    def factors(self, stored: Tensor, numel: int) -> Tensor:
        numbers = scales_plane(self, stored, numel).clone().view(torch.float8_e4m3fn).float()
        wholes = minima_plane(self, stored, numel).clone().view(torch.float32).repeat_interleave(self.scales_a_band)
        factors = torch.where(wholes < 0, numbers / -wholes, numbers * wholes)
        return factors.repeat_interleave(_EACH)[:numel]

    def scales_of(self, each: Tensor) -> Tensor:
        scales = each[::_EACH]
        return torch.cat([scales, scales.new_zeros(-len(scales) % self.scales_a_band)])


@functools.cache
def mxfp4_across(width: int) -> Format:
    """The format for rows of as many elements, always the same object."""
    return MXFP4Across(width)
