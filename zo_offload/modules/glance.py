"""Whether anything in many places has changed, at one look: most passes change nothing, and asking each place would
cost more than the rest of a small step.

The look goes over what the dicts of all places hold, in one sweep without Python code between. Only where something is
another object than before, the places are asked one by one, which is the whole of what `changed` means.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import is_
from typing import Any

from .places import HOOKS, Hooks, Names, Place


class Glance:
    """Over places that were all noted before. A place is noted again through `note` only."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self._others = [place for place in places if not _dicts_of(place)]
        self._dicts: list[dict[Any, Any]] = []
        self._then: tuple[list[int], list[Any], list[Any]] | None = None
        """Sizes, keys and values of the dicts, at a moment when no place had changed."""

    def changed(self) -> list[tuple[Place, Any]]:
        """(place, key) of the cells that hold other objects than were noted."""
        if self._is_as_then():
            return [(place, key) for place in self._others for key in place.changed()]
        found = [(place, key) for place in self._places for key in place.changed()]
        if not found:  # hooks of this package's own may have
            dicts = self._dicts = [d for place in self._places for d in _dicts_of(place)]
            self._then = list(map(len, dicts)), list(_keys(dicts)), list(_values(dicts))
        return found

    def note(self, places: Iterable[Place]) -> None:
        """Some of them remember what they hold now."""
        self._then = None
        for place in places:
            place.note()

    def _is_as_then(self) -> bool:
        """Whether all dicts hold what they held when no place had changed. False: not known."""
        if self._then is None:
            return False
        (sizes, keys, values), dicts = self._then, self._dicts
        if list(map(len, dicts)) != sizes:
            return False
        return all(map(is_, _values(dicts), values)) and all(map(is_, _keys(dicts), keys))


def _dicts_of(place: Place) -> list[dict[Any, Any]]:
    """The dicts that all of a place is in; none: it has to be asked."""
    if isinstance(place, Hooks):
        return [place.held[name] for hooks, options in HOOKS.items() for name in (hooks, *options)]
    return [place.target] if isinstance(place, Names) and type(place.target) in (dict, OrderedDict) else []


def _keys(dicts: Iterable[dict[Any, Any]]) -> Iterator[Any]:
    return chain.from_iterable(dicts)


def _values(dicts: Iterable[dict[Any, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, dicts))
