"""What torchrun, and accelerate launch like it, say to each process that they start: variables of the environment."""

from __future__ import annotations

import os

from ..errors import ConfigError


def launched() -> tuple[int, int]:
    """(rank, number of ranks) of this process, as its launcher says; (0, 1) without one."""
    world = variable("WORLD_SIZE", 1)
    return (variable("RANK", 0), world) if world > 1 else (0, 1)


def variable(name: str, default: int) -> int:
    """A number in the environment. Raises ConfigError on what is none."""
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} in the environment: expected a number") from None
