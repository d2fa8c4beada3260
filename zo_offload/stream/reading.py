"""Reads the current weights between passes: for an export, a user's request, or a comparison.

A parameter's value is its stored value at the last fold minus its pending updates, in float32, rounded once. Blocks are
read through the window's memory, which is empty between passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..formats import Format
from ..formats.grouped import cut
from ..kernels.device_updates import DeviceUpdates
from ..kernels.records import STILL, Mask, Update
from ..numerics.exact import exact_values
from ..numerics.fused import fused_pass
from ..numerics.noise import NoiseSpec
from ..plan.blocks import ALIGN, Piece
from ..plan.layout import Layout
from ..plan.plan import Plan
from .slots import Slot
from .window import BlockWindow

_SMALL = 1 << 16  # elements: a piece that is read along with its block


class Reader:
    """Reads parameters by name (`weights.Placed`). Not in a pass.

    settle(slot): bring the pieces of a block to the last fold; lacking(piece, slot): the updates that a piece lacks;
    mask_of(name): which elements of a parameter they change. held(): the values that replace those of blocks, float32.
    """

    def __init__(
        self,
        plan: Plan,
        layout: Layout,
        window: BlockWindow,
        *,
        settle: Callable[[Slot], None],
        lacking: Callable[[Piece, Slot], Sequence[Update] | DeviceUpdates],
        mask_of: Callable[[str], Mask | None],
        noise: NoiseSpec,
        threads: int | None,
        held: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> None:
        self._held = held
        self._params, self._blocks, self._pieces_of = plan.params, plan.blocks, plan.pieces_of  # of any relifted plan
        self._layout, self._window, self._settle, self._lacking = layout, window, settle, lacking
        self._noise, self._threads, self._mask_of = noise, threads, mask_of
        self._slot: Slot | None = None  # the block that the last read left in the window
        self._along: dict[Piece, Tensor] = {}  # small pieces of blocks that were read, not asked for yet
        self._is_full = False  # whether values of grouped formats are read in float32

    def shape_of(self, name: str) -> torch.Size:
        return self._params[name].shape

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a parameter's values: its storage dtype."""
        if name in self._held():
            return torch.float32
        return self._value_dtype(self._layout.formats[name])

    @contextmanager
    def in_full(self) -> Iterator[None]:
        """While open, values of formats with scales are read in float32, which holds them exactly, instead of being
        rounded to 16 bits."""
        self.forget()
        self._is_full = True
        try:
            yield
        finally:
            self._is_full = False
            self.forget()

    def _value_dtype(self, fmt: Format) -> torch.dtype:
        return torch.float32 if self._is_full and (fmt.group or fmt.residual_bytes) else fmt.torch_dtype

    def place_of(self, name: str, element: int) -> int:
        """The block of an element: reading in this order fetches each block once."""
        pieces = self._pieces_of(name)
        return next((self._layout.places[p].block for p in pieces if element < p.stop), len(self._blocks))

    def read(self, name: str) -> Tensor:
        """A copy of one parameter's current value; see `read_into`."""
        spec = self._params[name]
        out = torch.empty(spec.shape, dtype=self.dtype_of(name), device="cpu")
        self.read_into(name, 0, out.view(-1))
        return out

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Elements [start, start + len(out)) of a parameter's current value into `out`, on the CPU. Not in a pass.

        All folds and pending updates are included: decode(stored) minus the pending updates in float32, rounded once. A
        layer's parameters may be read in any order: small ones are read together with their block, so that a block is
        fetched at most once for each large parameter in it, and once for consecutive reads.
        """
        if (value := self._held().get(name)) is not None:
            out.copy_(value.view(-1)[start : start + len(out)])
            return
        if self._window.is_ahead:
            self.forget()
            self._window.restart()  # the slots hold blocks fetched ahead for the next pass
        stop = start + len(out)
        for piece in self._pieces_of(name):
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                self._read_piece(piece, low - piece.start, out[low - start : high - start])

    def _read_piece(self, piece: Piece, start: int, out: Tensor) -> None:
        value = self._along.get(piece)
        if value is None:
            block = self._layout.places[piece].block
            slot = self._slot
            if slot is None or slot.block != block:  # else the last read left the block in the window
                slot = self._window.load(block, into_window=True)
                self._settle(slot)
                self._slot = slot
                small = [p for p in self._blocks[block].pieces if p.numel <= _SMALL and p != piece]
                self._along.update((p, self._current(p, slot, 0, p.numel)) for p in small)
            out.copy_(self._current(piece, slot, start, start + len(out)))
            return
        out.copy_(value[start : start + len(out)])
        if start + len(out) == piece.numel:
            del self._along[piece]

    def _current(self, piece: Piece, slot: Slot, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a piece whose folds are done, on the CPU."""
        spec, place = self._params[piece.name], self._layout.places[piece]
        noise = self._noise.of(spec.shape)
        unit = max(ALIGN, place.fmt.group)  # whole groups
        low, high = start // unit * unit, min(piece.numel, -(-stop // unit) * unit)
        stored = cut(place.fmt, slot.memory[place.offset : place.offset + place.nbytes], piece.numel, low, high)
        pending = self._lacking(piece, slot)
        if place.residual_nbytes:
            wide, at = place.fmt.residual_bytes, place.residual_offset
            value = torch.empty(high - low, dtype=self._value_dtype(place.fmt), device="cpu")
            exact_values(
                stored.cpu(), slot.memory[at + wide * low : at + wide * high].cpu(), place.fmt, value,
                param_id=spec.param_id, numel=high - low, offset=piece.start + low,
                pending=pending.read() if isinstance(pending, DeviceUpdates) else pending, noise=noise,
                mask=self._mask_of(piece.name), threads=self._threads,
            )  # fmt: skip
        else:
            value = torch.empty(high - low, dtype=self._value_dtype(place.fmt), device=stored.device)
            fused_pass(
                stored, place.fmt, param_id=spec.param_id, numel=high - low, offset=piece.start + low, updates=pending,
                write_back=False, noise=noise, perturbations=[STILL], outs=[value],
                target=self._layout.target if spec.trainable else "values", mask=self._mask_of(piece.name),
                threads=self._threads,
            )  # fmt: skip
        return value[start - low : stop - low].cpu()

    def forget(self) -> None:
        """Forget the block that the last read left in the window: it is gone or outdated."""
        self._slot, self._along = None, {}
