"""Methods: which noises, which lanes, and how losses become updates. One file each; MeZO first."""

from __future__ import annotations

from .mezo import PRESETS, MeZO, Step, lr_schedule

__all__ = ["PRESETS", "MeZO", "Step", "lr_schedule"]
