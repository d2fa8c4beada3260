"""The command line: zo-offload fit | plan | eval | generate | export | ... . Only it prints.

Exit status: 0 done; 1 a check failed (journal check, doctor); 2 an error, printed on one line; 128 + a signal's number
if that signal stopped it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, RankError, ZOError
from ..ranks.launcher import launched
from .arguments import check_out, data_options, engine_settings, given_of, open_engine, own_method, unescaped
from .output import printable
from .parser import parse
from .train_commands import fit, join, rate, roster, sweep


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
        if args.run is not fit and launched()[0] > 0:
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


def _plan(args: argparse.Namespace) -> int:
    from .planning import plan_lines

    for line in plan_lines(args, engine_settings(args)):
        print(line)
    return 0


def _methods(args: argparse.Namespace) -> int:
    from ..methods import missing
    from .methods_table import presets, table

    for line in table():
        print(line)
    print("\nrecipes, for fit and plan:")
    for line in presets():
        print(f"  --method {line}")
    print("\npublished under other names, or not here:")
    for line in missing.lines():
        print(f"  {line}")
    return 0


def _basis(args: argparse.Namespace) -> int:
    if args.data is None or args.out is None:
        raise ConfigError("--data and --out are needed: rows of the task, and a fresh directory to write to")
    with open_engine(args) as engine:
        batch = engine.batching.batches(args.data, args.batch_size, data_options(args)).first()
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
    with open_engine(args) as engine:
        known = engine.active.last_fit or {}
        data = args.data or known.get("eval_data")
        if data is None:
            raise missing
        options = {**(known.get("options") or {}), **data_options(args)}
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
    with open_engine(args) as engine:
        prompts = [unescaped(prompt) for prompt in args.prompt]
        texts = engine.generate(prompts, max_new_tokens=args.max_new_tokens, **options)
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"{prompt}{text}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from ..checkpoint.export import check_scheme

    if args.out is None:
        raise ConfigError("--out is missing: a directory to write to")
    check_out(args.out)
    check_scheme(args.scheme)
    with open_engine(args) as engine:
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
        check_out(args.out)
    files = replay(args.base, args.journal, args.out, to=args.to, max_shard_bytes=args.max_shard,
                   overwrite=args.overwrite, merge=bool(args.merge), trust_remote_code=args.trust_remote_code,
                   **given_of(args, "adapter", "tail_file"), **own_method(args))  # fmt: skip
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


def _round(args: argparse.Namespace) -> int:
    from .round_tools import lines_of

    for line in lines_of(args):
        print(line, flush=True)
    return 0


RUN = {
    "fit": fit, "plan": _plan, "eval": _eval, "generate": _generate, "export": _export, "replay": _replay,
    "join": join, "ranks": roster, "journal": _journal, "doctor": _doctor, "rate": rate, "sweep": sweep,
    "methods": _methods, "basis": _basis, "round": _round,
}  # fmt: skip
