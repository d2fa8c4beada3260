"""Federated rounds of a seed pool: `zo-offload round start | train | merge | show`. See docs/ranks.md."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from ..engine import Engine
from ..errors import ConfigError
from ..journal.rounds import MAGIC, Round
from ..methods.pooled import pooled
from .arguments import data_options, engine_settings, given_of, movable, refuse, tokenizer_of
from .method_options import make_method
from .option_groups import IDENTITY

_OF_TRAIN = ("data", "client", "steps", "out")


def lines_of(args: argparse.Namespace) -> Iterator[str]:
    """Do what the command asks; yields what to tell."""
    if args.files and args.action != "merge":
        raise ConfigError(f"round {args.action} takes one path; left over: {' '.join(args.files)}")
    yield {"start": _start, "train": _train, "merge": _merge, "show": _show}[args.action](args)


def _start(args: argparse.Namespace) -> str:
    if args.run_dir is None:
        raise ConfigError("--run-dir is missing: the directory of the new run")
    if args.method is None and getattr(args, "method_record", None) is None:
        args.method = "seed-pool"
    method = make_method(args)
    pooled(method)
    settings = {**engine_settings(args), **tokenizer_of(args)}
    with Engine(args.model, method=method, model_class=args.model_class, ranks=None, **settings) as engine:
        engine.active.start()
        engine.active.flush()
    return f"run: {args.run_dir}. Give clients its config.json and journal.zoj; each needs the base, too"


def _train(args: argparse.Namespace) -> str:
    for name in _OF_TRAIN:
        if getattr(args, name) is None:
            raise ConfigError(f"--{name} is missing: round train RUN --data FILE --client NAME --steps N --out FILE")
    refuse(args, "method", "preset", "lora", *args.method_options, *IDENTITY, "run_dir")
    out = Path(args.out)
    if out.is_dir() or not out.parent.is_dir() or (out.exists() and out.read_bytes()[:4] != MAGIC):
        raise ConfigError(f"--out {out}: expected a new file, or one of an earlier round, in a directory that exists")
    own = {**given_of(args, *movable(), "model_class"), **tokenizer_of(args)}
    with Engine.resume(args.model, args.base, ranks=None, **own) as engine:
        found = engine.train_round(
            args.data, client=args.client, steps=args.steps, batch_size=args.batch_size, rows=args.rows,
            micro_batches=args.micro_batches, **data_options(args),
        )  # fmt: skip
    size = found.save(out)
    return f"{_told(found)}. {out}: {size} bytes"


def _merge(args: argparse.Namespace) -> str:
    found = Round.merge(args.model, args.files)
    told = f"step {found.step} of {args.model} is {_told(found)}"
    if args.out is not None:
        told += f". {args.out}: {found.save(args.out)} bytes"
    return told


def _show(args: argparse.Namespace) -> str:
    return _told(Round.load(args.model))


def _told(found: Round) -> str:
    return (
        f"{found}: {found.local_steps} local steps, loss {found.loss:.4f}, {found.rows} rows, "
        f"{found.seeds_used} of {len(found.sums)} seeds"
    )
