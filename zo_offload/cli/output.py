"""Standard output and error as they may be: closed, or of an encoding that has not every character."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def printable() -> Iterator[None]:
    """While open, printing raises for neither: what an encoding lacks is written as backslash and number."""
    streams = sys.stdout, sys.stderr
    changed: list[tuple[io.TextIOWrapper, str | None]] = []
    with open(os.devnull, "w") as nowhere:
        sys.stdout, sys.stderr = (nowhere if stream is None else stream for stream in streams)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
                changed.append((stream, stream.errors))
                stream.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams
            for stream, errors in changed:
                if not stream.closed:
                    stream.reconfigure(errors=errors)
