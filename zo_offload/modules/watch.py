"""Observes, op by op, under which running modules a forward uses each parameter.

A module may read a parameter of another (Mamba reads its convolution's weight), return one, or keep a view of one.
Names do not show that; storages do. `UseWatch` is a dispatch mode: every op that reads a parameter's bytes is noted
with the path of module calls that must hold the weight, which is

    the running modules                           if the op reads the Parameter itself
    the outermost of them                         if it reads another Parameter, that was given its data
    those also running when the view was made     if it reads a view of it

What it notes is kept by `recorder.py`. `trace.py` watches a forward without weights, for a plan to start from;
`run_watch.py` a real run of lanes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .recorder import Recorder, Running, common_calls

Inputs = list[tuple[Tensor, int | None]]
"""An op's input tensors, each with its storage key."""

# ops that take a tensor for its shape, dtype or device only
_SHAPE_ONLY = frozenset(
    "empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty new_zeros new_ones new_full "
    "new_empty_strided sym_size sym_stride sym_numel sym_storage_offset _has_compatible_shallow_copy_type".split()
)

BATCH_NORMS = frozenset(("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"))
"""(input, weight, bias, running mean, running variance, training, ...)"""


@dataclass(eq=False)
class Origin:
    """A storage that carries a parameter's values: the parameter on meta, its placeholder, or a lane's scratch."""

    name: str
    ref: weakref.ref[Any]  # tracking ends when the memory is freed
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
    """Prevents reuse of a storage's key for another tensor, without keeping the memory."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def watched_storage(tensor: Tensor, gone: Callable[[Any], None]) -> weakref.ref[Any]:
    """Calls `gone` when the memory of a tensor is freed.

    A StorageWeakRef would keep its small struct in the heap, and those of thousands of tensors break the holes that the
    next ones need: resident memory would grow layer by layer.
    """
    return weakref.ref(tensor.untyped_storage(), gone)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


class UseWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which op reads which parameter, for the recorder in `self.recorder` (None: not looking)."""

    supports_higher_order_operators = True

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder: Recorder | None = None
        self.origins: dict[int, Origin] = {}
        self.generators: dict[int, tuple[torch.Generator, Tensor]] = {}
        """Generators passed to ops, each with its state before the first op, by identity."""
        self._names = {id(p): name for name, p in params.items()}

    def track(self, tensor: Tensor, name: str, *, always: bool = False) -> Origin | None:
        """Watch a tensor's storage as parameter `name`. None if that storage is watched already."""
        key = storage_key(tensor)
        if key is None or key in self.origins:
            return None
        origin = Origin(name, watched_storage(tensor, partial(self._untrack, key)), always)
        self.origins[key] = origin
        return origin

    def put_generators_back(self) -> None:
        """Restore the generators that were passed to ops."""
        for generator, state in self.generators.values():
            generator.set_state(state)

    def _untrack(self, key: int, _: Any) -> None:
        self.origins.pop(key, None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        recorder = self.recorder
        if recorder is None:
            return self.execute(func, args, kwargs)
        inputs = [(t, storage_key(t)) for t in (*tensors_in(args), *tensors_in(tuple(kwargs.values())))]
        hits = [(t, self.origins[key]) for t, key in inputs if key in self.origins]
        if isinstance(func, HigherOrderOperator):  # flex_attention: it has functions among its arguments, and no schema
            for t, origin in hits:
                self.read(recorder, t, origin)
            out = self.execute(func, args, kwargs)
            self.after(recorder, inputs, list(tensors_in(out)))
            return out
        written = _written(func, args, kwargs)
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Generator) and value._cdata not in self.generators:  # type: ignore[attr-defined]
                self.generators[value._cdata] = value, value.get_state()  # type: ignore[attr-defined]
        self.before(recorder, func, inputs, written)
        out = self.execute(func, args, kwargs)
        outputs = list(tensors_in(out))
        for t, origin in hits:
            key = storage_key(t)
            views = [o for o in outputs if o is not t and storage_key(o) == key]
            if any(t is w for w in written):
                recorder.writes.add(origin.name)
                self.read(recorder, t, origin)
            elif views:
                origin.births[recorder] = self._held_by(recorder, t, origin)
            elif not any(o is t for o in outputs) and func.overloadpacket.__name__ not in _SHAPE_ONLY:
                self.read(recorder, t, origin)
        self.after(recorder, inputs, outputs)
        return out

    def _held_by(self, recorder: Recorder, tensor: Tensor, origin: Origin) -> tuple[Running, ...]:
        now = recorder.stack
        own = self._names.get(id(tensor))
        if own is not None and own != origin.name:  # `one.data = other.data`, by any of the modules around
            return tuple(now[:1])
        if own is not None:
            return tuple(now)
        since = origin.births.get(recorder) or origin.held.get(recorder) or origin.retired.get(recorder)
        return tuple(now) if since is None else common_calls(since, now)

    def read(self, recorder: Recorder, tensor: Tensor, origin: Origin) -> tuple[Running, ...]:
        path = self._held_by(recorder, tensor, origin)
        recorder.use(origin.name, path)
        return path

    def before(self, recorder: Recorder, func: Any, inputs: Inputs, written: list[Tensor]) -> None:
        """Called before an op runs. `written`: inputs that it changes."""

    def after(self, recorder: Recorder, inputs: Inputs, outputs: list[Tensor]) -> None:
        """Called after an op has run."""

    def execute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors among the arguments that the op changes."""
    if func.overloadpacket.__name__ in BATCH_NORMS:  # their schema does not mark this
        training = args[5] if len(args) > 5 else kwargs.get("training")
        statistics = (args[3:5] + (None, None))[:2] if len(args) > 3 else ()
        return [t for t in statistics if isinstance(t, Tensor)] if training else []
    if not func._schema.is_mutable:
        return []
    found: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
            found += tensors_in(value)
    return found
