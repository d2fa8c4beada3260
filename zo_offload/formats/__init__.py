"""Storage formats: encodings of a parameter's values as bytes.

    name       bytes streamed   held   what it is
    fp32       4                       as computed with
    bf16       2                       torch's bfloat16
    fp16       2                       torch's float16
    fp8_e4m3   1.008                   8-bit float, a power-of-two scale per group of 128
    fp8_e5m2   1.008
    int8       1.031                   8-bit integer, a float32 scale per group of 128
    int4       0.547                   asymmetric: a float32 scale and a bf16 minimum per group of 128
    int4_g64   0.594                   the same with groups of 64
    int4c      0.547                   int4 with a bf16 centre instead; `QZO` uses it for int4 (and int4_g64)
    nf4        0.5625                  normal quantiles, a float32 scale per group of 64
    bf16+16    2                2      exact float32 master
    bf16+8     2                1      24-bit float master
    int8+8     1.031            1      16-bit integer master
    fp8+8      1.008            1      16-bit float master; the coarse half is fp8_e4m3

`kept.py` and `banded.py` have others, for a quantized checkpoint's own codes: int4f, int8f, int8_127, fp8f, mxfp4,
mxfp4_across, nvfp4, nvfp4_two, fp4; for these codes, some of the formats above also exist with smaller groups.
`base.py` defines a format, `table.py` lists them. `code` is a format's integer in the kernels (csrc/formats.h).
"""

from __future__ import annotations

from .base import Format
from .bf16 import BF16
from .codec import decode_values, encode_values
from .fp16 import FP16
from .fp32 import FP32
from .table import CENTRED, FORMATS, KEPT, NEWEST_KEPT, PLAIN, format_of, get_format, kept_since

__all__ = [
    "BF16",
    "CENTRED",
    "FORMATS",
    "FP16",
    "FP32",
    "KEPT",
    "NEWEST_KEPT",
    "PLAIN",
    "Format",
    "decode_values",
    "encode_values",
    "format_of",
    "get_format",
    "kept_since",
]
