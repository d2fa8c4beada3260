"""Reads tensors of a checkpoint's files for decoders: a range of rows or columns at a time.

Some tensors (of GPTQ, AWQ, gpt-oss) are read by columns, whose elements are apart in a file. So a slab
of neighbouring columns is read at a time and kept; a decoder's next columns are usually in it. Memory: SLABS of
SLAB_BYTES, for tensors of any size.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError

SLAB_BYTES = 8 << 20
SLABS = 3
SHORT_ROW = 16 << 10
"""Bytes of a row that are read whole for some of its columns: a read costs as much as copying a few times these."""
SMALL = 1 << 20
"""The most elements of a tensor that is read whole: group indices, tables, descriptions."""


@dataclass(frozen=True)
class Spec:
    """A tensor in a file's header."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class Files:
    """All tensors of a checkpoint. Several threads may read.

    read_into: (name, start, out): elements [start, start + len(out)) of a tensor, flattened, into the 1-D `out`.
    """

    def __init__(self, specs: Mapping[str, Spec], read_into: Callable[[str, int, Tensor], None]) -> None:
        self.specs = specs
        self._read_into = read_into
        self._slabs: OrderedDict[tuple[str, int], tuple[int, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def get(self, name: str) -> Spec | None:
        return self.specs.get(name)

    def part(self, name: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count), 1-D."""
        out = torch.empty(count, dtype=self.specs[name].dtype, device="cpu")
        self._read_into(name, start, out)
        return out

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of a tensor seen as a matrix [., shape[-1]]."""
        width = self.specs[name].shape[-1] if self.specs[name].shape else 1
        return self.part(name, first * width, (last - first) * width).view(last - first, width)

    def small(self, name: str) -> Tensor:
        """A whole tensor of at most SMALL elements. CheckpointError: more."""
        spec = self.specs[name]
        if spec.numel > SMALL:
            raise CheckpointError(f"{name!r} is {spec}; at most {SMALL} elements are expected in it.")
        return self.part(name, 0, spec.numel).view(spec.shape)

    def columns(self, name: str, first: int, last: int, *, matrix: int = 0) -> Tensor:
        """Columns [first, last) of a matrix: the tensor, or one of several stacked in it; [rows, last - first].

        A column consists of all dimensions after the matrix's second: [E, A, B, C] with matrix=e has A rows and B
        columns of C elements each. The result must not be written to.
        """
        spec = self.specs[name]
        rows, columns, inner = (*spec.shape[-2:], 1) if len(spec.shape) < 4 else spec.shape[-3:]
        key = (name, matrix)
        with self._lock:
            held = self._slabs.get(key)
            if held is None or first < held[0] or last > held[0] + held[1].shape[1] // inner:
                self._slabs.pop(key, None)
                while len(self._slabs) >= SLABS:
                    self._slabs.popitem(last=False)
                fitting = SLAB_BYTES // max(1, rows * inner * spec.dtype.itemsize)
                end = min(columns, max(last, first + fitting))
                held = self._slabs[key] = (first, self._slab(name, matrix, first, end))
            else:
                self._slabs.move_to_end(key)
            return held[1][:, (first - held[0]) * inner : (last - held[0]) * inner]

    def _slab(self, name: str, matrix: int, first: int, end: int) -> Tensor:
        """Columns [first, end) of a matrix, as `columns` returns them."""
        spec = self.specs[name]
        rows, columns, inner = (*spec.shape[-2:], 1) if len(spec.shape) < 4 else spec.shape[-3:]
        width, low, high = columns * inner, first * inner, end * inner
        origin = matrix * rows * width
        slab = torch.empty(rows, high - low, dtype=spec.dtype, device="cpu")
        if high - low == width:
            self._read_into(name, origin, slab.view(-1))
        elif width * spec.dtype.itemsize > SHORT_ROW:
            for row in range(rows):
                self._read_into(name, origin + row * width + low, slab[row])
        else:
            at_once = max(1, SMALL // width)
            for row in range(0, rows, at_once):
                count = min(at_once, rows - row)
                whole = self.part(name, origin + row * width, count * width).view(count, width)
                slab[row : row + count] = whole[:, low:high]
        return slab
