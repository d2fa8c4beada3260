"""Sorts a model's parameters: those that stream, those that stay in the model, and those that share memory.

streamed   plain dense tensors of float32, bfloat16 or float16: stored in blocks, away while no module runs; only
           these can train
kept       all others: integers, booleans, complex, 64 and 8 bits, subclasses of tensors (quantized weights), memory
           that overlaps itself. They are frozen and stay in the module, as buffers do; exports and the digest of the
           base have them

Two Parameters with exactly the same memory (`b.weight.data = a.weight.data`) are tied: `tie` makes them one object
while an engine has the model. Parameters that share only a part of their memory, and a module's views of a trained
weight, cannot be supported: the weight moves elsewhere and its view would keep the old values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import PlanError
from .watch import storage_key

STREAMED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that a block can hold and a lane can be given."""


def is_plain(p: Tensor) -> bool:
    """Whether a tensor is of a kind that streams, regardless of its present memory."""
    return p.dtype in STREAMED and p.layout is torch.strided and not is_traceable_wrapper_subclass(p)


def streams(p: Tensor) -> bool:
    """Whether a parameter streams, given its own memory (one that is away has a placeholder's)."""
    overlaps = p.numel() > 1 and any(n > 1 and step == 0 for n, step in zip(p.shape, p.stride(), strict=True))
    return is_plain(p) and not overlaps


def split(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(streamed, kept) parameters by canonical name, in the model's order."""
    named = dict(model.named_parameters())
    streamed = {name: p for name, p in named.items() if streams(p)}
    return streamed, {name: p for name, p in named.items() if name not in streamed}


def ordered_like(p: Tensor) -> tuple[int, ...] | None:
    """Strides for a copy of a parameter in its memory order (channels_last, transposed); None if row-major."""
    return None if p.is_contiguous() else torch.empty_like(p, device="meta").stride()


def laid_out(value: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The value in memory with these strides; itself, if it has them."""
    if value.stride() == strides:
        return value
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device).copy_(value)


# ---- one memory, several tensors -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tied:
    """A Parameter that had another one's memory, and the Parameter that replaces it."""

    names: tuple[str, ...]
    canonical: str
    """The name of the replacing Parameter."""
    own: nn.Parameter
    asked: bool
    """Whether the replacing Parameter required a gradient itself."""


def tie(model: nn.Module) -> tuple[Tied, ...]:
    """Replace Parameters with exactly the same memory by the first of them; `untie` restores the others."""
    first: dict[Any, tuple[str, nn.Parameter]] = {}
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    found: list[Tied] = []
    for name, p in model.named_parameters():
        if isinstance(p, nn.UninitializedParameter) or not is_plain(p) or p.numel() == 0:
            continue
        key = (storage_key(p), p.storage_offset(), p.shape, p.stride(), p.dtype)
        canonical, other = first.setdefault(key, (name, p))
        if other is not p:
            found.append(Tied(tuple(names[id(p)]), canonical, p, other.requires_grad))
    for tied in found:
        one = model.get_parameter(tied.canonical)
        one.requires_grad_(one.requires_grad or tied.own.requires_grad)
        for name in tied.names:
            _set(model, name, one)
        tied.own.data = tied.own.data.new_empty(0)  # its memory must be freed together with the other one's
    return tuple(found)


def untie(model: nn.Module, ties: Iterable[Tied]) -> None:
    """Restore the model's own Parameters, with the memory that the replacing ones have now."""
    for tied in ties:
        one = model.get_parameter(tied.canonical)
        tied.own.data = one.data
        one.requires_grad_(tied.asked)
        for name in tied.names:
            _set(model, name, tied.own)


def _set(model: nn.Module, name: str, p: nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, p)


def check_memory(model: nn.Module, trained: Collection[str]) -> tuple[str, ...]:
    """Raise PlanError, with the name, if another tensor shares the memory of a trained parameter.

    Returns notes: parameters that are now next to each other in one storage, and will not be afterwards.
    """
    named = dict(model.named_parameters())
    by_storage: dict[int, list[str]] = {}
    for name, p in named.items():
        if is_plain(p) and (key := storage_key(p)) is not None:
            by_storage.setdefault(key, []).append(name)
    for names in by_storage.values():
        for i, one in enumerate(names):
            for other in names[i + 1 :]:
                if (one in trained or other in trained) and _share_elements(named[one], named[other]):
                    raise PlanError(
                        f"parameters {one!r} and {other!r} lie over the same memory, in part or in another shape. They "
                        "would be trained apart: make one of them in the forward, from the other"
                    )
    together = [names for names in by_storage.values() if len(names) > 1]
    own = {id(p) for p in named.values()}
    for where, tensor in _held(model):
        for name in by_storage.get(storage_key(tensor) or 0, ()) if id(tensor) not in own else ():
            if name in trained and _share_elements(named[name], tensor):
                raise PlanError(
                    f"{where} is a view of the memory of parameter {name!r}. The weights go elsewhere, so it would "
                    "keep the first values: make the view in the forward, or freeze the parameter"
                )
    return tuple(f"{n[0]!r} and {n[1]!r} lie in one storage; restored, each has memory of its own" for n in together)


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers and tensors in plain attributes of modules, also in lists, tuples and dicts there."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        held = {name: value for name, value in vars(module).items() if name not in _TABLES}
        for name, value in {**held, **module._buffers}.items():
            what = f"{'.'.join(filter(None, (path, name)))!r}"
            for tensor in _tensors(value):
                yield what, tensor


_TABLES = frozenset({"_parameters", "_buffers", "_modules"})


def _tensors(value: Any, depth: int = 3) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and type(value) in (list, tuple, dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, depth - 1)


def _share_elements(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors over one storage have bytes in common."""
    if a.numel() == 0 or b.numel() == 0:
        return False
    (low_a, high_a), (low_b, high_b) = _extent(a), _extent(b)
    low, high = min(low_a, low_b), max(high_a, high_b)
    if high_a <= low_b or high_b <= low_a:
        return False
    if a.dtype != b.dtype:
        return True
    size = a.dtype.itemsize
    seen = torch.zeros(
        (high - low) // size, dtype=torch.bool, device="cpu"
    )  # columns of one matrix lie between each other
    seen.as_strided(a.shape, a.stride(), (low_a - low) // size).fill_(True)
    return bool(seen.as_strided(b.shape, b.stride(), (low_b - low) // size).any())


def _extent(t: Tensor) -> tuple[int, int]:
    """The range of bytes that a tensor covers in its storage."""
    last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    first, size = int(t.storage_offset()), t.dtype.itemsize
    return first * size, (first + last + 1) * size
