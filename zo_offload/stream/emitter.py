"""Computes, from a block's bytes, the lanes' weights for an owner, and the bytes of the last fold.

Everything that is the same at all visits (places of pieces, which of them train, checks, the constant arguments of the
kernels' calls) is computed once: `Share`, and the prepared calls that are kept with the scratch they write to. So a
visit fills in versions, updates and seeds, and calls the kernels once for all parameters of an owner in a block. Cases
that cannot be prepared (gathered rows, masters, the reference) are computed piece by piece: the same bits, slowly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..kernels.device_updates import DeviceUpdates
from ..kernels.float32 import scaled
from ..kernels.records import ONE, STILL, Gains, Mask, Masks, Perturbation, Rounding, Target, Updates
from ..numerics.calls import Mark, Ready, Told
from ..numerics.fused import fused_pass, fused_rows, ready_pass, ready_passes
from ..numerics.noise import NoiseSpec
from ..numerics.updates import UpdateLog
from ..plan.blocks import ParamSpec, Piece
from ..plan.layout import Layout, Place
from .fold_sample import FoldSample, Look
from .scratch import Scratch
from .slots import Slot
from .window import BlockWindow

_NOTHING = Updates()
_MOST_KEPT = 4096  # prepared calls per scratch: for each owner with its shapes, and each place of its block


@dataclass(frozen=True, eq=False)
class Part:
    """The facts of a piece that are the same at every visit."""

    piece: Piece
    spec: ParamSpec
    place: Place
    decays: bool
    lane_gain: float
    update_gain: float
    mask: Mask | None
    noise: NoiseSpec
    of: str | None
    """The part of the model that it is in, if steps may leave that out."""
    trains: bool


@dataclass(frozen=True, eq=False)
class Share:
    """An owner's pieces in one block, or those of one portion of it."""

    block: int
    parts: tuple[Part, ...]
    index: tuple[int, ...]
    """For each piece, the index of its parameter among the owner's."""
    start_at: tuple[int, ...]
    """For each piece, its first element's index among the parameter's elements in this share or portion."""
    is_split: bool
    """Some piece has a residual part."""
    is_chosen: bool
    """Steps may leave some pieces out."""


class Emitter:
    """Fused passes over blocks in slots. decay, gains, masks: by canonical name."""

    def __init__(
        self,
        specs: Mapping[str, ParamSpec],
        layout: Layout,
        log: UpdateLog,
        *,
        fold_every: int,
        noise: NoiseSpec,
        rounding: Rounding,
        decay: Mapping[str, bool],
        gains: Gains,
        masks: Masks,
        threads: int | None,
    ) -> None:
        self._layout, self._log, self._rounding, self._threads = layout, log, rounding, threads
        self._fold_every, self._first_fold = fold_every, log.folded
        self._masks = {name: mask for name, mask in masks.items() if specs[name].trainable}
        self._parts = {
            piece: Part(
                piece, specs[piece.name], place, decay[piece.name], gains.get(piece.name, ONE).lane,
                gains.get(piece.name, ONE).update, self._masks.get(piece.name),
                noise.of(specs[piece.name].shape), log.parts.of.get(piece.name), specs[piece.name].trainable,
            )
            for piece, place in layout.places.items()
        }  # fmt: skip
        self._trained: dict[int, list[Part]] = {}  # by block
        for part in self._parts.values():
            if part.trains:
                self._trained.setdefault(part.place.block, []).append(part)
        self.changes = FoldSample(scales=layout.target == "scales", stochastic=rounding == "stochastic")
        """How many stored values folds change."""

    def share(self, block: int, pieces: Sequence[tuple[Piece, int, int]]) -> Share:
        """pieces: in the block, each with the index of its parameter and `start_at`, see `Share`."""
        parts = tuple(self._parts[piece] for piece, _, _ in pieces)
        return Share(
            block, parts, tuple(i for _, i, _ in pieces), tuple(at for _, _, at in pieces),
            any(part.place.residual_nbytes for part in parts), any(part.of for part in parts),
        )  # fmt: skip

    def needed(self, block: int, fold: int) -> int:
        """The version from which on a block's bytes are those of a fold: steps may leave the whole block out."""
        return max((self._log.needed(of, fold) for of in {part.of for part in self._trained.get(block, ())}), default=0)

    # ---- an owner's pieces of a block --------------------------------------------------------------------------------

    def emit(
        self,
        share: Share,
        window: BlockWindow,
        slot: Slot,
        writes: bool,
        lanes: Sequence[Perturbation],
        once: Sequence[bool],
        scratch: Scratch,
        rows: Tensor | None,
    ) -> None:
        """Write lanes' weights to scratch; folds due updates first, and stores the result if the visit writes.

        once: for each of the owner's parameters, whether all perturbations share the first one's tensor.
        """
        if rows is None and scratch.buffer is not None and not (window.exact and share.is_split):
            folds = self._folding(share.parts, slot)
            if folds:
                self._prepare_fold(window, slot, writes)
            ready = self._ready(share, slot, once, scratch)
            if ready is not None:
                self._run(share, slot, ready, self._told(share, slot, writes, lanes, once, folds), folds, writes)
                return
        for part, i, start_at in zip(share.parts, share.index, share.start_at, strict=True):
            own = lanes[:1] if once[i] else lanes
            outs = [tensors[i] for tensors in scratch.tensors[: len(own)]]
            if rows is None:
                outs = _cut(outs, part, start_at)
            self.emit_one(part, window, slot, writes, own, outs, rows)

    def _folding(self, parts: Sequence[Part], slot: Slot) -> tuple[Piece, ...]:
        """The pieces that lack an update that folds."""
        lacks, version = self._log.lacks, slot.version
        return tuple([part.piece for part in parts if part.trains and lacks(version[part.piece], part.of)])

    @staticmethod
    def _prepare_fold(window: BlockWindow, slot: Slot, writes: bool) -> None:
        """Give the slot its own bytes if they are written, and both parts of the block: after any fold both are written
        back. May bring an older version, if the tier finds damage."""
        if writes:
            window.own(slot)
        if not slot.residual:
            window.fetch_residual(slot)

    def _ready(self, share: Share, slot: Slot, once: Sequence[bool], scratch: Scratch) -> Ready | None:
        """The kernels' prepared call for these pieces, at their present addresses; None if there is no such call."""
        key = share, slot.memory.data_ptr(), slot.memory.numel()
        try:
            return scratch.kept[key]  # type: ignore[no-any-return]
        except KeyError:
            pass
        if len(scratch.kept) >= _MOST_KEPT:
            scratch.kept.clear()
        calls = []
        for part, i, start_at in zip(share.parts, share.index, share.start_at, strict=True):
            outs = _cut([tensors[i] for tensors in scratch.tensors[: 1 if once[i] else None]], part, start_at)
            place, residual = part.place, self._residual(part, slot)
            calls.append(
                ready_pass(
                    slot.streamed_part(part.piece, place.offset, place.nbytes), place.fmt, param_id=part.spec.param_id,
                    numel=part.piece.numel, offset=part.piece.start, rounding=self._rounding, noise=part.noise,
                    outs=outs, residual=residual, target=self._target(part), mask=part.mask, threads=self._threads,
                )
            )  # fmt: skip
        ready = scratch.kept[key] = ready_passes(calls)
        return ready

    def _told(
        self,
        share: Share,
        slot: Slot,
        writes: bool,
        lanes: Sequence[Perturbation],
        once: Sequence[bool],
        folds: Sequence[Piece],
    ) -> list[Told]:
        """The kernels' changing arguments: updates, perturbations, whether to write, whether to use residuals."""
        first, told = lanes[:1], list[Told]()
        version, since = slot.version, self._log.since
        for part, i in zip(share.parts, share.index, strict=True):
            own = first if once[i] else lanes
            if not part.trains:
                told.append((_NOTHING, [STILL] * len(own), False, False))
                continue
            if share.is_chosen or part.lane_gain != 1.0:
                own = self._own(part, own)
            updates = since(version[part.piece], part.decays, part.update_gain, part.of)
            fold = bool(folds) and part.piece in folds
            told.append((updates, own, writes and fold, fold and part.place.residual_nbytes > 0))
        return told

    def _run(
        self, share: Share, slot: Slot, ready: Ready, told: Sequence[Told], folds: Sequence[Piece], writes: bool
    ) -> None:
        """The kernels' call, with marks and samples of the slot's bytes before and after it."""
        if not (folds and writes):
            self._call(share, slot, ready, told, Mark())
            return
        looks = [self._look(part, slot) for part in share.parts if part.piece in folds]
        mark = slot.begin_write(folds, self._log.folded)
        self._call(share, slot, ready, told, mark)
        slot.end_write()
        for look in looks:
            if look is not None:
                self.changes.after(look)

    @staticmethod
    def _call(share: Share, slot: Slot, ready: Ready, told: Sequence[Told], mark: Mark) -> None:
        """The kernels, for this share of the slot's bytes."""
        ready.run(told, mark)

    def _look(self, part: Part, slot: Slot) -> Look | None:
        fold = (self._log.folded - self._first_fold) // self._fold_every
        return self.changes.before(slot.memory, part.place, part.piece.numel, fold)

    # ---- one piece: slower, and for cases that only this handles -----------------------------------------------------

    def settle(self, window: BlockWindow, slot: Slot) -> None:
        """Bring the pieces of a block that no module requested to the last fold, like the others."""
        window.wait(slot)
        folded, lacks = self._log.folded, self._log.lacks
        for part in self._trained.get(slot.block, ()):
            version = slot.version[part.piece]
            if lacks(version, part.of):
                self._fused(part, window, slot, True, (), ())
            elif version < folded:  # its bytes are already those of the fold
                slot.version[part.piece] = folded

    def emit_one(
        self,
        part: Part,
        window: BlockWindow,
        slot: Slot,
        writes: bool,
        lanes: Sequence[Perturbation],
        outs: Sequence[Tensor],
        rows: Tensor | None,
    ) -> None:
        """One piece's weights, or those of gathered rows; masters of split formats in an exact pass."""
        spec, place = part.spec, part.place
        if window.exact and place.residual_nbytes:
            self._emit_exact(part, window, slot, writes, outs, rows)
            return
        lanes = self._own(part, lanes)
        if rows is None:
            self._fused(part, window, slot, writes, lanes, outs)
            return
        residual = None
        if self._folding((part,), slot):
            if not slot.residual:
                window.fetch_residual(slot)  # before the updates: it may bring an older version
            residual = self._residual(part, slot)
        fused_rows(
            slot.memory[place.offset : place.offset + place.nbytes], place.fmt, param_id=spec.param_id,
            numel=part.piece.numel, row_numel=spec.row_numel, rows=rows, first_row=part.piece.start // spec.row_numel,
            total_rows=spec.shape[0], updates=self._lacking(part, slot), noise=part.noise, rounding=self._rounding,
            perturbations=lanes, outs=outs, residual=residual, target=self._target(part), mask=part.mask,
            threads=self._threads,
        )  # fmt: skip

    def _own(self, part: Part, lanes: Sequence[Perturbation]) -> Sequence[Perturbation]:
        """A parameter's own perturbations: none if it does not train (in this step), else the lanes' times its gain."""
        if not (part.trains and self._log.parts.trains(part.of, self._log.version)):
            return [STILL] * len(lanes)
        gain = part.lane_gain
        return lanes if gain == 1.0 else [replace(p, scale=scaled(p.scale, gain)) for p in lanes]

    def _emit_exact(
        self, part: Part, window: BlockWindow, slot: Slot, writes: bool, outs: Sequence[Tensor], rows: Tensor | None
    ) -> None:
        """A split parameter's masters, with pending updates applied, for lanes that are not perturbed."""
        piece, spec, place = part.piece, part.spec, part.place
        if not slot.residual:
            window.fetch_residual(slot)
        if self._folding((part,), slot):
            if not writes:  # an early visit of a block that a later one of this pass will write: fold into a copy
                slot = replace(slot, memory=slot.memory.clone(), version=dict(slot.version), streamed={}, lent=None)
            self._fused(part, window, slot, True, (), ())
        stored = slot.memory[place.offset : place.offset + place.nbytes]
        residual = self._residual(part, slot)
        still, updates = [STILL] * len(outs), self._lacking(part, slot)
        if rows is None:
            fused_pass(
                stored, place.fmt, param_id=spec.param_id, numel=piece.numel, offset=piece.start, updates=updates,
                write_back=False, noise=part.noise, perturbations=still, outs=outs, residual=residual, master=True,
                mask=part.mask, threads=self._threads,
            )  # fmt: skip
            return
        fused_rows(
            stored, place.fmt, param_id=spec.param_id, numel=piece.numel, row_numel=spec.row_numel, rows=rows,
            first_row=piece.start // spec.row_numel, total_rows=spec.shape[0], updates=updates, noise=part.noise,
            perturbations=still, outs=outs, residual=residual, master=True, mask=part.mask, threads=self._threads,
        )  # fmt: skip

    def _fused(
        self,
        part: Part,
        window: BlockWindow,
        slot: Slot,
        writes: bool,
        lanes: Sequence[Perturbation],
        outs: Sequence[Tensor],
    ) -> None:
        piece, place, spec = part.piece, part.place, part.spec
        folds = self._folding((part,), slot)
        if folds:
            self._prepare_fold(window, slot, writes)
        stored = slot.streamed_part(piece, place.offset, place.nbytes)
        updates, residual = self._lacking(part, slot), self._residual(part, slot) if folds else None
        look = self._look(part, slot) if writes and folds else None
        mark = slot.begin_write(folds, self._log.folded) if writes and folds else None
        fused_pass(
            stored, place.fmt, param_id=spec.param_id, numel=piece.numel, offset=piece.start, updates=updates,
            write_back=mark is not None, rounding=self._rounding, noise=part.noise, perturbations=lanes, outs=outs,
            residual=residual, target=self._target(part), mask=part.mask, threads=self._threads, mark=mark,
        )  # fmt: skip
        if mark is not None:
            slot.end_write()
        if look is not None:
            self.changes.after(look)

    @staticmethod
    def _residual(part: Part, slot: Slot) -> Tensor | None:
        """The piece's residual part; None if its format has none, or the slot has no memory for it."""
        at, nbytes = part.place.residual_offset, part.place.residual_nbytes
        return slot.memory[at : at + nbytes] if nbytes and at + nbytes <= slot.memory.numel() else None

    def _target(self, part: Part) -> Target:
        return self._layout.target if part.trains else "values"

    def mask(self, name: str) -> Mask | None:
        """The elements of a parameter that train; None: all, or none of them."""
        return self._masks.get(name)

    def lacking(self, piece: Piece, slot: Slot) -> Updates | DeviceUpdates:
        """The updates that a piece in a slot lacks."""
        return self._lacking(self._parts[piece], slot)

    def _lacking(self, part: Part, slot: Slot) -> Updates | DeviceUpdates:
        if not part.trains:
            return _NOTHING
        return self._log.since(slot.version[part.piece], part.decays, part.update_gain, part.of)


def _cut(outs: Sequence[Tensor], part: Part, start_at: int) -> list[Tensor]:
    """The part of a parameter's tensors that a piece fills."""
    numel = part.piece.numel
    return [out if out.numel() == numel else out.view(-1)[start_at : start_at + numel] for out in outs]
