"""What a method has for rounds of clients (`journal/rounds.py`): all its steps use a few noises, known by number."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ..errors import ConfigError
from .base import Method


class Pooled(ABC):
    """A method each of whose steps has one noise, of a pool of them. Its updates may be added up by noise."""

    pool: int
    """Number of the pool's noises."""

    @abstractmethod
    def seed_of(self, run_seed: int, index: int) -> int:
        """The pool's seed with this index."""

    @abstractmethod
    def draw(self, client: str, begin: int, step: int) -> int:
        """The index of a client's local step, in a round that began after `begin` steps; local steps count from there.
        A function of the three alone."""

    @abstractmethod
    def of_client(self, client: str, begin: int) -> Method:
        """This method for those local steps."""


def pooled(method: Method) -> Pooled:
    """The method as one that has rounds. Raises ConfigError."""
    if not isinstance(method, Pooled) or not method.own():
        raise ConfigError(f"a round needs --method seed-pool, the run's is {method.name!r}")
    if method.schedule != "constant":
        raise ConfigError(f"schedule={method.schedule!r}: sums of rounds have a meaning at a constant rate only")
    return method
