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
    for index in range(len(plan.blocks)) if blocks is None else blocks:
        view = tier.view(index)
        buffer = alloc(layout.block_bytes[index]) if view is None else view
        fill_block(plan, layout, base, index, buffer)
        tier.flush(index, buffer, ((0, layout.block_bytes[index]),), 0)
        progress(layout.block_bytes[index])


def fill_block(plan: Plan, layout: Layout, base: Base, index: int, buffer: Tensor) -> None:
    """One block's bytes at version 0, from the base."""
    for name in plan.blocks[index].params:
        _ingest_one(plan, layout, base, name, buffer)


def _ingest_one(plan: Plan, layout: Layout, base: Base, name: str, buffer: Tensor) -> None:
    tensor, spec, place = base.load(name), plan.params[name], layout.places[name]
    if tensor.shape != spec.shape:
        found, wanted = tuple(tensor.shape), tuple(spec.shape)
        raise CheckpointError(f"parameter {name!r} is {found} in the base, {wanted} in the model")
    stored, residual = to_stored(name, tensor, place.fmt)
    buffer[place.offset : place.offset + place.nbytes].copy_(stored)
    if residual is not None:
        buffer[place.residual_offset : place.residual_offset + place.residual_nbytes].copy_(residual)
