"""The lanes' source of weights: scratch made from blocks as they pass through the window.

Before a module runs, `emit` makes its scratch weights from the blocks' stored bytes in one fused pass per piece: apply
the updates of the steps that the piece lacks, write back those up to the last fold, emit the perturbed weights. A
parameter that does not train is the same for every perturbation: it is decoded once, and all lanes get that tensor.
`window.py` moves blocks, `emitter.py` computes on their bytes, and `reading.py` reads the weights between passes.

Contract: the bytes of a block at version v are a function of the base weights and the updates of steps 0..v-1 only.
Window, prefetch, tier, order of service and evaluations cannot change them; the cut into blocks and pieces cannot
change the values.

Span for profilers: `zo_offload.stream:fused`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..devices import Device
from ..kernels.records import Gains, Masks, Perturbation, Rounding
from ..numerics.noise import NoiseSpec
from ..numerics.updates import UpdateLog
from ..plan.blocks import ParamSpec, Piece
from ..plan.layout import Layout
from ..plan.plan import Owner, Plan
from ..system.spans import span
from ..tiers import Tier
from .emitter import Emitter, Share
from .fold_sample import FoldSample
from .reading import Reader
from .scratch import ScratchPool
from .slots import Slot, Traffic, WindowSize
from .window import BlockWindow


@dataclass(frozen=True)
class _Recipe:
    """The scratch of an owner's pieces and each piece's place in it: computed once, used at every visit."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    once: tuple[bool, ...]
    """Whether a parameter does not train, so that all lanes have the same tensor."""
    of: tuple[str | None, ...]
    """The part of the model that each parameter is in, if steps may leave that out."""
    is_chosen: bool
    """Steps may leave some parameters out."""
    names: tuple[str, ...]
    first: tuple[int, ...]
    """The index of each parameter's first element here."""
    shares: tuple[Share, ...]
    """The owner's pieces: one share per run of pieces in one block."""


class Streamer:
    """The lanes' source of weights (`lanes.serving.Source`) over a tier, a window of slots and the update log.

    window: how blocks move. decays(spec): whether weight decay applies to a parameter. look: called before each owner's
    weights are made; it may raise to end the pass. held(version): parameters whose values are not those of their
    blocks, by name, float32 on the device: a tail's (`run/tail.py`).
    """

    def __init__(
        self,
        plan: Plan,
        layout: Layout,
        tier: Tier,
        device: Device,
        log: UpdateLog,
        *,
        window: WindowSize,
        fold_every: int,
        noise: NoiseSpec,
        rounding: Rounding = "nearest",
        decays: Callable[[ParamSpec], bool] = lambda spec: len(spec.shape) > 1,
        gains: Gains | None = None,
        masks: Masks | None = None,
        threads: int | None = None,
        look: Callable[[], None] = lambda: None,
        held: Callable[[int], Mapping[str, Tensor]] = lambda version: {},
    ) -> None:
        self.plan, self.layout, self.log, self._held = plan, layout, log, held
        self._emitter = Emitter(
            plan.params,
            layout,
            log,
            fold_every=fold_every,
            noise=noise,
            rounding=rounding,
            decay={name: decays(spec) for name, spec in plan.params.items()},
            gains=gains or {},
            masks={name: mask.on(device.upload) for name, mask in (masks or {}).items()},
            threads=threads,
        )
        self._recipes: dict[tuple[str, Piece | None, int], _Recipe] = {}
        self._pool = ScratchPool(device.alloc)
        self._look = look
        self.window = BlockWindow(
            plan,
            layout,
            tier,
            device,
            log,
            how=window,
            fold_every=fold_every,
            settle=self._settle,
            needed=self._emitter.needed,
        )
        """The slots, and the transfers of their blocks."""
        self.reader = Reader(
            plan,
            layout,
            self.window,
            settle=self._settle,
            lacking=self._emitter.lacking,
            mask_of=self._emitter.mask,
            noise=noise,
            threads=threads,
            held=lambda: held(log.version),
        )
        """The current weights, between passes."""

    def set_plan(self, plan: Plan) -> None:
        """Take a plan whose owners were lifted or whose order was learnt; the blocks must be the same."""
        self._recipes = {}
        self.plan = plan
        self.reader.forget()
        self.window.set_plan(plan)

    # ---- passes, and operations between them -------------------------------------------------------------------------

    def begin_pass(self, exact: bool = False) -> None:
        """Start one forward of all lanes. exact: no lane is perturbed, and all see the masters (evaluation)."""
        self.reader.forget()
        self.window.begin_pass(exact)

    def end_pass(self) -> None:
        """All lanes have returned: finish the visits of the remaining blocks."""
        self.window.end_pass()

    def flush_all(self, between: Callable[[], None] = lambda: None) -> None:
        """Bring every block to the last fold in its tier; see `BlockWindow.flush_all`."""
        self.reader.forget()
        self.window.flush_all(between)

    def bring(self, block: int) -> None:
        """Bring one block to the last fold, in its tier. Not during a pass, and with no block fetched ahead."""
        self.reader.forget()
        self.window.bring(block)

    def mend(self) -> list[int]:
        """Restore the state between passes after an interrupted pass. The lost blocks; see `BlockWindow.mend`."""
        self.reader.forget()
        self._pool.take_all_back()
        return self.window.mend()

    def close(self) -> None:
        """End the worker threads, release window and scratch; nothing is flushed. Safe to call twice."""
        self.reader.forget()
        self.window.close()
        self._pool.clear()

    @property
    def traffic(self) -> Traffic:
        """The traffic since the last `count_anew`."""
        return self.window.traffic

    def count_anew(self) -> Traffic:
        """Count from zero; returns the counters, which count until the next call."""
        self.window.traffic = Traffic()
        return self.window.traffic

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights in the device's memory: the window and the pinned blocks."""
        return self.window.resident_bytes

    @property
    def scratch_bytes(self) -> int:
        return self._pool.nbytes

    # ---- lanes.Source ----------------------------------------------------------------------------------------------

    def emit(
        self,
        owner: Owner,
        perturbations: Sequence[Perturbation],
        rows: Tensor | None = None,
        pieces: Sequence[Piece] | None = None,
        *,
        fresh: bool = False,
    ) -> list[list[Tensor]]:
        """Scratch weights of the owner's parameters, [perturbation][parameter]; see `lanes.serving.Source`."""
        self._look()
        window = self.window
        key = (owner.name, pieces[0] if pieces else None, len(pieces or ()))
        recipe = self._recipes.get(key)
        if recipe is None:
            recipe = self._recipes[key] = self._recipe(owner, pieces)
        once, step = recipe.once, self.log.version
        if recipe.is_chosen:  # parameters that this step leaves out also have one tensor for all lanes
            trains = self.log.parts.trains
            once = tuple([o or not trains(part, step) for o, part in zip(once, recipe.of, strict=True)])
        scratch = self._pool.take(
            recipe.shapes if rows is None else [(len(rows), *shape[1:]) for shape in recipe.shapes],
            recipe.dtypes,
            len(perturbations),
            once=once,
            fresh=fresh,
        )
        for share in recipe.shares:
            slot, writes = window.acquire(share.block)
            start = time.perf_counter()
            with span("zo_offload.stream:fused", window.traffic.times, slot.block):
                self._emitter.emit(share, window, slot, writes, perturbations, once, scratch, rows)
            window.traffic.fused_s += time.perf_counter() - start
        if held := self._held(step):
            for i, name in enumerate(recipe.names):
                if name in held:
                    _put(held[name], scratch.tensors, i, recipe.first[i], rows)
        return scratch.tensors

    def _recipe(self, owner: Owner, pieces: Sequence[Piece] | None) -> _Recipe:
        parts = self.plan.pieces_in(owner) if pieces is None else pieces
        shapes, first = self.plan.shapes(parts), dict[str, int]()
        for part in parts:
            first[part.name] = min(part.start, first.get(part.name, part.start))
        names = [name for name in owner.params if name in shapes]
        of = tuple(self.log.parts.of.get(name) for name in names)
        placed = [(part, names.index(part.name), part.start - first[part.name]) for part in parts]
        in_blocks = groupby(placed, lambda one: self.layout.places[one[0]].block)
        return _Recipe(
            tuple(shapes[name] for name in names),
            tuple(self.plan.params[name].dtype for name in names),
            tuple(not self.plan.params[name].trainable for name in names),
            of,
            any(of),
            tuple(names),
            tuple(first[name] for name in names),
            tuple(self._emitter.share(block, list(together)) for block, together in in_blocks),
        )

    @property
    def changes(self) -> FoldSample:
        """How many stored values folds change."""
        return self._emitter.changes

    def _settle(self, slot: Slot) -> None:
        self._emitter.settle(self.window, slot)

    def release(self, scratch: list[list[Tensor]]) -> None:
        """The last lane has left the owner: its scratch may be used again."""
        self._pool.give(scratch)


def _put(value: Tensor, scratch: list[list[Tensor]], i: int, first: int, rows: Tensor | None) -> None:
    """Copy a parameter's value, its part from element `first` on or these rows, into its tensors in scratch."""
    for out in {id(tensors[i]): tensors[i] for tensors in scratch}.values():
        part = value.view(-1)[first : first + out.numel()] if rows is None else value[rows]
        out.copy_(part.view(out.shape))
