"""Counts how many stored values change when updates are folded, in a sample of the bytes before and after.

The sample has the first `VALUES` of each matrix with at least `SMALL` values, at the first folds and at some later
ones. It is counted on the device of the bytes, so that nothing waits for a device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan.layout import Place

VALUES = 1024
SMALL = 256
FIRST, EVERY = 16, 16  # folds that are looked at: the first ones, then one in so many


@dataclass(frozen=True)
class Look:
    """The bytes of a few values, in place and from before a fold; [values, bytes of one], or flat."""

    views: list[Tensor]
    before: list[Tensor]
    values: int


class FoldSample:
    """Counts over a run. scales: the scales are what folds change; stochastic: rounding keeps small updates on
    average."""

    def __init__(self, *, scales: bool, stochastic: bool) -> None:
        self.scales, self.stochastic = scales, stochastic
        self.looked = 0
        self.formats: set[str] = set()
        self._changed: list[Tensor] = []

    def share(self) -> float:
        """The share of sampled values that changed. Waits for their device."""
        total = float(sum(int(count) for count in self._changed))
        self._changed = [torch.tensor(int(total), device="cpu")]
        return total / self.looked if self.looked else 0.0

    def before(self, memory: Tensor, place: Place, numel: int, fold: int) -> Look | None:
        """Called before the `fold`th fold of a piece in a block's memory; None if it is not sampled."""
        if numel < SMALL or (fold > FIRST and fold % EVERY):
            return None
        fmt = place.fmt
        if self.scales:
            start, nbytes = fmt.scales_span(numel)
            values = min(VALUES, nbytes // 4)
            views = [memory[place.offset + start : place.offset + start + 4 * values].view(-1, 4)]
        else:
            values = min(VALUES, numel)
            views = [memory[place.offset : place.offset + values * fmt.value_bits // 8].view(values, -1)]
            if place.residual_nbytes:
                at = place.residual_offset
                views.append(memory[at : at + values * fmt.residual_bytes].view(values, -1))
        self.formats.add(f"{fmt.name} scales" if self.scales else fmt.name)
        return Look(views, [view.clone() for view in views], values)

    def after(self, look: Look) -> None:
        """Called after the fold."""
        changed = torch.zeros(look.values, dtype=torch.bool, device=look.views[0].device)
        for view, before in zip(look.views, look.before, strict=True):
            changed |= (view != before).any(1)
        self.looked += look.values
        self._changed.append(changed.sum())
        if len(self._changed) >= 1000:
            self._changed = [torch.stack(self._changed).sum()]
