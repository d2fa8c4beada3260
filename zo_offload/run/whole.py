"""An engine that may be interrupted anywhere: which thread is inside it, and whether its state is consistent.

On the main thread a signal handler's exception (KeyboardInterrupt, or any exception of the user's own handlers) can
occur at any bytecode, also in clean-up code. So nothing here relies on reaching its last line:

    Door       one thread at a time, and no forked process; callbacks may enter again
    Whole      work on the parts first marks them as broken, and at its end marks them as intact. The next entry that
               finds them broken mends them first; it may be interrupted in that as well

`closing.py` closes an engine.

Mending restores this state: the steps that the log has (`stepper.py`), the blocks in their tier (`window.py`), a model
between passes (`lanes/hub.py`). A block in memory that was half written cannot be restored: then the engine is torn,
and every call raises TornError.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from ..devices.link import Link
from ..errors import ConfigError, DivergenceError, TornError
from ..journal.learning_watch import LearningWatch
from ..modules.modes import modes_kept
from ..stream.slots import Traffic
from ..stream.streamer import Streamer
from ..system.closing import Closing
from .passes import Passes
from .session import Session
from .stepper import Stepper

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class Door:
    """Admits one thread at a time. A second thread gets an error and does not wait; the one inside may enter again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner = 0  # the thread that entered last; the lock knows whether it is still inside
        self.pid: int | None = None
        """The process that started the engine."""

    @property
    def is_forked(self) -> bool:
        """Whether this process was forked from the one that runs the engine, whose threads it does not have."""
        return self.pid is not None and self.pid != os.getpid()

    def call(self, method: Callable[[], _Result]) -> _Result:
        """Call method() inside the door. Raises ConfigError if another thread is inside."""
        if self.is_forked:
            raise ConfigError(
                f"this engine runs in process {self.pid}, from which this one was forked: its threads, files and lock "
                "are in that process. Use it there, or make an engine (with another run_dir) here"
            )
        if threading.current_thread() is not threading.main_thread():
            if not self._lock.acquire(blocking=False):
                self._refuse()
            try:
                self._owner = threading.get_ident()
                return method()
            finally:
                self._lock.release()
        if self._owner not in (0, threading.get_ident()):
            if not self._lock.acquire(blocking=False):
                self._refuse()
            self._lock.release()
        with self._lock:  # `with` is atomic here: no signal handler runs between acquire and release
            self._owner = threading.get_ident()
            return method()

    def _refuse(self) -> None:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        raise ConfigError(
            f"thread {names.get(self._owner, self._owner)!r} is inside this engine, and it takes one thread at a time: "
            f"thread {threading.current_thread().name!r} has to wait until it has left (use a lock of your own)"
        )


_Method = TypeVar("_Method", bound=Callable[..., Any])


def entry(method: _Method) -> _Method:
    """Make a method of an engine or its run pass through the door, and restore torch's modes afterwards."""

    @functools.wraps(method)
    def through_the_door(self: Any, *args: Any, **options: Any) -> Any:
        return self.door.call(lambda: modes_kept(lambda: method(self, *args, **options)))

    return cast(_Method, through_the_door)


@dataclass(frozen=True)
class Parts:
    """The parts that take steps."""

    session: Session
    streamer: Streamer
    passes: Passes
    stepper: Stepper
    watch: LearningWatch
    link: Link | None = None
    """The measured link between GPU and host; None if nothing streams over a link."""

    def wait_share(self, traffic: Traffic, seconds: float) -> float:
        """Share of the time that compute waited for blocks; on a GPU, that the link needed for the moved bytes."""
        if self.link is None:
            return traffic.wait_s / seconds
        return min(1.0, self.link.seconds(traffic.fetch_bytes, traffic.flush_bytes) / seconds)


class Whole:
    """`with whole as parts:` must surround all work on the parts; see the module.

    names: the blocks' names; run_dir: named in errors.
    """

    def __init__(self, parts: Parts, names: list[str], run_dir: Path | None) -> None:
        self._parts, self._names, self._run_dir = parts, names, run_dir
        self._broken = False
        self.torn: TornError | None = None

    def __enter__(self) -> Parts:
        if self._parts.passes.is_inside():
            raise ConfigError(
                "the engine was called from within one of its own passes (a forward, or the objective), which has the "
                "weights. Call it from a callback of fit, or between steps"
            )
        if self._broken:
            self._mend()
        if self.torn is not None:
            raise self.torn
        self._broken = True
        return self._parts

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._broken = False

    def _mend(self) -> None:
        parts = self._parts
        parts.passes.mend()
        lost = parts.streamer.mend()  # from here on none of our threads is working
        if parts.session.snapshots is not None:
            parts.session.snapshots.mend()
        if lost:
            self.torn = self._tell(lost)
        try:
            parts.stepper.mend()
        except DivergenceError:  # for a step launched before: the caller must know of it; everything is mended
            self._broken = False
            raise

    def _tell(self, lost: list[int]) -> TornError:
        blocks = ", ".join(sorted({repr(self._names[block]) for block in lost})[:3])
        what = f"weights in memory ({blocks}) were being written at an interruption, and there is no other copy"
        if self._run_dir is None:
            return TornError(
                f"{what}. Without a run_dir nothing can rebuild them: close this engine and begin again from the base"
            )
        return TornError(
            f"{what} in memory. The run is whole: close this engine and reopen it, "
            f"Engine.resume({str(self._run_dir)!r})"
        )


def release_dropped(closing: Closing, door: Door, where: str) -> None:
    """Release the resources of an engine that was dropped without `close`."""
    if not len(closing) or door.is_forked:
        return
    warnings.warn(f"an engine ({where}) was dropped without close(): use `with Engine(...)`", ResourceWarning, 2)
    try:
        closing.close()
    except Exception as error:  # no caller could catch it
        _log.warning("an engine (%s) that was dropped without close(): %s", where, error)
