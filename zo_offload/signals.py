"""SIGINT and SIGTERM while a run is under way: the first asks to stop after the step, the second stops at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Stopped(KeyboardInterrupt):
    """A run was stopped by a signal, after a whole step; everything is on the disk and the run can be resumed.

    A KeyboardInterrupt, so that no `except Exception` takes a run that was stopped for one that is finished.
    """

    def __init__(self, signum: int, step: int, where: str) -> None:
        self.signum, self.step = signum, step
        super().__init__(f"stopped by {signal.Signals(signum).name} after {step} steps; {where}")


class StopRequest:
    """What the handlers have seen. `signum`: the first signal, None before; `at_once`: there was a second one."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.at_once = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signum
            return
        self.at_once = True
        raise KeyboardInterrupt(f"second {signal.Signals(signum).name}: stopped at once, in mid-step")


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Handlers for the time of the block, then those of before again.

    Only on the main thread (elsewhere Python allows none), and only in place of the defaults: a handler that somebody
    installed keeps its signal.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in _DEFAULTS}
    mine = [number for number, default in _DEFAULTS.items() if before[number] == default]
    for number in mine:
        signal.signal(number, request.handle)
    try:
        yield request
    finally:
        for number in mine:
            signal.signal(number, before[number])
