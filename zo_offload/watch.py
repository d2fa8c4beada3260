"""Where a forward really uses each parameter: seen op by op, against the stack of running modules.

A module may read a parameter of another (Mamba reads its convolution's weight), return one, or keep a view of one.
Names do not show that; storages do. `UseWatch` is a dispatch mode: every op that reads a parameter's bytes is noted
with the path of module calls that must hold the weight, which is

    the running modules                           if the op reads the Parameter itself
    those also running when the view was made     if it reads a view of it

`RunWatch` watches a real run of lanes and is exact for that run; it also sees weights used while they are away, and
lanes that see each other's tensors. `trace.py` watches a forward without weights, for a plan to start from.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from .errors import PlanError

Path = tuple[str, ...]
"""Names of nested running modules, outermost first; the root module is "". """

Inputs = list[tuple[Tensor, int | None]]
"""Tensors an op gets, each with its storage key."""

ForwardCall = Callable[[nn.Module, Any], Any]
"""(model, batch) -> anything: how a lane calls the model."""

_NORMS = frozenset({"embedding_renorm_"})  # rows that the input names, each by its own norm

# ops that take a tensor for its shape, dtype or device only
_SHAPE_ONLY = frozenset(
    "empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty new_zeros new_ones new_full "
    "new_empty_strided sym_size sym_stride sym_numel sym_storage_offset _has_compatible_shallow_copy_type".split()
)

_BATCH_NORMS = frozenset(("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"))
"""(input, weight, bias, running mean, running variance, training, ...)"""


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
    writes: frozenset[str] = frozenset()
    """Parameters that the forward changes in place."""

    def merged(self, later: Trace) -> Trace:
        """Uses of both; order and completeness of the later one unless only the earlier saw a whole forward."""
        names = [*self.uses, *(n for n in later.uses if n not in self.uses)]
        uses = {n: self.uses.get(n, frozenset()) | later.uses.get(n, frozenset()) for n in names}
        base = later if later.complete or not self.complete else self
        notes = tuple(dict.fromkeys(self.notes + later.notes))
        return Trace(uses, base.order, base.complete, notes, self.writes | later.writes)


class Running:
    """One call of one module. Identity matters: two calls of the same module are two objects."""

    __slots__ = ("in_transform", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.in_transform = is_in_transform()


class Recorder:
    """Module calls and parameter uses of one forward (one lane)."""

    def __init__(self) -> None:
        self.stack: list[Running] = []
        self.order: list[tuple[int, str]] = []
        self.uses: dict[str, set[Path]] = {}
        self.writes: set[str] = set()

    def enter(self, name: str) -> None:
        self.order.append((len(self.stack), name))
        self.stack.append(Running(name))

    def leave(self, name: str) -> None:
        """Module `name` returned; calls inside it that were left by an exception end with it."""
        while self.stack and self.stack.pop().name != name:
            pass

    def use(self, param: str, path: Sequence[Running]) -> None:
        """What is called inside of a function transform cannot wait for weights: the module around it holds them."""
        outside = takewhile(lambda call: not call.in_transform, path)
        self.uses.setdefault(param, set()).add(tuple(call.name for call in outside))

    def where(self) -> str:
        return repr(self.stack[-1].name or "the model itself") if self.stack else "no module (in the calling code)"


def is_in_transform() -> bool:
    """Whether a function transform of torch.func (vmap, grad, jvp, jacrev, ...) is under way."""
    return torch._C._functorch.maybe_current_level() is not None


class WeightAway(Exception):
    """Ends a lane of a watched run that cannot go on; the run's verdict says why."""


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
        if isinstance(module, ScriptModule):
            continue  # takes no hooks; its calls are part of the module's above it

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
    ref: weakref.ref[Any]  # its end ends the tracking: nothing can use that memory any more
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


def watched_storage(tensor: Tensor, gone: Callable[[Any], None]) -> weakref.ref[Any]:
    """Calls `gone` when the memory of a tensor goes.

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

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder: Recorder | None = None
        self.origins: dict[int, Origin] = {}
        self.generators: dict[int, tuple[torch.Generator, Tensor]] = {}
        """Generators that ops were given, each with its state before the first of them, by what identifies it."""
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
        """Generators that ops were given as they were before."""
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
    """Tensors among the arguments that the op changes."""
    if func.overloadpacket.__name__ in _BATCH_NORMS:  # their schema does not say so
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


class KeptMemory(Protocol):
    """Memory that is put back after a run (`module_state.ModuleState`)."""

    def holds(self, key: int) -> bool: ...

    def before_write(self, key: int) -> None: ...


@dataclass(eq=False)
class _Made:
    """A tensor's memory: which lane made it, and whether weights or inputs went into it."""

    ref: weakref.ref[Any]
    """Takes the entry out when the memory goes."""
    by: Recorder
    of: str | None
    """None: of neither. The name of a parameter: of that alone. MANY: of several, or of inputs."""
    nbytes: int


MANY = "*"


class RunWatch(UseWatch):  # type: ignore[no-untyped-call]
    """Watches a real run of lanes: finds uses of weights that are away, and lanes that share state."""

    def __init__(self, params: Mapping[str, nn.Parameter], state: KeptMemory | None = None) -> None:
        super().__init__(params)
        self._state = state
        self._writers: dict[int, set[Recorder]] = {}  # of memory that was there before the run
        self.writes_batch = False
        self.faults: list[str] = []
        self.crossings: list[str] = []
        self.notes: dict[str, None] = {}
        self.peak_bytes = 0
        """The most memory of their own making that all lanes held at once."""
        self._live_bytes = 0
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
                self._check_write(recorder, func, inputs, t, self.origins[key])
            elif key is not None and key not in self._made:
                self._before_shared_write(recorder, key)
        updates = func.overloadpacket.__name__ in _BATCH_NORMS or torch.Tag.inplace in func.tags
        for t, key in inputs:
            made = self._made.get(key) if key is not None else None
            if made is not None and made.by is not recorder and made.of is not None:
                self.crossings.append(recorder.where())
            writers = self._writers.get(key) if key is not None else None
            if writers and writers != {recorder} and not (updates and any(t is w for w in written)):
                self.crossings.append(recorder.where())  # an update alone (`count.add_(1)`) tells the lane nothing

    def _before_shared_write(self, recorder: Recorder, key: int) -> None:
        """An op is about to write into memory that was there before the run."""
        self._writers.setdefault(key, set()).add(recorder)
        self.writes_batch |= key in self._batch
        if self._state is not None and self._state.holds(key):
            self._state.before_write(key)
        else:
            self.notes[f"{recorder.where()} changes a tensor made before the forward; all lanes share it"] = None

    def after(self, recorder: Recorder, inputs: Inputs, outputs: list[Tensor]) -> None:
        """Whose tensors these are. Only what comes from weights or inputs matters: a lane may well be the one that
        fills a table of positions for all."""
        known = {key for _, key in inputs if key is not None}
        of = self._made_of(known)
        for t in outputs:
            key = storage_key(t)
            if key is None or key in self.origins:
                continue
            if key in self._made:
                made = self._made[key]
                made.of = of if made.of in (None, of) else made.of if of is None else MANY
            elif key not in known:
                gone, nbytes = partial(self._forget, key), t.untyped_storage().nbytes()
                self._made[key] = _Made(watched_storage(t, gone), recorder, of, nbytes)
                self._live_bytes += nbytes
                self.peak_bytes = max(self.peak_bytes, self._live_bytes)

    def _made_of(self, keys: Iterable[int]) -> str | None:
        """What went into memory, as `_Made.of`."""
        found: set[str] = set()
        for key in keys:
            if key in self.origins:
                found.add(self.origins[key].name)
            elif key in self._batch:
                found.add(MANY)
            elif key in self._made and self._made[key].of is not None:
                found.add(self._made[key].of)  # type: ignore[arg-type]
        return None if not found else found.pop() if len(found) == 1 else MANY

    def _check_write(self, recorder: Recorder, func: Any, inputs: Inputs, weight: Tensor, origin: Origin) -> None:
        """A lane's own copy of a weight may be changed by what comes of the weight itself (a scale, a clamp, a norm):
        each call of the module that holds it begins with the weight as stored. PlanError where it would learn."""
        away = recorder not in origin.held
        others = {key for t, key in inputs if t is not weight and key is not None and key not in self.origins}
        others |= {k for _, k in inputs if k in self.origins and self.origins[k].name != origin.name}
        if func.overloadpacket.__name__ not in _NORMS and self._made_of(others) not in (None, origin.name):
            raise PlanError(
                f"parameter {origin.name!r} is changed in place ({func}) in the forward of {recorder.where()}, by "
                "what comes of inputs or of other weights. Weights are away between calls, so the change would be "
                "lost: make it outside of the forward, or keep the value in a buffer."
            )
        if away:
            recorder.writes.add(origin.name)
            self.read(recorder, weight, origin)
            raise WeightAway(f"{origin.name!r} is changed in place while it is away")

    def _forget(self, key: int, _: Any) -> None:
        made = self._made.pop(key, None)
        if made is not None:
            self._live_bytes -= made.nbytes


def trace_from(recorder: Recorder, *, complete: bool, notes: tuple[str, ...] = ()) -> Trace:
    uses = {n: frozenset(p) for n, p in recorder.uses.items()}
    return Trace(uses, tuple(recorder.order), complete, notes, frozenset(recorder.writes))


def trace_of(recorders: Sequence[Recorder], *, complete: bool, notes: Sequence[str] = ()) -> Trace:
    """The trace of a watched run: uses of all lanes, order of the first."""
    trace = trace_from(recorders[0], complete=complete, notes=tuple(notes))
    for recorder in recorders[1:]:
        other = trace_from(recorder, complete=complete)
        trace = trace.merged(replace(other, order=trace.order))
    return trace
