"""Options that several commands share: the engine's, the data's, the method's, and of what is opened."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from . import fields
from .config_file import ConfigFile
from .fields import Option, add_options_of, count, options_of

IDENTITY = (
    "storage", "keep", "compute", "mode", "rounding", "fold_every", "block_numel", "trainable", "tail", "tail_lr",
    "tail_optimizer", "seed", "num_labels", "config_overrides", "attn_implementation",
)  # fmt: skip
"""Options that numbers depend on: a run keeps them."""
NOT_SETTINGS = ("num_labels", "attn_implementation")  # not fields of EngineConfig
MODEL_ONLY = (
    "rounding", "fold_every", "order", "trainable", "tail", "tail_lr", "tail_optimizer", "snapshot_minutes",
    "snapshot_steps",
)  # fmt: skip
"""Options of training only."""

COUNTS = {name: {"type": count} for name in ("steps", "batch_size", "micro_batches", "eval_every", "save_every",
                                              "log_every")}  # fmt: skip


def model(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("model", nargs="?", metavar="MODEL", help=text)
    config(command)


def config(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", metavar="FILE", help="options by name, in YAML or JSON, or a run's config.json")


def opens(command: argparse.ArgumentParser) -> None:
    """Add options for opening a checkpoint or a run without training."""
    model(command, "checkpoint or run directory")
    base(command)
    own_class(command)
    engine(command, without=MODEL_ONLY)


def engine(command: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    from ..config import EngineConfig

    group = command.add_argument_group("engine", "where weights live, and how they are stored and computed")
    options = settings(EngineConfig)
    add_options_of(group, {name: option for name, option in options.items() if name not in without})
    group.add_argument("--model-class", help="such as AutoModelForSequenceClassification")
    group.add_argument("--lora", metavar="RANK", type=int, help="train a new LoRA adapter; the rest stays as it is")
    attention = "such as eager or sdpa, instead of the model's own choice"
    group.add_argument("--attn-implementation", help=attention)
    group.add_argument("--num-labels", type=count, help="classes of a new head, instead of config.json's")
    tokenizer = "directory or cached hub id, if the checkpoint has none or to use another"
    group.add_argument("--tokenizer", help=tokenizer)


def settings(kind: type) -> dict[str, Option]:
    """The fields of EngineConfig as options."""
    given: dict[str, dict[str, Any]] = {
        "keep": {"nargs": "+"}, "trainable": {"nargs": "+"}, "tail": {"nargs": "+"},
        "config_overrides": {"type": fields.json_object, "metavar": "JSON"},
        "adapter": {"type": str, "metavar": "DIR|SETTINGS"},
        "fold_every": {"type": fields.count_or_auto, "metavar": "N|auto"},
        **{name: {"type": count} for name in ("num_slots", "block_numel", "io_threads", "threads",
                                              "scrub_every", "snapshot_steps")},
    }  # fmt: skip
    return options_of(kind, given)


def data(command: argparse.ArgumentParser) -> None:
    from ..data.encode import Encoder

    group = command.add_argument_group("data", "what rows become")
    options = options_of(Encoder, {"max_length": {"type": count}})
    hidden = ("own_objective", "version")
    add_options_of(group, {name: option for name, option in options.items() if name not in hidden})


def methods(command: argparse.ArgumentParser, argv: Sequence[str], config: ConfigFile | None) -> None:
    from .method_options import add_options

    method = None if config is None else config.values.get("method")
    add_options(command, argv, method if isinstance(method, str) else None)


def own_class(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", metavar="FILE.py:CLASS", help="for a run: your own class that it was made with")


def merge(command: argparse.ArgumentParser) -> None:
    text = "for an adapter: export the whole model with the adapter merged"
    command.add_argument("--merge", action="store_true", default=None, help=text)


def base(command: argparse.ArgumentParser) -> None:
    command.add_argument("--base", help="for a run: the new path of its base checkpoint, if it was moved")


def token_file(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("--token-file", metavar="FILE", help=text)
