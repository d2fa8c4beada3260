"""The name that somebody may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], shown: str = "{}") -> str:
    """ " Did you mean x?", with the nearest of the names that are known, as `shown` writes it; "" if none is near."""
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f" Did you mean {shown.format(near[0])}?" if near else ""
