"""Gains: the factors of a method's perturbation and update for each parameter.

    lanes    w +- eps * gain.lane * z
    update   w - lr * grad * gain.update * z

Both are 1 unless the method (`Method.gain`) or a parameter's stored form needs other values. They are decided once,
when a run begins, and kept in the journal's header: a resumed or replayed run takes them from there, and a run whose
header has no gains has none.

**Lanes of 16 bits** (`Gain(g, 1 / g)`). A weight of 1 in bfloat16 has neighbours 0.004 and 0.008 away, so eps = 1e-3
rounds to nothing there, while the update would still apply all of z: the loss would not see what is updated. Such a
parameter is perturbed with an eps of its own, g * eps, g the least power of two that its weights resolve
(`RESOLVED`), and its update is divided by g: (L+ - L-) / (2 g eps) is the slope along its z, as ever, so a learning
rate has the same meaning as in float32. The size of "its weights" is the root mean square of a sample of the base's.

**Scales that train** (`Gain(1 / c, 1 / c)`). c is the format's `code_rms`, so eps and lr are in units of weights: a
group's weights change by eps, root mean square, where its scale changes by eps / c, in any format.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..checkpoint.weights import Base
from ..errors import ConfigError, JournalError
from ..kernels.records import ONE, Gain, Gains
from ..methods import Method
from ..plan.layout import Layout
from ..plan.plan import Plan

_log = logging.getLogger(__name__)

SAMPLE = 4096  # elements of a parameter in the sample
RESOLVED = 1.0
"""Least eps of a parameter, in distances between neighbours of its typical weight."""
MOST = 256.0
"""The largest gain. An eps that is still too small with it is an error: a larger gain would be another method."""


def decide_gains(plan: Plan, layout: Layout, method: Method, base: Base) -> dict[str, Gain]:
    """The gains of a new run. Reads a few elements of each trained parameter if they can matter.

    Raises ConfigError if eps would not move most of the weights in the lanes' dtype.
    """
    found, lost = dict[str, Gain](), dict[str, float]()
    for name, spec in plan.params.items():
        if not spec.trainable:
            continue
        own = _own_gain(method, name, spec.shape)
        eps = method.eps * own.lane
        least = _least_eps(base, name, spec.dtype, eps)
        more = 1.0
        if spec.dtype in _NARROW and eps < least:
            more = 2.0 ** math.ceil(math.log2(least / eps))
        if more > MOST or (spec.dtype not in _NARROW and eps * 8 < least):
            lost[name] = least
        rms = layout.formats[name].code_rms if method.unit_scales else 1.0
        gain = Gain(_float32(own.lane * (more / rms)), _float32(own.update * (1 / (more * rms))))
        if gain != ONE:
            found[name] = gain
    _check_lost(plan, method, lost)
    _tell(plan, method, found)
    return found


def _own_gain(method: Method, name: str, shape: torch.Size) -> Gain:
    """The method's own gain of a trained parameter. Raises ConfigError if one of its two factors is invalid."""
    gain = method.gain(name, shape)
    if not (0 < gain.lane < math.inf and 0 < gain.update < math.inf):
        raise ConfigError(
            f"method {method.name!r} gives {name!r} a gain of {gain.lane:g} in the lanes and {gain.update:g} in the "
            "update: both must be positive, or both 0 for a parameter that is not to train"
        )
    return gain


_NARROW = (torch.bfloat16, torch.float16)


def _least_eps(base: Base, name: str, dtype: torch.dtype, eps: float) -> float:
    """The distance from a parameter's typical weight to the next one in the lanes' dtype."""
    if dtype not in _NARROW and eps >= 2.0**-20:
        return 0.0  # of float32 weights below 8
    typical = _typical(base, name)
    info = torch.finfo(dtype)
    exponent = math.floor(math.log2(typical)) if typical > 0 else -200
    return RESOLVED * max(info.eps * 2.0**exponent, info.smallest_normal * info.eps)


def _typical(base: Base, name: str) -> float:
    """Root mean square of a sample of a parameter: runs of neighbours in four places."""
    numel, dtype = base.shape_of(name).numel(), base.dtype_of(name)
    size = min(numel, SAMPLE // 4)
    look: Any = getattr(base, "peek", base.read_into)
    squares = count = 0.0
    for start in sorted({i * (numel - size) // 3 for i in range(4)}):
        values = torch.empty(size, dtype=dtype, device="cpu")
        look(name, start, values)
        squares, count = squares + float(values.double().square().sum()), count + size
    return math.sqrt(squares / count) if count and math.isfinite(squares) else 0.0


def _check_lost(plan: Plan, method: Method, lost: Mapping[str, float]) -> None:
    numel = sum(plan.params[name].numel for name in lost)
    if 2 * numel <= plan.trainable_numel:
        return
    name = max(lost, key=lambda name: plan.params[name].numel)
    dtype = str(plan.params[name].dtype).removeprefix("torch.")
    raise ConfigError(
        f"eps={method.eps:g} vanishes in the lanes' {dtype} for {numel:,} of {plan.trainable_numel:,} trained weights: "
        f"those of {name!r} are {lost[name]:.1e} apart, so +eps and -eps would give the same loss. Choose an eps of "
        f"{lost[name]:.0e} or more" + (", or compute='fp32'" if dtype != "float32" else "")
    )


def _tell(plan: Plan, method: Method, gains: Gains) -> None:
    """Log the parameters that are perturbed by more than eps."""
    wider = {name: gain for name, gain in gains.items() if gain.lane * gain.update != 1.0 or plan.params[name]}
    coarse = [name for name in wider if plan.params[name].dtype in _NARROW and gains[name].lane > gains[name].update]
    if coarse and not method.unit_scales:
        most = max(gains[name].lane for name in coarse)
        _log.info(
            "eps=%g is less than 16-bit lanes resolve at %d of %d trained parameters (%s, ...): these are perturbed by "
            "up to %g times as much, and their updates divided by it",
            method.eps, len(coarse), sum(spec.trainable for spec in plan.params.values()), coarse[0], most,
        )  # fmt: skip


def _float32(x: float) -> float:
    return float(np.float32(x))


# ---- in the journal's header -----------------------------------------------------------------------------------------


def record_of(gains: Gains) -> dict[str, list[float]]:
    """Plain JSON."""
    return {name: [gain.lane, gain.update] for name, gain in sorted(gains.items())}


def gains_of(header: Mapping[str, Any], plan: Plan, where: str) -> dict[str, Gain]:
    """The gains in a journal's header, if any. Raises JournalError if they are malformed."""
    record = header.get("gains", {})
    try:
        found = {name: Gain(_float32(lane), _float32(update)) for name, (lane, update) in record.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise JournalError(f"{where}: the header's gains are malformed: {str(record)[:100]}") from error
    odd = [
        n for n, g in found.items() if n not in plan.params or not 0 < g.lane < math.inf or not 0 < g.update < math.inf
    ]
    if odd:
        raise JournalError(f"{where}: the header has gains that cannot be of this model: {', '.join(odd[:5])}")
    return found
