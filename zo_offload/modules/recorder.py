"""Records one forward: the nested calls of its modules, and its uses of each parameter.

Hooks on the modules and a watch over the ops (`watch.py`) fill a `Recorder` while the forward runs; plans are made from
the resulting `Trace`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from torch.jit import ScriptModule
from torch.utils.hooks import RemovableHandle

Path = tuple[str, ...]
"""Names of nested running modules, outermost first; the root module is "". """

ForwardCall = Callable[[nn.Module, Any], Any]
"""(model, batch) -> anything: how a lane calls the model."""


@dataclass(frozen=True)
class Trace:
    """One forward's uses of the model's parameters."""

    uses: Mapping[str, frozenset[Path]]
    """Canonical parameter name -> paths of module calls under which it must be held. () = outside of any module."""
    order: tuple[tuple[int, str], ...]
    """(depth, module) of each module call in order; depth 0 has no running module above it."""
    complete: bool
    """Whether the forward was seen to its end."""
    notes: tuple[str, ...] = ()
    writes: frozenset[str] = frozenset()
    """Parameters that the forward changes in place, or whose data it replaces temporarily."""

    def merged(self, later: Trace) -> Trace:
        """Uses of both; order and completeness of the later one unless only the earlier saw a whole forward."""
        names = [*self.uses, *(n for n in later.uses if n not in self.uses)]
        uses = {n: self.uses.get(n, frozenset()) | later.uses.get(n, frozenset()) for n in names}
        base = later if later.complete or not self.complete else self
        notes = tuple(dict.fromkeys(self.notes + later.notes))
        return Trace(uses, base.order, base.complete, notes, self.writes | later.writes)

    def with_writes_of(self, earlier: Trace) -> Trace:
        """This trace with an earlier trace's `writes`, which may not be visible under a better plan."""
        uses = {n: self.uses.get(n, frozenset()) | earlier.uses.get(n, frozenset()) for n in earlier.writes}
        return replace(self, uses={**self.uses, **uses}, writes=self.writes | earlier.writes)


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
        """Record a use. Code inside a function transform cannot wait for weights: the module around it holds them."""
        outside = takewhile(lambda call: not call.in_transform, path)
        self.uses.setdefault(param, set()).add(tuple(call.name for call in outside))

    def where(self) -> str:
        return repr(self.stack[-1].name or "the model itself") if self.stack else "no module (in the calling code)"


def is_in_transform() -> bool:
    """Whether a function transform of torch.func (vmap, grad, jvp, jacrev, ...) is under way."""
    return torch._C._functorch.maybe_current_level() is not None


class WeightAway(Exception):
    """Ends a lane of a watched run that cannot go on; the run's result has the reason."""


def common_calls(a: Sequence[Running], b: Sequence[Running]) -> tuple[Running, ...]:
    """The calls that were running in both stacks."""
    n = 0
    while n < len(a) and n < len(b) and a[n] is b[n]:
        n += 1
    return tuple(a[:n])


def hook_module_calls(model: nn.Module, recorder: Callable[[], Recorder | None]) -> list[RemovableHandle]:
    """Hooks that report module calls to the current recorder. Added last, they enter first and leave last."""
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, ScriptModule):
            continue  # takes no hooks; its calls count for the module above it

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
