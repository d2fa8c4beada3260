"""Options from the fields of dataclasses: the field's type, its default, and the docstring under it.

An option is defined once, as a field; the command line's flag, the config file's key and the Python keyword have its
name. Its help is the docstring's first sentence, and the sentence that begins with "Default", if there is one. A
field's metadata can override this: "help", "choices" (allowed values), and "option": False, which keeps it off the
command line.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import json
import math
import textwrap
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigError
from ..system.nearest import did_you_mean


@dataclass(frozen=True)
class Option:
    parsed: dict[str, Any]
    """Arguments of argparse's add_argument."""
    default: Any
    help: str


def options_of(
    kind: type, given: Mapping[str, dict[str, Any]] | None = None, *, lists: bool = True
) -> dict[str, Option]:
    """A dataclass's fields that can be options, by name. given: argparse's arguments for fields whose type does not
    imply them; lists: whether fields of several texts are options too."""
    hints, told = get_type_hints(kind), docstrings(kind)
    found = {}
    for part in dataclasses.fields(kind):
        if not part.init or not part.metadata.get("option", True) or part.name.startswith("_"):
            continue
        parsed = (given or {}).get(part.name) or _parsed(hints[part.name], lists)
        if parsed is not None:
            parsed = {**parsed, **({"choices": part.metadata["choices"]} if "choices" in part.metadata else {})}
            found[part.name] = Option(parsed, part.default, part.metadata.get("help", told.get(part.name, "")))
    return found


def add_options_of(group: Any, options: Mapping[str, Option]) -> None:
    """Add a flag for each option; None means "not given"."""
    for name, option in options.items():
        text = option.help.replace("%", "%%")
        if option.default not in (None, dataclasses.MISSING, True, False) and "Default" not in text:
            text += f" (default: {option.default})"
        group.add_argument(flag(name), dest=name, default=None, help=text, **option.parsed)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@functools.cache
def docstrings(kind: type) -> dict[str, str]:
    """The docstring under each field of a class and its bases: the first sentence, and the one about its default. Empty
    if the source is not available."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__[:-1]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        except (OSError, TypeError, SyntaxError):
            continue
        lines = body.body if isinstance(body, ast.ClassDef) else []
        for part, below in itertools.pairwise(lines):
            if not (isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)):
                continue
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
            if isinstance(text, str):
                found[part.target.id] = _short(" ".join(text.split()))
    return found


def _short(text: str) -> str:
    sentences = text.removesuffix(".").split(". ")
    default = next((s for s in sentences[1:] if s.startswith("Default")), None)
    return sentences[0] if default is None else f"{sentences[0]}. {default}"


# ---- types -----------------------------------------------------------------------------------------------------------


def _parsed(hint: Any, lists: bool) -> dict[str, Any] | None:
    """argparse's arguments for a type; None for types that a flag cannot have."""
    if get_origin(hint) in (Union, types.UnionType):
        inner = [part for part in get_args(hint) if part is not type(None)]
        if lists and any(get_origin(part) in _SEVERAL for part in inner):
            return {"nargs": "+"}
        if len(inner) > 1 and str in inner and set(inner) <= {str, Path, int, float}:
            return {"type": str}
        return _parsed(inner[0], lists) if len(inner) == 1 else None
    if get_origin(hint) is Literal:
        values = get_args(hint)
        return {"choices": values, "type": type(values[0])}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if lists and get_origin(hint) in _SEVERAL:
        return {"nargs": "+"}
    if lists and get_origin(hint) is Mapping:
        return {"type": json_object, "metavar": "JSON"}
    return {"type": hint} if hint in (int, float, str) else None


_SEVERAL = (Sequence, Collection, list, tuple)


def json_object(text: str) -> Any:
    """argparse type: a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def as_option(action: argparse.Action, value: Any, where: str) -> Any:
    """A config file's value, converted as the flag's. Raises ConfigError."""
    several = action.nargs in ("+", "*")
    if value is None or (several and isinstance(value, Mapping)):
        return value
    if isinstance(action, (argparse.BooleanOptionalAction, argparse._StoreTrueAction)):
        if not isinstance(value, bool):
            raise ConfigError(f"{where}={value!r}: expected true or false")
        return value
    if several:
        values = value if isinstance(value, list) else [value]
        return [_one(action, item, where) for item in values]
    return _one(action, value, where)


def _one(action: argparse.Action, value: Any, where: str) -> Any:
    kind = action.type or str
    wrong = isinstance(value, (list, bool)) or (isinstance(value, Mapping) and kind is not json_object)
    if not wrong and not (kind is json_object and isinstance(value, Mapping)):
        try:  # as text: YAML reads 1e-6 as text, and 3.5 is not a whole number
            value = kind(str(value))  # type: ignore[operator]
        except (ValueError, argparse.ArgumentTypeError) as error:
            told = str(error) if isinstance(error, argparse.ArgumentTypeError) else f"expected {_WORDS.get(kind, kind)}"
            raise ConfigError(f"{where}={value!r}: {told}") from None
    if wrong:
        raise ConfigError(f"{where}={value!r}: expected {_WORDS.get(kind, 'one value')}")
    if action.choices is not None and value not in action.choices:
        known = [str(choice) for choice in action.choices]
        hint = did_you_mean(str(value), known)
        raise ConfigError(f"{where}={value!r}: choose one of {', '.join(known)}.{hint}")
    return value


def count(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, not {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def count_or_auto(text: str) -> int | str:
    """argparse type: a whole number of at least 1, or "auto"."""
    return text if text == "auto" else count(text)


def which_step(text: str) -> int | str:
    """argparse type: a step's number, or "best"."""
    try:
        return text if text == "best" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step's number nor best") from None


def positive(text: str) -> float:
    """argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def temperature(text: str) -> float:
    """argparse type: a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a temperature: 0 or more")
    return value


_WORDS: dict[Any, str] = {
    int: "a whole number", count: "a whole number", float: "a number", positive: "a number above 0", str: "a text",
    which_step: "a step's number, or best",
}  # fmt: skip
