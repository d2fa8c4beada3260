"""SIGINT and SIGTERM during a run: the first asks to stop after the step, the second before the next block.

Both only set a flag, which the run checks where it can end. A third one raises at once, for user code that does not
return.
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

    A KeyboardInterrupt, so that no `except Exception` mistakes a stopped run for a finished one.
    """

    def __init__(self, signum: int, step: int, where: str) -> None:
        self.signum, self.step = signum, step
        super().__init__(f"stopped by {signal.Signals(signum).name} after {step} steps; {where}")


class StopRequest:
    """The signals seen by the handlers. `signum`: the first signal, None before; `at_once`: there was a second one."""

    def __init__(self, echo_s: float = 0.0) -> None:
        self._echo_s, self._first = echo_s, 0.0
        self.signum: int | None = None
        self.second: int | None = None
        self.ended = False
        """Whether the handlers should have been removed."""

    @property
    def at_once(self) -> bool:
        return self.second is not None

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if self.ended:  # interrupted before the previous handler was restored
            signal.signal(signum, _DEFAULTS[signal.Signals(signum)])
            signal.raise_signal(signum)
        elif self.signum is None:
            self.signum, self._first = signum, time.monotonic()
        elif time.monotonic() - self._first < self._echo_s:
            pass  # the first one again, repeated by a launcher
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
    """Code inside a step asks it whether the step may go on; `stop`: the present stop request, None for none."""

    def __init__(self) -> None:
        self.stop: StopRequest | None = None

    def look(self) -> None:
        """Raise KeyboardInterrupt if the step must end at once."""
        if self.stop is not None:
            self.stop.look()


@contextlib.contextmanager
def stop_signals(echo_s: float = 0.0) -> Iterator[StopRequest]:
    """Install the handlers inside this context, and restore the previous ones afterwards.

    echo_s: a second signal within so many seconds counts as the first: a launcher repeats signals that the terminal has
    already sent to all processes.

    Works only on the main thread (Python allows no others), and replaces only default handlers: a handler that somebody
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
