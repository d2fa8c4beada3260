"""A progress bar for runs that ask for one: loss, tokens/s, ETA, and what binds."""

from __future__ import annotations

from types import TracebackType

from ..system.units import show_bytes


class Progress:
    """tqdm on standard error when `show`, nothing otherwise."""

    def __init__(self, show: bool, first: int, steps: int) -> None:
        self._bar = None
        self._smooth: float | None = None
        if show:
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True)

    def step(
        self, loss: float, tokens_per_s: float, wait_share: float, fetched: float, flushed: float, warning: str = ""
    ) -> None:
        """One step done. loss is shown smoothed; wait_share is compute's time spent waiting for blocks; fetched and
        flushed are bytes a step, on average so far; a warning comes first."""
        if self._bar is None:
            return
        if loss == loss:
            self._smooth = loss if self._smooth is None else 0.9 * self._smooth + 0.1 * loss
        binds = "fetch" if wait_share > 0.5 else "compute"
        shown = "skipped" if self._smooth is None else f"{self._smooth:.4f}"
        moved = f", {show_bytes(fetched)} in, {show_bytes(flushed)} out a step" if fetched or flushed else ""
        first = f"WARNING {warning}; " if warning else ""
        self._bar.set_postfix_str(f"{first}loss {shown}, {tokens_per_s:.0f} tok/s, {binds} binds{moved}", refresh=False)
        self._bar.update(1)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
