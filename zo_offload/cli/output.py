"""Output to standard output and error that may be closed, or whose encoding may lack characters."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def printable() -> Iterator[None]:
    """While open, printing raises in neither case: characters that an encoding lacks become backslash escapes."""
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
