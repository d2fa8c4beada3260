"""Base weights into blocks: read one tensor at a time, convert to the storage format, write each block once.

The base is a checkpoint or a module in memory, seen as a mapping from canonical parameter names to tensors. While it
is read its digest is taken, so a resumed run can tell whether it stands on the same weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from .blocks import ParamSpec, Piece
from .checkpoint import tensor_digest
from .errors import CheckpointError
from .formats import Format, encode_values, format_of
from .layout import Layout
from .plan import Plan
from .tiers import Tier


class Base(Protocol):
    """Where a run's first weights come from."""

    def load(self, name: str) -> Tensor:
        """One parameter, by canonical name, in the base's dtype."""
        ...

    def dtype_of(self, name: str) -> torch.dtype: ...

    def digest(self) -> str:
        """Identity of all its names, dtypes, shapes and contents; reads only what was not loaded before."""
        ...


class ModuleBase:
    """A module in memory as a base. Holds the parameters' own storages; `let_go` drops them once they are ingested."""

    def __init__(self, model: nn.Module) -> None:
        self._data: dict[str, Tensor] = {name: p.data for name, p in model.named_parameters()}
        self._dtypes = {name: t.dtype for name, t in self._data.items()}
        self._digests: dict[str, str] = {}

    def load(self, name: str) -> Tensor:
        tensor = self._data[name].detach().to("cpu").contiguous()
        if name not in self._digests:
            self._digests[name] = tensor_digest(name, tensor)
        return tensor

    def dtype_of(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def digest(self) -> str:
        for name in self._data:
            if name not in self._digests:
                self.load(name)
        lines = "".join(f"{name} {self._digests[name]}\n" for name in sorted(self._digests))
        return hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()

    def let_go(self) -> None:
        self._data = {}


def to_stored(name: str, tensor: Tensor, fmt: Format) -> tuple[Tensor, Tensor | None]:
    """A base tensor's bytes in its storage format: (streamed part, residual part of split formats).

    To the same or a wider format this is exact; to a narrower one it rounds to nearest, as loading with that dtype in
    transformers would. CheckpointError on NaN, inf, or values the format cannot hold.
    """
    flat = tensor.reshape(-1)
    if flat.dtype == fmt.torch_dtype and fmt.name == format_of(flat.dtype).name and bool(torch.isfinite(flat).all()):
        return flat.contiguous().view(torch.uint8), None
    return encode_values(flat, fmt, what=f"parameter {name!r} of the base")


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

    Memory: one block and one tensor. Raises CheckpointError if a tensor's size is not the plan's.
    """
    filler = Filler(plan, layout, base)
    for index in range(len(plan.blocks)) if blocks is None else blocks:
        view = tier.view(index)
        buffer = alloc(layout.block_bytes[index]) if view is None else view
        filler.fill(index, buffer)
        tier.flush(index, buffer, ((0, layout.block_bytes[index]),), 0)
        progress(layout.block_bytes[index])


class Filler:
    """Blocks at version 0, from the base. Keeps the parameter it cut last until its last piece is out, so that one in
    several blocks is loaded once if they are filled in order."""

    def __init__(self, plan: Plan, layout: Layout, base: Base) -> None:
        self.plan, self.layout, self.base = plan, layout, base
        self._held: tuple[str, Tensor] | None = None

    def fill(self, index: int, buffer: Tensor) -> None:
        """One block's bytes into `buffer`. Raises CheckpointError if a tensor's size is not the plan's."""
        for piece in self.plan.blocks[index].pieces:
            place = self.layout.places[piece]
            stored, residual = to_stored(piece.name, self._values(piece), place.fmt)
            buffer[place.offset : place.offset + place.nbytes].copy_(stored)
            if residual is not None:
                buffer[place.residual_offset : place.residual_offset + place.residual_nbytes].copy_(residual)

    def _values(self, piece: Piece) -> Tensor:
        spec = self.plan.params[piece.name]
        tensor = self._held[1] if self._held is not None and self._held[0] == piece.name else self._load(spec)
        self._held = (piece.name, tensor) if piece.stop < spec.numel else None
        return tensor.view(-1)[piece.start : piece.stop]

    def _load(self, spec: ParamSpec) -> Tensor:
        self._held = None  # before the next one is loaded
        tensor = self.base.load(spec.name)
        if tensor.shape != spec.shape:
            found, wanted = tuple(tensor.shape), tuple(spec.shape)
            raise CheckpointError(f"parameter {spec.name!r} is {found} in the base, {wanted} in the model")
        return tensor.contiguous()
