"""Makes docs/api.md: every public name with its signature and docstring, read from the source.

python docs/make_api.py            prints the page
python docs/make_api.py --write    writes docs/api.md
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zo_offload
from zo_offload.formats import FORMATS
from zo_offload.methods import METHODS

PAGE = Path(__file__).with_name("api.md")
HEAD = """# API reference

Made from the docstrings by `python docs/make_api.py --write`; a test keeps it true. Paths in backticks, such as
`gains.py`, are modules under `zo_offload/`.
"""


def page() -> str:
    """The whole page as text."""
    own = {kind for kind in METHODS.values() if kind.own()}
    public = [getattr(zo_offload, name) for name in zo_offload.__all__ if name not in ("__version__", "PRESETS")]
    methods = [kind for kind in public if kind in own]
    errors = [kind for kind in public if issubclass(kind, BaseException)]
    rest = [kind for kind in public if kind not in (*methods, *errors, zo_offload.Engine, zo_offload.EngineConfig)]
    parts = [
        HEAD,
        "## Engine\n",
        *_class(zo_offload.Engine, level=3),
        "## Settings\n\nKeywords of `Engine(...)`, beside those above.\n",
        *_fields(zo_offload.EngineConfig),
        "## Methods\n\nEach field is a keyword, and an option of the command line.\n",
        *(
            line
            for kind in [zo_offload.Method, *methods]
            for line in _class(kind, level=3, members=kind is zo_offload.Method)
        ),
        "## What calls return, and others\n",
        *(line for kind in rest if kind is not zo_offload.Method for line in _class(kind, level=3)),
        "## Errors\n",
        *(f"- **{kind.__name__}** ({kind.__bases__[0].__name__}): {_flow(kind.__doc__)}" for kind in errors),
        "\n## Storage formats\n\n" + ", ".join(f"`{name}`" for name in FORMATS) + ". See [storage.md](storage.md).",
    ]
    return "\n".join(parts).rstrip() + "\n"


def _class(kind: type, level: int, members: bool = True) -> Iterator[str]:
    yield f"{'#' * level} {kind.__name__}\n"
    if dataclasses.is_dataclass(kind):
        yield f"{_doc(kind)}\n"
        yield from _fields(kind)
    else:
        yield f"```\n{kind.__name__}{_signature(kind)}\n```\n\n{_doc(kind)}\n"
    if not members:
        return
    for name, member in vars(kind).items():
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if name.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue
        bound = kind.__name__ if isinstance(member, (classmethod, staticmethod)) else kind.__name__.lower()
        yield f"{'#' * (level + 1)} {name}\n\n```\n{bound}.{name}{_signature(function)}\n```\n\n{_doc(function)}\n"


def _signature(thing: Any) -> str:
    """As it is written in the source, but for `self` and `cls`; one parameter a line where one line is too long."""
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return "(...)"
    kept = [p for name, p in signature.parameters.items() if name not in ("self", "cls")]
    text = str(signature.replace(parameters=kept)).replace("'", "")
    return text if len(text) < 100 else "(\n    " + ",\n    ".join(_apart(kept)) + "\n)" + text[text.rindex(")") + 1 :]


def _apart(parameters: list[inspect.Parameter]) -> Iterator[str]:
    keyword_only = False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            yield "*"
        yield str(parameter).replace("'", "")


def _fields(kind: type) -> Iterator[str]:
    """A list item a field of a dataclass, with the string that stands below it in the source."""
    said = _below(kind)
    for field in dataclasses.fields(kind):
        default = ""
        if field.default is not dataclasses.MISSING:
            default = f" = {field.default!r}"
        elif field.default_factory is not dataclasses.MISSING:
            default = f" = {field.default_factory()!r}"
        yield f"- `{field.name}: {field.type}{default}`" + (f": {said[field.name]}" if field.name in said else "")
    yield ""


def _below(kind: type) -> dict[str, str]:
    """Strings below a class's fields, its bases' too."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError):
            continue
        assert isinstance(body, ast.ClassDef)
        for line, after in itertools.pairwise(body.body):
            said = after.value if isinstance(after, ast.Expr) else None
            if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
                continue
            if isinstance(said, ast.Constant) and isinstance(said.value, str):
                found[line.target.id] = _flow(said.value)
    return found


def _doc(thing: Any) -> str:
    """A docstring as Markdown: paragraphs, and what is indented as it stands."""
    return inspect.cleandoc(thing.__doc__ or "").replace("\n    ", "\n\n    ", 1) if thing.__doc__ else ""


def _flow(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page())
    else:
        sys.stdout.write(page())
