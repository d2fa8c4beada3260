"""Recipes: how a tensor is composed from parts of others, so that any range of its elements can be made alone.

transformers' conversions between files and model (merge experts into one, split a fused projection, permute rotary
halves) only move elements. A `Recipe` describes such a tensor by the sources of its elements: elements [start, stop),
flattened in C order, are read from its parts, down to the tensors in the files. `Finder` finds the recipes by watching
a conversion on meta tensors; for an operation that it does not know there is no recipe, and the conversion must run on
whole tensors (`Whole`).

Memory: the requested elements, and SCRATCH more. Only a permutation that mixes more than that (a transposed matrix) is
made whole, and held by the `Reader` while its elements are read in order.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import CheckpointError

SCRATCH = 1 << 20
"""Elements of memory that a recipe may use besides the requested ones."""

ReadInto = Callable[[str, int, Tensor], None]
"""(source, start, out): elements [start, start + len(out)) of a source, flattened, into the 1-D tensor out."""


class Reader:
    """Reads elements of sources for recipes. Holds the last tensor that was made whole until all of it was used."""

    def __init__(self, read_into: ReadInto) -> None:
        self.read_into = read_into
        self._held: tuple[Hashable, Any] | None = None
        self._given: set[str] = set()
        self._lock = threading.RLock()

    def hold(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of `make`, computed again only if another result was held in between."""
        with self._lock:
            if self._held is None or self._held[0] != key:
                self._held, self._given = None, set()  # before the next one is made
                self._held = (key, make())
            return self._held[1]

    def ended(self, key: Hashable, name: str = "", names: int = 1) -> None:
        """Call after the last elements of one of the `names` tensors under a key were used."""
        with self._lock:
            if self._held is not None and self._held[0] == key:
                self._given.add(name)
                if len(self._given) == names:
                    self._held = None


class Recipe:
    """Elements of one tensor. `fill` may be called from several threads."""

    numel: int
    dtype: torch.dtype

    def fill(self, reader: Reader, start: int, out: Tensor) -> None:
        """Write elements [start, start + len(out)) into `out`, 1-D and of this dtype."""
        raise NotImplementedError

    def origin(self, element: int = 0) -> tuple[str, int]:
        """An element's source, and its index there (in a permuted row: that of the row's first element)."""
        raise NotImplementedError

    def part(self, reader: Reader, start: int, count: int) -> Tensor:
        """The same, in a new tensor."""
        out = torch.empty(count, dtype=self.dtype, device="cpu")
        self.fill(reader, start, out)
        return out


@dataclass(eq=False)
class Source(Recipe):
    """A tensor of the files, unchanged."""

    name: str
    numel: int
    dtype: torch.dtype

    def fill(self, reader: Reader, start: int, out: Tensor) -> None:
        reader.read_into(self.name, start, out)

    def origin(self, element: int = 0) -> tuple[str, int]:
        return self.name, element


@dataclass(eq=False)
class Cast(Recipe):
    """Each element converted to another dtype."""

    of: Recipe
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.numel = self.of.numel

    def fill(self, reader: Reader, start: int, out: Tensor) -> None:
        for at in range(0, len(out), SCRATCH):
            run = out[at : at + SCRATCH]
            run.copy_(self.of.part(reader, start + at, len(run)))

    def origin(self, element: int = 0) -> tuple[str, int]:
        return self.of.origin(element)


@dataclass(eq=False)
class Join(Recipe):
    """`rows` rows, each the row of the first part, then that of the second, ...: a concatenation or a stack."""

    rows: int
    parts: Sequence[Recipe]

    def __post_init__(self) -> None:
        self._widths = [part.numel // max(1, self.rows) for part in self.parts]
        self._ends = list(accumulate(self._widths))
        self.numel, self.dtype = self.rows * self._ends[-1], self.parts[0].dtype

    def fill(self, reader: Reader, start: int, out: Tensor) -> None:
        width, at = self._ends[-1], 0
        while at < len(out):
            row, column = divmod(start + at, width)
            whole = min((len(out) - at) // width, max(1, SCRATCH // width))
            if column == 0 and whole > 1:  # many short rows: a column of them from each part
                grid = out[at : at + whole * width].view(whole, width)
                for part, size, end in zip(self.parts, self._widths, self._ends, strict=True):
                    grid[:, end - size : end] = part.part(reader, row * size, whole * size).view(whole, size)
                at += whole * width
                continue
            index = bisect_right(self._ends, column)
            count = min(self._ends[index] - column, len(out) - at)
            size = self._widths[index]
            inside = row * size + column - (self._ends[index] - size)
            self.parts[index].fill(reader, inside, out[at : at + count])
            at += count

    def origin(self, element: int = 0) -> tuple[str, int]:
        row, column = divmod(element, max(1, self._ends[-1]))
        index = min(bisect_right(self._ends, column), len(self.parts) - 1)
        size = self._widths[index]
        return self.parts[index].origin(row * size + column - (self._ends[index] - size))


@dataclass(eq=False)
class Cut(Recipe):
    """Elements [begin, begin + width) of each of `rows` rows: a slice, a chunk, one tensor of a stack."""

    rows: int
    of: Recipe
    begin: int
    width: int

    def __post_init__(self) -> None:
        self._row = self.of.numel // max(1, self.rows)
        self.numel, self.dtype = self.rows * self.width, self.of.dtype

    def fill(self, reader: Reader, start: int, out: Tensor) -> None:
        at = 0
        while at < len(out):
            row, column = divmod(start + at, self.width)
            whole = min((len(out) - at) // self.width, max(1, SCRATCH // self._row))
            if column == 0 and whole > 1:  # many short rows are read whole and cut
                grid = self.of.part(reader, row * self._row, whole * self._row).view(whole, self._row)
                out[at : at + whole * self.width] = grid[:, self.begin : self.begin + self.width].reshape(-1)
                at += whole * self.width
                continue
            count = min(self.width - column, len(out) - at)
            self.of.fill(reader, row * self._row + self.begin + column, out[at : at + count])
            at += count

    def origin(self, element: int = 0) -> tuple[str, int]:
        row, column = divmod(element, max(1, self.width))
        return self.of.origin(row * self._row + self.begin + column)


@dataclass(eq=False)
class Turn(Recipe):
    """Each of `rows` rows, of shape `shape`, with its dimensions in the order `dims`."""

    rows: int
    of: Recipe
    shape: tuple[int, ...]
    dims: tuple[int, ...]

    def __post_init__(self) -> None:
        self._row = math.prod(self.shape)
        self.numel, self.dtype = self.of.numel, self.of.dtype

    def fill(self, reader: Reader, start: int, out: Tensor) -> None:
        at, most = 0, max(1, SCRATCH // self._row)
        while at < len(out):
            row, column = divmod(start + at, self._row)
            rows = min(-(-(column + len(out) - at) // self._row), most)
            key, make = (id(self), row), partial(self._turned, row, rows, reader)
            values = reader.hold(key, make) if self._row > SCRATCH // 4 and rows == 1 else make()
            count = min(rows * self._row - column, len(out) - at)
            out[at : at + count] = values[column : column + count]
            at += count
            if column + count == self._row:
                reader.ended(key)

    def _turned(self, row: int, rows: int, reader: Reader) -> Tensor:
        values = self.of.part(reader, row * self._row, rows * self._row).view(rows, *self.shape)
        return values.permute(0, *(dim + 1 for dim in self.dims)).reshape(-1)

    def origin(self, element: int = 0) -> tuple[str, int]:
        return self.of.origin(element // self._row * self._row)


@dataclass(eq=False)
class Whole(Recipe):
    """One output of a conversion without recipes: all its outputs are made at once."""

    name: str
    run: Callable[[Reader], Mapping[str, Tensor]]
    """All outputs; the same function for all of them."""
    count: int
    """Number of outputs."""
    source: str
    numel: int
    dtype: torch.dtype

    def fill(self, reader: Reader, start: int, out: Tensor) -> None:
        made = reader.hold(self.run, lambda: self.run(reader))[self.name]
        out.copy_(made.reshape(-1)[start : start + len(out)])
        if start + len(out) == self.numel:
            reader.ended(self.run, self.name, self.count)

    def origin(self, element: int = 0) -> tuple[str, int]:
        return self.source, 0


def as_floats(recipe: Recipe, meta: Tensor, built: torch.dtype, what: str) -> tuple[Recipe, Tensor]:
    """A parameter of the files with float64 rounded once to float32, the widest storage. Raises CheckpointError if it
    does not hold floating numbers although the model's parameter, of dtype `built`, does."""
    if meta.dtype is torch.float64:
        return Cast(recipe, torch.float32), meta.to(torch.float32)
    if built.is_floating_point and not meta.dtype.is_floating_point:
        raise CheckpointError(
            f"{what} is {str(meta.dtype).removeprefix('torch.')} in the files, and floating numbers in the model: "
            "quantized, without what says how? Save the checkpoint again in float32 or 16 bits."
        )
    return recipe, meta


# ---- finding recipes -------------------------------------------------------------------------------------------------


class Finder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While open, records recipes of the meta tensors that are made from the sources.

    Knows the operations that move elements; results of others have no recipe, and after an operation that writes into a
    tensor no result has one.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[int, tuple[Tensor, Recipe]] = {}
        self._spoilt = False

    def add(self, tensor: Tensor, recipe: Recipe) -> None:
        self._known[id(tensor)] = (tensor, recipe)  # the tensor too: its id must not be used again

    def recipe(self, tensor: Tensor) -> Recipe | None:
        known = self._known.get(id(tensor))
        return None if known is None or self._spoilt else known[1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        self._spoilt = self._spoilt or func._schema.is_mutable
        handler = _HANDLERS.get(func.overloadpacket.__name__)
        if handler is None or not args:
            return made
        given = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
        recipes = [self.recipe(tensor) for tensor in given]
        found = [recipe for recipe in recipes if recipe is not None]
        if len(found) == len(recipes):
            bound = {a.name: kwargs.get(a.name, a.default_value) for a in func._schema.arguments}
            bound.update(zip((a.name for a in func._schema.arguments), args, strict=False))
            outs = made if isinstance(made, (list, tuple)) else [made]
            for tensor, recipe in zip(outs, handler(given, found, bound, outs), strict=True):
                if recipe is not None:
                    self.add(tensor, recipe)
        return made


# For an operation: (its tensors, their recipes, its arguments by name, its results) -> recipes of its results.
_Handler = Callable[[Sequence[Tensor], Sequence[Recipe], Mapping[str, Any], Sequence[Tensor]], list[Recipe | None]]


def _same(given: Any, of: Sequence[Recipe], bound: Any, outs: Sequence[Tensor]) -> list[Recipe | None]:
    return [of[0] if out.dtype == of[0].dtype else None for out in outs]  # a view may be of another dtype


def _cast(given: Any, of: Sequence[Recipe], bound: Any, outs: Sequence[Tensor]) -> list[Recipe | None]:
    return [of[0] if outs[0].dtype == of[0].dtype else Cast(of[0], outs[0].dtype)]


def _join(given: Any, of: Sequence[Recipe], bound: Mapping[str, Any], outs: Sequence[Tensor]) -> list[Recipe | None]:
    out = outs[0]
    if any(recipe.dtype != out.dtype for recipe in of):
        return [None]
    parts = [recipe for recipe in of if recipe.numel > 0]
    return [Join(math.prod(out.shape[: bound["dim"] % out.dim()]), parts) if parts else of[0]]


def _cut(
    given: Sequence[Tensor], of: Sequence[Recipe], bound: Mapping[str, Any], outs: Sequence[Tensor]
) -> list[Recipe | None]:
    """One or several parts of one tensor along a dimension, one after another."""
    if bound.get("step", 1) != 1:
        return [None]
    shape = given[0].shape
    dim = bound["dim"] % len(shape)
    begin, inner = bound.get("index", bound.get("start")) or 0, math.prod(shape[dim + 1 :])
    begin = min(begin if begin >= 0 else max(0, begin + shape[dim]), shape[dim])
    cuts: list[Recipe | None] = []
    for out in outs:
        size = out.shape[dim] if out.dim() == len(shape) else 1
        cuts.append(Cut(math.prod(shape[:dim]), of[0], begin * inner, size * inner))
        begin += size
    return cuts


def _turn(
    given: Sequence[Tensor], of: Sequence[Recipe], bound: Mapping[str, Any], outs: Sequence[Tensor]
) -> list[Recipe | None]:
    shape = given[0].shape
    dims = list(range(len(shape)))
    if "dims" in bound:
        dims = [dim % len(shape) for dim in bound["dims"]]
    elif len(shape) > 1:
        one, other = bound.get("dim0", 0) % len(shape), bound.get("dim1", 1) % len(shape)
        dims[one], dims[other] = dims[other], dims[one]
    kept = next((i for i, dim in enumerate(dims) if i != dim), len(shape))
    if kept == len(shape) or of[0].numel == 0:
        return [of[0]]
    return [Turn(math.prod(shape[:kept]), of[0], tuple(shape[kept:]), tuple(dim - kept for dim in dims[kept:]))]


_HANDLERS: dict[str, _Handler] = {
    **dict.fromkeys(
        ("view", "_unsafe_view", "reshape", "_reshape_alias", "clone", "contiguous", "detach", "alias", "lift_fresh",
         "unsqueeze", "squeeze", "flatten"), _same,
    ),
    **dict.fromkeys(("_to_copy", "to"), _cast),
    **dict.fromkeys(("cat", "stack"), _join),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind", "narrow", "select", "slice"), _cut),
    **dict.fromkeys(("transpose", "permute", "t"), _turn),
}  # fmt: skip
