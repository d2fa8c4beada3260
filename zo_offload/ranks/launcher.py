"""Reads the environment variables that torchrun and accelerate launch set for each process."""

from __future__ import annotations

import os

from ..errors import ConfigError


def launched() -> tuple[int, int]:
    """(rank, number of ranks) of this process, as set by its launcher; (0, 1) without one."""
    world = variable("WORLD_SIZE", 1)
    return (variable("RANK", 0), world) if world > 1 else (0, 1)


def variable(name: str, default: int) -> int:
    """A number from the environment. Raises ConfigError if it is not a number."""
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} in the environment: expected a number") from None
