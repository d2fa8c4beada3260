"""A linear layer computed piece by piece: whole rows of its weight at a time, each into its columns of the output.

    out[..., a:b] = x @ W[a:b].T + bias[a:b]

So only one piece of the weight is needed at a time. The output is one tensor from the start and each product goes into
its columns: BLAS takes the distance between rows (ldc), so nothing is copied, on CPU or CUDA, and the only cost is that
of smaller products. Whether the result is bit-equal to that with the whole weight depends on the BLAS. It does not
depend on the source of the pieces, so a weight that is whole in memory is used in the same pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def tiled_linear(x: Tensor, pieces: Sequence[slice], weight: Callable[[int], Tensor], bias: Tensor | None) -> Tensor:
    """The result of nn.Linear for `x`; raises the same errors.

    weight(k): rows `pieces[k]` of the weight; called once each, in order; a piece is not used after the call for the
    next one. bias: not read after the call of weight(1).
    """
    w = weight(0)
    if not _is_plain(x) or (torch.is_grad_enabled() and any(t.requires_grad for t in (x, w, bias) if t is not None)):
        return _joined(x, w, pieces, weight, bias)
    x, w = _as_autocast(x), _as_autocast(w)
    bias = None if bias is None else _as_autocast(bias)
    if x.shape[-1:] != w.shape[1:] or x.dtype != w.dtype or (bias is not None and bias.dtype != w.dtype):
        _refuse(x, w, pieces[-1].stop, bias)
    out = torch.empty((*x.shape[:-1], pieces[-1].stop), dtype=w.dtype, device=w.device)
    rows, columns = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    if bias is not None:
        columns.copy_(bias)  # as addmm itself does before it adds the product
    for k, piece in enumerate(pieces):
        if k:
            del w  # a cast of the last piece
            w = _as_autocast(weight(k))
        tile = columns[:, piece]
        if bias is None:
            torch.mm(rows, w.t(), out=tile)
        else:
            torch.addmm(tile, rows, w.t(), out=tile)
    return out


def _joined(
    x: Tensor, first: Tensor, pieces: Sequence[slice], weight: Callable[[int], Tensor], bias: Tensor | None
) -> Tensor:
    """The same with plain torch ops, at the cost of a second output: for other kinds of tensors, and for autograd."""
    bias = None if bias is None else bias.clone()
    tiles = []
    for k, piece in enumerate(pieces):
        tiles.append(F.linear(x, weight(k) if k else first, None if bias is None else bias[piece]))
    return torch.cat(tiles, dim=-1)


def _is_plain(x: Tensor) -> bool:
    """Whether `x` is an ordinary strided tensor: no subclass, not sparse or nested, not inside a function transform."""
    return (
        type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided and not x.is_nested
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )  # fmt: skip


def _as_autocast(t: Tensor) -> Tensor:
    """The tensor that autocast would pass to F.linear; autocast ignores ops with out=."""
    kind = t.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if not casts or not t.is_floating_point() or t.dtype is torch.float64:
        return t
    return t.to(torch.get_autocast_dtype(kind))


def _refuse(x: Tensor, w: Tensor, num_rows: int, bias: Tensor | None) -> NoReturn:
    """Raise nn.Linear's own error, which names the shape of the whole weight."""
    F.linear(x, w[:1, :1].expand(num_rows, w.shape[1]), bias)
    raise AssertionError(f"F.linear takes {tuple(x.shape)} {x.dtype} with a weight of {w.shape[1]} columns, {w.dtype}")
