"""Stored bytes of any format: encoded values, or, where nothing is encoded, codes and scales drawn at random."""

from __future__ import annotations

import torch

from zo_offload.formats import Format
from zo_offload.formats.grouped import pack


def stored_as(fmt: Format, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(streamed part, residual part); of drawn ones as many elements as there are values, of a like size."""
    if fmt.encodes:
        return fmt.split(values) if fmt.residual_bytes else (fmt.encode(values), None)
    n, chance = values.numel(), torch.Generator().manual_seed(values.numel())
    codes = torch.randint(256, (fmt.values_nbytes(n),), dtype=torch.uint8, generator=chance)
    if fmt.name == "fp8f":
        codes[codes & 0x7F == 0x7F] = 0x80
    groups, lows = fmt.scales_nbytes(n) // fmt.scale_bytes, fmt.minima_nbytes(n) // 4
    scales = torch.randn(groups, generator=chance) * 2e-3
    minima = None if not lows else (torch.randn(lows, generator=chance) * 2e-2).view(torch.uint8)
    if fmt.scale_bytes == 1:
        scales = torch.randint(112, 128, (groups,), dtype=torch.uint8, generator=chance)
        scales[1::5], scales[2::10], scales[7::10] = 255, 0, 1
    else:
        scales[1::5], scales[2::5] = float("nan"), 0.0
    return pack(fmt, n, codes, scales.view(torch.uint8), minima), None
