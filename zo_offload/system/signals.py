"""SIGINT and SIGTERM while a run is under way: the first asks to stop after the step, the second before the next block.

Both only leave word; the run looks for it where it can be ended. A third one raises wherever it comes, for code of the
user's that does not return.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

_DEFAULTS: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Stopped(KeyboardInterrupt):
    """A run was stopped by a signal, after a whole step; everything is on the disk and the run can be resumed.

    A KeyboardInterrupt, so that no `except Exception` takes a run that was stopped for one that is finished.
    """

    def __init__(self, signum: int, step: int, where: str) -> None:
        self.signum, self.step = signum, step
        super().__init__(f"stopped by {signal.Signals(signum).name} after {step} steps; {where}")


class StopRequest:
    """What the handlers have seen. `signum`: the first signal, None before; `at_once`: there was a second one."""

    def __init__(self, echo_s: float = 0.0) -> None:
        self._echo_s, self._first = echo_s, 0.0
        self.signum: int | None = None
        self.second: int | None = None
        self.ended = False
        """The handlers should be gone."""

    @property
    def at_once(self) -> bool:
        return self.second is not None

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if self.ended:  # something broke in before the handler of before was put back
            signal.signal(signum, _DEFAULTS[signal.Signals(signum)])
            signal.raise_signal(signum)
        elif self.signum is None:
            self.signum, self._first = signum, time.monotonic()
        elif time.monotonic() - self._first < self._echo_s:
            pass  # the first one again, from whoever passes signals on
        elif self.second is None:
            self.second = signum
        else:
            raise KeyboardInterrupt(
                f"a third signal after the second {signal.Signals(self.second).name}: stopped wherever it was"
            )

    def look(self) -> None:
        """Raise KeyboardInterrupt if there was a second signal."""
        if self.second is not None and not self.ended:
            raise KeyboardInterrupt(f"second {signal.Signals(self.second).name}: stopped at once, in mid-step")


class Lookout:
    """Where those who work on a step ask whether it may go on; `stop`: whom they ask now, None for nobody."""

    def __init__(self) -> None:
        self.stop: StopRequest | None = None

    def look(self) -> None:
        """Raise KeyboardInterrupt if the step is to end at once."""
        if self.stop is not None:
            self.stop.look()


@contextlib.contextmanager
def stop_signals(echo_s: float = 0.0) -> Iterator[StopRequest]:
    """Handlers for the time of the block, then those of before again.

    echo_s: a second signal that comes within so many seconds counts as the first: a launcher passes on what the
    terminal has sent to all processes already.

    Only on the main thread (elsewhere Python allows none), and only in place of the defaults: a handler that somebody
    installed keeps its signal.
    """
    request = StopRequest(echo_s)
    mine: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():
        mine = [number for number, default in _DEFAULTS.items() if signal.getsignal(number) == default]
    try:
        for number in mine:
            signal.signal(number, request.handle)
        yield request
    finally:
        request.ended = True
        for number in mine:
            signal.signal(number, _DEFAULTS[number])
