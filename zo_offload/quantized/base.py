"""The interface of quantization schemes: weights by name, decoded a range of elements at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..formats import FORMATS, KEPT
from .files import Files, Spec

RUN = 1 << 20
"""Elements that are decoded at a time."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Settings = Mapping[str, Any]
"""config.json's quantization_config, or the library's own file next to it."""

Decoder = Callable[[Files, int, int], Tensor]
"""(files, start, count): elements [start, start + count), 1-D, in the weight's dtype or one that is rounded to it."""


Codes = tuple[Tensor, Tensor, Tensor | None]
"""For each element, 1-D: its code (uint8), its group's scale (float32; in fp8 the exponent's byte) and minimum."""


@dataclass(frozen=True)
class Kept:
    """A weight's own codes in a storage format: they decode to the weight before rounding."""

    format: str
    """Its name in `formats.FORMATS`."""
    run: Callable[[Files, int, int], Codes]
    """(files, start, count)"""
    fits: Callable[[Files], bool] = lambda files: True
    """Whether the format can hold all of its scales; reads them."""


_NAMES = {(fmt.kernel, fmt.group): fmt.name for fmt in (FORMATS | KEPT).values() if fmt.group}


def formats_of_groups(kind: str, group: int) -> list[str]:
    """The storage formats of a kind ("int4f", "int8", ...) whose groups fit into groups of `group`, the largest first;
    of those with smaller groups than necessary, only formats that users cannot choose."""
    found = [_NAMES[kind, n] for n in (128, 64, 32, 16) if group % n == 0 and (kind, n) in _NAMES]
    return [name for place, name in enumerate(found) if place == 0 or name in KEPT]


def run_length(index: Tensor) -> int:
    """How many neighbours of a row share a group, for groups by input: the largest of 128 .. 16; 1 if fewer do."""
    for n in (128, 64, 32, 16):
        if len(index) % n == 0 and bool((index.view(-1, n) == index.view(-1, n)[:, :1]).all()):
            return n
    return 1


def kept_as(kind: str, group: int, run: Callable[[Files, int, int], Codes], **options: Any) -> tuple[Kept, ...]:
    """A weight's codes in these formats; () if no format of the kind fits into groups of `group`."""
    return tuple(Kept(name, run, **options) for name in formats_of_groups(kind, group))


def is_exact(scales: Spec) -> bool:
    """Whether scales times zero points of up to 8 bits are exact in float32."""
    return scales.dtype in (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Decoded:
    """One weight of the unquantized model, decoded from `uses`: tensors of the files."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """The weight as the scheme's library decodes it."""
    uses: tuple[str, ...]
    run: Decoder
    kept: tuple[Kept, ...] = ()
    """The formats that hold its codes, the smallest first; (): none does."""

    def read_into(self, files: Files, start: int, out: Tensor) -> None:
        """Read elements [start, start + len(out)) into `out`, 1-D and of `dtype`. Memory: a few RUNs."""
        for at in range(0, len(out), RUN):
            part = out[at : at + RUN]
            part.copy_(self.run(files, start + at, len(part)))


@dataclass(frozen=True)
class Wanted:
    """A scheme's arguments besides the tensors."""

    settings: Settings
    dtype: torch.dtype
    """The model's dtype, for schemes whose library decodes to it."""


class Scheme(Protocol):
    """One library's layout of quantized weights. Stateless."""

    name: ClassVar[str]
    methods: ClassVar[tuple[str, ...]]
    """Values of quant_method that mean this one."""

    def find(self, files: Files, wanted: Wanted) -> Iterator[Decoded]:
        """The weights of this scheme in the files. CheckpointError names the tensors and what is wrong with them. Reads
        only headers and small tensors."""
        ...


def by_rows(width: int, rows: Callable[[Files, int, int], Tensor], align: int = 1) -> Decoder:
    """A decoder over `rows`, which is called for whole rows of `width` elements, from a multiple of `align` on."""

    def run(files: Files, start: int, count: int) -> Tensor:
        first = start // width // align * align
        values = rows(files, first, -(-(start + count) // width)).reshape(-1)
        begin = start - first * width
        return values[begin : begin + count]

    return run


def kept_rows(
    width: int, rows: Callable[[Files, int, int], Codes], align: int = 1
) -> Callable[[Files, int, int], Codes]:
    """The same for codes; scales and minima may be one per row, or one per group of a row."""

    def run(files: Files, start: int, count: int) -> Codes:
        first = start // width // align * align
        begin = start - first * width

        def cut(plane: Tensor) -> Tensor:
            return plane.repeat_interleave(width // plane.shape[1], 1).reshape(-1)[begin : begin + count]

        codes, scales, minima = rows(files, first, -(-(start + count) // width))
        return cut(codes), cut(scales), None if minima is None else cut(minima)

    return run


def need(files: Files, name: str, of: str, shape: tuple[int, ...] | None = None, *dtypes: torch.dtype) -> Spec:
    """A tensor that is needed to decode `of`. CheckpointError: missing, another shape or dtype."""
    spec = files.get(name)
    if spec is None:
        raise CheckpointError(f"{of!r} is quantized, and {name!r}, which it cannot be decoded without, is missing.")
    if shape is not None and spec.shape != shape:
        raise CheckpointError(f"{name!r} is {spec}; {list(shape)} is expected beside {of!r} ({files.specs[of]}).")
    if dtypes and spec.dtype not in dtypes:
        known = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise CheckpointError(f"{name!r} is {spec}; beside {of!r} one of {known} is expected.")
    return spec
