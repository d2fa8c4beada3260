"""Progress display of a run: a bar on a terminal, lines with time and ETA elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..data.batches import Batches
from ..data.survey import survey
from ..system.units import show_bytes

SECONDS = 30.0  # between two lines, if log_every is not given


class Progress:
    """On standard error if `show`, otherwise nothing. every: steps between two lines; None: a bar on a terminal, else
    lines for the first and the last step and one every SECONDS."""

    def __init__(self, show: bool, first: int, steps: int, every: int | None = None) -> None:
        self._show = show and sys.stderr is not None  # a process may have no stderr
        self._first, self._steps, self._every = first, steps, every
        self._bar: Any = None
        self._smooth: float | None = None
        self._begin = self._told = time.monotonic()

    def found(self, batches: Batches) -> None:
        """Show the data's summary."""
        if self._show:
            self._say(survey(batches))

    def will_write(self, nbytes: int, directory: Path) -> None:
        """Show the size of block files that are about to be made."""
        if self._show:
            free = shutil.disk_usage(next(p for p in (directory, *directory.parents) if p.exists())).free
            self._say(f"blocks on disk: {show_bytes(nbytes)} in {directory} ({show_bytes(free)} are free there)")

    def begun(self, first: int) -> Progress:
        """Training begins, after `first` steps."""
        self._first, self._begin = first, time.monotonic()
        self._told = self._begin
        if self._show and self._every is None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._steps, initial=first, unit="step", dynamic_ncols=True)
        return self

    def step(
        self, loss: float, lr: float, tokens_per_s: float, wait_share: float, fetched: float, flushed: float,
        done: int, warning: str = "",
    ) -> None:  # fmt: skip
        """`done` steps are done in total. loss is shown smoothed; wait_share is the share of time that compute waits
        for blocks; fetched and flushed are mean bytes per step so far; a warning is shown first."""
        if not self._show:
            return
        if loss == loss:
            self._smooth = loss if self._smooth is None else 0.9 * self._smooth + 0.1 * loss
        binds = "fetch" if wait_share > 0.5 else "compute"
        shown = "skipped" if self._smooth is None else f"{self._smooth:.4f}"
        moved = f", {show_bytes(fetched)} in, {show_bytes(flushed)} out a step" if fetched or flushed else ""
        first = f"WARNING {warning}; " if warning else ""
        text = f"{first}loss {shown}, {tokens_per_s:.0f} tok/s, {binds} binds{moved}"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(1)
        elif self._is_due(done):
            self._told = time.monotonic()
            seconds = (self._told - self._begin) / max(1, done - self._first)
            left = _clock(seconds * (self._steps - done))
            self._say(f"step {done}/{self._steps}, {text}, lr {lr:.3g}, {seconds:.3g} s a step, {left} left")

    def evaluated(self, values: Mapping[str, float], best: bool) -> None:
        """Show an evaluation; best: whether it is the best so far."""
        if self._show:
            named = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if name != "step")
            self._say(f"step {int(values['step'])}/{self._steps}, evaluation: {named}{' (best so far)' * best}")

    def _is_due(self, done: int) -> bool:
        if self._every is not None:
            return done % self._every == 0 or done == self._steps
        ends = done in (self._first + 1, self._steps)
        return ends or time.monotonic() - self._told >= SECONDS

    def _say(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds; also days if there are any."""
    days, rest = divmod(int(seconds), 86400)
    text = f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days} days {text}" if days else text
