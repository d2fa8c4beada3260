"""Cuts parameters into pieces, and packs pieces into blocks.

A *block* is the unit of streaming: each element of an outermost repeated stack (ModuleList or Sequential with at least
two children of one class) is a block, and the rest is grouped in execution order, in groups no larger than the largest
of those. In models without a stack, the top-level children are blocks. A parameter belongs to the block of the module
in its canonical name.

No block holds more than `block_numel` elements: a layer larger than that is several blocks in a row, and a parameter
that does not fit into one together with its module's small parameters is cut into *pieces*: ranges of whole rows (of
dim 0), about equal. All but the last are a multiple of 128 rows, or if fewer rows fit, of 128 elements: so a format's
groups, their trained scales and the noise's counters have the same boundaries in a piece as in the parameter, and the
numbers do not depend on the cut. If rows of dim 0 are too large (128 elements in whole rows do not fit), the first two
dimensions are flattened and their rows are used, and so on. Not cut, and therefore possibly larger than a block should
be: parameters with fewer than two dimensions, those whose last dimension is too large, and parameters that are kept on
the device for the whole run.

Stacked experts (`experts.py`) are cut together, into *runs*: a run has the pieces of all their parameters for as many
experts as fit into a block. A run is one block, or several blocks in a row if one expert is larger than a block; a
piece is then rows of one expert's matrix.

Pure: no device, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch

from ..modules.recorder import Trace
from ..modules.tree import ModuleTree

BLOCK_NUMEL = 64 << 20
"""Default limit of a block: 128 MiB of 16-bit weights. So large that a copy's start-up cost is negligible."""

ALIGN = 128  # elements: a multiple of every group and of a Philox block's numbers; also rows, for fast products


@dataclass(frozen=True)
class ParamSpec:
    """One parameter, stored once for all its names."""

    name: str
    """Canonical name: the first in `model.named_parameters()`."""
    aliases: tuple[str, ...]
    """Its other names (ties)."""
    param_id: int
    shape: torch.Size
    dtype: torch.dtype
    """The dtype that the model computes with."""
    trainable: bool
    strides: tuple[int, ...] | None = None
    """The strides of the model's own tensor if it is not row-major (channels_last, transposed). Lanes get these
    strides, since kernels depend on them; the store is row-major."""

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def row_numel(self) -> int:
        """Elements of one row of dim 0; 1 for a scalar."""
        return self.shape[1:].numel()


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of a parameter, whole rows; most parameters have only one piece."""

    name: str
    """Canonical name of the parameter."""
    index: int
    """The piece's index among the parameter's pieces."""
    start: int
    numel: int
    _hash: int = field(init=False, repr=False, compare=False)  # pieces are looked up a dozen times a visit

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.name, self.start)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def stop(self) -> int:
        return self.start + self.numel


@dataclass(frozen=True)
class Block:
    """Pieces stored and streamed together."""

    index: int
    name: str
    """Module path; all blocks of a layer in several blocks have the layer's name."""
    pieces: tuple[Piece, ...]
    """In execution order."""

    @property
    def params(self) -> tuple[str, ...]:
        """Canonical names of the parameters with at least one piece in this block."""
        return tuple(dict.fromkeys(piece.name for piece in self.pieces))

    @property
    def numel(self) -> int:
        return sum(piece.numel for piece in self.pieces)


def whole(spec: ParamSpec) -> Piece:
    """A parameter that is not cut."""
    return Piece(spec.name, 0, 0, spec.numel)


def cut(spec: ParamSpec, most: int) -> tuple[Piece, ...]:
    """A parameter in pieces of at most `most` elements, by the module's rule; one piece if it cannot be cut."""
    row = spec.row_numel
    if spec.numel <= most or len(spec.shape) < 2:
        return (whole(spec),)
    unit = ALIGN if most // row >= ALIGN else ALIGN // math.gcd(ALIGN, row)
    fitting = most // row // unit * unit
    if fitting == 0 and len(spec.shape) > 2:
        return cut(replace(spec, shape=torch.Size((spec.shape[0] * spec.shape[1], *spec.shape[2:]))), most)
    if fitting == 0:
        return (whole(spec),)
    rows = spec.shape[0]
    size = -(-rows // -(-rows // fitting))  # as few pieces as fit, of equal size
    size = -(-size // unit) * unit
    starts = range(0, rows, size)
    return tuple(Piece(spec.name, i, r * row, min(size, rows - r) * row) for i, r in enumerate(starts))


def cut_runs(specs: Sequence[ParamSpec], most: int) -> list[list[Piece]]:
    """Stacked parameters, all with one row per expert, in runs of experts: per run its pieces, parameter by parameter.

    A run has at most `most` elements if more than one expert (or as many as the grid takes) fits, and no piece has more
    if its rows can be cut. One run of whole parameters if all of them fit.
    """
    experts, each = specs[0].shape[0], sum(spec.row_numel for spec in specs)
    if experts * each <= most:
        return [[whole(spec) for spec in specs]]
    unit = math.lcm(*(ALIGN // math.gcd(ALIGN, spec.row_numel) for spec in specs))
    fitting = max(1, most // each // unit) * unit
    size = -(-experts // -(-experts // fitting))
    size = -(-size // unit) * unit
    count = dict.fromkeys((spec.name for spec in specs), 0)
    runs: list[list[Piece]] = []
    for first in range(0, experts, size):
        runs.append([])
        held = min(size, experts - first)
        for spec in specs:  # cut like a matrix of all rows of the run's experts
            rows = replace(spec, shape=torch.Size((held * spec.shape[1], *spec.shape[2:])))
            for piece in cut(rows, most):
                start = first * spec.row_numel + piece.start
                runs[-1].append(Piece(spec.name, count[spec.name], start, piece.numel))
                count[spec.name] += 1
    return runs


def pack(
    tree: ModuleTree,
    params: Mapping[str, ParamSpec],
    serving: Mapping[str, tuple[str, ...]],
    trace: Trace,
    block_numel: int,
) -> tuple[Block, ...]:
    """Blocks in the order in which a forward first reaches them. serving: parameter -> modules that are served it."""
    units: dict[str, list[str]] = {}  # stack element, or module outside stacks -> its parameters
    for name in params:
        holder = tree.holders[name][0]
        units.setdefault(tree.element_of(holder) or tree.runner(holder), []).append(name)
    first = {module: i for i, (_, module) in reversed(list(enumerate(trace.order)))}
    when, last = {}, -1
    for unit, names in units.items():  # a module that was not seen to run follows the one defined before it
        seen = [first[m] for n in names for m in serving[n] if m in first]
        last = when[unit] = min(seen) if seen else last
    nbytes = {u: sum(params[n].numel * params[n].dtype.itemsize for n in names) for u, names in units.items()}
    cap = max((nbytes[u] for u in units if u in tree.elements), default=0)
    groups: list[list[str]] = []
    room = 0
    for unit in sorted(units, key=lambda u: when[u]):
        if unit in tree.elements:
            groups.append([unit])
            room = 0
        elif groups and nbytes[unit] <= room:
            groups[-1].append(unit)
            room -= nbytes[unit]
        else:
            groups.append([unit])
            room = cap - nbytes[unit]
    blocks: list[Block] = []
    for group in groups:
        names = [n for unit in group for n in sorted(units[unit], key=lambda n: _first_use(n, tree, serving, first))]
        label = "+".join(unit or "(model)" for unit in group)
        for pieces in _fill(_bundles(names, params, tree, block_numel), block_numel):
            blocks.append(Block(len(blocks), label, pieces))
    return tuple(blocks)


def _first_use(
    name: str, tree: ModuleTree, serving: Mapping[str, tuple[str, ...]], first: Mapping[str, int]
) -> tuple[int, int]:
    owner = min((first[m] for m in serving[name] if m in first), default=len(first))
    return owner, min((first[h] for h in tree.holders[name] if h in first), default=len(first))


def _bundles(
    names: Sequence[str], params: Mapping[str, ParamSpec], tree: ModuleTree, block_numel: int
) -> Iterator[list[Piece]]:
    """Pieces in order, in bundles that are best in one block: a bias and the first piece of its weight.

    In each module uncut parameters come first, so that they are there before the first piece of the cut one. A run of
    stacked experts is one bundle.
    """
    for holder, group in groupby(names, key=lambda name: tree.holders[name][0]):
        specs = [params[name] for name in group]
        if holder in tree.stacks and sum(spec.numel for spec in specs) > block_numel:
            yield from cut_runs(specs, block_numel)
            continue
        small = [whole(spec) for spec in specs if len(spec.shape) < 2]
        beside = sum(piece.numel for piece in small)
        most = block_numel - beside if 2 * beside <= block_numel else block_numel
        large = sorted((cut(spec, most) for spec in specs if len(spec.shape) >= 2), key=lambda pieces: len(pieces) > 1)
        single = [piece for pieces in large for piece in pieces]
        yield [*small, *single[:1]]
        yield from ([piece] for piece in single[1:])


def _fill(bundles: Iterable[list[Piece]], block_numel: int) -> Iterator[tuple[Piece, ...]]:
    """Bundles in order into blocks of at most block_numel elements; one that is larger by itself is split up."""
    block: list[Piece] = []
    used = 0
    for bundle in bundles:
        parts = [bundle] if sum(piece.numel for piece in bundle) <= block_numel else [[piece] for piece in bundle]
        for part in parts:
            numel = sum(piece.numel for piece in part)
            if block and used + numel > block_numel:
                yield tuple(block)
                block, used = [], 0
            block += part
            used += numel
    if block:
        yield tuple(block)
