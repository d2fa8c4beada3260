"""Derives from measured passes how many lanes a pool's member leases, and how long it waits for others' lanes.

A pass costs the streaming of the blocks, and an unknown further cost for each lane. So a member's share is not computed
from lanes per second: it grows while its passes are shorter than the others', and shrinks while they are longer.
Members that stream equally fast keep equal shares, whatever a lane costs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median

LEAST_PATIENCE_S, FIRST_PATIENCE_S, TIMES_SEEN = 2.0, 30.0, 3.0
"""Seconds until lanes are late: at least; before ENOUGH passes; as a multiple of the time of nine in ten passes."""
SEEN, ENOUGH = 64, 4
"""Numbers of passes that patience is derived from: at most, at least."""
_SHARE = 8.0  # weights stay between 1 / _SHARE and _SHARE


def lanes_of(count: int, weights: Mapping[str, float], me: str) -> int:
    """Number of lanes, among `count`, that a member leases at a time; all if it is alone."""
    mine = weights.get(me, 1.0)
    total = sum(weights.values()) + (0.0 if me in weights else mine)
    return max(1, math.ceil(count * mine / total - 1e-6))


def weighted(weights: Mapping[str, float], seconds: Mapping[str, float]) -> dict[str, float]:
    """Weights for the next step. seconds: each member's time for its pass in this step; absent members keep theirs."""
    if len(seconds) < 2:
        return dict(weights)
    typical = median(seconds.values())
    found = dict(weights)
    for member, took in seconds.items():
        if member in found and took > 0:
            changed = found[member] * math.sqrt(typical / took)
            found[member] = min(_SHARE, max(1 / _SHARE, changed))
    return found


class Patience:
    """Seconds after which a lane is late. fixed: a given value; None: derived from measured passes."""

    def __init__(self, fixed: float | None = None) -> None:
        self._fixed = fixed
        self._seen: deque[float] = deque(maxlen=SEEN)

    def see(self, seconds: float) -> None:
        """Add the time of a pass."""
        self._seen.append(seconds)

    @property
    def seconds(self) -> float:
        if self._fixed is not None:
            return self._fixed
        if len(self._seen) < ENOUGH:
            return FIRST_PATIENCE_S
        return max(LEAST_PATIENCE_S, TIMES_SEEN * sorted(self._seen)[math.ceil(0.9 * len(self._seen)) - 1])
