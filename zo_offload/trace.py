"""Where a forward really uses each parameter: seen op by op, against the stack of running modules.

A module may read a parameter of another (Mamba reads its convolution's weight), return one, or keep a view of one.
Names do not show that; storages do. `UseWatch` is a dispatch mode: every op that reads a parameter's bytes is noted
with the path of module calls that must hold the weight, which is

    the running modules                           if the op reads the Parameter itself
    those also running when the view was made     if it reads a view of it

`trace_on_meta` applies it to a copy of the model with its parameters on the meta device: no weights, no arithmetic
worth naming, one forward of OPT-175B in under a second. What depends only on the batch (masks, positions) is computed
for real; a value that would come from weights (`.item()`, `nonzero`) is made up, plausibly. So the traced way through
the model may be wrong. `RunWatch` looks at a real run of lanes the same way and is exact for that run; it also sees
weights used while they are away, and lanes that see each other's tensors.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from .errors import PlanError

log = logging.getLogger(__name__)

Path = tuple[str, ...]
"""Names of nested running modules, outermost first; the root module is "". """

Inputs = list[tuple[Tensor, int | None]]
"""Tensors an op gets, each with its storage key."""

ForwardCall = Callable[[nn.Module, Any], Any]
"""(model, batch) -> anything: how a lane calls the model."""

_REAL_COPY_MAX_ELEMENTS = 1 << 20
# ops that take a tensor for its shape, dtype or device only
_SHAPE_ONLY = frozenset(
    "empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty new_zeros new_ones new_full "
    "new_empty_strided sym_size sym_stride sym_numel sym_storage_offset _has_compatible_shallow_copy_type".split()
)


@dataclass(frozen=True)
class Trace:
    """What one forward did with the model's parameters."""

    uses: Mapping[str, frozenset[Path]]
    """Canonical parameter name -> paths of module calls under which it must be held. () = outside of any module."""
    order: tuple[tuple[int, str], ...]
    """(depth, module) of each module call in order; depth 0 has no running module above it."""
    complete: bool
    """The forward was seen to its end."""
    notes: tuple[str, ...] = ()

    def merged(self, later: Trace) -> Trace:
        """Uses of both; order and completeness of the later one unless only the earlier saw a whole forward."""
        names = [*self.uses, *(n for n in later.uses if n not in self.uses)]
        uses = {n: self.uses.get(n, frozenset()) | later.uses.get(n, frozenset()) for n in names}
        base = later if later.complete or not self.complete else self
        return Trace(uses, base.order, base.complete, tuple(dict.fromkeys(self.notes + later.notes)))


class Running:
    """One call of one module. Identity matters: two calls of the same module are two objects."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Recorder:
    """Module calls and parameter uses of one forward (one lane)."""

    def __init__(self) -> None:
        self.stack: list[Running] = []
        self.order: list[tuple[int, str]] = []
        self.uses: dict[str, set[Path]] = {}

    def enter(self, name: str) -> None:
        self.order.append((len(self.stack), name))
        self.stack.append(Running(name))

    def leave(self, name: str) -> None:
        """Module `name` returned; calls inside it that were left by an exception end with it."""
        while self.stack and self.stack.pop().name != name:
            pass

    def use(self, param: str, path: Sequence[Running]) -> None:
        self.uses.setdefault(param, set()).add(tuple(call.name for call in path))

    def where(self) -> str:
        return repr(self.stack[-1].name or "the model itself") if self.stack else "no module (in the calling code)"


def common_calls(a: Sequence[Running], b: Sequence[Running]) -> tuple[Running, ...]:
    """The calls that were running at both moments."""
    n = 0
    while n < len(a) and n < len(b) and a[n] is b[n]:
        n += 1
    return tuple(a[:n])


def hook_module_calls(model: nn.Module, recorder: Callable[[], Recorder | None]) -> list[RemovableHandle]:
    """Hooks that tell the current recorder which modules run. Put on last, they see a module first and leave last."""
    handles = []
    for name, module in model.named_modules():

        def before(module: nn.Module, args: Any, name: str = name) -> None:
            seen_by = recorder()
            if seen_by is not None:
                seen_by.enter(name)

        def after(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            seen_by = recorder()
            if seen_by is not None:
                seen_by.leave(name)

        handles.append(module.register_forward_pre_hook(before, prepend=True))
        handles.append(module.register_forward_hook(after, always_call=True))
    return handles


@dataclass(eq=False)
class Origin:
    """A storage that carries a parameter's values: the parameter on meta, its placeholder, or a lane's scratch."""

    name: str
    ref: StorageWeakRef  # while we hold this, no other storage can appear under the same key
    always: bool = False  # readable at any time (meta trace)
    held: dict[Recorder, tuple[Running, ...]] = field(default_factory=dict)  # calls running when it was handed out
    retired: dict[Recorder, tuple[Running, ...]] = field(default_factory=dict)  # and the same after it was taken back
    births: dict[Recorder, tuple[Running, ...]] = field(default_factory=dict)  # calls running when a view was made


def storage_key(tensor: Tensor) -> int | None:
    """Identity of the memory behind a tensor; None for layouts that have no single storage."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def weak_storage(tensor: Tensor) -> StorageWeakRef:
    """Keeps the key of a tensor's storage from being given to another, not the memory."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


class UseWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which op reads which parameter, for the recorder in `self.recorder` (None: not looking)."""

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder: Recorder | None = None
        self.origins: dict[int, Origin] = {}
        self._names = {id(p): name for name, p in params.items()}

    def track(self, tensor: Tensor, name: str, *, always: bool = False) -> Origin | None:
        """Watch a tensor's storage as parameter `name`. None if that storage is watched already."""
        key = storage_key(tensor)
        if key is None or key in self.origins:
            return None
        origin = Origin(name, weak_storage(tensor), always)
        self.origins[key] = origin
        return origin

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        recorder = self.recorder
        if recorder is None:
            return self.execute(func, args, kwargs)
        inputs = [(t, storage_key(t)) for t in (*tensors_in(args), *tensors_in(tuple(kwargs.values())))]
        hits = [(t, self.origins[key]) for t, key in inputs if key in self.origins]
        written = _written(func, args, kwargs) if func._schema.is_mutable else []
        self.before(recorder, func, inputs, written)
        out = self.execute(func, args, kwargs)
        outputs = list(tensors_in(out))
        for t, origin in hits:
            key = storage_key(t)
            views = [o for o in outputs if o is not t and storage_key(o) == key]
            if views and not any(t is w for w in written):
                origin.births[recorder] = self._held_by(recorder, t, origin)
            elif not any(o is t for o in outputs) and func.overloadpacket.__name__ not in _SHAPE_ONLY:
                self.read(recorder, t, origin)
        self.after(recorder, inputs, outputs)
        return out

    def _held_by(self, recorder: Recorder, tensor: Tensor, origin: Origin) -> tuple[Running, ...]:
        now = recorder.stack
        if id(tensor) in self._names:
            return tuple(now)
        since = origin.births.get(recorder) or origin.held.get(recorder) or origin.retired.get(recorder)
        return tuple(now) if since is None else common_calls(since, now)

    def read(self, recorder: Recorder, tensor: Tensor, origin: Origin) -> tuple[Running, ...]:
        path = self._held_by(recorder, tensor, origin)
        recorder.use(origin.name, path)
        return path

    def before(self, recorder: Recorder, func: Any, inputs: Inputs, written: list[Tensor]) -> None:
        """An op is about to run. `written`: inputs that it changes."""

    def after(self, recorder: Recorder, inputs: Inputs, outputs: list[Tensor]) -> None:
        """An op has run."""

    def execute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors among the arguments that the op's schema says it changes."""
    found: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
            found += tensors_in(value)
    return found


@dataclass(eq=False)
class _Made:
    """A tensor's memory: which lane made it, and whether weights or inputs went into it."""

    ref: StorageWeakRef
    by: Recorder
    tainted: bool


class RunWatch(UseWatch):  # type: ignore[no-untyped-call]
    """Watches a real run of lanes: finds uses of weights that are away, and lanes that share state."""

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        super().__init__(params)
        self.faults: list[str] = []
        self.crossings: list[str] = []
        self.notes: dict[str, None] = {}
        self._made: dict[int, _Made] = {}
        self._batch: dict[int, StorageWeakRef] = {}

    def taint(self, tensors: Iterable[Tensor]) -> None:
        """Inputs of lanes: what is computed from them is a lane's own."""
        for t in tensors:
            key = storage_key(t)
            if key is not None and key not in self._batch:
                self._batch[key] = weak_storage(t)

    def read(self, recorder: Recorder, tensor: Tensor, origin: Origin) -> tuple[Running, ...]:
        path = super().read(recorder, tensor, origin)
        if recorder not in origin.held:
            how = "after its module returned" if recorder in origin.retired else "while it is away"
            self.faults.append(f"{origin.name!r} is used in {recorder.where()} {how}")
        return path

    def before(self, recorder: Recorder, func: Any, inputs: Inputs, written: list[Tensor]) -> None:
        for t in written:
            key = storage_key(t)
            if key in self.origins:
                name = self.origins[key].name
                raise PlanError(
                    f"parameter {name!r} is changed in place ({func}) in the forward of {recorder.where()}. Weights "
                    f"are away between calls, so such a change is lost: make it outside of the forward, or keep the "
                    f"value in a buffer."
                )
            if key is not None and key not in self._made:
                self.notes[f"{recorder.where()} changes a tensor made before the forward; all lanes share it"] = None
        for _, key in inputs:
            made = self._made.get(key) if key is not None else None
            if made is not None and made.by is not recorder and made.tainted:
                self.crossings.append(recorder.where())

    def after(self, recorder: Recorder, inputs: Inputs, outputs: list[Tensor]) -> None:
        """Whose tensors these are. Only what comes from weights or inputs matters: a lane may well be the one that
        fills a table of positions for all."""
        known = {key for _, key in inputs if key is not None}
        tainted = any(k in self.origins or k in self._batch for k in known)
        tainted = tainted or any(k in self._made and self._made[k].tainted for k in known)
        for t in outputs:
            key = storage_key(t)
            if key is None or key in self.origins:
                continue
            if key in self._made:
                self._made[key].tainted |= tainted
            elif key not in known:
                self._made[key] = _Made(weak_storage(t), recorder, tainted)


# ---- the trace without weights ---------------------------------------------------------------------------------------


class _MetaWatch(UseWatch):  # type: ignore[no-untyped-call]
    """Runs what it can for real, the rest on meta; makes up values that only weights could give."""

    def execute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = (*tensors_in(args), *tensors_in(tuple(kwargs.values())))
        if not any(t.is_meta for t in inputs):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
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
    """A mask used as an index, as though it were true everywhere (the most a routed expert can get)."""
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
    """A copy of the model with its parameters, and buffers of any size worth mentioning, on the meta device."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        small = b.numel() <= _REAL_COPY_MAX_ELEMENTS and not b.is_meta
        memo[id(b)] = b.detach().cpu().clone() if small else torch.empty_like(b, device="meta")
    for module in model.modules():
        for value in vars(module).values():  # deepcopy refuses what autograd made (the weight of old-style weight norm)
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = torch.empty_like(value, device="meta", requires_grad=False)
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
        params = dict(shadow.named_parameters())
        watch = _MetaWatch(params)
        for name, p in params.items():
            watch.track(p, name, always=True)
        watch.recorder = recorder
        hook_module_calls(shadow, lambda: recorder)
        with torch.no_grad(), watch:
            call(shadow, _batch_copy(batch))
    except Exception as error:  # whatever a model's code may raise without real values
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
        log.debug("trace on meta stopped", exc_info=True)
        last = f"at or after module {recorder.order[-1][1]!r}" if recorder.order else "before any module"
        note = f"the trace without weights stopped {last} ({reason})"
        return _finished(recorder, complete=False, notes=(note,))
    return _finished(recorder, complete=True)


def _finished(recorder: Recorder, *, complete: bool, notes: tuple[str, ...] = ()) -> Trace:
    return Trace({n: frozenset(p) for n, p in recorder.uses.items()}, tuple(recorder.order), complete, notes)


def trace_of(recorders: Sequence[Recorder], *, complete: bool, notes: Sequence[str] = ()) -> Trace:
    """The trace of a watched run: uses of all lanes, order of the first."""
    trace = _finished(recorders[0], complete=complete, notes=tuple(notes))
    for recorder in recorders[1:]:
        other = _finished(recorder, complete=complete)
        trace = trace.merged(Trace(other.uses, trace.order, complete))
    return trace
