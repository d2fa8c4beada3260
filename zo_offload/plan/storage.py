"""Decides how a run stores its weights: the format of each parameter, and how often updates are folded.

`storage=` names the format of the weight matrices. Other parameters follow these rules:
    norms and biases (fewer than two dimensions)       float32 where `storage` is quantized or split, else as the others
    parameters that `keep` selects                     the base's own format; float32 if they train
    trained, with storage= a format never rewritten    float32 (LoRA adapters, norms, ... on an int4 base)
    an adapter, a small trained part of a frozen model float32, in a block of its own that stays on the device: nothing
                                                       is then flushed during the run
"Small" is at most a 16th of the model's parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import ConfigError
from ..formats import Format, format_of, get_format
from ..kernels.records import Target, Trains
from ..modules.tree import select_names
from .blocks import ParamSpec
from .layout import Layout
from .plan import Plan, keep_resident

KEPT = "kept"
SMALL = 16
"""A trained part of at most 1 / SMALL of the model is kept on the device."""


KeptOf = Callable[[str], Sequence[Format]]
"""A parameter's name -> the formats that hold its own codes, the smallest first."""


@dataclass(frozen=True)
class Stored:
    """A plan with every parameter's format. The plan may train fewer parameters, and have a resident block."""

    plan: Plan
    formats: Mapping[str, Format]
    target: Target = "values"
    """What a fused pass trains: values or scales."""

    def format_of(self, spec: ParamSpec) -> Format:
        return self.formats[spec.name]


def decide_formats(
    plan: Plan,
    storage: str | None,
    dtype_of: Callable[[str], torch.dtype],
    keep: Any = None,
    target: Trains = "values",
    *,
    resident: bool = False,
    kept_of: KeptOf = lambda name: (),
) -> Stored:
    """Formats by the module's rules. storage None: each parameter in the base's own dtype. "kept": quantized parameters
    in the first of the formats that `kept_of` names, which hold their codes, in which no piece begins inside of a
    group; the others in the base's own dtype. resident: trained parameters are kept on the device, however large their
    share is.

    target: "scales" trains only the group scales of quantized parameters, about the groups' centres; "shifts" trains
    them as the format keeps groups. Raises ConfigError if the format cannot train the target.
    """
    if storage == KEPT:
        return _keep_codes(plan, dtype_of, target, kept_of, resident)
    wanted = None if storage is None else get_format(storage)
    kept = select_names(plan.tree, keep, "keep") if keep is not None else set()
    plan = _scales_only(plan, wanted, kept) if target != "values" else plan
    if target == "values" and wanted is not None and not wanted.trains and not resident:
        _check_trainable(plan, wanted)
    small = _small_part(plan, resident) if target == "values" else frozenset()
    formats = {
        name: _format(spec, wanted, dtype_of(name), name in kept, name in small, target)
        for name, spec in plan.params.items()
    }
    plan = keep_resident(plan, small) if small else plan
    return Stored(plan, formats, "values" if target == "values" else "scales")


def _keep_codes(
    plan: Plan,
    dtype_of: Callable[[str], torch.dtype],
    target: Trains,
    kept_of: KeptOf,
    resident: bool,
) -> Stored:
    if target != "values":
        raise ConfigError("storage='kept' trains no scales; name a format: storage='int8', 'int4' or 'nf4'")
    held = {name: fmt for name in plan.params if (fmt := _holds(plan, name, kept_of(name))) is not None}
    if not held:
        raise ConfigError(
            "storage='kept': the base has no quantized weights whose codes a storage format holds "
            "(docs/quantized.md lists them); leave storage out, or name a format"
        )
    for name, fmt in held.items():
        if plan.params[name].trainable and not resident:
            _check_trainable(plan, fmt)
    small = _small_part(plan, resident)
    fp32 = get_format("fp32")
    formats = {
        name: fp32
        if name in small or (spec.trainable and name in held)
        else held.get(name) or format_of(dtype_of(name))
        for name, spec in plan.params.items()
    }
    return Stored(keep_resident(plan, small) if small else plan, formats)


def _holds(plan: Plan, name: str, formats: Sequence[Format]) -> Format | None:
    """The first of the formats whose groups are whole in each of the parameter's pieces."""
    starts = [piece.start for piece in plan.pieces_of(name)]
    return next((fmt for fmt in formats if all(start % fmt.group == 0 for start in starts)), None)


def _format(
    spec: ParamSpec, wanted: Format | None, base: torch.dtype, kept: bool, small: bool, target: Trains
) -> Format:
    fp32 = get_format("fp32")
    if small:
        return fp32
    if wanted is None:
        return format_of(base)
    if kept:
        return fp32 if spec.trainable else format_of(base)
    if is_plain(wanted):
        return wanted
    if len(spec.shape) < 2 or (spec.trainable and not wanted.trains and target == "values"):
        return fp32
    return wanted.about_centre if spec.trainable and target == "scales" else wanted


def is_plain(fmt: Format) -> bool:
    """Whether values are stored one after another as ordinary floats: fp32, bf16, fp16."""
    return not fmt.group and not fmt.residual_bytes


def _scales_only(plan: Plan, wanted: Format | None, kept: set[str]) -> Plan:
    """The plan in which only parameters with scales remain trainable."""
    if wanted is None or not wanted.trains_scales:
        given = "the base's own dtype" if wanted is None else f"storage={wanted.name!r}"
        raise ConfigError(
            f"a method that trains scales needs a format with float32 group scales, but {given} has none: "
            "choose storage='int4', 'nf4' or 'int8'"
        )
    params = {
        name: replace(spec, trainable=spec.trainable and len(spec.shape) >= 2 and name not in kept)
        for name, spec in plan.params.items()
    }
    if not any(spec.trainable for spec in params.values()):
        raise ConfigError(
            f"none of the parameters that trainable selects is stored as {wanted.name}, so there are no scales to train"
        )
    return replace(plan, params=params)


def _check_trainable(plan: Plan, wanted: Format) -> None:
    if plan.trainable_numel * 4 > plan.numel:
        raise ConfigError(
            f"storage={wanted.name!r} holds values that are never rewritten, but {plan.trainable_numel:,} of "
            f"{plan.numel:,} parameters are to train. Train the scales (method=QZO()), adapters "
            "(trainable='requires_grad' on a PEFT model) or norms and biases (trainable=[...]), or choose "
            "storage='int8+8', which trains everything at 1 byte per parameter and step"
        )


def _small_part(plan: Plan, resident: bool) -> frozenset[str]:
    """The trained parameters, if they are a small part of a mostly frozen model, or if `resident`; else none."""
    trained = frozenset(name for name, spec in plan.params.items() if spec.trainable)
    return trained if trained and (resident or plan.trainable_numel * SMALL <= plan.numel) else frozenset()


def is_lossless(plan: Plan, layout: Layout) -> bool:
    """Whether folding never rounds, so that `fold_every` changes nothing: all trained parameters are in float32."""
    trained = (layout.formats[name].name for name, spec in plan.params.items() if spec.trainable)
    return layout.target == "scales" or all(name == "fp32" for name in trained)


def choose_fold_every(
    given: int | str | None, plan: Plan, layout: Layout, in_place: bool, usual: int, noises: int = 1
) -> int:
    """`fold_every`, with the default resolved. "auto", too, is the default until it is measured (`run/folding.py`).

    In float32 the numbers do not depend on it, so weights that are never flushed (in_place: blocks are used in place;
    or all trained parameters are resident) fold every step, which avoids making the noise of pending updates again.
    Otherwise it is part of the run's identity and must not depend on the tier. usual: the noise's `fold_every`; noises:
    number of noises per step; each is a pending update of its own.

    With c seconds of noise per element, and f seconds to flush one, folding every K steps costs c (K + 1) / 2 + f / K
    per element and step, least at K = sqrt(2 f / c). bf16 to a disk at 1 GB/s (f = 2 ns) and one CPU core of Gaussian
    noise (c = 1 ns): K = 2; two cores, 2.8; a PCIe 5 link at 50 GB/s and an H200 (0.04 ns, 1.3 ps): K = 8. 4 is within
    25 % of the least cost of both, and keeps four times more of an update that 16 bits would round away. Rademacher
    noise costs a fifth (`benchmarks.kernels`), directions of low rank about as much: K is sqrt(5) larger.
    """
    if isinstance(given, int):
        return given
    flushed = not in_place and not layout.written <= plan.resident
    every = max(1, round(usual / math.sqrt(noises)))  # the c above is for all noises of a step together
    return every if flushed or not is_lossless(plan, layout) else 1
