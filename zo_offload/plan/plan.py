"""The plan of a model: its blocks, and which module needs which parameters in which order.

    make_plan   the module tree and a trace without weights -> Plan
    relift      a plan and the trace of a watched real run -> the same blocks with corrected owners and order

An *owner* is a module that gets its parameters while it runs; `owners.py` finds the owners.

Parameters are stored in blocks, the units of streaming; parameters that are too large for a block are cut into pieces:
`blocks.py`.

Pure: no device, no I/O; on a model on meta it needs no weights.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import nn

from ..errors import PlanError
from ..modules.parameters import check_memory, ordered_like
from ..modules.recorder import ForwardCall, Trace
from ..modules.tree import ModuleTree, TrainableFilter, module_tree, select_trainable
from ..numerics.noise import assign_param_ids
from .blocks import BLOCK_NUMEL, Block, ParamSpec, Piece, pack, whole
from .owners import serve
from .trace import trace_on_meta


@dataclass(frozen=True)
class Owner:
    """A module that gets its parameters while it runs."""

    name: str
    """Module path; "" is the model itself."""
    params: tuple[str, ...]
    """Canonical names of the parameters installed while it runs, including lifted ones."""
    block: int
    """Block of its first piece that streams."""
    rows: bool = False
    """A plain nn.Embedding: it can be served only the rows in use."""
    spans: bool = False
    """Its pieces are in several streamed blocks: each is visited once, so all lanes are served together."""


@dataclass(frozen=True)
class BlockRow:
    """One line of `Plan.describe()`: a layer, or a group of parameters outside layers."""

    block: int
    """Its first block."""
    num_blocks: int
    name: str
    num_params: int
    numel: int
    trainable_numel: int
    visits: int
    """How often one forward visits its first block."""


@dataclass(frozen=True)
class Plan:
    """The streamer's and the lanes' description of a model."""

    params: Mapping[str, ParamSpec]
    """The parameters that stream, in order of `model.named_parameters()`."""
    owners: tuple[Owner, ...]
    calls: tuple[int, ...]
    """The owner of each call, in execution order of one forward, with repeats. Owners not seen to run are missing."""
    blocks: tuple[Block, ...]
    traced: bool
    """Whether a whole forward was traced; if not, owners are safe guesses, to be refined after the first real run."""
    notes: tuple[str, ...]
    tree: ModuleTree = field(repr=False)
    trace: Trace = field(repr=False)
    resident: frozenset[int] = frozenset()
    """Blocks that stay on the device for the whole run; their visits are not counted."""

    def block_of(self, name: str) -> int:
        """Index of the block that stores a parameter (canonical name), or its first piece."""
        return self._block_of[self._pieces_of[name][0]]

    def pieces_of(self, name: str) -> tuple[Piece, ...]:
        """A parameter's pieces in order; most have one."""
        return self._pieces_of[name]

    def pieces_in(self, owner: Owner) -> tuple[Piece, ...]:
        """All pieces of an owner's parameters, in the order in which its blocks are visited.

        Uncut parameters come before a single cut one (a bias before the first piece of its weight). With several cut
        parameters (lifts): in stored order. The last piece of an embedding that serves rows comes first: if it is tied
        to the head, the previous pass ended with that piece, which is still in the window.
        """
        return self._pieces_in[owner.params, owner.rows]

    def portions(self, owner: Owner) -> tuple[tuple[Piece, ...], ...]:
        """The portions that an owner can be served one after another, in stored order; one if it needs all at once.

        For a plain nn.Linear with no other parameters: the pieces of its weight, the first one with the bias. For
        stacked experts with no other parameters: their runs.
        """
        return self._portions_of[owner.name]

    def runs(self, names: Sequence[str]) -> tuple[slice, ...]:
        """The experts of each run, for stacked parameters cut at the same experts. One run if they are not cut."""
        rows = {name: self.params[name].row_numel for name in names}
        starts = ({p.start // rows[n] for p in self._pieces_of[n] if p.start % rows[n] == 0} for n in names)
        firsts = sorted(set.intersection(*starts))
        ends = [*firsts[1:], self.params[names[0]].shape[0]]
        return tuple(slice(first, end) for first, end in zip(firsts, ends, strict=True))

    def streamed_blocks(self, pieces: Iterable[Piece]) -> tuple[int, ...]:
        """The blocks of pieces, in the given order, without those that stay on the device."""
        blocks = dict.fromkeys(self._block_of[piece] for piece in pieces)
        return tuple(block for block in blocks if block not in self.resident)

    def shapes(self, pieces: Iterable[Piece]) -> dict[str, tuple[int, ...]]:
        """Shapes by parameter, with as many rows of dim 0 as its pieces have."""
        numel = Counter[str]()
        for piece in pieces:
            numel[piece.name] += piece.numel
        return {name: self._shape(self.params[name], n) for name, n in numel.items()}

    def _shape(self, spec: ParamSpec, numel: int) -> tuple[int, ...]:
        return tuple(spec.shape) if numel == spec.numel else (numel // spec.row_numel, *spec.shape[1:])

    @cached_property
    def _block_of(self) -> dict[Piece, int]:
        return {piece: block.index for block in self.blocks for piece in block.pieces}

    @cached_property
    def _pieces_of(self) -> dict[str, tuple[Piece, ...]]:
        return _pieces_of(self.blocks)

    @cached_property
    def _pieces_in(self) -> dict[tuple[tuple[str, ...], bool], tuple[Piece, ...]]:
        return {(o.params, o.rows): _in_order(o.params, self._pieces_of, self._block_of, o.rows) for o in self.owners}

    @cached_property
    def _portions_of(self) -> dict[str, tuple[tuple[Piece, ...], ...]]:
        return {owner.name: self._cut_up(owner) for owner in self.owners}

    def _cut_up(self, owner: Owner) -> tuple[tuple[Piece, ...], ...]:
        pieces = self.pieces_in(owner)
        if owner.name not in self.tree.portioned:
            return (pieces,)
        if set(owner.params) == set(self.tree.stacks.get(owner.name, ())):
            firsts = [run.start for run in self.runs(owner.params)]
            found: list[list[Piece]] = [[] for _ in firsts]
            for piece in pieces:
                found[bisect_right(firsts, piece.start // self.params[piece.name].row_numel) - 1].append(piece)
            return tuple(tuple(portion) for portion in found)
        weight, bias = (self.tree.names.get(f"{owner.name}.{what}") for what in ("weight", "bias"))
        if weight in owner.params and {weight, bias}.issuperset(owner.params):
            first, *others = self._pieces_of[weight]
            beside = (piece for piece in pieces if piece.name != weight)
            return ((*beside, first), *((piece,) for piece in others))
        return (pieces,)

    @cached_property
    def visits(self) -> tuple[int, ...]:
        """Blocks in the order in which one forward visits them; consecutive calls in one block are one visit."""
        order: list[int] = []
        for call in self.calls:
            for piece in self.pieces_in(self.owners[call]):
                block = self._block_of[piece]
                if block not in self.resident and (not order or order[-1] != block):
                    order.append(block)
        return tuple(order)

    @property
    def numel(self) -> int:
        return sum(p.numel for p in self.params.values())

    @property
    def trainable_numel(self) -> int:
        return sum(p.numel for p in self.params.values() if p.trainable)

    def lifted(self) -> dict[str, tuple[str, ...]]:
        """Parameters that are not served at their own modules: canonical name -> owners."""
        owners: dict[str, list[str]] = {}
        for owner in self.owners:
            for name in owner.params:
                owners.setdefault(name, []).append(owner.name)
        return {n: tuple(o) for n, o in owners.items() if not set(o) <= set(self.tree.holders[n])}

    def describe(self) -> list[BlockRow]:
        """One row per layer (consecutive blocks of one layer), for tables."""
        rows, visits = [], self.visits
        for name, group in groupby(self.blocks, key=lambda block: block.name):
            blocks = list(group)
            pieces = [piece for block in blocks for piece in block.pieces]
            rows.append(
                BlockRow(
                    blocks[0].index, len(blocks), name, len({p.name for p in pieces}), sum(p.numel for p in pieces),
                    sum(p.numel for p in pieces if self.params[p.name].trainable), visits.count(blocks[0].index),
                )
            )  # fmt: skip
        return rows


def plan_digest(plan: Plan) -> str:
    """32 hex digits over everything that fixes the stored bytes: parameters, their ids, pieces and blocks. Owners and
    order are left out, so a plan keeps its digest when it is relifted."""
    rows = [[p.name, p.param_id, list(p.shape), str(p.dtype), p.trainable] for p in plan.params.values()]
    blocks = [[[p.name, p.start, p.numel] for p in b.pieces] for b in plan.blocks]
    return hashlib.blake2b(json.dumps([rows, blocks]).encode(), digest_size=16).hexdigest()


def make_plan(
    model: nn.Module,
    batch: Any = None,
    *,
    trainable: TrainableFilter = None,
    call: ForwardCall | None = None,
    block_numel: int = BLOCK_NUMEL,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Plan a model, from its module tree and one traced forward without weights.

    Args:
        model: weights may be real or on meta; it is neither run nor changed.
        batch: one batch as `call` takes it; only shapes and integer values matter. None: the model's `dummy_inputs`
            if it has any (transformers), else no trace.
        trainable: which parameters are perturbed and updated. None: those with requires_grad, or every floating one
            if none has it. "requires_grad": strictly those. A callable: (name, parameter) -> bool. Else a glob or a
            list of globs over dotted names: a glob of k segments selects a parameter if any k consecutive segments of
            one of its names match, segment by segment (`*` stays within a segment), so "layers.*.self_attn" selects
            everything in each layer's attention, "bias" every bias, "*" all.
        call: how a lane calls the model; default `model(**batch)`.
        block_numel: most elements a block may hold; larger layers and parameters are cut (`blocks.py`).
        notes: notes about the model for the user, first among the plan's notes.

    Raises PlanError: no parameters, none trainable, a pattern that selects nothing, parameters of unknown shape, one
    used outside of any module.
    """
    named = dict(model.named_parameters())
    if not named:
        raise PlanError(f"{type(model).__name__} has no parameters: nothing to train")
    lazy = [n for n, p in named.items() if isinstance(p, (nn.UninitializedParameter, nn.UninitializedBuffer))]
    if lazy:
        raise PlanError(f"parameters without a shape yet: {lazy[:5]}. Run the model once on a batch before planning")
    if isinstance(model, torch.jit.ScriptModule):
        raise PlanError(f"{type(model).__name__}: the calls of a scripted model cannot be seen. Pass the module itself")
    tree = module_tree(model)
    chosen = select_trainable(named, tree, trainable)
    remarks = check_memory(model, chosen)
    ids = assign_param_ids(list(named))
    streamed = {name: p for name, p in named.items() if name in tree.names}
    aliases: dict[str, list[str]] = {name: [] for name in streamed}
    for name, canonical in tree.names.items():
        if name != canonical:
            aliases[canonical].append(name)
    params = {
        n: ParamSpec(n, tuple(aliases[n]), ids[n], p.shape, p.dtype, n in chosen, ordered_like(p))
        for n, p in streamed.items()
    }
    if batch is None:
        batch = getattr(model, "dummy_inputs", None)
    if batch is None:
        trace = Trace({}, (), False, ("no batch to trace with",))
    else:
        trace = trace_on_meta(model, batch, call or (lambda m, b: m(**b)))
    serving, seen = serve(tree, trace)
    notes = (*notes, *seen, *remarks)
    frozen = sum(p.numel for p in params.values() if not p.trainable)
    if trainable is None and frozen:
        notes += (f"{frozen:,} parameters without requires_grad stay frozen",)
    if tree.kept:
        kept = [f"{name!r} ({named[name].dtype})" for name in dict.fromkeys(tree.kept.values())]
        more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
        notes += (f"kept in the module, frozen: {', '.join(kept[:3])}{more}",)
    blocks = pack(tree, params, serving, trace, block_numel)
    return _assemble(params, blocks, tree, trace, serving, notes)


def _with_remarks(plan: Plan, notes: tuple[str, ...]) -> tuple[str, ...]:
    """Notes of a later trace, and an earlier plan's notes about the parameters themselves."""
    return (*notes, *(note for note in plan.notes if note not in plan.trace.notes))


def relift(plan: Plan, seen: Trace) -> Plan:
    """The plan corrected by a watched real run's trace (`Hub.trace`, `PlanFault.trace`). Parameters and blocks stay.

    After a fault it lifts parameters that were used elsewhere; after a first run with a guessed plan (`traced` False)
    it undoes unnecessary lifts. Relift until a run has no fault: each fault adds a use, so this ends.
    """
    # a trace on meta that stopped has only some uses: the real run's trace replaces it
    trace = seen if seen.complete and not plan.trace.complete else plan.trace.merged(seen)
    if trace is seen:
        trace = seen.with_writes_of(plan.trace)
    serving, notes = serve(plan.tree, trace)
    notes = _with_remarks(plan, notes)
    return _assemble(plan.params, plan.blocks, plan.tree, trace, serving, notes, plan.resident)


def keep_resident(plan: Plan, names: frozenset[str]) -> Plan:
    """The plan with the parameters `names`, uncut, in a last block of their own that stays on the device."""
    rest = [(b.name, tuple(p for p in b.pieces if p.name not in names)) for b in plan.blocks]
    blocks = [Block(i, name, pieces) for i, (name, pieces) in enumerate((n, p) for n, p in rest if p)]
    moved = dict.fromkeys(name for b in plan.blocks for name in b.params if name in names)
    resident = Block(len(blocks), "trained", tuple(whole(plan.params[name]) for name in moved))
    serving, notes = serve(plan.tree, plan.trace)
    notes = _with_remarks(plan, notes)
    return _assemble(
        plan.params, (*blocks, resident), plan.tree, plan.trace, serving, notes, frozenset({resident.index})
    )


def _assemble(
    params: Mapping[str, ParamSpec],
    blocks: tuple[Block, ...],
    tree: ModuleTree,
    trace: Trace,
    serving: Mapping[str, tuple[str, ...]],
    notes: tuple[str, ...],
    resident: frozenset[int] = frozenset(),
) -> Plan:
    served: dict[str, list[str]] = {}
    for name in params:
        for module in serving[name]:
            served.setdefault(module, []).append(name)
    block_of = {piece: block.index for block in blocks for piece in block.pieces}
    pieces_of = _pieces_of(blocks)
    called = [name for _, name in trace.order if name in served]
    unseen = [name for name in tree.classes if name in served and name not in set(called)]
    if not trace.complete:  # the order is a guess anyway: definition order for the rest
        called += unseen
    owners: list[Owner] = []
    index: dict[str, int] = {}
    block = 0
    for name in dict.fromkeys([*called, *unseen]):
        index[name] = len(owners)
        mine = tuple(served[name])
        rows = name in tree.gatherable and len(mine) == 1 and name in tree.holders[mine[0]]
        streamed = [b for p in _in_order(mine, pieces_of, block_of, rows) if (b := block_of[p]) not in resident]
        # an owner with resident parameters only belongs where the forward reaches it
        block = streamed[0] if streamed else block
        owners.append(Owner(name, mine, block, rows, len(set(streamed)) > 1))
    calls = tuple(index[name] for name in called)
    return Plan(params, tuple(owners), calls, blocks, trace.complete, notes, tree, trace, resident)


def _pieces_of(blocks: tuple[Block, ...]) -> dict[str, tuple[Piece, ...]]:
    found: dict[str, list[Piece]] = {}
    for block in blocks:
        for piece in block.pieces:
            found.setdefault(piece.name, []).append(piece)
    return {name: tuple(sorted(pieces, key=lambda piece: piece.index)) for name, pieces in found.items()}


def _in_order(
    names: tuple[str, ...], pieces_of: Mapping[str, tuple[Piece, ...]], block_of: Mapping[Piece, int], rows: bool
) -> tuple[Piece, ...]:
    """See `Plan.pieces_in`."""
    pieces = [piece for name in names for piece in pieces_of[name]]
    pieces.sort(key=lambda piece: block_of[piece], reverse=rows)
    cut_ones = [name for name in names if len(pieces_of[name]) > 1]
    if len(cut_ones) == 1:
        pieces.sort(key=lambda piece: piece.name == cut_ones[0])
    return tuple(pieces)
