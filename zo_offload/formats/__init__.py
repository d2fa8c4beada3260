"""Storage formats: how a parameter's values are kept in bytes.

One file a format. `code` is the integer the native kernels know it by (csrc/formats.h). A format says its size only
through `nbytes`, and the native pass has pointers for planes beside the values, so formats with scales (groups of
int8, int4, nf4) fit the same calls.
"""

from __future__ import annotations

import torch

from zo_offload.errors import ConfigError
from zo_offload.formats.base import Format
from zo_offload.formats.bf16 import BF16
from zo_offload.formats.fp16 import FP16
from zo_offload.formats.fp32 import FP32

__all__ = ["BF16", "FORMATS", "FP16", "FP32", "Format", "format_of", "get_format"]

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (FP32(), BF16(), FP16())}
_BY_DTYPE: dict[torch.dtype, Format] = {fmt.torch_dtype: fmt for fmt in FORMATS.values()}


def get_format(name: str) -> Format:
    """The format of that name; ConfigError names those there are."""
    try:
        return FORMATS[name]
    except KeyError:
        raise ConfigError(f"storage format {name!r} is not known; choose one of {sorted(FORMATS)}") from None


def format_of(dtype: torch.dtype) -> Format:
    """The format that holds values of a torch dtype exactly as they are."""
    try:
        return _BY_DTYPE[dtype]
    except KeyError:
        known = sorted(str(d) for d in _BY_DTYPE)
        raise ConfigError(f"no storage format for {dtype}; parameters must be one of {known}") from None
