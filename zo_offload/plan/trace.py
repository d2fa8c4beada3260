"""Traces a forward without weights, as the start of a plan.

The model is copied with its parameters on the meta device and run once under a watch: no weights, hardly any
arithmetic, one forward of OPT-175B in about a second. Tensors that depend only on the batch (masks, positions) are
computed for real; a value that would come from weights (`.item()`, `nonzero`) is replaced by a plausible one. So the
trace may take a wrong path through the model, and a forward that needs real values may stop: the first real run is
watched again.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..modules.away import shapes_only
from ..modules.compiled import eagerly
from ..modules.parameters import is_plain
from ..modules.recorder import ForwardCall, Recorder, Trace, hook_module_calls, trace_from
from ..modules.watch import UseWatch, tensors_in

log = logging.getLogger(__name__)

_REAL_COPY_MAX_ELEMENTS = 1 << 20


class MetaWatch(UseWatch):  # type: ignore[no-untyped-call]
    """Runs ops for real if possible, the others on meta; makes up values that only weights could give."""

    def execute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = (*tensors_in(args), *tensors_in(tuple(kwargs.values())))
        name = func.overloadpacket.__name__
        if not any(t.is_meta for t in inputs):
            if name == "histc" and not args[0].is_floating_point():  # which a GPU has, and a CPU has not
                return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
            return func(*args, **kwargs)
        if name in _STAND_INS:
            return _STAND_INS[name](*args, **kwargs)
        args, kwargs = tree_map(_onto_meta, (args, kwargs))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta")
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            args = (args[0], [j for i in args[1] for j in _positions(i)], *args[2:])
        out = func(*args, **kwargs)
        if name == "any":  # `if isnan(x).any(): raise` must not stop the trace
            out._zo_guess = False
        return out


def _onto_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta else value


def _empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _positions(index: Any) -> list[Any]:
    """A mask used as an index, as if it were true everywhere (the most that a routed expert can get)."""
    if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
        return [_empty(index.numel())] * index.ndim
    return [index]


def _scalar(x: Tensor) -> Any:
    if x.dtype is torch.bool:
        return getattr(x, "_zo_guess", True)
    return 1.0 if x.dtype.is_floating_point else 1


def _grouped_mm(a: Tensor, b: Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    groups = [offs.shape[0]] if a.ndim == 2 and b.ndim == 2 else []
    batch = [a.shape[0]] if a.ndim == 3 and b.ndim == 3 else []
    return _empty(*groups, *batch, a.shape[-2], b.shape[-1], dtype=out_dtype or a.dtype)


_STAND_INS: dict[str, Callable[..., Any]] = {
    "_local_scalar_dense": _scalar,
    "equal": lambda a, b: True,
    "nonzero": lambda x: _empty(x.numel(), x.ndim),
    "masked_select": lambda x, mask: _empty(x.numel(), dtype=x.dtype),
    "_unique2": lambda x, *a, **k: (_empty(x.numel(), dtype=x.dtype), _empty(*x.shape), _empty(x.numel())),
    "unique_consecutive": lambda x, *a, **k: (_empty(1, dtype=x.dtype), _empty(*x.shape), _empty(1)),
    "bincount": lambda x, weights=None, minlength=0: _empty(max(1, minlength)),
    "histc": lambda x, bins=100, *a, **k: _empty(bins, dtype=x.dtype),
    "_grouped_mm": _grouped_mm,
}


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model with its parameters and large buffers on the meta device."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        if not is_plain(p) and not p.is_meta and p.numel() <= _REAL_COPY_MAX_ELEMENTS:
            continue  # small buffers (masks, index tables) stay: they may decide the path through the model
        shape = (
            torch.empty_like(p, device="meta") if is_plain(p) else torch.empty(p.shape, dtype=p.dtype, device="meta")
        )
        memo[id(p)] = nn.Parameter(shape, requires_grad=p.requires_grad)
    for b in model.buffers():
        small = b.numel() <= _REAL_COPY_MAX_ELEMENTS and not b.is_meta
        memo[id(b)] = b.detach().cpu().clone() if small else torch.empty_like(b, device="meta")
    for module in model.modules():
        for value in vars(module).values():  # deepcopy refuses autograd's results (the weight of old-style weight norm)
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = torch.empty_like(value, device="meta", requires_grad=False)
    with shapes_only():
        return copy.deepcopy(model, memo)


def _batch_copy(batch: Any) -> Any:
    """Integer inputs stay real (masks and positions come from them); floating ones need only a shape."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        real = not value.is_floating_point() and value.numel() <= _REAL_COPY_MAX_ELEMENTS and not value.is_meta
        return value.detach().cpu().clone() if real else torch.empty_like(value, device="meta")

    return tree_map(one, dict(batch) if isinstance(batch, Mapping) else batch)


def trace_on_meta(model: nn.Module, batch: Any, call: ForwardCall) -> Trace:
    """Trace one forward without weights. Never raises: a trace that stopped has complete=False and a note."""
    recorder = Recorder()
    try:
        shadow = meta_copy(model)
        params = {name: p for name, p in shadow.named_parameters() if p.is_meta}
        watch = MetaWatch(params)
        for name, p in params.items():
            watch.track(p, name, always=True)
        watch.recorder = recorder
        hook_module_calls(shadow, lambda: recorder)
        try:
            with torch.no_grad(), eagerly(), watch:
                call(shadow, _batch_copy(batch))
        finally:
            watch.put_generators_back()
    except Exception as error:  # a model's code may raise anything without real values
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
        log.debug("trace on meta stopped", exc_info=True)
        last = f"at or after module {recorder.order[-1][1]!r}" if recorder.order else "before any module"
        note = f"the trace without weights stopped {last} ({reason})"
        return trace_from(recorder, complete=False, notes=(note,))
    return trace_from(recorder, complete=True)
