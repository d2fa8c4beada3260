"""The places where a forward can leave state in a model's modules: attributes, and the objects reachable from them.

A place has cells: a namespace one for each name, a list or set one for all its items. It remembers its contents when it
was last noted, and reports the cells that hold other objects now.

Objects are reached through containers and plain objects. An attribute is left out entirely if it leads to something
that cannot be copied (a lock, a file, a C object) or to very many objects. Not covered: state that only globals,
closures or C code hold, and a tensor's memory, which `state.py` handles.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import re
import sys
import types
import weakref
from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from .generators import is_generator

GONE = object()
"""The value of a cell that is not there."""

_MAX_DEPTH, _MAX_PLACES = 6, 2000  # of what one attribute leads to
_MAX_ITEMS = 1 << 17  # of a container; bytes of an array

LEAVES: tuple[type, ...] = (
    bool, int, float, complex, str, bytes, type(None), type, types.FunctionType, types.BuiltinFunctionType,
    types.MethodType, types.ModuleType, types.GenericAlias, functools.partial, property, staticmethod, classmethod,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, enum.Enum, range, slice,
    type(Ellipsis), type(NotImplemented), pathlib.PurePath, re.Pattern, weakref.ref, datetime.date, datetime.time,
    datetime.timedelta, decimal.Decimal, fractions.Fraction,
)  # fmt: skip
"""Types whose values cannot change, at least not as part of a model."""

_BARE = frozenset(vars(nn.Module())) - {"training"}  # what torch keeps in every module
_OF_TORCH = ("_parameters", "_buffers", "_modules")
_CLASSES_LEFT_OUT = ("torch", "transformers", "typing", "abc")  # nothing is kept in the classes of these
HOOKS = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}
"""Attributes of a module that hold the hooks around its forward, and those that hold their options."""
_HEAP_TYPE = 1 << 9  # of type.__flags__: a class made by Python code


class Place:
    """One place; `target` is the object it is. Cells are named by keys."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.note()

    def note(self) -> None:
        """Remember the present contents."""
        self.then: Any = self.now()

    def now(self) -> Any:
        raise NotImplementedError

    def changed(self) -> list[Any]:
        """Keys of the cells whose objects differ from the noted ones."""
        raise NotImplementedError

    def get(self, key: Any) -> Any:
        raise NotImplementedError

    def noted(self, key: Any) -> Any:
        """A cell's noted object."""
        return self.then.get(key, GONE)

    def put(self, key: Any, value: Any) -> None:
        raise NotImplementedError

    def put_back(self) -> None:
        """Restore the noted contents."""
        for key in self.changed():
            self.put(key, self.noted(key))


class Names(Place):
    """A dict: of an object's attributes, or one that a module uses."""

    target: dict[Any, Any]

    def now(self) -> Any:
        return dict(self.target)

    def changed(self) -> list[Any]:
        now, then = self.target, self.then
        if len(now) == len(then) and all(map(is_, now.values(), then.values())) and all(map(is_, now, then)):
            return []
        return [key for key in {**then, **now} if now.get(key, GONE) is not then.get(key, GONE)]

    def get(self, key: Any) -> Any:
        return self.target.get(key, GONE)

    def put(self, key: Any, value: Any) -> None:
        if value is GONE:
            self.target.pop(key, None)
        else:
            self.target[key] = value

    def put_back(self) -> None:
        super().put_back()
        if list(self.target) != list(self.then):  # the order of buffers and modules is that of their names
            self.target.clear()
            self.target.update(self.then)


class Hooks(Place):
    """The hooks around a module's forward, without those of this package: one cell for all of them.

    A model may put hooks on itself at its first forward and record that in an attribute (transformers does, to return
    hidden states). If only the attribute were restored, every forward would add hooks again.
    """

    def __init__(self, held: dict[str, Any]) -> None:
        self.held = held  # the module's attributes, which are a place of their own
        super().__init__(held["_forward_hooks"])

    def now(self) -> Any:
        """(attribute, id of the hook) -> hook, and option -> True."""
        held, found = self.held, {}
        for hooks, options in HOOKS.items():
            for key, hook in held[hooks].items():
                if not _is_ours(hook):
                    found[hooks, key] = hook
                    found |= {(option, key): True for option in options if key in held[option]}
        return found

    def changed(self) -> list[Any]:
        now, then = self.now(), self.then
        same = len(now) == len(then) and all(now.get(key, GONE) is hook for key, hook in then.items())
        return [] if same else [None]

    def get(self, key: Any) -> Any:
        return self.now()

    def noted(self, key: Any) -> Any:
        return self.then

    def put(self, key: Any, value: Any) -> None:
        for attribute, hook in self.now().keys() - value.keys():
            del self.held[attribute][hook]
        for (attribute, hook), what in value.items():
            self.held[attribute][hook] = what


class ClassNames(Place):
    """A class's attributes, which all its instances share."""

    target: type

    def now(self) -> Any:
        return dict(vars(self.target))

    def changed(self) -> list[Any]:
        now, then = vars(self.target), self.then
        if len(now) == len(then) and all(map(is_, now.values(), then.values())):
            return []
        keys = [key for key in {**then, **now} if not _is_special(key)]
        return [key for key in keys if now.get(key, GONE) is not then.get(key, GONE)]

    def get(self, key: Any) -> Any:
        return vars(self.target).get(key, GONE)

    def put(self, key: Any, value: Any) -> None:
        if value is not GONE:
            type.__setattr__(self.target, key, value)
        elif key in vars(self.target):
            type.__delattr__(self.target, key)


class Slots(Place):
    """An object's slots."""

    def now(self) -> Any:
        return {name: getattr(self.target, name, GONE) for name in slots_of(type(self.target))}

    def changed(self) -> list[Any]:
        return [name for name, value in self.then.items() if getattr(self.target, name, GONE) is not value]

    def get(self, key: Any) -> Any:
        return getattr(self.target, key, GONE)

    def put(self, key: Any, value: Any) -> None:
        if value is not GONE:
            object.__setattr__(self.target, key, value)
        elif hasattr(self.target, key):
            object.__delattr__(self.target, key)


class Items(Place):
    """A list, deque or set: one cell, its items."""

    def now(self) -> Any:
        return tuple(self.target)

    def changed(self) -> list[Any]:
        return [] if len(self.target) == len(self.then) and all(map(is_, self.target, self.then)) else [None]

    def get(self, key: Any) -> Any:
        return self.now()

    def noted(self, key: Any) -> Any:
        return self.then

    def put(self, key: Any, value: Any) -> None:
        if isinstance(self.target, list):
            self.target[:] = value
            return
        self.target.clear()
        if isinstance(self.target, set):
            self.target.update(value)
        else:
            self.target.extend(value)


class Array(Place):
    """A numpy array: one cell, its values."""

    def now(self) -> Any:
        return self.target.copy()

    def changed(self) -> list[Any]:
        return [] if self.target.tobytes() == self.then.tobytes() else [None]

    def get(self, key: Any) -> Any:
        return self.now()

    def noted(self, key: Any) -> Any:
        return self.then

    def put(self, key: Any, value: Any) -> None:
        self.target[...] = value


def _is_ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def slots_of(cls: type) -> list[str]:
    """Names of the slots that a class and its bases have."""
    names: list[str] = []
    for base in cls.__mro__:
        own = vars(base).get("__slots__", ())
        names += (own,) if isinstance(own, str) else own
    return [name for name in names if name not in ("__dict__", "__weakref__")]


class Reach:
    """The places, tensors and generators that are reachable from a model's modules and their classes."""

    def __init__(self, model: nn.Module) -> None:
        self.places: list[Place] = []
        self.tensors: list[Tensor] = []
        self.generators: list[Any] = []
        modules = list(model.modules())
        self.seen = {id(module) for module in modules}
        self._refused: set[int] = set()
        for module in modules:
            self._module(module)
        for cls in dict.fromkeys(cls for module in modules for cls in type(module).__mro__):
            if cls.__flags__ & _HEAP_TYPE and cls.__module__.partition(".")[0] not in _CLASSES_LEFT_OUT:
                self.places.append(ClassNames(cls))
                self._values([value for name, value in vars(cls).items() if not _is_special(name)])

    def _module(self, module: nn.Module) -> None:
        held = vars(module)
        self.places += Names(held), Hooks(held)
        for name in _OF_TORCH:
            own = held.get(name)
            if type(own) in (dict, collections.OrderedDict):
                self.places.append(Names(own))
        self._values(held.get("_buffers", {}).values())
        self._values([value for name, value in held.items() if name not in _BARE])

    def _values(self, values: Iterable[Any]) -> None:
        """Add everything reachable from each value, or nothing of it."""
        for value in values:
            if not isinstance(value, LEAVES) and id(value) not in self._refused:
                found = _Found(self.seen)
                if found.walk(value, 0):
                    self.seen |= found.seen
                    self.places += found.places
                    self.tensors += found.tensors
                    self.generators += found.generators
                else:
                    self._refused.add(id(value))


class _Found:
    """The objects reachable from one value. known: ids of objects found before."""

    def __init__(self, known: set[int]) -> None:
        self.known, self.seen = known, set[int]()
        self.places: list[Place] = []
        self.tensors: list[Tensor] = []
        self.generators: list[Any] = []

    def walk(self, value: Any, depth: int) -> bool:
        """Add the reachable objects. Returns False if one cannot be copied, or if there are too many."""
        if isinstance(value, LEAVES) or id(value) in self.known or id(value) in self.seen:
            return True
        self.seen.add(id(value))
        if depth > _MAX_DEPTH or len(self.places) > _MAX_PLACES:
            return False
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return True
        if is_generator(value):
            self.generators.append(value)
            return True
        if isinstance(value, (list, set, frozenset, tuple, collections.deque)):
            return self._items(value, depth)
        if type(value) in (dict, collections.OrderedDict, collections.defaultdict, collections.Counter):
            return self._all(Names(value), value.values(), depth)
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic, numpy.dtype)):
            return self._array(value, numpy)
        return self._object(value, depth)

    def _all(self, place: Place | None, values: Iterable[Any], depth: int) -> bool:
        values = list(values)
        if len(values) > _MAX_ITEMS:
            return False
        if place is not None:
            self.places.append(place)
        return all(self.walk(value, depth + 1) for value in values)

    def _items(self, value: Any, depth: int) -> bool:
        fixed = isinstance(value, (tuple, frozenset)) or len(value) > _MAX_ITEMS
        return self._all(None if fixed else Items(value), value, depth)

    def _array(self, value: Any, numpy: Any) -> bool:
        if isinstance(value, numpy.ndarray) and value.dtype != object and value.flags.writeable:
            if value.nbytes > _MAX_ITEMS:
                return False
            self.places.append(Array(value))
        return True

    def _object(self, value: Any, depth: int) -> bool:
        """A plain object: one whose state is in its dict and slots."""
        cls, held = type(value), getattr(value, "__dict__", None)
        slots = slots_of(cls)
        if isinstance(value, dict) or not cls.__flags__ & _HEAP_TYPE:
            return False  # a mapping with its own behaviour; a C object
        attributes = held if isinstance(held, dict) else {}
        if slots:
            self.places.append(Slots(value))
        values: Sequence[Any] = [*attributes.values(), *(getattr(value, name, None) for name in slots)]
        return self._all(Names(attributes) if attributes or held is not None else None, values, depth)
