"""float32 storage: 4 bytes; nothing is lost, so both rounding modes are the identity."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import Format


class FP32(Format):
    """4 bytes per parameter, no error. Infinities stay, every NaN becomes 0x7fc00000."""

    name: ClassVar[str] = "fp32"
    code: ClassVar[int] = 0
    torch_dtype: ClassVar[torch.dtype] = torch.float32
    value_bits: ClassVar[int] = 32
    rounds: ClassVar[bool] = False

    def decode(self, stored: Tensor, numel: int | None = None) -> Tensor:
        return stored.clone().view(torch.float32)  # a copy: the bytes may be at any address

    def encode(self, values: Tensor, sr_bits: Tensor | None = None, like: Tensor | None = None) -> Tensor:
        quiet = torch.full_like(values, float("nan"))
        return torch.where(values.isnan(), quiet, values).view(torch.uint8)
