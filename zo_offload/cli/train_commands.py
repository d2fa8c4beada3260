"""The commands that train: fit, rate, sweep; and the pool's: join, ranks."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .arguments import (
    check_out,
    data_options,
    engine_settings,
    field_names,
    given_of,
    movable,
    own_method,
    ranks_of,
    refuse,
    tokenizer_of,
)
from .option_groups import IDENTITY


def fit(args: argparse.Namespace) -> int:
    from ..journal.calls import FitCall

    check_out(args.out, args.model if args.resume else args.run_dir)
    if args.keep_best and args.out and not args.resume and args.run_dir is None:
        raise ConfigError(
            "--keep-best with --out exports an earlier step, which is made from the journal: give --run-dir"
        )
    if args.merge and not args.out:
        raise ConfigError("--merge says how --out is written: give --out, or leave it out")
    if args.new_data and not args.resume:
        raise ConfigError("--new-data lets a run go on with other data: give it with --resume, or leave it out")
    engine = _engine_to_fit(args)
    if args.out and (wrong := engine.active.opened.cannot_be_saved(bool(args.merge))):
        raise ConfigError(f"--out {args.out}: {wrong}")
    if args.dry_run:
        return _dry_run(args, engine)
    call = {name: getattr(args, name) for name in field_names(FitCall) if name not in ("data", "options")}
    with engine:
        if args.serve is not None:
            from .pool_tools import invitation

            print(invitation(args, engine.ranks.port), flush=True)
        if engine.decided and not args.resume and engine.ranks.leads:
            print(*engine.decided, sep="\n")
        result = engine.fit(
            args.data, **call, progress=not args.quiet, new_data=bool(args.new_data), **data_options(args)
        )
        keeps = (engine.active.last_fit or {}).get("keep_best") and engine.run_dir is not None
        if args.out:
            engine.save_pretrained(args.out, step="best" if keeps and engine.checkpoint is not None else None,
                                   merge=bool(args.merge))  # fmt: skip
    if not engine.ranks.leads:
        return 0
    _print_result(result, engine.run_dir)
    if args.out:
        which = f", step {int(result.best['step'])}, its best" if keeps and result.best else ""
        print(f"exported to {args.out}{which}")
    return 0


def _dry_run(args: argparse.Namespace, engine: Any) -> int:
    known = engine.active.last_fit or {}
    data, options = args.data or known.get("data"), {**(known.get("options") or {}), **data_options(args)}
    with engine:
        print(engine.preview(data, batch_size=args.batch_size or known.get("batch_size"), **options))
    return 0


def _engine_to_fit(args: argparse.Namespace) -> Any:
    """The engine of a new run, or of a resumed one."""
    from ..engine import Engine
    from .method_options import make_method

    if args.resume:
        own = own_method(args)
        refuse(args, "preset", "lora", *args.method_options, *IDENTITY, "run_dir")
        return Engine.resume(args.model, args.base, **own, **given_of(args, *movable(), "model_class"),
                             **tokenizer_of(args), ranks=ranks_of(args))  # fmt: skip
    if args.base is not None:
        raise ConfigError(f"--base {args.base} says where the base of a run is now: give it with --resume")
    if args.data is None:
        raise ConfigError("--data is missing: a file or folder to train on")
    return Engine(
        args.model, method=make_method(args), model_class=args.model_class, **engine_settings(args),
        **tokenizer_of(args), ranks=ranks_of(args),
    )  # fmt: skip


def _print_result(result: Any, run_dir: Path | None) -> None:
    from ..journal.run_directory import METRICS, to_json

    if result.steps == 0 and not result.stopped:
        print(f"no step was left: the run has {result.last_step}; --steps gives the total")
    print(
        f"{result.steps} steps, {result.tokens_per_s:.0f} tokens/s, resident weights "
        f"{result.resident_bytes / 1e6:.1f} MB of {result.model_bytes / 1e6:.1f} MB"
        f"{f', stopped: {result.stopped}' if result.stopped else ''}"
    )
    for warning in result.warnings:
        print(f"warning: {warning}")
    for values in result.evals:
        print(to_json(values))
    if run_dir is not None:
        again = f"zo-offload fit {shlex.quote(str(run_dir))} --resume"
        print(f"run: {run_dir} (losses and evaluations in {METRICS}; {again} goes on)")


def join(args: argparse.Namespace) -> int:
    from . import pool_tools

    own = {**own_method(args), **given_of(args, *movable(), "model_class"), **tokenizer_of(args)}
    if args.run_dir is not None:
        own["run_dir"] = args.run_dir
    result = pool_tools.join(args, own, show=not args.quiet)
    why = f"; {result.stopped}" if result.stopped else ""
    print(f"{result.steps} steps with the keeper at {args.address}, to step {result.last_step}{why}")
    return 0


def roster(args: argparse.Namespace) -> int:
    from .pool_tools import members_token
    from .pool_tools import roster as lines_of

    for line in lines_of(args.address, members_token(args)):
        print(line)
    return 0


def rate(args: argparse.Namespace) -> int:
    from ..engine import Engine
    from .method_options import make_method
    from .rates import FACTORS, best, try_rates

    if args.data is None:
        raise ConfigError("--data is missing: a file or folder to train on")
    method = make_method(args)
    rates = args.rates or [factor * method.lr for factor in FACTORS]
    without = {"run_dir"} if args.run_dir is not None else {"run_dir", "snapshot_minutes", "snapshot_steps"}
    settings = {name: value for name, value in engine_settings(args).items() if name not in without}

    def make(changed: Any) -> Any:
        folder = {} if args.run_dir is None else {"run_dir": Path(args.run_dir) / f"lr-{changed.lr:g}"}
        more = {**settings, **folder, **tokenizer_of(args)}
        return Engine(args.model, method=changed, model_class=args.model_class, **more)

    fit = {"train_data": args.data, "batch_size": args.batch_size, "micro_batches": args.micro_batches}
    trials = []
    for trial in try_rates(make, method, {**fit, **data_options(args)}, rates, args.steps):
        trials.append(trial)
        print(f"lr {trial.lr:<10.3g} loss {trial.first:.4f}, then {trial.last:.4f}  {trial.what}", flush=True)
    found = best(trials)
    if found is None:
        raise ConfigError("none of these rates worked: try smaller ones, --rates")
    print(f"best of these in {args.steps} steps: --lr {found.lr:.3g}. A long run may need half of it, or a decay")
    return 0


def sweep(args: argparse.Namespace) -> int:
    from ..engine import Engine
    from ..journal.calls import FitCall
    from .method_options import make_methods
    from .sweep import grid, lines, table
    from .sweep import sweep as swept

    for name in ("data", "eval_data", "run_dir"):
        if getattr(args, name) is None:
            raise ConfigError(f"--{name.replace('_', '-')} is missing: {_SWEEPS[name]}")
    if args.rates and args.lr is not None:
        raise ConfigError(f"--lr {args.lr:g} and --rates: give one of them")
    points = grid(make_methods(args), args.rates or (), args.times or (), args.seeds)
    call = {name: getattr(args, name) for name in field_names(FitCall) if name not in ("data", "options")}
    fit = {"train_data": args.data, **call, **data_options(args), "progress": not args.quiet}
    shared = {k: v for k, v in vars(args).items() if k not in _NOT_SHARED and v is not None}

    def make(point: Any, path: Path, begun: bool) -> Any:
        if begun:
            own = {} if point.method.own() else {"method": point.method}
            return Engine.resume(path, **own, **given_of(args, *movable(), "model_class"), **tokenizer_of(args))
        settings = {**engine_settings(args), "seed": point.seed, "run_dir": path}
        return Engine(args.model, method=point.method, model_class=args.model_class, **settings, **tokenizer_of(args))

    runs = []
    for run, before in swept(Path(args.run_dir), points, make, fit, json.loads(json.dumps(shared))):
        runs.append(run)
        told = "   ".join(f"{key} {value:.4f}" for key, value in run.values.items() if key != "step")
        print(f"{run.run}: {told or run.what}{' (from before)' * before}", flush=True)
    print(*lines(*table(runs, args.metric)), sep="\n")
    return 0


_SWEEPS = {
    "data": "a file or folder to train on", "eval_data": "rows that settings are compared by",
    "run_dir": "a directory for the runs",
}  # fmt: skip
_NOT_SHARED = ("run", "run_dir", "methods", "rates", "times", "seeds", "quiet", "method_options", "method_record",
               "patience", "config")  # fmt: skip
