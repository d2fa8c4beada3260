"""Makes the engine's arguments from those of a command."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..ranks.launcher import launched
from ..system.plain import once
from .option_groups import IDENTITY, NOT_SETTINGS


def own_method(args: argparse.Namespace) -> dict[str, Any]:
    """The user's own method class that a run was made with, if one is named: the run holds its fields."""
    if args.method is None:
        return {}
    from .method_options import find_class

    kind = find_class(args.method)
    if kind.own():
        raise ConfigError(f"a run keeps the method that it began with: leave out --method {args.method}")
    return {"method": kind}


def open_engine(args: argparse.Namespace) -> Any:
    """An engine on a run directory (as its journal left it) or on a checkpoint."""
    from ..checkpoint.adapter_configs import is_adapter
    from ..engine import Engine
    from ..formats import FORMATS
    from ..journal import run_directory
    from ..methods import method_training

    if (Path(args.model) / run_directory.JOURNAL).exists():
        refuse(args, "lora", *IDENTITY, "run_dir")
        given = {**own_method(args), **given_of(args, *movable(), "model_class")}
        return Engine.resume(args.model, args.base, **given, **tokenizer_of(args), ranks=None)
    if args.base is not None:
        raise ConfigError(f"--base {args.base} is the new path of a run's base, but {args.model} is not a run")
    if args.method is not None:
        raise ConfigError(f"--method {args.method} is the method of a run, but {args.model} is not a run")
    adapts = args.lora is not None or args.adapter is not None or is_adapter(Path(args.model))
    frozen = args.storage in FORMATS and not FORMATS[args.storage].trains and not adapts
    # nothing is trained here: the format's plain values are enough
    method = method_training("shifts") if frozen else None
    return Engine(
        args.model,
        method=method,
        model_class=args.model_class,
        **engine_settings(args),
        **tokenizer_of(args),
        ranks=None,
    )


def ranks_of(args: argparse.Namespace) -> Any:
    """The processes that were launched together with this one: they train together."""
    if args.serve is not None:
        from .pool_tools import pool_of

        return pool_of(args)
    if given := given_of(args, "token_file", "audit", "tolerance"):
        raise ConfigError(f"--{next(iter(given)).replace('_', '-')} goes with --serve HOST:PORT")
    if args.patience is None:
        return "auto"
    if launched()[1] < 2:
        raise ConfigError(f"--patience {args.patience:g} is for other ranks, and there are none: give it under "
                          "torchrun, or with --serve")  # fmt: skip
    from ..ranks.find import Group

    return Group(patience=args.patience)


def check_out(out: str | None, run_dir: str | None = None) -> None:
    """Raise before any work is done if exports to `out` are impossible. run_dir: the run that is trained first."""
    if out is None:
        return
    path = Path(out).absolute()
    run = None if run_dir is None else Path(run_dir).absolute()
    if run is not None and path in (run, *run.parents):
        raise ConfigError(f"--out {out} would hold the run {run_dir}: give a directory of its own to export to")
    nearest = next(p for p in (path, *path.parents) if p.exists())
    if not nearest.is_dir():
        raise ConfigError(f"--out {out}: {nearest} is a file; give a directory to write to")
    if nearest == path and any(path.iterdir()):
        raise ConfigError(f"--out {out} is not empty; give a fresh directory")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ConfigError(f"--out {out}: nothing can be written in {nearest}: {error.strerror or error}") from error


def refuse(args: argparse.Namespace, *names: str) -> None:
    """Raise if one of these options was given: a run keeps them from its beginning."""
    if given := given_of(args, *names):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{args.model} is a run and keeps its own settings: leave out {options}")


def given_of(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def field_names(kind: type) -> list[str]:
    return [part.name for part in fields(kind)]


def movable() -> list[str]:
    """Settings that may change when a run is resumed."""
    from ..config import EngineConfig

    return [name for name in field_names(EngineConfig) if name not in (*IDENTITY, "run_dir")]


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's settings that were given."""
    given = given_of(args, *(name for name in IDENTITY if name not in NOT_SETTINGS), *movable(), "run_dir")
    if len(given.get("trainable", ())) == 1:
        given["trainable"] = given["trainable"][0]
    if args.lora is not None and args.adapter is not None:
        raise ConfigError(f"--lora {args.lora} makes a new adapter, and --adapter {args.adapter} names one: give one")
    if args.lora is not None:
        given["adapter"] = f"r={args.lora}"
    overrides = {**given.get("config_overrides", {}), **given_of(args, "num_labels", "attn_implementation")}
    return {**given, "config_overrides": overrides} if overrides else given


def tokenizer_of(args: argparse.Namespace) -> dict[str, Any]:
    """The tokenizer of another directory, if one was named."""
    if getattr(args, "tokenizer", None) is None:
        return {}
    from ..checkpoint.tokenizers import load_tokenizer

    return {"tokenizer": load_tokenizer(args.tokenizer, trust_remote_code=bool(args.trust_remote_code))}


def data_options(args: argparse.Namespace) -> dict[str, Any]:
    from ..data.encode import Encoder

    options = given_of(args, *(name for name in field_names(Encoder) if name not in ("kind", "tokenizer", "version")))
    for name in ("template", "prefix"):
        if name in options:
            options[name] = unescaped(options[name])
    if "verbalizers" in options:
        options["verbalizers"] = _words(options["verbalizers"])
    columns = [name.strip() for text in options.get("text_column", ()) for name in text.split(",")]
    if columns:
        options["text_column"] = columns[0] if len(columns) == 1 else columns
    return options


def unescaped(text: str) -> str:
    """A text of the command line, with backslash and n turned into line ends."""
    return text.replace("\\n", "\n")


def _words(given: Any) -> Any:
    """Verbalizers: one word per label, or one JSON object of words by label."""
    if isinstance(given, Mapping):
        return given
    if len(given) == 1 and given[0].lstrip().startswith("{"):
        try:
            by_label = json.loads(given[0], object_pairs_hook=once)
        except ValueError:
            by_label = None  # a template with the column that lists a row's own
        if isinstance(by_label, dict):
            return {label: unescaped(word) if isinstance(word, str) else word for label, word in by_label.items()}
    return [unescaped(word) for word in given]
