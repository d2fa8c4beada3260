"""Suggests the nearest known name for a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], shown: str = "{}") -> str:
    """The text " Did you mean x?" with the nearest known name, formatted by `shown`; "" if none is near."""
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f" Did you mean {shown.format(near[0])}?" if near else ""
