"""Methods: noises, lanes, and the way from losses to updates. One file each; MeZO first.

Every file in this folder but base, outcome, presets and missing is a method: METHODS, the command line, plans and
`from zo_offload import ...` find it. This module also exports what a method in your own file needs besides torch:
`Method`, `Perturbation`, `step_seed`, and the arithmetic of `scalars.py`. The imports by name are for type
checkers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ..errors import ConfigError
from ..kernels.records import Mask, Perturbation, Smallest, Terms, Trains
from ..kernels.scalars import divide, sqrt, total
from ..numerics.noise import step_seed
from . import missing
from .base import METHODS, Method, lr_schedule
from .conmezo import ConMeZO
from .conservative import Conservative
from .fzoo import FZOO
from .fzoo_loo import FZOOLeaveOneOut
from .fzoo_reuse import FZOOReuse
from .lezo import LeZO
from .lozo import LOZO
from .meazo import MEAZO
from .mezo import MeZO
from .momentum import Momentum
from .nspsa import NSPSA
from .outcome import Step, Told
from .presets import PRESETS, check_tunes
from .qzo import QZO, QZOShift
from .random_mask import RandomMask
from .rank import RankSGD
from .seed_pool import SeedPool
from .senszoq import SensZOQ
from .sign import SignSGD
from .sparse_mezo import SparseMeZO
from .spsa15 import SPSA15
from .tail_alone import TailAlone

__all__ = [
    "DEFAULT", "FZOO", "LOZO", "MEAZO", "METHODS", "NSPSA", "PRESETS", "QZO", "SPSA15", "ConMeZO", "Conservative",
    "FZOOLeaveOneOut", "FZOOReuse", "LeZO", "Mask", "MeZO", "Method", "Momentum", "Perturbation", "QZOShift",
    "RandomMask", "RankSGD", "SeedPool", "SensZOQ", "SignSGD", "Smallest", "SparseMeZO", "Step", "TailAlone",
    "Terms", "Told", "check_tunes", "divide", "known_record", "lr_schedule", "method_from", "method_training", "sqrt",
    "step_seed", "total",
]  # fmt: skip

DEFAULT: type[MeZO] = MeZO
"""The method of an engine that was given none, and of a record without a name."""

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def known_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A method's fields from an earlier version's record, in this version's form: "qzo" without units is now
    "qzo-shift", and a record without a noise layout has the first one."""
    fields = {"noise_layout": 1, **record}
    if fields.get("name") == "qzo" and "units" not in fields:
        fields["name"] = "qzo-shift"
    return fields


def method_training(target: Trains) -> Method:
    """A method with default fields that trains `target`: values or scales of the stored weights."""
    found: Callable[[], Method] = next(kind for kind in METHODS.values() if kind.own() and kind.target == target)
    return found()


def method_from(record: Mapping[str, Any], kind: type[Method] | None = None) -> Method:
    """A method from a run's record of its fields (see `known_record`); without a name it is DEFAULT.

    kind: a user's own class, which the record cannot locate.
    """
    fields = known_record(record)
    name, units = fields.pop("name", DEFAULT.name), fields.pop("units", None)
    fields.pop("class", None)
    if kind is None and not (name in METHODS and METHODS[name].own()):
        missing.check(str(name))
        own = sorted(known for known, method in METHODS.items() if method.own())
        raise ConfigError(f"method {name!r} is not known; there are {', '.join(own)}")
    method = (kind or METHODS[name])(**fields)
    if units != getattr(method, "units", None):
        raise ConfigError(f"method {name!r} with eps and lr in units of {units!r} is not known to this version")
    return method
