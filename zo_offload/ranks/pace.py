"""How much of a step a pool's member takes, and how long it waits for what others took: both learnt from what was seen.

A pass costs what it costs to stream the blocks, and more for each lane in it, in a proportion that nobody knows. So a
member's share is not computed from lanes a second: it grows while its passes are shorter than the others', and shrinks
while they are longer. Members that stream equally fast keep equal shares, whatever a lane costs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median

LEAST_PATIENCE_S, FIRST_PATIENCE_S, TIMES_SEEN = 2.0, 30.0, 3.0
"""Lanes are late after so many times what nine in ten passes took; at least, and where nothing was seen."""
SEEN, ENOUGH = 64, 4
"""Passes that patience is learnt from, and how many say something."""
_SHARE = 8.0  # of two members' shares, the larger is at most so many times the smaller's square


def lanes_of(count: int, weights: Mapping[str, float], me: str) -> int:
    """How many of `count` lanes a member leases at a time; all where it is alone."""
    mine = weights.get(me, 1.0)
    total = sum(weights.values()) + (0.0 if me in weights else mine)
    return max(1, math.ceil(count * mine / total - 1e-6))


def weighted(weights: Mapping[str, float], seconds: Mapping[str, float]) -> dict[str, float]:
    """Weights for the next step. seconds: that the pass of each took in this one; who is not there keeps its own."""
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
    """Seconds after which a lane is late. fixed: what was asked for; None: learnt."""

    def __init__(self, fixed: float | None = None) -> None:
        self._fixed = fixed
        self._seen: deque[float] = deque(maxlen=SEEN)

    def see(self, seconds: float) -> None:
        """That a pass took."""
        self._seen.append(seconds)

    @property
    def seconds(self) -> float:
        if self._fixed is not None:
            return self._fixed
        if len(self._seen) < ENOUGH:
            return FIRST_PATIENCE_S
        return max(LEAST_PATIENCE_S, TIMES_SEEN * sorted(self._seen)[math.ceil(0.9 * len(self._seen)) - 1])
