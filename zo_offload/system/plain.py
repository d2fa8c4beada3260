"""Converts values of other libraries to plain Python and JSON values."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def plain_value(value: Any) -> Any:
    """A numpy or torch scalar as a Python scalar."""
    scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if scalar else value


def plain_option(value: Any) -> Any:
    """An option in the form that it has after reading a run's config.json: numbers, texts, lists, mappings by text.

    Values that JSON cannot hold (a tokenizer, a function) stay unchanged.
    """
    if isinstance(value, Mapping):
        return {str(plain_value(key)): plain_option(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_option(item) for item in value]
    if hasattr(value, "tolist") and getattr(value, "ndim", None):
        return plain_option(value.tolist())
    return str(value) if isinstance(value, Path) else plain_value(value)


def is_whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number of at least `least`; True and False are not."""
    try:
        return not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        return False


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path with its ~ replaced, as a shell would do. Raises ConfigError for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path}: there is no such user, and so no home directory") from None


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json's object_pairs_hook: ValueError for a repeated name; json would use the last one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def as_rate(lr: Any) -> float:
    """A step's learning rate from any value that holds one number. Raises ConfigError."""
    try:
        rate = float(lr)
    except (TypeError, ValueError, OverflowError):
        rate = math.nan
    if isinstance(lr, str) or not math.isfinite(rate):
        raise ConfigError(f"lr={str(lr)[:40]}: expected a finite number")
    return rate
