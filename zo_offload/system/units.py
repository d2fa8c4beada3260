"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import math
import re

from ..errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(value: int | float | str, what: str = "size") -> int:
    """Bytes from 6e9, "6GB" (1e9) or "6GiB" (2**30)."""
    match = re.fullmatch(r"\s*(-?[0-9.]+(?:e\+?[0-9]+)?)\s*([A-Za-z]*)\s*", str(value))
    try:
        nbytes = float(match[1]) * _UNITS[match[2].upper()] if match else math.nan
    except (KeyError, ValueError):
        nbytes = math.nan
    if nbytes <= 0:
        raise ConfigError(f"{what}={value!r}: expected more than zero bytes")
    if not nbytes < 1 << 63:
        raise ConfigError(f"{what}={value!r}: expected a number of bytes such as 6000000000, '6GB' or '5.5GiB'")
    return int(nbytes)


def show_bytes(nbytes: float) -> str:
    """A size for people: "403.1 MB". Units of 1000, as disks and links are sold."""
    for unit in ("B", "kB", "MB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
