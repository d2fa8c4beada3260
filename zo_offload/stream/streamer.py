"""The lanes' source of weights: scratch made from blocks as they pass through the window.

When a module's turn comes, `emit` makes its scratch weights from the blocks' stored bytes in one fused pass a piece:
apply the updates of the steps the piece still lacks, write back those up to the last fold, emit the perturbed weights.
A parameter that does not train is the same for every perturbation: it is decoded once, and all lanes get that tensor.
How blocks come and go is `window.py`'s, and reading the weights between passes `reading.py`'s.

Contract: the bytes of a block at version v are a function of the base weights and the updates of steps 0..v-1 only.
Window, prefetch, tier, order of service and evaluation in between cannot change them; nor can the cut into blocks and
pieces change the values.

Span for profilers: `zo_offload.stream:fused`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..devices import Device
from ..kernels.device_updates import DeviceUpdates
from ..kernels.float32 import scaled
from ..kernels.records import ONE, STILL, Gains, Mask, Masks, Perturbation, Rounding, Update
from ..numerics.fused import fused_pass, fused_rows
from ..numerics.noise import NoiseSpec
from ..numerics.updates import UpdateLog
from ..plan.blocks import ParamSpec, Piece
from ..plan.layout import Layout
from ..plan.plan import Owner, Plan
from ..system.spans import span
from ..tiers import Tier
from .fold_sample import FoldSample
from .reading import Reader
from .scratch import ScratchPool
from .slots import Slot, Traffic, WindowSize
from .window import BlockWindow


@dataclass(frozen=True)
class _Recipe:
    """What scratch an owner's pieces need and where each piece goes: the same at every visit, and asked for at each."""

    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    once: list[bool]
    """Whether a parameter does not train, so that all lanes have the same tensor."""
    of: list[str | None]
    """Which part of the model it is of, if single steps leave that out."""
    parts: list[tuple[Piece, int, int]]
    """(piece, index of its parameter, its first element's place in what is there of the parameter)."""


class Streamer:
    """The lanes' source of weights (`lanes.serving.Source`) over a tier, a window of slots and the update log.

    window: how blocks move. decays(spec): whether weight decay applies to a parameter. look: called before each owner's
    weights are made, where it may end the pass by raising.
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
    ) -> None:
        self.plan, self.layout, self.log = plan, layout, log
        self.noise, self.rounding, self.threads, self.fold_every = noise, rounding, threads, fold_every
        self._decay = {name: decays(spec) for name, spec in plan.params.items()}
        self._gains: Gains = gains or {}
        self._masks: Masks = masks or {}
        self._first_fold = log.folded
        self._recipes: dict[tuple[str, Piece | None, int], _Recipe] = {}
        self._pool = ScratchPool(device.alloc)
        self._look = look
        self.changes = FoldSample(scales=layout.target == "scales", stochastic=rounding == "stochastic")
        """How many of the stored values folds change."""
        self.window = BlockWindow(
            plan,
            layout,
            tier,
            device,
            log,
            how=window,
            fold_every=fold_every,
            settle=self._settle,
            needed=self._needed,
        )
        """The blocks on their way."""
        self.reader = Reader(
            plan,
            layout,
            self.window,
            settle=self._settle,
            lacking=self._lacking,
            mask_of=self._mask,
            noise=noise,
            threads=threads,
        )
        """The current weights, between passes."""

    def set_plan(self, plan: Plan) -> None:
        """Take a plan whose owners were lifted or whose order was learnt; the blocks must be the same."""
        self._recipes = {}
        self.plan = plan
        self.reader.forget()
        self.window.set_plan(plan)

    # ---- passes, and what lies between them --------------------------------------------------------------------------

    def begin_pass(self, exact: bool = False) -> None:
        """Start one forward of all lanes. exact: no lane is perturbed, and all are to see the masters (evaluation)."""
        self.reader.forget()
        self.window.begin_pass(exact)

    def end_pass(self) -> None:
        """All lanes have returned: bring the remaining blocks' visits to their end."""
        self.window.end_pass()

    def flush_all(self, between: Callable[[], None] = lambda: None) -> None:
        """Bring every block to the last fold in its tier; see `BlockWindow.flush_all`."""
        self.reader.forget()
        self.window.flush_all(between)

    def bring(self, block: int) -> None:
        """One block to the last fold, in its tier. Not in a pass, and with nothing fetched ahead."""
        self.reader.forget()
        self.window.bring(block)

    def mend(self) -> list[int]:
        """After a pass was broken off: as between passes. The blocks that are lost; see `BlockWindow.mend`."""
        self.reader.forget()
        self._pool.take_all_back()
        return self.window.mend()

    def close(self) -> None:
        """End the worker threads, let window and scratch go; nothing is flushed. Safe to call twice."""
        self.reader.forget()
        self.window.close()
        self._pool.clear()

    @property
    def traffic(self) -> Traffic:
        """What was counted since the last `count_anew`."""
        return self.window.traffic

    def count_anew(self) -> Traffic:
        """Count from zero: what is counted from now on, until the next call of this."""
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
        if any(recipe.of):  # what this step leaves out is one tensor for all lanes too
            once = [o or not self.log.parts.trains(part, step) for o, part in zip(once, recipe.of, strict=True)]
        scratch = self._pool.take(
            recipe.shapes if rows is None else [(len(rows), *shape[1:]) for shape in recipe.shapes],
            recipe.dtypes,
            len(perturbations),
            once=once,
            fresh=fresh,
        )
        for part, index, start_at in recipe.parts:
            slot, writes = window.acquire(self.layout.places[part].block)
            lanes = perturbations[:1] if once[index] else perturbations
            outs = [tensors[index] for tensors in scratch.tensors[: len(lanes)]]
            if rows is None and outs[0].numel() != part.numel:
                outs = [out.view(-1)[start_at : start_at + part.numel] for out in outs]
            start = time.perf_counter()
            with span("zo_offload.stream:fused", window.traffic.times, slot.block):
                self._emit_one(part, slot, writes, lanes, outs, rows)
            window.traffic.fused_s += time.perf_counter() - start
        return scratch.tensors

    def _recipe(self, owner: Owner, pieces: Sequence[Piece] | None) -> _Recipe:
        parts = self.plan.pieces_in(owner) if pieces is None else pieces
        shapes, first = self.plan.shapes(parts), dict[str, int]()
        for part in parts:
            first[part.name] = min(part.start, first.get(part.name, part.start))
        names = [name for name in owner.params if name in shapes]
        return _Recipe(
            [shapes[name] for name in names],
            [self.plan.params[name].dtype for name in names],
            [not self.plan.params[name].trainable for name in names],
            [self.log.parts.of.get(name) for name in names],
            [(part, names.index(part.name), part.start - first[part.name]) for part in parts],
        )

    def release(self, scratch: list[list[Tensor]]) -> None:
        """The last lane has left the owner: its scratch may be used again."""
        self._pool.give(scratch)

    # ---- one block ---------------------------------------------------------------------------------------------------

    def _settle(self, slot: Slot) -> None:
        """Bring the pieces of a block that no module asked for to the last fold, as the others are."""
        self.window.wait(slot)
        for piece in self.plan.blocks[slot.block].pieces:
            if self._folds(piece, slot):
                self._fused(piece, slot, True, (), ())
            elif self.plan.params[piece.name].trainable:  # its bytes are those of the fold as they are
                slot.version[piece] = max(slot.version[piece], self.log.folded)

    def _emit_one(
        self,
        piece: Piece,
        slot: Slot,
        writes: bool,
        perturbations: Sequence[Perturbation],
        outs: Sequence[Tensor],
        rows: Tensor | None,
    ) -> None:
        spec, place = self.plan.params[piece.name], self.layout.places[piece]
        if self.window.exact and place.residual_nbytes:
            self._emit_exact(piece, slot, writes, outs, rows)
            return
        perturbations = self._own(piece.name, perturbations)
        if rows is None:
            self._fused(piece, slot, writes, perturbations, outs)
            return
        fused_rows(
            slot.memory[place.offset : place.offset + place.nbytes],
            place.fmt,
            param_id=spec.param_id,
            numel=piece.numel,
            row_numel=spec.row_numel,
            rows=rows,
            first_row=piece.start // spec.row_numel,
            total_rows=spec.shape[0],
            updates=self._lacking(piece, slot),
            noise=self.noise,
            rounding=self.rounding,
            perturbations=perturbations,
            outs=outs,
            residual=self._residual(piece, slot),
            target=self.layout.target if spec.trainable else "values",
            mask=self._mask(piece.name),
            threads=self.threads,
        )

    def _own(self, name: str, perturbations: Sequence[Perturbation]) -> Sequence[Perturbation]:
        """A parameter's own perturbations: none if it does not train (in this step), else the lanes' times its gain."""
        trains = self.log.parts.trains(self.log.parts.of.get(name), self.log.version)
        if not (self.plan.params[name].trainable and trains):
            return [STILL] * len(perturbations)
        gain = self._gains.get(name, ONE).lane
        return perturbations if gain == 1.0 else [Perturbation(p.seed, scaled(p.scale, gain)) for p in perturbations]

    def _emit_exact(self, piece: Piece, slot: Slot, writes: bool, outs: Sequence[Tensor], rows: Tensor | None) -> None:
        """A split parameter's masters, less what is pending, for lanes that are not perturbed."""
        spec, place = self.plan.params[piece.name], self.layout.places[piece]
        if not slot.residual:
            self.window.fetch_residual(slot)
        if self._folds(piece, slot):
            if not writes:  # an early visit of a block that a later one of this pass will write: fold into a copy
                slot = replace(slot, memory=slot.memory.clone(), version=dict(slot.version), streamed={}, lent=None)
            self._fused(piece, slot, True, (), ())
        end = place.residual_offset + place.residual_nbytes
        stored = slot.memory[place.offset : place.offset + place.nbytes]
        residual = slot.memory[place.residual_offset : end]
        still, updates = [STILL] * len(outs), self._lacking(piece, slot)
        if rows is None:
            fused_pass(
                stored, place.fmt, param_id=spec.param_id, numel=piece.numel, offset=piece.start, updates=updates,
                write_back=False, noise=self.noise, perturbations=still, outs=outs, residual=residual, master=True,
                mask=self._mask(piece.name), threads=self.threads,
            )  # fmt: skip
            return
        fused_rows(
            stored, place.fmt, param_id=spec.param_id, numel=piece.numel, row_numel=spec.row_numel, rows=rows,
            first_row=piece.start // spec.row_numel, total_rows=spec.shape[0], updates=updates, noise=self.noise,
            perturbations=still, outs=outs, residual=residual, master=True, mask=self._mask(piece.name),
            threads=self.threads,
        )  # fmt: skip

    def _fused(
        self, piece: Piece, slot: Slot, writes: bool, perturbations: Sequence[Perturbation], outs: Sequence[Tensor]
    ) -> None:
        place, spec = self.layout.places[piece], self.plan.params[piece.name]
        folds = self._folds(piece, slot)
        if writes and folds:
            self.window.own(slot)
        stored = slot.streamed_part(piece, place.offset, place.nbytes)
        updates = self._lacking(piece, slot)
        residual = self._residual(piece, slot) if folds else None
        fold = (self.log.folded - self._first_fold) // self.fold_every
        look = self.changes.before(slot.memory, place, piece.numel, fold) if writes and folds else None
        mark = slot.begin_write(piece, self.log.folded) if writes and folds else None
        fused_pass(
            stored,
            place.fmt,
            param_id=spec.param_id,
            numel=piece.numel,
            offset=piece.start,
            updates=updates,
            write_back=mark is not None,
            rounding=self.rounding,
            noise=self.noise,
            perturbations=perturbations,
            outs=outs,
            residual=residual,
            target=self.layout.target if spec.trainable else "values",
            mask=self._mask(piece.name),
            threads=self.threads,
            mark=mark,
        )
        if mark is not None:
            slot.end_write()
        if look is not None:
            self.changes.after(look)

    def _folds(self, piece: Piece, slot: Slot) -> bool:
        """Whether an update that this piece lacks folds."""
        part = self.log.parts.of.get(piece.name)
        return self.plan.params[piece.name].trainable and self.log.lacks(slot.version[piece], part)

    def _needed(self, block: int, fold: int) -> int:
        """The version that a block must have for its bytes to be those of a fold: steps may leave all of it out."""
        names = {p.name for p in self.plan.blocks[block].pieces if self.plan.params[p.name].trainable}
        return max((self.log.needed(self.log.parts.of.get(name), fold) for name in names), default=0)

    def _residual(self, piece: Piece, slot: Slot) -> Tensor | None:
        """The piece's residual part if a fold needs it now, fetched if it is not there.

        For the whole block: once one piece is folded, both parts of the block go back.
        """
        if not self._folds(piece, slot):
            return None
        if not slot.residual:
            self.window.fetch_residual(slot)
        place = self.layout.places[piece]
        if not place.residual_nbytes:
            return None
        return slot.memory[place.residual_offset : place.residual_offset + place.residual_nbytes]

    def _mask(self, name: str) -> Mask | None:
        """Which of a parameter's elements train; None: all, or none of them."""
        return self._masks.get(name) if self.plan.params[name].trainable else None

    def _lacking(self, piece: Piece, slot: Slot) -> Sequence[Update] | DeviceUpdates:
        if not self.plan.params[piece.name].trainable:
            return ()
        gain = self._gains.get(piece.name, ONE).update
        part = self.log.parts.of.get(piece.name)
        return self.log.since(slot.version[piece], self._decay[piece.name], gain, part)
