"""Releases everything, even if a part fails or is interrupted; can be repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Closing:
    """Resources to release, newest first. Each is removed once it is released, so `close` can be called again."""

    def __init__(self) -> None:
        self._left: list[Callable[[], Any]] = []

    def __len__(self) -> int:
        return len(self._left)

    def add(self, release: Callable[[], Any]) -> None:
        """Add a release function. It may be called again after an interruption."""
        self._left.append(release)

    def close(self, down_to: int = 0, last: Callable[[], Any] = lambda: None) -> None:
        """Release all but the oldest `down_to`, then `last`. Raises the first error once all is done."""
        errors: list[Exception] = []
        while len(self._left) > down_to:
            for _ in range(2):  # the failure may have been a signal handler's exception: the second try succeeds
                try:
                    self._left[-1]()
                    break
                except Exception as error:
                    errors.append(error)
            self._left.pop()
        last()
        for later in errors[1:]:
            errors[0].add_note(f"zo_offload: and then, {type(later).__name__}: {later}")
        if errors:
            raise errors[0]
