"""Methods on the command line: options from the fields of their classes, and classes from a user's own file.

Each field of a method's dataclass is an option; see `fields.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError
from ..journal.run_directory import make_method as method_of_record
from ..methods import DEFAULT, METHODS, PRESETS, Method, missing
from ..system.nearest import did_you_mean
from .fields import Option, docstrings, options_of

OWN = "FILE.py:CLASS"


def find_class(text: str | None) -> type[Method]:
    """The method of that name, or the user's own class named by "file.py:Class" or "package.module:Class"."""
    if text is None:
        return DEFAULT
    if text in METHODS:
        return METHODS[text]
    place, colon, name = text.rpartition(":")
    if not colon:
        missing.check(text)
        hint = did_you_mean(text, _own())
        raise ConfigError(f"method {text!r} is not known: there are {', '.join(_own())}, and your own as {OWN}.{hint}")
    kind = getattr(_module(place), name, None)
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise ConfigError(f"--method {text}: {place} has no class {name!r} that is a Method")
    return kind


def _module(place: str) -> types.ModuleType:
    path = Path(place)
    try:
        if path.suffix != ".py":
            return importlib.import_module(place)
        if not path.is_file():
            raise ConfigError(f"--method: {place} does not exist")
        there = sys.modules.get(path.stem)
        if there is not None and Path(getattr(there, "__file__", None) or "").resolve() == path.resolve():
            return there
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    except ConfigError:
        raise
    except Exception as error:  # any error of the user's own file
        raise ConfigError(f"--method: {place} cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def _own() -> list[str]:
    return [name for name, kind in METHODS.items() if kind.own()]


def add_options(command: argparse.ArgumentParser, argv: Sequence[str], method: str | None = None) -> None:
    """Add --method, --preset and one option per field of any method. argv, method: a user's own class, named in argv or
    by a config file's method, adds its options too.

    The parsed arguments have `method_options`, the names of all these options but --method and --preset.
    """
    group = command.add_argument_group("method", "how a step is taken; an option applies to the methods that have it")
    names = ",".join(_own())
    group.add_argument("--method", metavar=f"{{{names},{OWN}}}", help=f"{_about()}. Default: {DEFAULT.name}")
    group.add_argument("--preset", help=f"a published recipe of the method: {_presets()}")
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--method")
    chosen = find_class(early.parse_known_args(list(argv))[0].method or method)
    kinds = [chosen, *(METHODS[name] for name in _own() if METHODS[name] is not chosen)]
    found: dict[str, list[type[Method]]] = {}
    for kind in kinds:
        for option in _options_of(kind):
            found.setdefault(option, []).append(kind)
    for option, having in found.items():
        try:
            group.add_argument(f"--{option.replace('_', '-')}", dest=option, help=_help(option, having),
                               **_options_of(having[0])[option].parsed)  # fmt: skip
        except argparse.ArgumentError:
            raise ConfigError(
                f"method {having[0].name!r}: its field {option!r} has the name of another option. Give it another, or "
                'field(metadata={"option": False})'
            ) from None
    command.set_defaults(method_options=tuple(found))


def make_method(args: argparse.Namespace) -> Method:
    """The method that parsed options name, or that a run's config.json holds, with the parsed options replacing its
    own. Raises ConfigError for an option that it does not have."""
    record = getattr(args, "method_record", None)
    kept = None
    if record is not None and not args.preset and (args.method is None or "class" in record):
        kept = method_of_record(record, find_class(args.method) if args.method is not None else None)
    kind = find_class(args.method) if kept is None else type(kept)
    given = {name: getattr(args, name) for name in args.method_options if getattr(args, name) is not None}
    options = _options_of(kind)
    for name, value in given.items():
        if name not in options:
            having = [other for other in _own() if name in _options_of(METHODS[other])]
            raise ConfigError(
                f"--{name.replace('_', '-')} {value} is an option of --method {', '.join(having)}, not of {kind.name}"
            )
    if kept is not None:
        return dataclasses.replace(kept, **given)
    return kind.preset(args.preset, **given) if args.preset else kind(**given)


def make_methods(args: argparse.Namespace) -> list[Method]:
    """The methods that `args.methods` names, or the one of `make_method`; each with the options it has. Raises
    ConfigError for an option that none of them has."""
    if args.methods is None:
        return [make_method(args)]
    if args.method is not None or getattr(args, "method_record", None) is not None:
        raise ConfigError("--methods names all methods: leave out --method, and a run's config.json as --config")
    kinds = [find_class(name) for name in args.methods]
    given = [name for name in args.method_options if getattr(args, name) is not None]
    for name in given:
        if not any(name in _options_of(kind) for kind in kinds):
            raise ConfigError(f"--{name.replace('_', '-')} is an option of none of {', '.join(args.methods)}")
    return [
        make_method(argparse.Namespace(**{
            **vars(args), **{name: None for name in given if name not in _options_of(kind)}, "method": text
        }))
        for text, kind in zip(args.methods, kinds, strict=True)
    ]  # fmt: skip


def _about() -> str:
    lines = ((METHODS[name].__doc__ or "").partition("\n")[0].partition(": ")[0].rstrip(".") for name in _own())
    return "; ".join(f"{name}: {line}" for name, line in zip(_own(), lines, strict=True))


def _presets() -> str:
    return "; ".join(f"{', '.join(recipes)} ({method})" for method, recipes in PRESETS.items())


@functools.cache
def _options_of(kind: type[Method]) -> dict[str, Option]:
    return options_of(kind, lists=False)


def _help(option: str, having: Sequence[type[Method]]) -> str:
    """An option's help: its first sentence, and its defaults by method if they differ or not all methods have it."""
    defaults = {kind.name: _options_of(kind)[option].default for kind in having}
    general = option in {part.name for part in dataclasses.fields(Method)}
    text = (docstrings(Method) if general else {}).get(option) or _options_of(having[0])[option].help
    if len(set(map(str, defaults.values()))) > 1 or not general:
        values = {name: "none" if value is dataclasses.MISSING else value for name, value in defaults.items()}
        text += f" ({', '.join(f'{name} {value}' for name, value in values.items())})"
    else:
        text += f" ({next(iter(defaults.values()))})"
    return text.strip().replace("%", "%%")
