"""Passes control between the hub and its lanes, one greenlet at a time, with each lane's modes.

The hub begins and ends a run and chooses the lane that continues; a lane before an owner yields until the hub has
served it. The hooks on the model (`attachment.py`) find here the lane in which they were called.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any

import greenlet
import torch

from ..modules.modes import ModeState, current_modes, restore_modes
from .serving import LaneRun
from .watched import WatchedRun


class Control:
    """Control between a hub and its lanes. Between runs there is neither a lane nor a watch."""

    def __init__(self) -> None:
        self.lane: LaneRun | None = None
        """The running lane."""
        self.watch: WatchedRun | None = None
        """The watch of the current run."""
        self.rewritten: set[str] = set()
        """Owners in which a lane of the current, unwatched run changed in place a weight that other lanes share."""
        self._home: greenlet.greenlet | None = None  # the hub's own greenlet, while a run is under way
        self._thread = 0  # in which lanes run
        self._modes: ModeState  # torch's modes as the run found them
        self._aborting = False  # lanes are being ended

    @property
    def is_running(self) -> bool:
        """Whether a run is under way, or was interrupted and is not cleaned up yet."""
        return self._home is not None

    # ---- the hub's side ----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin a run, in the caller's greenlet, thread and modes."""
        self._thread, self._modes, self._aborting = threading.get_ident(), current_modes(), False
        self.rewritten = set()
        self._home = greenlet.getcurrent()

    def launch(self, lane: LaneRun, work: Callable[[], Any]) -> None:
        """Make a lane's greenlet: it runs `work` from its first `switch_to` on, watched if the run is."""
        watch = self.watch

        def body() -> None:
            try:
                if watch is None:
                    lane.result = work()
                else:
                    with watch.mode:
                        lane.result = work()
            except greenlet.GreenletExit:
                pass  # the hub gives this run up
            except BaseException as error:
                lane.error = _first_of(error)

        lane.glet = greenlet.greenlet(body, parent=self._home)
        lane.glet.gr_context = contextvars.copy_context()  # else it would start without the caller's

    def switch_to(self, lane: LaneRun) -> None:
        """Run a lane until it waits or ends."""
        watch = self.watch
        if watch is not None:
            watch.mode.recorder = lane.recorder
        self.lane = lane
        lane.glet.switch()  # type: ignore[union-attr]
        self.lane = None
        if watch is not None:
            watch.mode.recorder = None

    def end_lanes(self, lanes: list[LaneRun]) -> None:
        """End lanes that still run, unwatched; torch's modes are then those before the run."""
        self._aborting = True
        if self.watch is not None:
            self.watch.mode.recorder = None
            self.watch.close()
            self.watch = None
        for lane in lanes:
            if lane.glet is not None and lane.glet and not lane.glet.dead:
                self.lane = lane
                lane.glet.throw(greenlet.GreenletExit)
            lane.glet = None
        self.lane = None
        restore_modes(self._modes)

    def end(self) -> None:
        """End the run after its clean-up."""
        self._home = None

    # ---- a lane's side -----------------------------------------------------------------------------------------------

    def lane_here(self) -> LaneRun | None:
        """The running lane; None if there is none, or if the caller is in another thread."""
        return self.lane if threading.get_ident() == self._thread else None

    def wait(self, lane: LaneRun) -> None:
        """Pass control to the hub until it has installed the weights that the lane waits for."""
        if self._aborting:
            raise greenlet.GreenletExit
        if torch.is_autocast_cache_enabled():  # its casts of weights are kept by parameter: another lane's weights
            torch.set_autocast_cache_enabled(False)
        lane.modes.park(self._modes)
        try:
            self._home.switch()  # type: ignore[union-attr]
        finally:
            lane.modes.resume(self._modes)


def _first_of(error: BaseException) -> BaseException:
    """The original error of a lane, if torch raised another one about a mode that was being entered or left."""
    if isinstance(error, RuntimeError) and "mode stack" in str(error) and error.__context__ is not None:
        return error.__context__
    return error
