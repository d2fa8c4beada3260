"""Fills blocks from base weights: reads and encodes one chunk of elements at a time, and writes each block once.

The base is a checkpoint or a module in memory, as a mapping from canonical parameter names to tensors. Its digest is
computed while it is read, so a resumed run can tell whether it has the same base. Memory: one block, and one chunk in
the base's dtype, for parameters of any size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from ..checkpoint.weights import CHUNK, Base, Keeping, chunks, tensor_digest, together
from ..errors import CheckpointError
from ..formats import Format
from ..formats.codec import PlaneEncoder
from ..formats.grouped import paste
from ..modules.away import check_present
from ..modules.offloaded import Offloaded
from ..plan.blocks import Piece
from ..plan.layout import Layout
from ..plan.plan import Plan
from ..tiers import Tier

__all__ = ["Base", "Filler", "ModuleBase", "ingest"]


class ModuleBase:
    """A module in memory as a base. Holds the parameters' own storages; `let_go` drops them once they are ingested.

    offloaded: what hooks of accelerate hold of the module; it is read one tensor at a time. Raises PlanError for other
    parameters without values: on meta, or in another engine.
    """

    def __init__(self, model: nn.Module, offloaded: Offloaded | None = None) -> None:
        self._offloaded = offloaded
        self._elsewhere = frozenset[str]() if offloaded is None else offloaded.names
        check_present(model, self._elsewhere)
        named = dict(model.named_parameters())
        self._data: dict[str, Tensor] = {name: p.data for name, p in named.items() if name not in self._elsewhere}
        self._metas = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in named.items()}
        self._digests: dict[str, str] = {}
        self._last: tuple[str, Tensor] | None = None  # the tensor that was read last from the hooks
        self._lock = threading.Lock()
        self.is_here = True
        """Whether the parameters' values were not dropped."""

    def shape_of(self, name: str) -> torch.Size:
        return self._metas[name].shape

    def dtype_of(self, name: str) -> torch.dtype:
        return self._metas[name].dtype

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        data = self._value(name)
        if not data.is_contiguous():
            data = data.contiguous()
        out.copy_(data.view(-1)[start : start + len(out)])
        if start + len(out) == data.numel():
            self._last = None

    def digest_of(self, name: str) -> str:
        if name not in self._digests:
            self._digests[name] = tensor_digest(name, self._value(name))
        return self._digests[name]

    def digest(self) -> str:
        return together({name: self.digest_of(name) for name in self._metas})

    def _value(self, name: str) -> Tensor:
        if name not in self._elsewhere:
            return self._data[name].detach()
        assert self._offloaded is not None
        with self._lock:
            last = self._last
            if last is None or last[0] != name:
                self._last = last = None  # one at a time
                self._last = last = (name, self._offloaded.read(name))
                if name not in self._digests:
                    self._digests[name] = tensor_digest(name, last[1])
            return last[1]

    @property
    def values(self) -> dict[str, Tensor]:
        """The values of parameters that are in the module, by name; empty once they were dropped."""
        return self._data

    def let_go(self) -> None:
        self._data, self._last, self.is_here = {}, None, False


def load_kept(model: nn.Module, names: Iterable[str], base: Base) -> None:
    """Load parameters that stay in the model (`parameters.py`) and are still on meta, from the base."""
    for name in names:
        p = model.get_parameter(name)
        if not p.is_meta:
            continue
        value = torch.empty(base.shape_of(name), dtype=base.dtype_of(name), device="cpu")
        base.read_into(name, 0, value.view(-1))
        real = nn.Parameter(value.to(p.dtype), requires_grad=False)
        for other, held in list(model.named_parameters(remove_duplicate=False)):
            if held is p:
                path, _, last = other.rpartition(".")
                setattr(model.get_submodule(path), last, real)


def ingest(
    plan: Plan,
    layout: Layout,
    base: Base,
    tier: Tier,
    alloc: Callable[[int], Tensor],
    *,
    blocks: Iterable[int] | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Fill the tier's blocks (all, or those given) at version 0.

    Memory: one block and one chunk. Raises CheckpointError if a tensor's size is not the plan's, before any is written.
    """
    filler = Filler(plan, layout, base)
    wanted = list(range(len(plan.blocks)) if blocks is None else blocks)
    staging: Tensor | None = None
    for index in wanted:
        nbytes, view = layout.block_bytes[index], tier.view(index)
        if view is None and staging is None:
            staging = alloc(max(layout.block_bytes[i] for i in wanted))
        buffer = view if view is not None else staging[:nbytes]  # type: ignore[index]
        filler.fill(index, buffer)
        tier.flush(index, buffer, ((0, nbytes),), 0)
        progress(nbytes)


def has_codes(base: Base, name: str, fmt: Format) -> bool:
    """Whether a base's own codes of a parameter are in this format: blocks then hold them as they are."""
    return bool(fmt.group) and isinstance(base, Keeping) and fmt in base.kept_formats(name)


def kept_exactly(plan: Plan, layout: Layout, base: Base) -> set[str]:
    """The parameters that do not train and are in the base's own codes."""
    formats = layout.formats
    return {name for name, spec in plan.params.items() if not spec.trainable and has_codes(base, name, formats[name])}


def read_exactly(plan: Plan, layout: Layout, base: Base, *, trained: bool = True) -> set[str]:
    """Those, and the parameters that do not train whose blocks have the base's own dtype. trained=False: no step was
    taken, so it does not matter what trains."""

    def is_exact(name: str) -> bool:
        fmt = layout.formats[name]
        plain = not (fmt.group or fmt.residual_bytes) and (base.dtype_of(name) == fmt.torch_dtype or not fmt.rounds)
        return plain or has_codes(base, name, fmt)

    return {name for name, spec in plan.params.items() if not (spec.trainable and trained) and is_exact(name)}


class Filler:
    """Blocks at version 0, from the base. Raises CheckpointError if a tensor's size is not the plan's."""

    def __init__(self, plan: Plan, layout: Layout, base: Base) -> None:
        self.plan, self.layout, self.base = plan, layout, base
        for name, spec in plan.params.items():
            if base.shape_of(name) != spec.shape:
                found, wanted = tuple(base.shape_of(name)), tuple(spec.shape)
                raise CheckpointError(f"parameter {name!r} is {found} in the base, {wanted} in the model")

    def fill(self, index: int, buffer: Tensor) -> None:
        """Write one block's bytes into `buffer`, with zeros between pieces."""
        host = buffer if buffer.device.type == "cpu" else torch.empty(buffer.numel(), dtype=torch.uint8, device="cpu")
        host.zero_()
        for piece in self.plan.blocks[index].pieces:
            self._fill_piece(piece, host)
        if host is not buffer:
            buffer.copy_(host)

    def _fill_piece(self, piece: Piece, buffer: Tensor) -> None:
        """Encode a piece in its storage format: exactly in the same or a wider one, rounded to nearest in a narrower
        one, as transformers does when loading with that dtype. Raises CheckpointError for values that the format cannot
        hold."""
        place = self.layout.places[piece]
        stored = buffer[place.offset : place.offset + place.nbytes]
        residual = buffer[place.residual_offset : place.residual_offset + place.residual_nbytes]
        if has_codes(self.base, piece.name, place.fmt):
            assert isinstance(self.base, Keeping)
            chunk = max(CHUNK // place.fmt.group, 1) * place.fmt.group
            for at in range(piece.start, piece.stop, chunk):  # its own codes are in this format
                count = min(chunk, piece.stop - at)
                part = self.base.kept_part(piece.name, place.fmt, at, count)
                paste(place.fmt, stored, piece.numel, at - piece.start, part, count)
            return
        encoder = PlaneEncoder(
            stored, residual if place.residual_nbytes else None, place.fmt, piece.numel,
            f"parameter {piece.name!r} of the base",
        )  # fmt: skip
        read, dtype = partial(self.base.read_into, piece.name), self.base.dtype_of(piece.name)
        for start, values in chunks(read, dtype, piece.start, piece.stop):
            encoder.put(start - piece.start, values)
        encoder.finish()
