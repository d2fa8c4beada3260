"""Parts shared by the formats with groups: planes in one byte range, group maxima, power-of-two scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Format, bits_of, from_bits

LEAST_SCALE = 2.0**-100
"""The smallest float32 scale: its inverse is finite and a 256th of it is not subnormal."""
INFINITE = 0x7F800000  # as bits; those of NaN are larger
NAN_EXPONENT = 0xFF
LARGEST_EXPONENT = 246  # scale 2**119: 256 times it is still finite


def padded(values: Tensor, group: int) -> Tensor:
    """[n] -> [groups, group]; the last group is padded with zeros."""
    return F.pad(values, (0, -values.numel() % group)).view(-1, group)


def each(per_group: Tensor, group: int, numel: int) -> Tensor:
    """[groups] -> [n]: the value of every element's group."""
    return per_group.repeat_interleave(group)[:numel]


def largest_bits(values: Tensor, group: int) -> Tensor:
    """The largest magnitude of each group, as bits: NaN > infinity > all numbers. int64 [groups]."""
    return padded(bits_of(values) & 0x7FFFFFFF, group).amax(1)


def exponents(values: Tensor, group: int, top: int) -> Tensor:
    """The scale of each group as a biased exponent b, for 2**(b - 127): the least with max <= 1.75 * 2**top * scale.

    1.75 * 2**top is the largest value of the scaled format (1.75 * 2**8 = 448, 1.75 * 2**15 = 57344).
    """
    largest = largest_bits(values, group)
    fitting = ((largest + 0x1FFFFF) >> 23) - top  # one more if the mantissa is above 1.75
    return torch.where(largest >= INFINITE, NAN_EXPONENT, fitting.clamp(1, LARGEST_EXPONENT))


def power_of_two(exponent: Tensor) -> Tensor:
    """2**(b - 127) as float32; NaN for 255."""
    return torch.where(exponent == NAN_EXPONENT, float("nan"), from_bits(exponent << 23))


def scaled_down(values: Tensor, exponent: Tensor, group: int) -> Tensor:
    """values / scale; 0 in a group whose scale is NaN."""
    inverse = each(from_bits((254 - exponent.clamp(max=LARGEST_EXPONENT)) << 23), group, values.numel())
    lost = each(exponent == NAN_EXPONENT, group, values.numel())
    return torch.where(lost, 0.0, values * inverse)


def pack(fmt: Format, numel: int, codes: Tensor, scales: Tensor, minima: Tensor | None = None) -> Tensor:
    """Planes as uint8 -> the streamed part."""
    stored = torch.zeros(fmt.nbytes(numel), dtype=torch.uint8, device=codes.device)
    stored[: codes.numel()] = codes
    for (start, size), plane in ((fmt.scales_span(numel), scales), (fmt.minima_span(numel), minima)):
        if plane is not None:
            stored[start : start + size] = plane
    return stored


def values_plane(fmt: Format, stored: Tensor, numel: int) -> Tensor:
    return stored[: fmt.values_nbytes(numel)]


def scales_plane(fmt: Format, stored: Tensor, numel: int) -> Tensor:
    start, size = fmt.scales_span(numel)
    return stored[start : start + size]


def minima_plane(fmt: Format, stored: Tensor, numel: int) -> Tensor:
    start, size = fmt.minima_span(numel)
    return stored[start : start + size]


def float_scales(fmt: Format, stored: Tensor, numel: int) -> Tensor:
    """A format's float32 scales; a copy."""
    return scales_plane(fmt, stored, numel).clone().view(torch.float32)


def cut(fmt: Format, stored: Tensor, numel: int, start: int, end: int) -> Tensor:
    """The streamed part of elements [start, end), as a copy; `start` is a multiple of the group (or `end` == numel)."""
    if not fmt.group:
        return stored[fmt.nbytes(start) : fmt.nbytes(end)].clone()
    values = values_plane(fmt, stored, numel)[fmt.values_nbytes(start) : fmt.values_nbytes(end)]
    scales = scales_plane(fmt, stored, numel)[fmt.scales_nbytes(start) : fmt.scales_nbytes(end)]
    minima = minima_plane(fmt, stored, numel)[fmt.minima_nbytes(start) : fmt.minima_nbytes(end)]
    return pack(fmt, end - start, values, scales, minima)


def paste(fmt: Format, stored: Tensor, numel: int, start: int, piece: Tensor, count: int) -> None:
    """The inverse of `cut`: writes the streamed part of `count` elements back at `start`."""
    if not fmt.group:
        stored[fmt.nbytes(start) : fmt.nbytes(start + count)] = piece
        return
    for plane, nbytes in (
        (values_plane, fmt.values_nbytes),
        (scales_plane, fmt.scales_nbytes),
        (minima_plane, fmt.minima_nbytes),
    ):
        plane(fmt, stored, numel)[nbytes(start) : nbytes(start + count)] = plane(fmt, piece, count)
