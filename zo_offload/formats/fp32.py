"""float32 storage: nothing is lost, so both rounding modes are the identity."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor


class FP32:
    name: ClassVar[str] = "fp32"
    code: ClassVar[int] = 0
    torch_dtype: ClassVar[torch.dtype] = torch.float32

    def nbytes(self, numel: int) -> int:
        return 4 * numel

    def decode(self, stored: Tensor) -> Tensor:
        return stored.clone().view(torch.float32)  # a copy: the bytes may lie at any address

    def encode(self, values: Tensor, sr_bits: Tensor | None) -> Tensor:
        quiet = torch.full_like(values, float("nan"))
        return torch.where(values.isnan(), quiet, values).view(torch.uint8)
