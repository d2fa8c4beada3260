"""Storage formats: how a parameter's values are kept in bytes.

    name       bytes streamed   held   what it is
    fp32       4                       as computed with
    bf16       2                       torch's bfloat16
    fp16       2                       torch's float16
    fp8_e4m3   1.008                   8-bit float, a power-of-two scale a group of 128
    fp8_e5m2   1.008
    int8       1.031                   8-bit integer, a float32 scale a group of 128
    int4       0.547                   asymmetric: a float32 scale and a bf16 minimum a group of 128
    int4_g64   0.594                   the same with groups of 64
    int4c      0.547                   int4 with a bf16 centre instead; what `QZO` makes of int4 (and of int4_g64)
    nf4        0.5625                  normal quantiles, a float32 scale a group of 64
    bf16+16    2                2      exact float32 master
    bf16+8     2                1      24-bit float master
    int8+8     1.031            1      16-bit integer master
    fp8+8      1.008            1      16-bit float master; the coarse half is fp8_e4m3

`base.py` says what a format is. `code` is the integer the native kernels know it by (csrc/formats.h).
"""

from __future__ import annotations

import torch

from zo_offload.errors import ConfigError
from zo_offload.formats.base import Format
from zo_offload.formats.bf16 import BF16
from zo_offload.formats.codec import decode_values, encode_values
from zo_offload.formats.four_bits import NF4, Int4
from zo_offload.formats.fp8 import FP8E4M3, FP8E5M2, FP8Plus8
from zo_offload.formats.fp16 import FP16
from zo_offload.formats.fp32 import FP32
from zo_offload.formats.int8 import Int8, Int8Plus8
from zo_offload.formats.split_bf16 import BF16Plus8, BF16Plus16

__all__ = [
    "BF16",
    "CENTRED",
    "FORMATS",
    "FP16",
    "FP32",
    "Format",
    "decode_values",
    "encode_values",
    "format_of",
    "get_format",
]

_PLAIN: tuple[Format, ...] = (FP32(), BF16(), FP16())
_SCALED: tuple[Format, ...] = (FP8E4M3(), FP8E5M2(), Int8(), Int4(128), Int4(64), NF4())
_SPLIT: tuple[Format, ...] = (BF16Plus16(), BF16Plus8(), Int8Plus8(), FP8Plus8())
FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (*_PLAIN, *_SCALED, *_SPLIT)}
CENTRED: dict[str, Format] = {fmt.about_centre.name: fmt.about_centre for fmt in _SCALED if fmt.minimum_bytes}
"""Not to be chosen: a method chooses them."""
_BY_DTYPE: dict[torch.dtype, Format] = {fmt.torch_dtype: fmt for fmt in _PLAIN}


def get_format(name: str) -> Format:
    """The format of that name; ConfigError names those there are."""
    try:
        return FORMATS[name] if name in FORMATS else CENTRED[name]
    except KeyError:
        raise ConfigError(f"storage format {name!r} is not known; choose one of {sorted(FORMATS)}") from None


def format_of(dtype: torch.dtype) -> Format:
    """The format that holds values of a torch dtype exactly as they are."""
    try:
        return _BY_DTYPE[dtype]
    except KeyError:
        known = sorted(str(d) for d in _BY_DTYPE)
        raise ConfigError(f"no storage format for {dtype}; parameters must be one of {known}") from None
