"""What a quantized model's files take, and how codes are kept, from its settings alone: for plans without the files."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .base import Settings, formats_of_groups
from .table import method_of

_UNQUANTIZED = re.compile(r"embed|lm_head|\bgate\.weight$|router|norm|score|wte|wpe")
"""Embeddings, heads and routers: by default no scheme quantizes them."""


def file_bytes(settings: Settings, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> int | None:
    """Bytes of the tensors of these names and shapes, 16 bits per value if not quantized; None if the settings do not
    tell. An estimate: quantized tensors are guessed by rank and name, and by the lists in the settings."""
    each = bytes_a_weight(settings)
    if each is None:
        return None
    total = 0.0
    for name, shape in shapes:
        numel = 1
        for size in shape:
            numel *= size
        total += numel * (each if _is_quantized(name, shape, settings) else 2)
    return int(total)


def bytes_a_weight(settings: Settings) -> float | None:
    """Bytes in the files per quantized weight, scales included."""
    if not settings:
        return None
    method = method_of(settings)
    group = _number(settings.get("group_size")) or 0
    if method in ("gptq", "awq", "auto-round", "intel/auto-round"):
        bits = _number(settings.get("bits", settings.get("w_bit"))) or 4
        return bits / 8 + ((2 + bits / 8) / group if group > 0 else 0)
    if method in ("fp8", "fbgemm_fp8"):
        return 1.0
    if method == "mxfp4":
        return 0.5 + 1 / 32
    if method in ("modelopt", "modelopt_fp4", "nvfp4"):
        return 0.5 + 1 / 16 if "FP4" in str(settings.get("quant_algo", "NVFP4")) else 1.0
    if method == "bitsandbytes":
        nested = settings.get("bnb_4bit_use_double_quant")
        return (0.5 + (1 if nested else 4) / 64) if settings.get("load_in_4bit") else 1.0
    weights = _first_group(settings)
    if weights is not None:
        bits, size = _number(weights.get("num_bits")) or 8, _number(weights.get("group_size")) or 0
        return bits / 8 + ((1 if bits == 4 and weights.get("type") == "float" else 2) / size if size > 0 else 0)
    return None


def kept_format(settings: Settings, name: str, shape: tuple[int, ...]) -> str | None:
    """The storage format that storage="kept" would take for a weight; None: none, or the settings do not tell. With the
    files at hand, their tensors decide."""
    kind, group = _codes(settings, shape) if settings and _is_quantized(name, shape, settings) else ("", 0)
    found = formats_of_groups(kind, math.gcd(shape[-1], group) if group > 0 else shape[-1]) if kind else []
    if not found and kind == "fp8_e4m3" and method_of(settings) == "mxfp4":
        return kind  # re-encoded, in groups that may span rows
    return found[0] if found else None


def _codes(settings: Settings, shape: tuple[int, ...]) -> tuple[str, int]:
    """(kind of storage format, weights of a row in a group; 0: all of them)"""
    method, group = method_of(settings), _number(settings.get("group_size")) or 0
    bits = _number(settings.get("bits", settings.get("w_bit"))) or 4
    if method in ("gptq", "awq", "auto-round", "intel/auto-round"):
        if settings.get("desc_act") and group and not settings.get("static_groups"):
            return "", 0  # groups of inputs that are not neighbours
        return ("int4f" if bits <= 4 else "int8" if settings.get("sym") else "int8f"), group
    if method in ("fp8", "fbgemm_fp8"):
        block = settings.get("weight_block_size")
        return "fp8_e4m3" if settings.get("scale_fmt") == "ue8m0" else "fp8f", block[1] if block else 0
    if method == "mxfp4":  # gpt-oss: groups across the rows of stacked experts
        return ("fp8_e4m3", 128) if len(shape) == 3 and shape[-1] % 4 == 0 else ("", 0)
    if method in ("modelopt", "modelopt_fp4", "nvfp4"):
        return ("nvfp4", 16) if "FP4" in str(settings.get("quant_algo", "NVFP4")) else ("fp8f", 0)
    if method == "bitsandbytes" and settings.get("load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type", "fp4")), 64
    weights = _first_group(settings)
    if weights is None:
        return "", 0
    bits, group = _number(weights.get("num_bits")) or 8, _number(weights.get("group_size")) or 0
    if weights.get("type") == "float":
        return ("nvfp4" if group == 16 else "mxfp4", group) if bits == 4 else ("fp8f", group)
    symmetric = weights.get("symmetric") is not False
    return ("int4" if symmetric else "int4f") if bits <= 4 else ("int8" if symmetric else "int8f"), group


def _is_quantized(name: str, shape: tuple[int, ...], settings: Settings) -> bool:
    if len(shape) < 2 or _UNQUANTIZED.search(name):
        return False
    skipped = settings.get("modules_to_not_convert") or settings.get("ignore") or settings.get("llm_int8_skip_modules")
    for entry in skipped if isinstance(skipped, (list, tuple)) else ():
        if isinstance(entry, str) and (entry in name or fnmatch.fnmatch(name, f"{entry}*")):
            return False
    return True


def _first_group(settings: Settings) -> Mapping[str, Any] | None:
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        if isinstance(group, dict) and isinstance(group.get("weights"), dict):
            weights: Mapping[str, Any] = group["weights"]
            return weights
    return None


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
