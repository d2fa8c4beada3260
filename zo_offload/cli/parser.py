"""Parses the command line: commands, their options, and config files. `command.py` runs the commands.

Most options are fields of dataclasses: `FitCall` (the run), `EngineConfig` (the engine), `Encoder` (the data), and the
methods. They are read only for the requested command, since their classes import torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from ..errors import ConfigError
from ..system.nearest import did_you_mean
from ..system.plain import user_path
from . import fields, views
from . import option_groups as groups
from .config_file import ConfigFile, read_config
from .fields import add_options_of, as_option, count, options_of, positive


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest name; options cannot be abbreviated."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} ({self.prog} --help lists all)", file=sys.stderr)
        sys.exit(2)

    def known(self) -> dict[str, argparse.Action]:
        """The options and arguments, by their names in a config file."""
        return {action.dest: action for action in self._actions if action.dest not in ("help", "config")}

    def unknown(self, extras: Sequence[str]) -> NoReturn:
        """Raise an error for unknown arguments."""
        name = next((extra for extra in extras if extra.startswith("-")), extras[0]).partition("=")[0]
        self.error(f"{name} is not an option of it.{did_you_mean(name, self._option_string_actions)}")

    def take(self, config: ConfigFile) -> None:
        """Use the file's values for arguments that are not given. Raises ConfigError."""
        known = self.known()
        for name in config.values:
            if name not in known:
                raise ConfigError(f"{config.path}: {name!r} is no option of {self.prog}.{did_you_mean(name, known)}")
        values = {name: as_option(known[name], value, f"{config.path}: {name}")
                  for name, value in config.values.items()}  # fmt: skip
        self.set_defaults(**values, method_record=config.method)


def parse(argv: Sequence[str], run: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.Namespace:
    """The arguments of a command, with the function that runs it. run: functions by command name."""
    from .. import __version__

    parser = Parser(prog="zo-offload", description="Fine-tune models far larger than the device.")
    parser.add_argument("--version", action="version", version=f"zo-offload {__version__}")
    commands = parser.add_subparsers(
        required=True, metavar=" | ".join([*_COMMANDS, "plot", "report"]), parser_class=Parser
    )
    asked = next(iter(argv), None)
    chosen = parser
    views.add_commands(commands)
    for name, (about, add) in _COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about, usage=f"zo-offload {name} {_USAGE[name]}")
        command.set_defaults(run=run[name])
        if name == asked:
            chosen, config = command, _config_of(argv)
            add(command, argv, config)
            if config is not None:
                command.take(config)
    if asked is not None and not asked.startswith("-") and asked not in commands.choices:
        parser.error(f"{asked!r} is not a command.{did_you_mean(asked, commands.choices)}")
    args, extras = parser.parse_known_args(argv)
    if extras:
        chosen.unknown(extras)
    for name, action in chosen.known().items():
        if action.nargs == "?" and not action.option_strings and getattr(args, name) is None:
            chosen.error(f"{action.metavar or name} is missing: {action.help}")
    for name in _PATHS:  # no shell replaces the ~ in --run-dir=~/a, or in a config file
        if isinstance(value := getattr(args, name, None), str) and value.startswith("~"):
            setattr(args, name, str(user_path(value)))
    return args


_PATHS = ("model", "base", "data", "eval_data", "demonstrations", "run_dir", "out", "save_dir", "adapter", "tokenizer",
          "task", "journal", "path", "timeline")  # fmt: skip


def _config_of(argv: Sequence[str]) -> ConfigFile | None:
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    path = early.parse_known_args(list(argv))[0].config
    return None if path is None else read_config(path)


# ---- commands --------------------------------------------------------------------------------------------------------

_Add = Callable[[Parser, Sequence[str], ConfigFile | None], None]


def _fit(fit: Parser, argv: Sequence[str], config: ConfigFile | None) -> None:
    from ..journal.calls import FitCall

    groups.model(fit, "checkpoint directory or cached hub id; with --resume, the run directory")
    groups.base(fit)
    fit.add_argument("--resume", action="store_true", default=None,
                     help="continue the run in MODEL; data, steps and so on stay as before unless given")  # fmt: skip
    fit.add_argument("--new-data", action="store_true", default=None,
                     help="go on with other data than the run was begun with")  # fmt: skip
    dry = "show a summary of the data, and its first rows as the model will see them; no step"
    fit.add_argument("--dry-run", action="store_true", default=None, help=dry)
    fit.add_argument("--out", help="export the tuned checkpoint here: the last step, with --keep-best the best")
    groups.merge(fit)
    waits = "under torchrun, or with --serve: seconds to wait for another rank (default: measured)"
    fit.add_argument("--patience", type=float, help=waits)
    fit.add_argument("--serve", metavar="HOST:PORT", help="let others join the run there (docs/ranks.md)")
    groups.token_file(fit, "with --serve: a file with the token that members need (default: RUN_DIR/token, created)")
    audit = "with --serve: share of the members' lanes that is recomputed and compared (default: 0.02)"
    fit.add_argument("--audit", type=float, help=audit)
    tolerance = "with --serve: relative difference that such losses may have (default: 0.001)"
    fit.add_argument("--tolerance", type=float, help=tolerance)
    fit.add_argument("--quiet", action="store_true", default=None, help="show no progress")
    run = fit.add_argument_group("run", "length, evaluation, and what is kept")
    given = {"data": {"type": str}, "eval_data": {"type": str}} | groups.COUNTS
    add_options_of(run, options_of(FitCall, given, lists=False))
    groups.engine(fit)
    groups.data(fit)
    groups.methods(fit, argv, config)


def _plan(plan: Parser, argv: Sequence[str], config: ConfigFile | None) -> None:
    groups.model(plan, "checkpoint or run directory, a config's file, or a name such as llama-3-70b")
    plan.add_argument("--tokens", type=count, help="tokens per row (default: 512, or the model's maximum)")
    plan.add_argument("--batch-size", type=count, help="rows (default: fit's)")
    plan.add_argument("--micro-batches", type=count, default=1, help="parts a batch is cut into (default: 1)")
    plan.add_argument("--steps", type=count, help="total steps, for hours and wear")
    plan.add_argument("--gpu", help="such as rtx-4090, t4, a100, h200: planned for with its public rates")
    plan.add_argument("--host-memory", dest="machine_memory", help="of that machine, such as 128GB")
    plan.add_argument("--host-bandwidth", type=positive, help="GB/s that its memory reads, a possible bottleneck")
    plan.add_argument("--disk", help="nvme-gen3, nvme-gen4, nvme-gen4-qlc, nvme-gen5, nvme-datacenter, or GB/s")
    plan.add_argument("--disk-size", type=positive, metavar="TB", help="of the drive, for its wear (default: 2)")
    plan.add_argument("--link", help="GB/s that blocks move at, or pcie4-x8 (default: the GPU's, or measured)")
    plan.add_argument("--compare", choices=["gpus", "disks"], help="a table of all known GPUs or drives")
    plan.add_argument(
        "--ranks", type=count, metavar="N", help="a table: tokens/s of 1, 2, 4, ... N GPUs, and the bottleneck"
    )
    nvlink = "GB/s that a GPU receives from the others: adds what slices and shards would give"
    plan.add_argument("--nvlink", type=positive, metavar="GB/S", help=nvlink)
    plan.add_argument("--timeline", metavar="FILE", help="write a predicted timeline of one step, for ui.perfetto.dev")
    groups.engine(plan, without=["host_memory"])  # there it is how memory is locked; here the flag gives its size
    groups.methods(plan, argv, config)


def _rate(rate: Parser, argv: Sequence[str], config: ConfigFile | None) -> None:
    groups.model(rate, "checkpoint directory or cached hub id")
    rate.add_argument("--data", help="training data, as fit takes it")
    rates = "learning rates (default: a tenth to ten times the method's)"
    rate.add_argument("--rates", type=float, nargs="+", help=rates)
    rate.add_argument("--steps", type=count, default=20, help="steps at each rate (default: 20)")
    rate.add_argument("--batch-size", type=count, help="rows per step (default: the method's)")
    rate.add_argument("--micro-batches", type=count, help="parts a batch is cut into (default: 1)")
    groups.engine(rate)
    groups.data(rate)
    groups.methods(rate, argv, config)


def _sweep(sweep: Parser, argv: Sequence[str], config: ConfigFile | None) -> None:
    from ..journal.calls import FitCall

    if config is not None and "seed" in config.values:  # of one run, such as the file of a run that is to be varied
        config.values.setdefault("seeds", [config.values.pop("seed")])
    groups.model(sweep, "checkpoint directory or cached hub id")
    sweep.add_argument("--methods", nargs="+", metavar="METHOD", help="several methods (default: that of --method)")
    sweep.add_argument("--rates", type=float, nargs="+", metavar="LR", help="learning rates (default: the method's)")
    times = "instead of --rates: factors of each method's own rate, such as 0.3 1 3"
    sweep.add_argument("--times", type=float, nargs="+", metavar="FACTOR", help=times)
    sweep.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="a run for each (default: 0)")
    sweep.add_argument("--quiet", action="store_true", default=None, help="show no progress within a run")
    run = sweep.add_argument_group("run", "length, evaluation, and what is kept, for every run")
    given = {"data": {"type": str}, "eval_data": {"type": str}} | groups.COUNTS
    add_options_of(run, options_of(FitCall, given, lists=False))
    groups.engine(sweep, without=["seed"])
    groups.data(sweep)
    groups.methods(sweep, argv, config)


def _basis(basis: Parser, argv: Sequence[str], config: ConfigFile | None) -> None:
    groups.opens(basis)
    basis.add_argument("--data", help="rows of the task: the first batch of them is used")
    basis.add_argument("--batch-size", type=count, default=16, help="rows of that batch (default: 16)")
    basis.add_argument("--rank", type=count, default=4, help="directions per layer (default: 4)")
    basis.add_argument("--layers", nargs="+", help="globs of the layers (default: all but the vocabulary's head)")
    basis.add_argument("--out", help="fresh directory for it: a peft adapter that is still 0")
    groups.data(basis)


def _eval(evaluate: Parser, argv: Sequence[str], config: ConfigFile | None) -> None:
    groups.opens(evaluate)
    evaluate.add_argument("--data", help="what to evaluate on (default: the run's --eval-data)")
    evaluate.add_argument("--batch-size", type=count, help="rows at a time (default: a run's, else 16)")
    evaluate.add_argument("--eval-rows", type=count, help="number of rows, chosen by the seed (default: all)")
    evaluate.add_argument("--step", type=fields.which_step, help="for a run: this step, or best (default: the last)")
    shots = "a table: with this many demonstrations before each prompt; for a run, its base too"
    evaluate.add_argument("--shots", type=int, nargs="+", metavar="N", help=shots)
    evaluate.add_argument("--demonstrations", help="their source (default: a task's train split, a run's data)")
    groups.data(evaluate)


def _generate(generate: Parser, argv: Sequence[str], config: ConfigFile | None) -> None:
    groups.opens(generate)
    generate.add_argument("--prompt", nargs="+", help="texts to be continued")
    generate.add_argument("--max-new-tokens", type=count, default=32, help="maximum number of new tokens (default: 32)")
    coldest = "0 (default): always the likeliest token"
    generate.add_argument("--temperature", type=fields.temperature, default=0.0, help=coldest)


def _export(export: Parser, argv: Sequence[str], config: ConfigFile | None) -> None:
    groups.opens(export)
    export.add_argument("--out", help="directory to write")
    groups.merge(export)
    text = (
        "safetensors, safetensors-f32, peft or merged; kept (a quantized checkpoint's own layout); fp8 (linear layers, "
        "a scale for each 128 x 128); gguf, gguf-q8_0, ... (one file)"
    )
    export.add_argument("--as", dest="scheme", metavar="LAYOUT", help=text)
    export.add_argument("--step", type=fields.which_step, help="for a run: this step, or best (default: the last)")
    export.add_argument("--max-shard", default="5GB", help="largest file (default: 5GB)")


def _replay(replay: Parser, argv: Sequence[str], config: ConfigFile | None) -> None:
    replay.add_argument("base", nargs="?", help="the checkpoint that the run began with")
    replay.add_argument("journal", nargs="?", help="journal.zoj, or the run directory")
    replay.add_argument("--to", type=int, help="steps to take (default: all)")
    replay.add_argument("--tail-file", metavar="FILE", help="a tail's numbers at that step (default: the run's)")
    replay.add_argument("--out", help="directory to write")
    groups.merge(replay)
    replay.add_argument("--adapter", metavar="DIR", help="the adapter that the run began with, if it was moved")
    replay.add_argument("--max-shard", default="5GB", help="largest file (default: 5GB)")
    replay.add_argument("--overwrite", action="store_true", help="write into a directory that is not empty")
    replay.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the base")
    groups.own_class(replay)
    groups.config(replay)


def _journal(journal: Parser, argv: Sequence[str], config: ConfigFile | None) -> None:
    journal.add_argument("action", nargs="?", choices=["show", "check", "cut", "csv"], help="show, check, cut or csv")
    journal.add_argument("path", nargs="?", help="journal.zoj, or the run directory (then its blocks too)")
    journal.add_argument("--last", type=count, help="show: how many steps (default: 10)")
    journal.add_argument("--to", type=int, help="cut: how many steps to keep")


def _join(join: Parser, argv: Sequence[str], config: ConfigFile | None) -> None:
    from ..config import EngineConfig

    where = "where `fit --serve` listens, or a tunnel to it; several, with commas, where another keeper may follow"
    join.add_argument("address", nargs="?", metavar="HOST:PORT", help=where)
    join.add_argument("base", nargs="?", metavar="BASE", help="the run's base here: a checkpoint directory or hub id")
    join.add_argument("--data", help="the run's data on this machine (default: the keeper's path)")
    groups.token_file(join, "a file with the keeper's token (or it in ZO_OFFLOAD_TOKEN)")
    join.add_argument("--patience", type=float, help="seconds until another's lanes are late (default: keeper's)")
    wait = "seconds to look for a keeper that does not answer (default: 300)"
    join.add_argument("--wait", type=float, default=300.0, help=wait)
    over = "if the keeper is gone for --wait seconds, serve the run here, from --run-dir"
    join.add_argument("--take-over", metavar="HOST:PORT", help=over)
    join.add_argument("--quiet", action="store_true", default=None, help="show no progress")
    join.add_argument("--method", metavar="FILE.py:CLASS", help="your own class, if the run was made with one")
    join.add_argument("--model-class", help="such as AutoModelForSequenceClassification, if the run's is your own")
    join.add_argument("--tokenizer", help="directory or cached hub id, if the run was given one")
    group = join.add_argument_group("engine", "where weights live here; settings that numbers depend on are the run's")
    kept = (*groups.IDENTITY, *groups.MODEL_ONLY, "whole")
    add_options_of(group, {name: option for name, option in groups.settings(EngineConfig).items() if name not in kept})
    groups.config(join)


def _ranks(ranks: Parser, argv: Sequence[str], config: ConfigFile | None) -> None:
    ranks.add_argument("address", nargs="?", metavar="HOST:PORT", help="where `fit --serve` listens")
    groups.token_file(ranks, "a file with the keeper's token (or it in ZO_OFFLOAD_TOKEN)")


def _round(round_: Parser, argv: Sequence[str], config: ConfigFile | None) -> None:
    text = "begin a run, train a client's part of a round, merge clients' files, or show a file"
    round_.add_argument("action", nargs="?", choices=["start", "train", "merge", "show"], help=text)
    round_.add_argument("model", nargs="?", metavar="PATH", help="the base; the run directory; or a round's file")
    round_.add_argument("files", nargs="*", metavar="FILE", help="merge: the clients' files, or one file of a mean")
    groups.base(round_)
    round_.add_argument("--data", help="train: the client's data, as fit takes it")
    round_.add_argument("--client", help="train: the client's name; no two clients have the same")
    round_.add_argument("--steps", type=count, help="train: local steps")
    round_.add_argument("--batch-size", type=count, help="train: rows per step (default: the method's)")
    round_.add_argument("--micro-batches", type=count, default=1, help="train: parts of a batch (default: 1)")
    round_.add_argument("--rows", type=count, help="train: weight in the mean (default: rows of the data)")
    round_.add_argument("--out", help="train: the file to write; merge: also write the mean here, for the clients")
    groups.engine(round_)
    groups.data(round_)
    groups.methods(round_, argv, config)
    groups.config(round_)


def _nothing(command: Parser, argv: Sequence[str], config: ConfigFile | None) -> None:
    """Add no options."""


_COMMANDS: dict[str, tuple[str, _Add]] = {
    "fit": ("fine-tune a checkpoint, or go on with a run", _fit),
    "plan": ("time and memory of a run, on this or named hardware; reads no weights", _plan),
    "join": ("join a run that somebody else serves, from anywhere, for as long as you like", _join),
    "ranks": ("list the members of a served run, and their speed", _ranks),
    "round": ("federated rounds: clients train apart on their own data, and their mean is one step", _round),
    "methods": ("costs of a step for each method, and all recipes", _nothing),
    "rate": ("try a few steps at each of several learning rates; keeps no weights", _rate),
    "sweep": ("one run for each of several methods, rates and seeds, and a table of results", _sweep),
    "basis": ("main directions of the inputs of a model's layers, for --adapter", _basis),
    "eval": ("loss and accuracy of a checkpoint or a run", _eval),
    "generate": ("text from a checkpoint or a run; one pass of the weights per token", _generate),
    "export": ("a run's weights as a checkpoint for plain transformers", _export),
    "replay": ("the weights of any step, from the base and a journal alone", _replay),
    "journal": ("show, check or cut a journal, or print it as CSV", _journal),
    "doctor": ("show what is installed, and check that a tiny step works", _nothing),
}


_USAGE = {
    "fit": "MODEL --data FILE [--run-dir DIR] [options]", "plan": "MODEL [options]",
    "join": "HOST:PORT BASE --token-file FILE [options]", "ranks": "HOST:PORT --token-file FILE",
    "round": "start BASE --run-dir RUN | train RUN --data FILE --client NAME --steps N --out FILE | "
             "merge RUN FILE ... [--out FILE] | show FILE",
    "methods": "", "rate": "MODEL --data FILE [options]",
    "sweep": "MODEL --data FILE --eval-data FILE --run-dir DIR [options]",
    "basis": "MODEL --data FILE --out DIR [options]",
    "eval": "MODEL --data FILE [options]", "generate": "MODEL --prompt TEXT ... [options]",
    "export": "RUN --out DIR [options]", "replay": "BASE JOURNAL --out DIR [options]",
    "journal": "show | check | cut | csv JOURNAL [options]", "doctor": "",
}  # fmt: skip
