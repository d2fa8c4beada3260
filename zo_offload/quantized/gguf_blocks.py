"""Blocks of GGUF's types, decoded in float32 as ggml does it, bit for bit.

Of each type: elements and bytes of a block, and what its bytes mean. `d`, `m`: float16. Where elements are said to be
halves, element i is the low half of byte i, and the high halves follow after all low ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .bits import E2M1, powers


@dataclass(frozen=True)
class BlockType:
    name: str
    numel: int
    nbytes: int
    decode: Callable[[Tensor], Tensor]
    """uint8 [n, nbytes] -> float32 [n, numel]"""


def _half(raw: Tensor) -> Tensor:
    """[n, 2 k] bytes -> float32 [n, k]"""
    return raw.contiguous().view(torch.float16).float()


def _halves(qs: Tensor) -> Tensor:
    return torch.cat([qs & 15, qs >> 4], 1)


def _ones(raw: Tensor) -> Tensor:
    """[n, k] bytes -> their bits, the lowest first, [n, 8 k]"""
    return (raw.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device="cpu") & 1).flatten(1)


def _q4_0(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * (_halves(b[:, 2:]).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * _halves(b[:, 4:]).float() + _half(b[:, 2:4])


def _q5_0(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * ((_halves(b[:, 6:]) | _ones(b[:, 2:6]) << 4).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * (_halves(b[:, 8:]) | _ones(b[:, 4:8]) << 4).float() + _half(b[:, 2:4])


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].contiguous().view(torch.int8).float() * _half(b[:, :2])


def _crumbs(qs: Tensor) -> Tensor:
    """[n, 64] bytes -> [n, 256] codes of 2 bits: element e at byte 32 (e // 128) + e % 32, shift 2 (e % 128 // 32)"""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device="cpu").view(1, 1, 4, 1)
    return (qs.view(-1, 2, 1, 32) >> shifts & 3).reshape(-1, 256)


def _each(scales: Tensor, count: int) -> Tensor:
    return scales.repeat_interleave(count, 1)


def _q2_k(b: Tensor) -> Tensor:
    scale, least = _half(b[:, 80:82]) * (b[:, :16] & 15).float(), _half(b[:, 82:84]) * (b[:, :16] >> 4).float()
    return _each(scale, 16) * _crumbs(b[:, 16:80]).float() - _each(least, 16)


def _q3_k(b: Tensor) -> Tensor:
    packed = b[:, 96:108]
    low = torch.cat([packed[:, :8] & 15, packed[:, :8] >> 4], 1)
    high = packed[:, 8:].unsqueeze(1) >> torch.arange(0, 8, 2, dtype=torch.uint8, device="cpu").view(1, 4, 1) & 3
    scales = (low | high.reshape(-1, 16) << 4).float() - 32
    upper = (b[:, :32].unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device="cpu").view(1, 8, 1) & 1).reshape(
        -1, 256
    )
    codes = _crumbs(b[:, 32:96]).float() - 4 * (1 - upper.float())
    return _each(_half(b[:, 108:110]) * scales, 16) * codes


def _scales_k(packed: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 12] bytes -> scales and minima of eight groups, 6 bits each."""
    a, c, e = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = torch.cat([a & 63, (e & 15) | a >> 6 << 4], 1)
    least = torch.cat([c & 63, e >> 4 | c >> 6 << 4], 1)
    return scale.float(), least.float()


def _nibbles_k(qs: Tensor) -> Tensor:
    """[n, 128] bytes -> [n, 256]: of each 32 bytes the low halves, then the high ones"""
    parts = qs.view(-1, 4, 1, 32) >> torch.tensor([0, 4], dtype=torch.uint8, device="cpu").view(1, 1, 2, 1) & 15
    return parts.reshape(-1, 256)


def _q4_k(b: Tensor) -> Tensor:
    scale, least = _scales_k(b[:, 4:16])
    scale, least = _half(b[:, :2]) * scale, _half(b[:, 2:4]) * least
    return _each(scale, 32) * _nibbles_k(b[:, 16:]).float() - _each(least, 32)


def _q5_k(b: Tensor) -> Tensor:
    scale, least = _scales_k(b[:, 4:16])
    scale, least = _half(b[:, :2]) * scale, _half(b[:, 2:4]) * least
    upper = (b[:, 16:48].unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device="cpu").view(1, 8, 1) & 1).reshape(
        -1, 256
    )
    return _each(scale, 32) * (_nibbles_k(b[:, 48:]) | upper << 4).float() - _each(least, 32)


def _q6_k(b: Tensor) -> Tensor:
    low = b[:, :128].view(-1, 2, 1, 64) >> torch.tensor([0, 4], dtype=torch.uint8, device="cpu").view(1, 1, 2, 1) & 15
    high = (
        b[:, 128:192].view(-1, 2, 1, 32) >> torch.arange(0, 8, 2, dtype=torch.uint8, device="cpu").view(1, 1, 4, 1) & 3
    )
    codes = low.reshape(-1, 256) | high.reshape(-1, 256) << 4
    scales = _half(b[:, 208:210]) * b[:, 192:208].contiguous().view(torch.int8).float()
    return _each(scales, 16) * (codes.float() - 32)


def _mxfp4(b: Tensor) -> Tensor:
    return E2M1[_halves(b[:, 1:]).long()] * powers(b[:, :1].contiguous())


BLOCKS = {
    2: BlockType("Q4_0", 32, 18, _q4_0), 3: BlockType("Q4_1", 32, 20, _q4_1), 6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1), 8: BlockType("Q8_0", 32, 34, _q8_0), 10: BlockType("Q2_K", 256, 84, _q2_k),
    11: BlockType("Q3_K", 256, 110, _q3_k), 12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k), 14: BlockType("Q6_K", 256, 210, _q6_k),
    39: BlockType("MXFP4", 32, 17, _mxfp4),
}  # fmt: skip
"""By the number that files have."""
PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
