"""What a fused pass is told of a step and of a lane, and the bytes that kernels on the CPU and on a GPU read of it."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..errors import ConfigError

Rounding = Literal["nearest", "stochastic"]
Target = Literal["values", "scales"]
Trains = Literal["values", "scales", "shifts"]
"""What a method trains. scales: each group's, about its centre; shifts: each group's, from its minimum."""

UPDATE = struct.Struct("<QffII")
"""struct zo_update of csrc/api.h: seed, coefficient, decay, flags (1: it folds), 0."""
LANE = struct.Struct("<QQfI")
"""struct zo_lane: seed, address of its output, scale, code of the output's format."""


def _check(what: str, seed: int, **scalars: float) -> None:
    if not 0 <= seed < 1 << 64:
        raise ConfigError(f"{what} has seed={seed}: must be >= 0 and < 2**64")
    for name, value in scalars.items():
        if not math.isfinite(value) or ctypes.c_float(value).value != value:
            raise ConfigError(
                f"{what} has {name}={value!r}: must be finite and exactly a float32; round it where it is made"
            )


@dataclass(frozen=True)
class Update:
    """One step's change of a parameter: w <- fma(-coeff, z(seed), w * decay)."""

    seed: int
    coeff: float
    """Learning rate times projected gradient; exactly a float32."""
    decay: float = 1.0
    """1 - learning rate * weight decay; exactly a float32."""
    fold: bool = True
    """Round to the storage format after this update; False keeps the sum in float32 for the next one."""
    packed: bytes = field(init=False, repr=False, compare=False)
    """struct zo_update of csrc/api.h."""

    def __post_init__(self) -> None:
        _check("an update", self.seed, coeff=self.coeff, decay=self.decay)
        object.__setattr__(self, "packed", UPDATE.pack(self.seed, self.coeff, self.decay, bool(self.fold), 0))


@dataclass(frozen=True)
class Perturbation:
    """One lane's weights: w + scale * z(seed). scale == 0 means the weights themselves (evaluation)."""

    seed: int
    scale: float

    def __post_init__(self) -> None:
        _check("a perturbation", self.seed, scale=self.scale)


STILL = Perturbation(0, 0.0)
"""The weights as they are: evaluation, and what is not trained."""


@dataclass(frozen=True)
class Gain:
    """How much of a method's perturbation and update one parameter gets (`gains.py`); both exactly float32."""

    lane: float = 1.0
    """Times the scale of a perturbation."""
    update: float = 1.0
    """Times the coefficient of an update."""


ONE = Gain()
Gains = Mapping[str, Gain]
"""By canonical name; a parameter that is not in it has `ONE`."""
