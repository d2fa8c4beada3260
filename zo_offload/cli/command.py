"""The command line: zo-offload fit | plan | methods | rate | basis | eval | generate | export | ... .

Only it prints.
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
from . import views


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors a user can cause are one line on standard error."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parser(argv).parse_args(argv)
        if args.run is not _fit and launched()[0] > 0:
            return 0  # of several processes one does what is not training
        return int(args.run(args))
    except (ZOError, OSError) as error:
        text = " ".join(str(error).split())
        _tell_launcher(text)
        print("zo-offload:", text, file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"zo-offload: {str(stop) or 'stopped'}", file=sys.stderr)
        return 128 + int(getattr(stop, "signum", signal.SIGINT))


def _tell_launcher(text: str) -> None:
    """The error where torchrun looks for it: it shows the first that one of its processes had."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not isinstance(sys.exc_info()[1], RankError):  # that is another's, which tells it
        about = {"py_callstack": "", "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": about}}))


# ---- commands --------------------------------------------------------------------------------------------------------


def _fit(args: argparse.Namespace) -> int:
    from ..engine import Engine
    from ..journal.run_directory import to_json
    from .method_options import make_method

    _check_out(args.out)
    if args.resume:
        own = _own_method(args)
        _refuse(args, "preset", "lora", *args.method_options, *_IDENTITY, "run_dir")
        engine = Engine.resume(
            args.model, args.base, **own, **_given(args, *_MOVABLE, "model_class", "adapter"), **_tokenizer(args),
            ranks=_ranks(args),
        )  # fmt: skip
    else:
        if args.base is not None:
            raise ConfigError(f"--base {args.base} says where the base of a run is now: give it with --resume")
        if args.data is None:
            raise ConfigError("--data is missing: a .jsonl or .csv file to train on")
        settings = {**_given(args, *_SETTINGS, *_MOVABLE, "run_dir"), **_adapter(args)}
        engine = Engine(
            args.model, method=make_method(args), model_class=args.model_class, **settings, **_overrides(args),
            **_tokenizer(args), ranks=_ranks(args),
        )  # fmt: skip
        if engine.storage_note and engine.ranks.leads:
            print(f"storage auto takes {engine.config.storage}: {engine.storage_note}")
    with engine:
        result = engine.fit(
            args.data, eval_data=args.eval_data, eval_every=args.eval_every, micro_batches=args.micro_batches,
            brake=args.brake,
            steps=args.steps, batch_size=args.batch_size, progress=not args.quiet,
            new_data=args.new_data, **_data_options(args),
        )  # fmt: skip
        if args.out:
            engine.save_pretrained(args.out, merge=args.merge)
    if not engine.ranks.leads:
        return 0
    print(
        f"{result.steps} steps, {result.tokens_per_s:.0f} tokens/s, resident weights "
        f"{result.resident_bytes / 1e6:.1f} MB of {result.model_bytes / 1e6:.1f} MB"
    )
    for warning in result.warnings:
        print(f"warning: {warning}")
    for values in result.evals:
        print(to_json(values))
    if args.out:
        print(f"exported to {args.out}")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from .method_options import make_method
    from .report import plan_report

    for line in plan_report(
        args.model, method=make_method(args), tokens=args.tokens, batch_size=args.batch_size,
        micro_batches=args.micro_batches, model_class=args.model_class, link_gb_per_s=args.link,
        **_given(args, *_SETTINGS, *_MOVABLE), **_adapter(args), **_overrides(args),
    ):  # fmt: skip
        print(line)
    return 0


def _rate(args: argparse.Namespace) -> int:
    from ..engine import Engine
    from .method_options import make_method
    from .rates import FACTORS, best, try_rates

    method = make_method(args)
    rates = args.rates or [factor * method.lr for factor in FACTORS]
    settings = {**_given(args, *_SETTINGS, *_MOVABLE), **_adapter(args)}

    def make(changed: Any) -> Any:
        folder = {} if args.run_dir is None else {"run_dir": Path(args.run_dir) / f"lr-{changed.lr:g}"}
        more = {**settings, **folder, **_overrides(args), **_tokenizer(args)}
        return Engine(args.model, method=changed, model_class=args.model_class, **more)

    fit = {"train_data": args.data, "batch_size": args.batch_size, "micro_batches": args.micro_batches}
    trials = []
    for trial in try_rates(make, method, {**fit, **_data_options(args)}, rates, args.steps):
        trials.append(trial)
        print(f"lr {trial.lr:<10.3g} loss {trial.first:.4f}, then {trial.last:.4f}  {trial.what}", flush=True)
    found = best(trials)
    if found is None:
        raise ConfigError("none of these rates went through: try smaller ones, --rates")
    print(f"best of these in {args.steps} steps: --lr {found.lr:.3g}. A long run may need half of it, or a decay")
    return 0


def _methods(args: argparse.Namespace) -> int:
    from .methods_table import presets, table

    for line in table():
        print(line)
    print("\nrecipes, for fit and plan:")
    for line in presets():
        print(f"  --method {line}")
    return 0


def _basis(args: argparse.Namespace) -> int:
    with _open(args) as engine:
        batch = engine.batching.batches(args.data, args.batch_size, _data_options(args)).first()
        basis = engine.activation_basis(batch, args.rank, layers=args.layers)
    basis.save(args.out)
    print(f"{len(basis.vectors)} layers, rank {basis.rank}. Train in it:")
    print(f"  --adapter {args.out} --trainable lora_B --keep lora_A")
    return 0


def _eval(args: argparse.Namespace) -> int:
    from ..journal.run_directory import to_json

    with _open(args) as engine:
        values = engine.evaluate(args.data, batch_size=args.batch_size, **_data_options(args))
    print(to_json(values))
    return 0


def _generate(args: argparse.Namespace) -> int:
    options = {"do_sample": False} if args.temperature == 0 else {"do_sample": True, "temperature": args.temperature}
    with _open(args) as engine:
        texts = engine.generate(args.prompt, max_new_tokens=args.max_new_tokens, **options)
    for prompt, text in zip(args.prompt, texts, strict=True):
        print(f"{prompt}{text}")
    return 0


def _export(args: argparse.Namespace) -> int:
    _check_out(args.out)
    with _open(args) as engine:
        files = engine.save_pretrained(args.out, max_shard_bytes=args.max_shard, merge=args.merge)
    print(f"wrote {len(files)} files to {args.out}")
    return 0


def _replay(args: argparse.Namespace) -> int:
    from ..replay import replay

    if not args.overwrite:
        _check_out(args.out)
    files = replay(args.base, args.journal, args.out, to=args.to, max_shard_bytes=args.max_shard,
                   overwrite=args.overwrite, merge=args.merge, trust_remote_code=args.trust_remote_code,
                   **_given(args, "adapter"), **_own_method(args))  # fmt: skip
    print(f"wrote {len(files)} files to {args.out}")
    return 0


def _journal(args: argparse.Namespace) -> int:
    from . import journal_tools

    path = Path(args.path)
    if args.action == "show":
        for line in journal_tools.show(path, args.last):
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


def _own_method(args: argparse.Namespace) -> dict[str, Any]:
    """The class of a user's own that a run was made with, if one is named: the run has its fields."""
    if args.method is None:
        return {}
    from .method_options import find_class

    kind = find_class(args.method)
    if kind.own():
        raise ConfigError(f"a run keeps the method that it was begun with: leave out --method {args.method}")
    return {"method": kind}


def _open(args: argparse.Namespace) -> Any:
    """An engine on a run directory (as its journal left it) or on a checkpoint."""
    from ..checkpoint.adapter_configs import is_adapter
    from ..engine import Engine
    from ..formats import FORMATS
    from ..journal import run_directory
    from ..methods import method_training

    if (Path(args.model) / run_directory.JOURNAL).exists():
        _refuse(args, "lora", *_IDENTITY, "run_dir")
        given = {**_own_method(args), **_given(args, *_MOVABLE, "model_class", "adapter")}
        return Engine.resume(args.model, args.base, **given, **_tokenizer(args), ranks=None)
    if args.base is not None:
        raise ConfigError(f"--base {args.base} says where the base of a run is now, and {args.model} is not a run")
    if args.method is not None:
        raise ConfigError(f"--method {args.method} says what a run was made with, and {args.model} is not a run")
    adapter = _adapter(args)
    adapts = bool(adapter) or is_adapter(Path(args.model))
    frozen = args.storage in FORMATS and not FORMATS[args.storage].trains and not adapts
    # nothing is trained here: the values as the format has them will do
    method = method_training("shifts") if frozen else None
    given = {**_given(args, *_SETTINGS, *_MOVABLE, "run_dir"), **adapter}
    return Engine(
        args.model, method=method, model_class=args.model_class, **given, **_overrides(args), **_tokenizer(args),
        ranks=None,
    )  # fmt: skip


def _ranks(args: argparse.Namespace) -> Any:
    """The processes that this one was launched with: they train together."""
    if args.patience is None:
        return "auto"
    from ..ranks.find import Group

    return Group(patience=args.patience)


def _check_out(out: str | None) -> None:
    """Raise before any work is done if `out` cannot be exported to."""
    if out is None:
        return
    path = Path(out).absolute()
    nearest = next(p for p in (path, *path.parents) if p.exists())
    if not nearest.is_dir():
        raise ConfigError(f"--out {out}: {nearest} is a file; give a directory to write to")
    if nearest == path and any(path.iterdir()):
        raise ConfigError(f"--out {out} is not empty; give a fresh directory")


def _refuse(args: argparse.Namespace, *names: str) -> None:
    """Raise if one of these options, which a run keeps from its beginning, was given."""
    if given := _given(args, *names):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{args.model} is a run and keeps its own settings: leave out {options}")


# ---- arguments -------------------------------------------------------------------------------------------------------

_IDENTITY = (  # what numbers depend on
    "storage",
    "keep",
    "compute",
    "rounding",
    "fold_every",
    "block_numel",
    "trainable",
    "seed",
    "num_labels",
    "attn_implementation",
)
_SETTINGS = tuple(
    name for name in _IDENTITY if name not in ("num_labels", "attn_implementation")
)  # fields of EngineConfig
_MOVABLE = (
    "offload",
    "device",
    "device_memory",
    "num_slots",
    "order",
    "snapshot_minutes",
    "trust_remote_code",
)  # what may change when it is resumed


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    """What of the checkpoint's config.json is to be another."""
    given = _given(args, "num_labels", "attn_implementation")
    return {"config_overrides": given} if given else {}


def _adapter(args: argparse.Namespace) -> dict[str, Any]:
    """The adapter that is asked for, as the engine's setting."""
    if args.lora is not None and args.adapter is not None:
        raise ConfigError(f"--lora {args.lora} makes a new adapter, and --adapter {args.adapter} names one: give one")
    return {"adapter": f"r={args.lora}"} if args.lora is not None else _given(args, "adapter")


def _tokenizer(args: argparse.Namespace) -> dict[str, Any]:
    """The tokenizer of another directory, where one was named."""
    if getattr(args, "tokenizer", None) is None:
        return {}
    from ..checkpoint.tokenizers import load_tokenizer

    return {"tokenizer": load_tokenizer(args.tokenizer, trust_remote_code=bool(args.trust_remote_code))}


def _data_options(args: argparse.Namespace) -> dict[str, Any]:
    options = _given(args, "task", "template", "verbalizers", "text_column", "label_column", "target_column",
                     "max_length", "loss")  # fmt: skip
    if "template" in options:
        options["template"] = options["template"].replace("\\n", "\n")
    if len(options.get("text_column", ())) == 1:
        options["text_column"] = options["text_column"][0]
    return options


def _count(text: str) -> int:
    """argparse's type of a number that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """argv: what is to be parsed; methods, and torch with them, are loaded for commands that take their options."""
    parser = argparse.ArgumentParser(prog="zo-offload", description="Fine-tune models far larger than the device.")
    commands = parser.add_subparsers(
        required=True,
        metavar="fit | plan | methods | rate | basis | eval | generate | export | replay | plot | report | journal",
    )

    fit = commands.add_parser("fit", help="fine-tune a checkpoint")
    fit.add_argument("model", help="checkpoint directory or cached hub id; with --resume, the run directory")
    fit.add_argument("--data", help="training data: .jsonl or .csv; with --resume, what the run was begun with")
    _base(fit)
    fit.add_argument("--eval-data", help="evaluation data: .jsonl or .csv")
    fit.add_argument("--eval-every", type=_count, help="steps between evaluations (always at the end)")
    fit.add_argument("--steps", type=_count, help="steps in all")
    fit.add_argument("--batch-size", type=_count)
    fit.add_argument("--micro-batches", type=_count, help="parts a batch is cut into (1)")
    fit.add_argument("--run-dir", help="journal, metrics and blocks")
    fit.add_argument("--brake", action="store_true", default=None, help="halve the rate whenever the loss rises")
    fit.add_argument("--new-data", action="store_true", help="go on with other data than the run was begun with")
    fit.add_argument("--snapshot-minutes", type=float, help="every block to the disk once in so long (10)")
    fit.add_argument(
        "--resume", action="store_true", help="continue the run in MODEL; what is not given (data, steps) is as it was"
    )
    fit.add_argument("--out", help="export the tuned checkpoint here")
    _merge(fit)
    fit.add_argument("--patience", type=float, help="under torchrun: seconds to wait for another rank (learnt)")
    _step_options(fit)
    fit.add_argument("--quiet", action="store_true", help="no progress bar")
    _storage(fit)
    _data(fit)
    _add_methods(fit, "fit", argv)
    fit.set_defaults(run=_fit)

    plan = commands.add_parser("plan", help="what a run would take: blocks, memory, traffic; reads no weights")
    plan.add_argument("model", help="checkpoint directory, config.json, or a size such as opt-175b")
    plan.add_argument("--tokens", type=_count, help="tokens a row: 512, or as many as the model takes")
    plan.add_argument("--batch-size", type=_count, default=1)
    plan.add_argument("--micro-batches", type=_count, default=1, help="parts a batch is cut into")
    plan.add_argument(
        "--link",
        type=float,
        help="GB/s that blocks move at (default: measured; of a GPU that is not here, 25 each way)",
    )
    _step_options(plan)
    _storage(plan)
    _add_methods(plan, "plan", argv)
    plan.set_defaults(run=_plan)

    rate = commands.add_parser("rate", help="a few steps at each of several learning rates; trains nothing to keep")
    rate.add_argument("model", help="checkpoint directory or cached hub id")
    rate.add_argument("--data", required=True, help="training data: .jsonl or .csv")
    rate.add_argument("--rates", type=float, nargs="+", help="learning rates (a tenth to ten times the method's)")
    rate.add_argument("--steps", type=_count, default=20, help="steps at each rate (20)")
    rate.add_argument("--batch-size", type=_count)
    rate.add_argument("--micro-batches", type=_count, help="parts a batch is cut into (1)")
    rate.add_argument("--run-dir", help="fresh directory for the trials' blocks, with --offload disk")
    _step_options(rate)
    _storage(rate)
    _data(rate)
    _add_methods(rate, "rate", argv)
    rate.set_defaults(run=_rate)

    methods = commands.add_parser("methods", help="what each method costs a step, and the recipes there are")
    methods.set_defaults(run=_methods)

    basis = commands.add_parser("basis", help="directions that a model's layers are given inputs in, for --adapter")
    basis.add_argument("model", help="checkpoint directory or cached hub id, or a run directory")
    _base(basis)
    _own_class(basis)
    basis.add_argument("--data", required=True, help="rows of the task: the first batch of them is looked at")
    basis.add_argument("--batch-size", type=_count, default=16)
    basis.add_argument("--rank", type=_count, default=4, help="directions a layer (4)")
    basis.add_argument("--layers", nargs="+", help="globs of the layers meant (all but the head on the vocabulary)")
    basis.add_argument("--out", required=True, help="fresh directory for it: an adapter of peft's that is 0 yet")
    basis.add_argument("--run-dir", help="fresh directory for the blocks of a checkpoint, with --offload disk")
    _storage(basis)
    _data(basis)
    basis.set_defaults(run=_basis)

    evaluate = commands.add_parser("eval", help="loss and accuracy of a checkpoint or a run")
    evaluate.add_argument("model", help="checkpoint or run directory")
    _base(evaluate)
    _own_class(evaluate)
    evaluate.add_argument("--data", required=True)
    evaluate.add_argument("--batch-size", type=_count, default=16)
    evaluate.add_argument("--run-dir", help="fresh directory for the blocks of a checkpoint, with --offload disk")
    _storage(evaluate)
    _data(evaluate)
    evaluate.set_defaults(run=_eval)

    generate = commands.add_parser("generate", help="text from a checkpoint or a run; one pass of the weights a token")
    generate.add_argument("model", help="checkpoint or run directory")
    _base(generate)
    _own_class(generate)
    generate.add_argument("--prompt", required=True, nargs="+")
    generate.add_argument("--max-new-tokens", type=_count, default=32)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default): the likeliest token each time")
    generate.add_argument("--run-dir", help="fresh directory for the blocks of a checkpoint, with --offload disk")
    _storage(generate)
    generate.set_defaults(run=_generate)

    export = commands.add_parser("export", help="a run's weights as a checkpoint for plain transformers")
    export.add_argument("model", help="run directory (or a checkpoint, with --storage to convert it)")
    _base(export)
    _own_class(export)
    export.add_argument("--out", required=True)
    _merge(export)
    export.add_argument("--max-shard", default="5GB")
    export.add_argument("--run-dir", help="fresh directory for the blocks of a checkpoint, with --offload disk")
    _storage(export)
    export.set_defaults(run=_export)

    replay = commands.add_parser("replay", help="the weights of any step, from the base and a journal alone")
    replay.add_argument("base", help="the checkpoint that the run began with")
    replay.add_argument("journal", help="journal.zoj, or the run directory")
    replay.add_argument("--to", type=int, help="steps to take (all)")
    replay.add_argument("--out", required=True)
    _merge(replay)
    replay.add_argument("--max-shard", default="5GB")
    replay.add_argument("--overwrite", action="store_true", help="write into a directory that is not empty")
    replay.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the base")
    replay.add_argument("--adapter", metavar="DIR", help="the adapter that the run began with, if it was moved")
    _own_class(replay)
    replay.set_defaults(run=_replay)

    views.add_commands(commands)

    journal = commands.add_parser("journal", help="show, check or cut a journal, or print it as CSV")
    journal.add_argument("action", choices=["show", "check", "cut", "csv"])
    journal.add_argument("path", help="journal.zoj, or the run directory (check and cut then see to its blocks too)")
    journal.add_argument("--last", type=int, default=10, help="show: how many steps")
    journal.add_argument("--to", type=int, help="cut: how many steps to keep")
    journal.set_defaults(run=_journal)
    return parser


def _step_options(command: argparse.ArgumentParser) -> None:
    """How a step is run: the same for a run and for its plan."""
    command.add_argument("--rounding", choices=["nearest", "stochastic"])
    command.add_argument("--fold-every", type=_count, help="steps between two write-backs of a block")
    command.add_argument("--num-slots", type=_count)
    command.add_argument("--order", choices=["auto", "module", "block", "lane"])
    command.add_argument("--seed", type=int)
    command.add_argument("--trainable", help="glob on parameter names, such as 'layers.*.self_attn'")


def _add_methods(command: argparse.ArgumentParser, name: str, argv: Sequence[str]) -> None:
    """The options of methods, for the command that is asked for: they are read from classes, which import torch."""
    if name in argv[:1]:
        from .method_options import add_options

        add_options(command, argv)


def _own_class(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", metavar="FILE.py:CLASS", help="of a run: your own class that it was made with")


def _merge(command: argparse.ArgumentParser) -> None:
    command.add_argument("--merge", action="store_true", help="of an adapter: export the whole model, with it in it")


def _base(command: argparse.ArgumentParser) -> None:
    command.add_argument("--base", help="of a run: where its base checkpoint is now, if it was moved")


def _storage(command: argparse.ArgumentParser) -> None:
    command.add_argument("--offload", choices=["auto", "none", "host", "disk"])
    command.add_argument("--device", help="cpu, cuda or cuda:N")
    command.add_argument("--storage", help="fp32, bf16, fp16, bf16+16, int8+8, int4, ... (zo_offload.formats)")
    command.add_argument("--keep", nargs="+", help="parameters a quantized storage leaves in 16 or 32 bits")
    command.add_argument("--compute", choices=["fp32", "bf16", "fp16"])
    command.add_argument("--device-memory", help="budget such as 6GB")
    command.add_argument("--block-numel", type=_count, help="most elements of a block, the unit that streams")
    command.add_argument("--model-class", help="such as AutoModelForSequenceClassification")
    command.add_argument("--lora", metavar="RANK", type=int, help="train a new LoRA adapter; the rest stays as it is")
    command.add_argument(
        "--adapter",
        metavar="DIR|SETTINGS",
        help="a peft adapter's directory, or a new one: r=16,target_modules=q_proj+v_proj, prefix=5, prompt=10",
    )
    command.add_argument("--attn-implementation", help="such as eager or sdpa, instead of the model's own choice")
    command.add_argument("--num-labels", type=_count, help="classes of a new head, instead of config.json's")
    command.add_argument(
        "--tokenizer", help="directory or cached hub id, where the checkpoint has none or another is meant"
    )
    command.add_argument(
        "--trust-remote-code", action="store_true", default=None, help="run code that comes with the checkpoint"
    )


def _data(command: argparse.ArgumentParser) -> None:
    command.add_argument("--task", choices=["auto", "lm", "classification", "prompt"])
    command.add_argument(
        "--template", help="prompt such as 'Review: {text}\\nSentiment:'; with {mask} for a masked model"
    )
    command.add_argument(
        "--verbalizers",
        nargs="+",
        help="one word a label, such as ' negative' ' positive', or columns: {choice1} {choice2}",
    )
    command.add_argument("--loss", choices=["model", "options"], help="its own (model), or among the verbalizers alone")
    command.add_argument("--text-column", nargs="+", help="of the text (text); two make a pair")
    command.add_argument("--label-column", help="of the label (label)")
    command.add_argument("--target-column", help="of a text that answers the prompt")
    command.add_argument("--max-length", type=_count)


if __name__ == "__main__":
    sys.exit(main())
