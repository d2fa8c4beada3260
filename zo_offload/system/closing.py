"""Release everything, even where a part of it fails or something breaks in; and again, if it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Closing:
    """What has to be released, newest first. Each is crossed out once it is done, so `close` can be called again."""

    def __init__(self) -> None:
        self._left: list[Callable[[], Any]] = []

    def __len__(self) -> int:
        return len(self._left)

    def add(self, release: Callable[[], Any]) -> None:
        """release: may be called again after it was broken off. Newest first."""
        self._left.append(release)

    def close(self, down_to: int = 0, last: Callable[[], Any] = lambda: None) -> None:
        """Release all but the oldest `down_to`, then `last`. Raises the first error once all is done."""
        errors: list[Exception] = []
        while len(self._left) > down_to:
            for _ in range(2):  # what failed may have been a signal handler's exception: the second time it is done
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
