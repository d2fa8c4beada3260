"""Random numbers of a forward: functions of the run's seed and the step; the caller's generators are not changed.

The rule, for every call of the engine:

    a step                   each of its lanes begins with generators seeded by (run seed, step)
    an evaluation            each of its batches by (run seed, number of the batch); reading its data draws from a
                             separate stream, by the run seed
    tracing and measuring    by the run seed
    run, generate            with the caller's generators, which are advanced as by a plain forward: so
                             `torch.manual_seed` before `generate(do_sample=True)` has the same effect as in
                             transformers

In the first three cases the caller's generators are restored afterwards. This covers torch's default generators,
Python's and numpy's; a `torch.Generator` passed to an op; and generators that the model's modules hold. Others (an
object in a closure, say) cannot be seen.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")

_HOST = frozenset({"torch", "python", "numpy"})  # kinds of the generators that reading data draws from


def lane_seed(run_seed: int, what: str, index: int) -> int:
    """64-bit seed of the random numbers that lanes draw in step `index`, say. Unrelated to the perturbations' noise."""
    return int.from_bytes(hashlib.blake2b(f"{run_seed} {what} {index}".encode(), digest_size=8).digest(), "little")


class Generators:
    """The generators that a model may draw from, each under a name ("its kind")."""

    def __init__(self) -> None:
        self._met: dict[str, Any] = {}
        self._salts: dict[str, str] = {}  # of what was met, from its first state: whatever else is met, and when

    def meet(self, generator: Any, state: Any = None) -> bool:
        """Add a generator (see `is_generator`) whose state was `state`, or is unchanged. False if it was known."""
        known = (torch.default_generator, *torch.cuda.default_generators, *self._met.values())
        if any(generator is other or _is_same(generator, other) for other in known):
            return False
        kind = f"met:{len(self._met)}"
        self._met[kind], self._salts[kind] = generator, _digest(_state_of(generator) if state is None else state)
        return True

    def state(self, kinds: frozenset[str] | None = None) -> dict[str, Any]:
        """States of the generators of these kinds, None for all: on CPU and on each CUDA device in use."""
        states: dict[str, Any] = {}
        if kinds is None or "torch" in kinds:
            states["torch"] = torch.default_generator.get_state()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            for device in range(torch.cuda.device_count()):
                if kinds is None or f"cuda:{device}" in kinds:
                    states[f"cuda:{device}"] = torch.cuda.get_rng_state(device)
        if kinds is None or "python" in kinds:
            states["python"] = random.getstate()
        if "numpy" in sys.modules and (kinds is None or "numpy" in kinds):
            states["numpy"] = sys.modules["numpy"].random.get_state()
        for kind, generator in self._met.items():
            if kinds is None or kind in kinds:
                states[kind] = _state_of(generator)
        return states

    def set(self, states: dict[str, Any]) -> None:
        for kind, state in states.items():
            if kind == "torch":
                torch.default_generator.set_state(state)
            elif kind == "python":
                random.setstate(state)
            elif kind == "numpy":
                sys.modules["numpy"].random.set_state(state)
            elif kind in self._met:
                _set_state_of(self._met[kind], state)
            else:
                torch.cuda.set_rng_state(state, kind)

    def seed(self, kinds: Iterator[str] | frozenset[str], seed: int) -> None:
        """Seed the generators of these kinds."""
        for kind in kinds:
            if kind == "torch":
                torch.default_generator.manual_seed(seed)
            elif kind == "python":
                random.seed(seed)
            elif kind == "numpy":
                sys.modules["numpy"].random.seed([seed & 0xFFFFFFFF, seed >> 32])
            elif kind in self._met:
                _seed(self._met[kind], lane_seed(seed, self._salts[kind], 0))
            else:
                torch.cuda.default_generators[torch.device(kind).index].manual_seed(seed)


def is_generator(value: Any) -> bool:
    """Whether a value is a generator that this class can handle."""
    numpy = sys.modules.get("numpy")
    of_numpy = numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))
    return of_numpy or isinstance(value, (torch.Generator, random.Random))


def _is_same(a: Any, b: Any) -> bool:
    """Whether two objects are the same generator: ops see other Python objects of a passed one."""
    return isinstance(a, torch.Generator) and isinstance(b, torch.Generator) and a._cdata == b._cdata  # type: ignore[attr-defined]


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state() if hasattr(generator, "get_state") else generator.bit_generator.state


def _digest(state: Any) -> str:
    return hashlib.blake2b(_as_bytes(state), digest_size=8).hexdigest()


def _as_bytes(state: Any) -> bytes:
    if isinstance(state, torch.Tensor):
        state = state.numpy()
    if isinstance(state, dict):
        return _as_bytes(tuple(state.items()))
    if isinstance(state, tuple):
        return b"(" + b",".join(map(_as_bytes, state)) + b")"
    return bytes(state.tobytes()) if hasattr(state, "tobytes") else repr(state).encode()


def _set_state_of(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif hasattr(generator, "set_state"):
        generator.seed([seed & 0xFFFFFFFF, seed >> 32])
    else:
        generator.bit_generator.state = type(generator.bit_generator)(seed).state


def drawn_from(a: dict[str, Any], b: dict[str, Any]) -> frozenset[str]:
    """Kinds of the generators that were drawn from between two states."""
    return frozenset(kind for kind in a if kind in b and not _same_state(a[kind], b[kind]))


def _same_state(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    try:
        return bool(a == b)
    except ValueError:  # there is an array in it
        pass
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same_state(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_same_state(x, y) for x, y in zip(a, b, strict=True))
    return bool((a == b).all())


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """While open, the process's generators are seeded; afterwards they are restored."""
    generators = Generators()
    before = generators.state()
    generators.seed(frozenset(before), seed)
    try:
        yield
    finally:
        generators.set(before)


def read_apart(begin: Callable[[], Iterator[Item]], seed: int) -> Iterator[Item]:
    """The items of `begin()`, read with generators that are seeded before the first and keep their state in between.

    Between items the process's generators have their own state.
    """
    generators = Generators()
    kinds = frozenset(generators.state(_HOST))
    iterator: Iterator[Item] | None = None
    inside: dict[str, Any] = {}
    while True:
        outside = generators.state(kinds)
        try:
            if iterator is None:
                generators.seed(kinds, seed)
                iterator = begin()
            else:
                generators.set(inside)
            try:
                item = next(iterator)
            except StopIteration:
                return
            inside = generators.state(kinds)
        finally:
            generators.set(outside)
        yield item
