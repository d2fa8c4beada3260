"""Blocks of GGUF's types: their codes, scales and minima, and their float32 values, bit for bit as in ggml.

A value is code * scale, or code * scale + minimum; all products are exact. Each type has: elements and bytes per block,
elements per scale, and the meaning of its bytes. `d`, `m`: float16. Where elements are called halves, element i is the
low half of byte i, and the high halves follow after all low ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .bits import E2M1, powers

Parts = tuple[Tensor, Tensor, Tensor | None]
"""For n blocks: codes, int16 [n, numel]; scales and minima, float32 [n, numel / group]."""


@dataclass(frozen=True)
class BlockType:
    name: str
    numel: int
    nbytes: int
    group: int
    parts: Callable[[Tensor], Parts]
    """uint8 [n, nbytes] -> its parts."""
    kept: tuple[tuple[str, int], ...]
    """(kind, shift): storage formats that hold codes + shift, the smallest first."""

    def decode(self, blocks: Tensor) -> Tensor:
        """uint8 [n, nbytes] -> float32 [n, numel]"""
        codes, scales, minima = self.parts(blocks)
        values = codes.float() if self.kept[0][0] != "mxfp4" else E2M1[codes.long()]
        values *= _each(scales, self.group)
        return values if minima is None else values.add_(_each(minima, self.group))


def _half(raw: Tensor) -> Tensor:
    """[n, 2 k] bytes -> float32 [n, k]"""
    return raw.contiguous().view(torch.float16).float()


def _halves(qs: Tensor) -> Tensor:
    return torch.cat([qs & 15, qs >> 4], 1).short()


def _ones(raw: Tensor) -> Tensor:
    """[n, k] bytes -> their bits, the lowest first, [n, 8 k]"""
    return (raw.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device="cpu") & 1).flatten(1).short()


def _planes(raw: Tensor) -> Tensor:
    """[n, 32] bytes -> [n, 256]: element e is bit e // 32 of byte e % 32"""
    shifts = torch.arange(8, dtype=torch.uint8, device="cpu").view(1, 8, 1)
    return (raw.unsqueeze(1) >> shifts & 1).reshape(-1, 256).short()


def _each(scales: Tensor, count: int) -> Tensor:
    return scales.repeat_interleave(count, 1)


def _q4_0(b: Tensor) -> Parts:
    return _halves(b[:, 2:]) - 8, _half(b[:, :2]), None


def _q4_1(b: Tensor) -> Parts:
    return _halves(b[:, 4:]), _half(b[:, :2]), _half(b[:, 2:4])


def _q5_0(b: Tensor) -> Parts:
    return (_halves(b[:, 6:]) | _ones(b[:, 2:6]) << 4) - 16, _half(b[:, :2]), None


def _q5_1(b: Tensor) -> Parts:
    return _halves(b[:, 8:]) | _ones(b[:, 4:8]) << 4, _half(b[:, :2]), _half(b[:, 2:4])


def _q8_0(b: Tensor) -> Parts:
    return b[:, 2:].contiguous().view(torch.int8).short(), _half(b[:, :2]), None


def _crumbs(qs: Tensor) -> Tensor:
    """[n, 64] bytes -> [n, 256] codes of 2 bits: element e at byte 32 (e // 128) + e % 32, shift 2 (e % 128 // 32)"""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device="cpu").view(1, 1, 4, 1)
    return (qs.view(-1, 2, 1, 32) >> shifts & 3).reshape(-1, 256).short()


def _q2_k(b: Tensor) -> Parts:
    scale, least = _half(b[:, 80:82]) * (b[:, :16] & 15).float(), _half(b[:, 82:84]) * (b[:, :16] >> 4).float()
    return _crumbs(b[:, 16:80]), scale, -least


def _q3_k(b: Tensor) -> Parts:
    packed = b[:, 96:108]
    low = torch.cat([packed[:, :8] & 15, packed[:, :8] >> 4], 1)
    high = packed[:, 8:].unsqueeze(1) >> torch.arange(0, 8, 2, dtype=torch.uint8, device="cpu").view(1, 4, 1) & 3
    scales = (low | high.reshape(-1, 16) << 4).float() - 32
    return _crumbs(b[:, 32:96]) - 4 * (1 - _planes(b[:, :32])), _half(b[:, 108:110]) * scales, None


def _scales_k(b: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of eight groups, 6 bits each, in bytes 4 .. 15, times d and dmin, which come first."""
    a, c, e = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = torch.cat([a & 63, (e & 15) | a >> 6 << 4], 1)
    least = torch.cat([c & 63, e >> 4 | c >> 6 << 4], 1)
    return _half(b[:, :2]) * scale.float(), -(_half(b[:, 2:4]) * least.float())


def _nibbles_k(qs: Tensor) -> Tensor:
    """[n, 128] bytes -> [n, 256]: for each 32 bytes the low halves, then the high ones"""
    parts = qs.view(-1, 4, 1, 32) >> torch.tensor([0, 4], dtype=torch.uint8, device="cpu").view(1, 1, 2, 1) & 15
    return parts.reshape(-1, 256).short()


def _q4_k(b: Tensor) -> Parts:
    return _nibbles_k(b[:, 16:]), *_scales_k(b)


def _q5_k(b: Tensor) -> Parts:
    return _nibbles_k(b[:, 48:]) | _planes(b[:, 16:48]) << 4, *_scales_k(b)


def _q6_k(b: Tensor) -> Parts:
    low = b[:, :128].view(-1, 2, 1, 64) >> torch.tensor([0, 4], dtype=torch.uint8, device="cpu").view(1, 1, 2, 1) & 15
    high = (
        b[:, 128:192].view(-1, 2, 1, 32) >> torch.arange(0, 8, 2, dtype=torch.uint8, device="cpu").view(1, 1, 4, 1) & 3
    )
    codes = low.reshape(-1, 256) | high.reshape(-1, 256) << 4
    return codes.short() - 32, _half(b[:, 208:210]) * b[:, 192:208].contiguous().view(torch.int8).float(), None


def _mxfp4(b: Tensor) -> Parts:
    return _halves(b[:, 1:]), powers(b[:, :1].contiguous()), None


_SIGNED, _ABOVE, _WIDE = (("int8", 0),), (("int4f", 0),), (("int8f", 0),)
_ALL = (
    (2, BlockType("Q4_0", 32, 18, 32, _q4_0, (("int4f", 8), ("int8", 0)))),
    (3, BlockType("Q4_1", 32, 20, 32, _q4_1, _ABOVE)),
    (6, BlockType("Q5_0", 32, 22, 32, _q5_0, _SIGNED)),
    (7, BlockType("Q5_1", 32, 24, 32, _q5_1, _WIDE)),
    (8, BlockType("Q8_0", 32, 34, 32, _q8_0, _SIGNED)),
    (10, BlockType("Q2_K", 256, 84, 16, _q2_k, _ABOVE)),
    (11, BlockType("Q3_K", 256, 110, 16, _q3_k, _SIGNED)),
    (12, BlockType("Q4_K", 256, 144, 32, _q4_k, _ABOVE)),
    (13, BlockType("Q5_K", 256, 176, 32, _q5_k, _WIDE)),
    (14, BlockType("Q6_K", 256, 210, 16, _q6_k, _SIGNED)),
    (39, BlockType("MXFP4", 32, 17, 32, _mxfp4, (("mxfp4", 0),))),
)
BLOCKS = dict(_ALL)
"""By their number in files."""
PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
