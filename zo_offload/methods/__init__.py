"""Methods: which noises, which lanes, and how losses become updates. One file each; MeZO first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .fzoo import FZOO
from .mezo import MeZO, Step, lr_schedule
from .presets import PRESETS, check_tunes
from .qzo import QZO, QZOShift

__all__ = [
    "FZOO", "METHODS", "PRESETS", "QZO", "MeZO", "QZOShift", "Step", "check_tunes", "known_record", "lr_schedule",
    "method_from",
]  # fmt: skip

METHODS: dict[str, type[MeZO]] = {"mezo": MeZO, "fzoo": FZOO, "qzo": QZO, "qzo-shift": QZOShift}


def known_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A method's fields as a run kept them, as this version would: "qzo" without units is what is now "qzo-shift"."""
    fields = dict(record)
    if fields.get("name") == "qzo" and "units" not in fields:
        fields["name"] = "qzo-shift"
    return fields


def method_from(record: Mapping[str, Any]) -> MeZO:
    """A method from its fields, as a run keeps them (see `known_record`); without a name it is MeZO."""
    fields = known_record(record)
    name, units = fields.pop("name", "mezo"), fields.pop("units", None)
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is not known; there are {', '.join(sorted(METHODS))}")
    method = METHODS[name](**fields)
    if units != getattr(method, "units", None):
        raise ConfigError(f"method {name!r} with eps and lr in units of {units!r} is not known to this version")
    return method
