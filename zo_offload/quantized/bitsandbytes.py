"""bitsandbytes: 4 bits with a table (nf4, fp4), with or without double quantization, and LLM.int8.

weight         uint8 [n / 2, 1] (or the same bytes in another dtype), the weight flattened; element 2 i is the HIGH
               half of byte i. Blocks of consecutive elements share an absmax; the last may be short
weight.absmax  float32 [blocks]; or uint8, then it is itself quantized:
               absmax = RN32(RN32(nested_quant_map[code] * nested_absmax[j // nested_blocksize]) + nested_offset)
weight.quant_map  float32 [16], the table
weight.quant_state.bitsandbytes__nf4 (__fp4)  the bytes of a JSON object: blocksize, shape, dtype, ...

weight = RN(RN32(table[code] * absmax)), in the object's dtype

weight  int8 [out, in], SCB  float32 [out]:   weight = RN(RN32(RN32(code * SCB) * RN32(1 / 127)))
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..formats.four_bits import NF4_VALUES
from ..formats.kept import FP4_VALUES, INVERSE_127
from .base import Codes, Decoded, Wanted, by_rows, kept_as, kept_rows, need
from .bits import halves
from .files import Files

_STATE = ".quant_state.bitsandbytes__"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class BitsAndBytes:
    name: ClassVar[str] = "bitsandbytes"
    methods: ClassVar[tuple[str, ...]] = ("bitsandbytes",)

    def find(self, files: Files, wanted: Wanted) -> Iterator[Decoded]:
        for name in files.specs:
            if _STATE in name:
                yield _four_bits(files, name.partition(_STATE)[0], name)
            elif name.endswith(".SCB"):
                yield _int8(files, f"{name.removesuffix('SCB')}weight", name, wanted.dtype)


def _state(files: Files, name: str) -> dict[str, Any]:
    try:
        value = json.loads(bytes(files.small(name).view(torch.uint8).reshape(-1).tolist()))
        shape, size = [int(n) for n in value["shape"]], value["blocksize"]
        nested = value.get("nested_blocksize", 1), float(value.get("nested_offset", 0.0))
        sound = all(isinstance(n, int) and n > 0 for n in (size, nested[0], *shape)) and value["dtype"] in _DTYPES
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{name!r} is not bitsandbytes' description of a weight: {error}") from error
    if not sound:
        raise CheckpointError(
            f"{name!r}: sizes above 0 and a dtype of {', '.join(_DTYPES)} are expected: {value!s:.200}"
        )
    return {**value, "shape": shape}


def _four_bits(files: Files, name: str, state_name: str) -> Decoded:
    state = _state(files, state_name)
    shape = tuple(state["shape"])
    n = math.prod(shape)
    size = min(state["blocksize"], n)
    spec, absmax, table = need(files, name, state_name), f"{name}.absmax", f"{name}.quant_map"
    blocks = -(-n // size)
    if spec.nbytes != -(-n // 2):
        raise CheckpointError(
            f"{state_name!r} says {list(shape)}, and {name!r} is {spec}: {-(-n // 2)} bytes expected."
        )
    need(files, table, name, (16,), torch.float32)
    is_nested = need(files, absmax, name, (blocks,), torch.float32, torch.uint8).dtype == torch.uint8
    nested, nested_table = f"{name}.nested_absmax", f"{name}.nested_quant_map"
    step, offset = (
        state.get("nested_blocksize", 1),
        torch.tensor(state.get("nested_offset", 0.0), dtype=torch.float32, device="cpu"),
    )
    if is_nested:
        need(files, nested, name, (-(-blocks // step),), torch.float32)
        need(files, nested_table, name, (256,), torch.float32)
    dtype, itemsize = _DTYPES[state["dtype"]], spec.dtype.itemsize

    def largest(files: Files, first: int, last: int) -> Tensor:
        """absmax of blocks [first, last), float32"""
        codes = files.part(absmax, first, last - first)
        if not is_nested:
            return codes
        groups = torch.arange(first, last, device="cpu").div(step, rounding_mode="floor")
        low = int(groups[0])
        values = files.part(nested, low, int(groups[-1]) + 1 - low)
        return files.small(nested_table)[codes.long()] * values[groups - low] + offset

    def kept(files: Files, start: int, count: int) -> Codes:
        """The table index and absmax of each element."""
        low, high = start // (2 * itemsize), -(-(start + count) // (2 * itemsize))
        raw = files.part(name, low, min(high, spec.numel) - low).view(torch.uint8)
        codes = halves(raw, high_first=True)[start - low * 2 * itemsize :][:count]
        first, last = start // size, -(-(start + count) // size)
        edges = (torch.arange(first, last + 1, device="cpu") * size).clamp(start, start + count)
        return codes, largest(files, first, last).repeat_interleave(edges.diff()), None

    def run(files: Files, start: int, count: int) -> Tensor:
        codes, values, _ = kept(files, start, count)
        return (files.small(table)[codes.long()] * values).to(dtype)

    kind = "nf4" if state_name.endswith("nf4") else "fp4"
    ours = torch.tensor(NF4_VALUES if kind == "nf4" else FP4_VALUES, dtype=torch.float32, device="cpu")

    def is_ours(files: Files) -> bool:
        return bool((files.small(table) == ours).all())

    uses = (name, state_name, absmax, table) + ((nested, nested_table) if is_nested else ())
    group = math.gcd(size, shape[-1])  # pieces of a weight begin with a row
    keeps = kept_as(kind, group, kept, fits=is_ours)
    return Decoded(name, shape, dtype, uses, run, keeps)


def _int8(files: Files, name: str, scale: str, dtype: torch.dtype) -> Decoded:
    spec = need(files, name, scale, None, torch.int8)
    if len(spec.shape) != 2:
        raise CheckpointError(f"{name!r} is {spec}; a matrix is expected beside {scale!r}.")
    need(files, scale, name, spec.shape[:1], torch.float32)
    layout = f"{name}_format"
    if layout in files and int(files.small(layout).reshape(-1)[:1].sum()) != 0:
        raise CheckpointError(f"{layout!r}: a layout permuted for a kernel, which is not supported.")

    def rows(files: Files, first: int, last: int) -> Tensor:
        codes = files.rows(name, first, last).float()
        return codes.mul_(files.part(scale, first, last - first).unsqueeze(1)).mul_(INVERSE_127).to(dtype)

    def kept(files: Files, first: int, last: int) -> Codes:
        codes = files.rows(name, first, last).view(torch.uint8)
        return codes, files.part(scale, first, last - first).unsqueeze(1), None

    width = spec.shape[1]
    uses = (name, scale) + ((layout,) if layout in files else ())
    keeps = kept_as("int8_127", width, kept_rows(width, kept))
    return Decoded(name, spec.shape, dtype, uses, by_rows(width, rows), keeps)
