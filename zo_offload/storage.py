"""How a run stores its weights: the format of each parameter, and how often updates are folded into the bytes."""

from __future__ import annotations

from .layout import Layout
from .plan import Plan

FOLD_EVERY = {"gaussian": 4, "rademacher": 8}
"""Default `fold_every` where blocks are flushed.

With c seconds of noise an element, f seconds to flush one, folding every K steps costs c (K + 1) / 2 + f / K an
element and step, least at K = sqrt(2 f / c). bf16 to a disk at 1 GB/s (f = 2 ns) beside one CPU core of Gaussian noise
(c = 1 ns): K = 2; two cores, 2.8; a PCIe 5 link at 50 GB/s beside an H200 (0.04 ns, 1.3 ps): K = 8. 4 is within 25 %
of the least cost of both, and keeps four times more of an update that 16 bits would round away. Rademacher noise
costs a fifth (`benchmarks.kernels`): K is sqrt(5) larger."""


def is_lossless(plan: Plan, layout: Layout) -> bool:
    """Whether folding never rounds: every trained parameter is stored in float32, so any `fold_every` is the same."""
    return all(layout.places[name].fmt.name == "fp32" for name, spec in plan.params.items() if spec.trainable)


def choose_fold_every(given: int | None, plan: Plan, layout: Layout, offload: str, distribution: str) -> int:
    """`fold_every`, with the default decided.

    In float32 the numbers do not depend on it, so weights that are never flushed (offload "none") fold every step,
    which saves making the noise of pending updates again. Elsewhere it is part of the run's identity and must not
    depend on where the blocks live.
    """
    if given is not None:
        return given
    return 1 if offload == "none" and is_lossless(plan, layout) else FOLD_EVERY[distribution]
