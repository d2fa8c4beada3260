"""The command line: zo-offload fit | plan | eval | generate | export | ... . Only it prints.

Exit status: 0 done; 1 a check failed (journal check, doctor); 2 an error, printed on one line; 128 + a signal's number
if that signal stopped it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError, RankError, ZOError
from ..ranks.launcher import launched
from ..system.plain import once
from .output import printable
from .parser import IDENTITY, NOT_SETTINGS, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors a user can cause are one line on standard error.

    Without argv it is the program itself: once its command has ended, SIGINT is ignored until the process is gone.
    """
    is_program, argv = argv is None, sys.argv[1:] if argv is None else argv
    if "--serve" in argv or argv[:1] in (["join"], ["ranks"]):
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else torch prints a stack for each broken connection
    try:
        with printable():
            return _run(argv)
    except KeyboardInterrupt as stop:  # a second one, while the first was being reported
        return 128 + int(getattr(stop, "signum", signal.SIGINT))
    finally:
        if is_program:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(argv: Sequence[str]) -> int:
    try:
        args = parse(argv, RUN)
        if args.run is not _fit and launched()[0] > 0:
            return 0  # among several processes only one does anything but training
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has closed the pipe: `zo-offload plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discard the rest of the buffer
        return 128 + signal.SIGPIPE
    except (ZOError, OSError) as error:
        text = " ".join(str(error).split())
        _tell_launcher(text)
        print("zo-offload:", text, file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"zo-offload: {str(stop) or 'stopped'}", file=sys.stderr)
        return 128 + int(getattr(stop, "signum", signal.SIGINT))


def _tell_launcher(text: str) -> None:
    """Write the error where torchrun looks for it: it shows the first error of its processes."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not isinstance(sys.exc_info()[1], RankError):  # another process's error, which that process reports
        about = {"py_callstack": "", "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": about}}))


# ---- commands --------------------------------------------------------------------------------------------------------


def _fit(args: argparse.Namespace) -> int:
    from ..journal.calls import FitCall

    _check_out(args.out, args.model if args.resume else args.run_dir)
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
    call = {name: getattr(args, name) for name in _names(FitCall) if name not in ("data", "options")}
    with engine:
        if args.serve is not None:
            from .pool_tools import invitation

            print(invitation(args, engine.ranks.port), flush=True)
        if engine.decided and not args.resume and engine.ranks.leads:
            print(*engine.decided, sep="\n")
        result = engine.fit(
            args.data, **call, progress=not args.quiet, new_data=bool(args.new_data), **_data_options(args)
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
    data, options = args.data or known.get("data"), {**(known.get("options") or {}), **_data_options(args)}
    with engine:
        print(engine.preview(data, batch_size=args.batch_size or known.get("batch_size"), **options))
    return 0


def _engine_to_fit(args: argparse.Namespace) -> Any:
    """The engine of a new run, or of a resumed one."""
    from ..engine import Engine
    from .method_options import make_method

    if args.resume:
        own = _own_method(args)
        _refuse(args, "preset", "lora", *args.method_options, *IDENTITY, "run_dir")
        return Engine.resume(args.model, args.base, **own, **_given(args, *_movable(), "model_class"),
                             **_tokenizer(args), ranks=_ranks(args))  # fmt: skip
    if args.base is not None:
        raise ConfigError(f"--base {args.base} says where the base of a run is now: give it with --resume")
    if args.data is None:
        raise ConfigError("--data is missing: a file or folder to train on")
    return Engine(
        args.model, method=make_method(args), model_class=args.model_class, **_settings(args), **_tokenizer(args),
        ranks=_ranks(args),
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


def _join(args: argparse.Namespace) -> int:
    from .pool_tools import join

    own = {**_own_method(args), **_given(args, *_movable(), "model_class"), **_tokenizer(args)}
    if args.run_dir is not None:
        own["run_dir"] = args.run_dir
    result = join(args, own, show=not args.quiet)
    why = f"; {result.stopped}" if result.stopped else ""
    print(f"{result.steps} steps with the keeper at {args.address}, to step {result.last_step}{why}")
    return 0


def _roster(args: argparse.Namespace) -> int:
    from .pool_tools import members_token, roster

    for line in roster(args.address, members_token(args)):
        print(line)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from .planning import plan_lines

    for line in plan_lines(args, _settings(args)):
        print(line)
    return 0


def _rate(args: argparse.Namespace) -> int:
    from ..engine import Engine
    from .method_options import make_method
    from .rates import FACTORS, best, try_rates

    if args.data is None:
        raise ConfigError("--data is missing: a file or folder to train on")
    method = make_method(args)
    rates = args.rates or [factor * method.lr for factor in FACTORS]
    settings = {name: value for name, value in _settings(args).items() if name != "run_dir"}

    def make(changed: Any) -> Any:
        folder = {} if args.run_dir is None else {"run_dir": Path(args.run_dir) / f"lr-{changed.lr:g}"}
        more = {**settings, **folder, **_tokenizer(args)}
        return Engine(args.model, method=changed, model_class=args.model_class, **more)

    fit = {"train_data": args.data, "batch_size": args.batch_size, "micro_batches": args.micro_batches}
    trials = []
    for trial in try_rates(make, method, {**fit, **_data_options(args)}, rates, args.steps):
        trials.append(trial)
        print(f"lr {trial.lr:<10.3g} loss {trial.first:.4f}, then {trial.last:.4f}  {trial.what}", flush=True)
    found = best(trials)
    if found is None:
        raise ConfigError("none of these rates worked: try smaller ones, --rates")
    print(f"best of these in {args.steps} steps: --lr {found.lr:.3g}. A long run may need half of it, or a decay")
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from ..engine import Engine
    from ..journal.calls import FitCall
    from .method_options import make_methods
    from .sweep import grid, lines, sweep, table

    for name in ("data", "eval_data", "run_dir"):
        if getattr(args, name) is None:
            raise ConfigError(f"--{name.replace('_', '-')} is missing: {_SWEEPS[name]}")
    if args.rates and args.lr is not None:
        raise ConfigError(f"--lr {args.lr:g} and --rates: give one of them")
    points = grid(make_methods(args), args.rates or (), args.times or (), args.seeds)
    call = {name: getattr(args, name) for name in _names(FitCall) if name not in ("data", "options")}
    fit = {"train_data": args.data, **call, **_data_options(args), "progress": not args.quiet}
    shared = {k: v for k, v in vars(args).items() if k not in _NOT_SHARED and v is not None}

    def make(point: Any, path: Path, begun: bool) -> Any:
        if begun:
            own = {} if point.method.own() else {"method": point.method}
            return Engine.resume(path, **own, **_given(args, *_movable(), "model_class"), **_tokenizer(args))
        settings = {**_settings(args), "seed": point.seed, "run_dir": path}
        return Engine(args.model, method=point.method, model_class=args.model_class, **settings, **_tokenizer(args))

    runs = []
    for run, before in sweep(Path(args.run_dir), points, make, fit, json.loads(json.dumps(shared))):
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


def _methods(args: argparse.Namespace) -> int:
    from .methods_table import presets, table

    for line in table():
        print(line)
    print("\nrecipes, for fit and plan:")
    for line in presets():
        print(f"  --method {line}")
    return 0


def _basis(args: argparse.Namespace) -> int:
    if args.data is None or args.out is None:
        raise ConfigError("--data and --out are needed: rows of the task, and a fresh directory to write to")
    with _open(args) as engine:
        batch = engine.batching.batches(args.data, args.batch_size, _data_options(args)).first()
        basis = engine.activation_basis(batch, args.rank, layers=args.layers)
    basis.save(args.out)
    print(f"{len(basis.vectors)} layers, rank {basis.rank}. Train in it:")
    print(f"  --adapter {args.out} --trainable lora_B --keep lora_A")
    return 0


def _eval(args: argparse.Namespace) -> int:
    from ..journal.run_directory import JOURNAL, to_json

    missing = ConfigError("--data is missing: what to evaluate on")
    if args.demonstrations is not None and args.shots is None:
        raise ConfigError("--demonstrations are what --shots N takes: give that too, or leave them out")
    if args.data is None and not (Path(args.model) / JOURNAL).exists():
        raise missing
    with _open(args) as engine:
        known = engine.active.last_fit or {}
        data = args.data or known.get("eval_data")
        if data is None:
            raise missing
        options = {**(known.get("options") or {}), **_data_options(args)}
        asked = {
            "batch_size": args.batch_size or known.get("batch_size") or 16,
            "eval_rows": args.eval_rows or known.get("eval_rows"),
            **options,
        }
        if args.shots is None:
            print(to_json(_evaluated_at(engine, args.step, data, asked)))
            return 0
        demonstrations = args.demonstrations or known.get("data") or (data if options.get("task") else None)
        kept = known.get("keep_best") and engine.checkpoint is not None
        which = args.step if args.step is not None else "best" if kept else None
        is_run = engine.active.run_dir is not None and known
        for name, step in (("base", 0), ("tuned", which)) if is_run else ((Path(args.model).name, None),):
            for shots in args.shots:
                values = _evaluated_at(engine, step, data, {**asked, "shots": shots, "demonstrations": demonstrations})
                shown = "   ".join(f"{key} {value:.4f}" for key, value in values.items())
                print(f"{name:<12} {shots:>3} shots   {shown}", flush=True)
    return 0


def _evaluated_at(engine: Any, step: int | str | None, data: str, asked: dict[str, Any]) -> dict[str, float]:
    """An evaluation at a step; None: at the last step."""
    if step is None:
        return dict(engine.evaluate(data, **asked))
    with engine.at(step) as then:
        return dict(then.evaluate(data, **asked))


def _generate(args: argparse.Namespace) -> int:
    if not args.prompt:
        raise ConfigError("--prompt is missing: a text to be continued")
    options = {"do_sample": False} if args.temperature == 0 else {"do_sample": True, "temperature": args.temperature}
    with _open(args) as engine:
        prompts = [_unescaped(prompt) for prompt in args.prompt]
        texts = engine.generate(prompts, max_new_tokens=args.max_new_tokens, **options)
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"{prompt}{text}")
    return 0


def _export(args: argparse.Namespace) -> int:
    if args.out is None:
        raise ConfigError("--out is missing: a directory to write to")
    _check_out(args.out)
    with _open(args) as engine:
        if args.step is not None and engine.active.run_dir is None:
            raise ConfigError(f"--step {args.step} is for runs, but {args.model} is not a run")
        files = engine.save_pretrained(args.out, step=args.step, max_shard_bytes=args.max_shard,
                                       merge=bool(args.merge), scheme=args.scheme)  # fmt: skip
    print(f"wrote {len(files)} files to {args.out}")
    return 0


def _replay(args: argparse.Namespace) -> int:
    from ..replay import replay

    if args.out is None:
        raise ConfigError("--out is missing: a directory to write to")
    if not args.overwrite:
        _check_out(args.out)
    files = replay(args.base, args.journal, args.out, to=args.to, max_shard_bytes=args.max_shard,
                   overwrite=args.overwrite, merge=bool(args.merge), trust_remote_code=args.trust_remote_code,
                   **_given(args, "adapter"), **_own_method(args))  # fmt: skip
    print(f"wrote {len(files)} files to {args.out}")
    return 0


def _journal(args: argparse.Namespace) -> int:
    from . import journal_tools

    path = Path(args.path)
    for name, action in (("to", "cut"), ("last", "show")):
        if getattr(args, name) is not None and args.action != action:
            raise ConfigError(f"--{name} is of journal {action}, not of {args.action}: leave it out")
    if args.action == "show":
        for line in journal_tools.show(path, args.last or 10):
            print(line)
    elif args.action == "csv":
        journal_tools.write_csv(path, sys.stdout)
    elif args.action == "cut":
        if args.to is None:
            raise ConfigError("journal cut needs --to STEP: how many steps to keep")
        backup = journal_tools.cut(path, args.to)
        print(f"kept {args.to} steps; the journal as it was: {backup}")
    else:
        results = list(journal_tools.check(path))
        for sound, line in results:
            print(line if sound else f"NOT SOUND: {line}")
        return 0 if all(sound for sound, _ in results) else 1
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import examine

    return examine()


RUN = {
    "fit": _fit, "plan": _plan, "eval": _eval, "generate": _generate, "export": _export, "replay": _replay,
    "join": _join, "ranks": _roster, "journal": _journal, "doctor": _doctor, "rate": _rate, "sweep": _sweep,
    "methods": _methods, "basis": _basis,
}  # fmt: skip


# ---- arguments -------------------------------------------------------------------------------------------------------


def _own_method(args: argparse.Namespace) -> dict[str, Any]:
    """The user's own method class that a run was made with, if one is named: the run holds its fields."""
    if args.method is None:
        return {}
    from .method_options import find_class

    kind = find_class(args.method)
    if kind.own():
        raise ConfigError(f"a run keeps the method that it began with: leave out --method {args.method}")
    return {"method": kind}


def _open(args: argparse.Namespace) -> Any:
    """An engine on a run directory (as its journal left it) or on a checkpoint."""
    from ..checkpoint.adapter_configs import is_adapter
    from ..engine import Engine
    from ..formats import FORMATS
    from ..journal import run_directory
    from ..methods import method_training

    if (Path(args.model) / run_directory.JOURNAL).exists():
        _refuse(args, "lora", *IDENTITY, "run_dir")
        given = {**_own_method(args), **_given(args, *_movable(), "model_class")}
        return Engine.resume(args.model, args.base, **given, **_tokenizer(args), ranks=None)
    if args.base is not None:
        raise ConfigError(f"--base {args.base} is the new path of a run's base, but {args.model} is not a run")
    if args.method is not None:
        raise ConfigError(f"--method {args.method} is the method of a run, but {args.model} is not a run")
    adapts = args.lora is not None or args.adapter is not None or is_adapter(Path(args.model))
    frozen = args.storage in FORMATS and not FORMATS[args.storage].trains and not adapts
    # nothing is trained here: the format's plain values are enough
    method = method_training("shifts") if frozen else None
    return Engine(
        args.model, method=method, model_class=args.model_class, **_settings(args), **_tokenizer(args), ranks=None
    )


def _ranks(args: argparse.Namespace) -> Any:
    """The processes that were launched together with this one: they train together."""
    if args.serve is not None:
        from .pool_tools import pool_of

        return pool_of(args)
    if given := _given(args, "token_file", "audit", "tolerance"):
        raise ConfigError(f"--{next(iter(given)).replace('_', '-')} goes with --serve HOST:PORT")
    if args.patience is None:
        return "auto"
    if launched()[1] < 2:
        raise ConfigError(f"--patience {args.patience:g} is for other ranks, and there are none: give it under "
                          "torchrun, or with --serve")  # fmt: skip
    from ..ranks.find import Group

    return Group(patience=args.patience)


def _check_out(out: str | None, run_dir: str | None = None) -> None:
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


def _refuse(args: argparse.Namespace, *names: str) -> None:
    """Raise if one of these options was given: a run keeps them from its beginning."""
    if given := _given(args, *names):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{args.model} is a run and keeps its own settings: leave out {options}")


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def _names(kind: type) -> list[str]:
    return [part.name for part in fields(kind)]


def _movable() -> list[str]:
    """Settings that may change when a run is resumed."""
    from ..config import EngineConfig

    return [name for name in _names(EngineConfig) if name not in (*IDENTITY, "run_dir")]


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's settings that were given."""
    given = _given(args, *(name for name in IDENTITY if name not in NOT_SETTINGS), *_movable(), "run_dir")
    if len(given.get("trainable", ())) == 1:
        given["trainable"] = given["trainable"][0]
    if args.lora is not None and args.adapter is not None:
        raise ConfigError(f"--lora {args.lora} makes a new adapter, and --adapter {args.adapter} names one: give one")
    if args.lora is not None:
        given["adapter"] = f"r={args.lora}"
    overrides = {**given.get("config_overrides", {}), **_given(args, "num_labels", "attn_implementation")}
    return {**given, "config_overrides": overrides} if overrides else given


def _tokenizer(args: argparse.Namespace) -> dict[str, Any]:
    """The tokenizer of another directory, if one was named."""
    if getattr(args, "tokenizer", None) is None:
        return {}
    from ..checkpoint.tokenizers import load_tokenizer

    return {"tokenizer": load_tokenizer(args.tokenizer, trust_remote_code=bool(args.trust_remote_code))}


def _data_options(args: argparse.Namespace) -> dict[str, Any]:
    from ..data.encode import Encoder

    options = _given(args, *(name for name in _names(Encoder) if name not in ("kind", "tokenizer", "version")))
    for name in ("template", "prefix"):
        if name in options:
            options[name] = _unescaped(options[name])
    if "verbalizers" in options:
        options["verbalizers"] = _words(options["verbalizers"])
    columns = [name.strip() for text in options.get("text_column", ()) for name in text.split(",")]
    if columns:
        options["text_column"] = columns[0] if len(columns) == 1 else columns
    return options


def _unescaped(text: str) -> str:
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
            return {label: _unescaped(word) if isinstance(word, str) else word for label, word in by_label.items()}
    return [_unescaped(word) for word in given]
