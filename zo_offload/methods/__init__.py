"""Methods: which noises, which lanes, and how losses become updates. One file each; MeZO first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .fzoo import FZOO
from .mezo import PRESETS, MeZO, Step, lr_schedule
from .qzo import QZO

__all__ = ["FZOO", "METHODS", "PRESETS", "QZO", "MeZO", "Step", "lr_schedule", "method_from"]

METHODS: dict[str, type[MeZO]] = {"mezo": MeZO, "fzoo": FZOO, "qzo": QZO}


def method_from(record: Mapping[str, Any]) -> MeZO:
    """A method from its fields, as a run keeps them; without a name it is MeZO."""
    fields = dict(record)
    name = fields.pop("name", "mezo")
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is not known; there are {', '.join(sorted(METHODS))}")
    return METHODS[name](**fields)
