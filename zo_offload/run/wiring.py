"""Puts the parts that take steps together: each part gets its collaborators when it is made, and none later.

the session's tier -> [page-locked, or through pinned memory: device.wrap] -> Streamer -> Passes
the session's stepper (log, journal)                        folds seen by the streamer -> LearningWatch
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from ..data.losses import Objective
from ..journal.journal import Journal
from ..journal.learning_watch import LearningWatch
from ..stream.streamer import Streamer
from ..system.closing import Closing
from .memory import MemoryPlan
from .opening import Opened
from .passes import Passes
from .session import Session
from .whole import Parts


def wire(
    opened: Opened,
    session: Session,
    memory: MemoryPlan,
    objective: Objective,
    look: Callable[[], None],
    closing: Closing,
) -> Parts:
    """The parts of a run. look: raises if a step must end at once. closing: gets the resources to release."""
    prepared, device = opened.prepared, opened.device
    config, plan, layout, offload = prepared.config, prepared.plan, prepared.layout, prepared.offload
    device.trim()  # gives back what the base's tensors took while they were read
    # measure the link first: page-locking, which starts in the background, would disturb the measurement
    link = device.measure_link() if offload != "none" else None
    streamed = [block for block in dict.fromkeys(plan.visits) if block not in memory.window.pinned]
    tier = device.wrap(session.tier, offload, layout.block_bytes, streamed, config.host_memory)
    if tier is not session.tier:
        closing.add(tier.close)
    tail = session.stepper.tail
    streamer = Streamer(
        plan, layout, tier, device, session.stepper.log, window=memory.window, fold_every=prepared.fold_every,
        noise=prepared.method.noise, rounding=config.rounding, gains=session.gains, masks=session.masks,
        threads=config.threads, look=look, held=(lambda version: {}) if tail is None else tail.values,
    )  # fmt: skip
    closing.add(streamer.close)
    passes = Passes(
        opened.model, plan, streamer, device, objective=objective, order=memory.order, fixed=config.order != "auto",
        compute=config.compute, mode=config.mode, seed=config.seed, wide=session.wide, whole=config.whole,
        ranks=opened.ranks, on_measured=memory.check_reserve, tail=tail,
    )  # fmt: skip
    closing.add(passes.close)
    watch = LearningWatch(streamer.changes, _warns(session.journal))
    return Parts(session, streamer, passes, session.stepper, watch, link)


def _warns(journal: Journal | None) -> Callable[[str, str], None]:
    """A function that warns of a run that learns nothing, and notes in the journal what its records do not show."""

    def warn(kind: str, text: str) -> None:
        if journal is not None and kind == "vanishing":
            journal.note({"warning": text})
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    return warn
