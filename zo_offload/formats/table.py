"""All storage formats by name, by torch dtype and by their code in the kernels."""

from __future__ import annotations

import re

import torch

from ..errors import ConfigError
from .banded import NVFP4Two, mxfp4_across
from .base import Format
from .bf16 import BF16
from .four_bits import NF4, Int4
from .fp8 import FP8E4M3, FP8E5M2, FP8Plus8
from .fp16 import FP16
from .fp32 import FP32
from .int8 import Int8, Int8Plus8
from .kept import FP4, FP8F, MXFP4, NVFP4, Int4F, Int8By127, Int8F
from .split_bf16 import BF16Plus8, BF16Plus16

_PLAIN: tuple[Format, ...] = (FP32(), BF16(), FP16())
_SCALED: tuple[Format, ...] = (FP8E4M3(), FP8E5M2(), Int8(), Int4(128), Int4(64), NF4())
_SPLIT: tuple[Format, ...] = (BF16Plus16(), BF16Plus8(), Int8Plus8(), FP8Plus8())

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (*_PLAIN, *_SCALED, *_SPLIT)}
CENTRED: dict[str, Format] = {fmt.about_centre.name: fmt.about_centre for fmt in _SCALED if fmt.minimum_bytes}
"""Chosen by a method, not by the user."""
_KEPT: tuple[Format, ...] = (
    Int4F(), Int4F(64), Int4F(32), Int4F(16), Int8F(), Int8F(64), Int8F(32), Int8(64), Int8(32), Int8(16),
    FP8F(), FP8F(64), FP8F(32), MXFP4(), NVFP4(), FP4(), FP4(32), NF4(32),
    Int8By127(), Int8By127(64), Int8By127(32), Int8By127(16), NVFP4Two(),
)  # fmt: skip
KEPT: dict[str, Format] = {fmt.name: fmt for fmt in _KEPT}
"""For a quantized checkpoint's own codes (`storage="kept"`); not chosen by the user. mxfp4 across rows is one, too, for
each length of a row: `get_format("mxfp4_across_2880")`."""
_ACROSS = re.compile(r"mxfp4_across_([1-9]\d{0,8})")
_ALL = FORMATS | CENTRED | KEPT
PLAIN: dict[torch.dtype, Format] = {fmt.torch_dtype: fmt for fmt in _PLAIN}
"""The formats of lanes and of plain checkpoints: a torch dtype's own bytes."""


NEWEST_KEPT = 2
"""The latest set of formats that `storage="kept"` chooses from; see `kept_since`."""


def kept_since(fmt: Format) -> int:
    """The set of formats in which a format was first chosen for a checkpoint's own codes.

    0: only what users choose, too. 1: int4f and most others. 2: those with the scales of the file, where 1 had others.
    A run goes on with the formats that it began with. A new format gets a number of its own.
    """
    if fmt.name in FORMATS:
        return 0
    return 2 if fmt.kernel in ("mxfp4_across", "nvfp4_two", "int8_127") else 1


def get_format(name: str) -> Format:
    """The format of that name; ConfigError lists the known names."""
    if found := _ACROSS.fullmatch(name):
        return mxfp4_across(int(found[1]))
    try:
        return _ALL[name]
    except KeyError:
        raise ConfigError(f"storage format {name!r} is not known; choose one of {sorted(FORMATS)}") from None


def format_of(dtype: torch.dtype) -> Format:
    """The format that holds values of a torch dtype unchanged."""
    try:
        return PLAIN[dtype]
    except KeyError:
        known = sorted(str(d) for d in PLAIN)
        raise ConfigError(f"no storage format for {dtype}; parameters must be one of {known}") from None
