"""A model's modules as plain data, and the selection of its trained parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from torch import Tensor, nn, strided
from torch.jit import ScriptModule

from ..errors import PlanError
from .experts import is_stack_of_experts
from .parameters import is_plain, split, streams

TrainableFilter = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class ModuleTree:
    """A model's modules as plain data, for planning."""

    classes: Mapping[str, str]
    """Module path -> class, in definition order."""
    names: Mapping[str, str]
    """Every name of every parameter that streams -> canonical name."""
    containers: frozenset[str]
    """Modules that never run themselves, or whose calls cannot be seen (TorchScript): the one above handles them."""
    gatherable: frozenset[str]
    """Exact nn.Embedding modules without max_norm."""
    portioned: frozenset[str]
    """Plain nn.Linear modules and stacked experts without hooks: their weights may come in portions."""
    stacks: Mapping[str, tuple[str, ...]]
    """Modules of stacked experts -> canonical names of their parameters, with one row per expert."""
    elements: tuple[str, ...]
    """Elements of the outermost repeated stacks."""
    kept: Mapping[str, str] = field(default_factory=dict)
    """As `names`, for the parameters that stay in the model (`parameters.py`)."""

    def element_of(self, module: str) -> str | None:
        """The stack element that contains a module, or is the module itself."""
        return next((name for name in upwards(module) if name in self._elements), None)

    @cached_property
    def _elements(self) -> frozenset[str]:
        return frozenset(self.elements)

    @cached_property
    def holders(self) -> dict[str, tuple[str, ...]]:
        """Canonical name -> the modules that hold the parameter (several if it is tied), canonical one first."""
        found: dict[str, dict[str, None]] = {}
        for name, canonical in self.names.items():
            holder = name.rpartition(".")[0]
            if holder in self.classes:
                found.setdefault(canonical, {})[holder] = None
        return {name: tuple(holders) for name, holders in found.items()}

    def runner(self, module: str) -> str:
        """The module itself, or the nearest one above it that can run."""
        return next(name for name in upwards(module) if name not in self.containers or name == "")


def module_tree(model: nn.Module) -> ModuleTree:
    """The model's modules as plain data."""
    modules = dict(model.named_modules())
    canonical = {id(p): name for name, p in model.named_parameters()}
    names = {name: canonical[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    kept = split(model)[1].keys()
    return ModuleTree(
        classes={n: f"{type(m).__module__}.{type(m).__qualname__}" for n, m in modules.items()},
        names={name: one for name, one in names.items() if one not in kept},
        containers=frozenset(n for n, m in modules.items() if isinstance(m, (*_CONTAINERS, ScriptModule))),
        gatherable=frozenset(n for n, m in modules.items() if gathers_rows(m)),
        portioned=frozenset(
            n for n, m in modules.items() if computes_in_portions(m) and not has_hooks(m) and _all_stream(m)
        ),
        stacks={
            n: tuple(canonical[id(p)] for p in m.parameters())
            for n, m in modules.items()
            if is_stack_of_experts(m) and _all_stream(m)
        },
        elements=tuple(_stack_elements(model, modules)),
        kept={name: one for name, one in names.items() if one in kept},
    )


def _all_stream(module: nn.Module) -> bool:
    return all(map(streams, module.parameters()))


def gathers_rows(module: nn.Module) -> bool:
    """Whether a call of this module reads only the rows of its weight that its input selects."""
    return (
        type(module) is nn.Embedding and module.max_norm is None and "forward" not in vars(module)
        and not has_hooks(module) and is_plain(module.weight)
    )  # fmt: skip


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a call of this module is `input @ weight.T + bias` and no more.

    Not a subclass, not parametrized (that changes the class), its forward not replaced, its weight a parameter that has
    elements.
    """
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.numel() > 0


def computes_in_portions(module: nn.Module) -> bool:
    """Whether a call of this module can take its weights a portion at a time (`tiles.py`, `experts.py`)."""
    return is_plain_linear(module) or is_stack_of_experts(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run before or after this module's forward: they may read its weight."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _stack_elements(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    found: list[str] = []
    name_of = {id(m): n for n, m in modules.items()}

    def walk(module: nn.Module, seen: set[int]) -> None:
        children = [c for c in module.children() if id(c) not in seen and any(True for _ in c.parameters())]
        seen.update(map(id, children))
        classes = [type(c) for c in children]
        repeated = max((classes.count(c) for c in set(classes)), default=0) >= 2
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and repeated:
            found.extend(name_of[id(c)] for c in children)
            return
        for child in children:
            walk(child, seen)

    walk(model, {id(model)})
    if found:
        return found
    module = model  # no stack: top-level children, below wrappers that only hold one child
    while True:
        children = [c for c in module.children() if any(True for _ in c.parameters())]
        if len(children) != 1 or any(True for _ in module.parameters(recurse=False)):
            return [name_of[id(c)] for c in children]
        module = children[0]


def select_trainable(named: Mapping[str, nn.Parameter], tree: ModuleTree, trainable: TrainableFilter) -> set[str]:
    """Canonical names that the filter selects; see `make_plan`. named: all parameters.

    Raises PlanError if it selects none, or one that cannot train. Integers can never train, so no filter selects them.
    """
    kept = set(tree.kept.values())
    numbers = {n: p for n, p in named.items() if p.dtype.is_floating_point or p.dtype.is_complex}
    able = {n for n in numbers if n not in kept}
    if trainable is None or trainable == "requires_grad":
        chosen = {n for n, p in numbers.items() if p.requires_grad}
        if not chosen and trainable is None:
            chosen = set(able)
        what = "requires_grad"
    elif callable(trainable):
        chosen, what = {n for n, p in numbers.items() if trainable(n, p)}, "the predicate"
    else:
        what = f"trainable={trainable!r}"
        chosen = select_names(tree, trainable, "trainable", set(numbers))
    if not chosen:
        hint = ": call requires_grad_(True) on those meant, and open an adapter of peft's with is_trainable=True"
        raise PlanError(
            f"{what} selects none of {len(able)} floating parameters: nothing to train"
            f"{hint if what == 'requires_grad' else ''}"
        )
    for name in (n for n in named if n in chosen and n in kept):
        raise PlanError(
            f"parameter {name!r} is to train ({what}), but it is {_kind(named[name])}, and only plain float32, "
            "bfloat16 and float16 can. Convert it (module.float()) or freeze it (requires_grad_(False), or trainable=)"
        )
    return chosen


def _kind(p: nn.Parameter) -> str:
    """The property of a parameter that prevents streaming."""
    if not is_plain(p):
        return str(p.dtype) if type(p.data) is Tensor and p.layout is strided else f"a {type(p.data).__name__}"
    return "an expanded tensor, whose elements share memory"


def select_names(tree: ModuleTree, globs: Any, what: str, among: set[str] | None = None) -> set[str]:
    """Canonical names of the parameters that one or several globs select; each must select at least one."""
    every = {**tree.names, **tree.kept}
    names = set(tree.names.values()) if among is None else among
    chosen: set[str] = set()
    for glob in [globs] if isinstance(globs, str) else list(globs):
        selected = {c for name, c in every.items() if c in names and _glob_selects(glob, name)}
        if not selected:
            some = sorted(names)[:: max(1, len(names) // 4)][:5]
            raise PlanError(
                f"{what}={glob!r} selects none of {len(names)} floating parameters (such as {some}). A glob "
                f"must match consecutive dotted segments of a parameter's name."
            )
        chosen |= selected
    return chosen


def _glob_selects(glob: str, name: str) -> bool:
    want, have = glob.split("."), name.split(".")
    return any(
        all(fnmatchcase(segment, pattern) for segment, pattern in zip(have[i:], want, strict=False))
        for i in range(len(have) - len(want) + 1)
    )


def upwards(module: str) -> list[str]:
    """The paths of a module and of the modules around it, nearest first, "" last."""
    parts = module.split(".") if module else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]
