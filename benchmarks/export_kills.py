"""Exports killed on purpose, over an earlier export: at every move of a file, at random moments. Exit 1 on a mixture.

    python -m benchmarks.export_kills [--random 200] [--every 1] [--readers 40] [--seed 0]

An old export (weights, config.json, tokenizer; other rope_theta, other vocabulary) lies in a directory; a child exports
a new one over it and is killed with SIGKILL. What lies there then is loaded by plain transformers and compared with
both, each of its parts: old, new, or an error ("loud"). Anything else, or two parts that are not of one export, is a
mixture. Then an export is let finish: it must be whole, with nothing left beside it, and files of the user's own must
have stayed.

moves     one kill before each call that changes a name (rename, exchange, link, unlink, mkdir, rmdir), in every case
random    kills at random moments, from the first byte to the end
readers   a process that loads the directory again and again while exports that differ in their weights alone replace
          each other in it

Cases: one file or shards, before and after; nothing else in the directory, a file of the user's, a folder of the user's
(then files are replaced one by one), and a system that cannot exchange directories.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.common import about, emit
from benchmarks.faults import in_child
from zo_offload.checkpoint import publish
from zo_offload.checkpoint.checkpoint import save_pretrained

MOVES = ("replace", "rename", "link", "unlink", "remove", "mkdir", "rmdir")
ONE, MANY = 10**9, 9_000
BESIDE = ("nothing", "file", "folder", "no exchange")


def make(which: int) -> tuple[Any, Any]:
    """A model and a tokenizer; those of two numbers have the same names and shapes, and differ in everything else."""
    torch.manual_seed(which)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4 + which},
    )  # fmt: skip
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"word{which}{i}" for i in range(8))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", model_max_length=100 + which
    )
    return transformers.LlamaForCausalLM(config).eval(), tokenizer


def facts(directory: Path, *, parts: tuple[str, ...] = ("model", "tokenizer")) -> dict[str, Any]:
    """What plain transformers loads from there, by part; an error's name where it loads nothing."""
    found: dict[str, Any] = {}
    for part in parts:
        try:
            if part == "model":
                model = transformers.AutoModelForCausalLM.from_pretrained(directory)
                found["weights"] = [float(p.detach().double().sum()) for p in model.parameters()]
                found["config"] = model.config.rope_parameters["rope_theta"]
            else:
                tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
                found["tokenizer"] = [sorted(tokenizer.get_vocab()), tokenizer.model_max_length]
        except Exception as error:  # loud: any error will do
            found[f"no {part}"] = type(error).__name__
    return found


def verdict(found: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> str:
    """old, new or loud; "mixture" of parts of both, or of a part that is neither's."""
    both = {"old": old, "new": new}
    parts = [part for part in old if part in found]
    whose = {next((name for name, facts in both.items() if found[part] == facts[part]), "?") for part in parts}
    if len(whose) > 1 or "?" in whose:
        return "mixture"
    return "loud" if any(part.startswith("no ") for part in found) else next(iter(whose))


def export(target: Path, which: int, shard: int) -> None:
    model, tokenizer = make(which)
    save_pretrained(target, model=model, tokenizer=tokenizer, max_shard_bytes=shard, overwrite=True)


def kill_at(number: int) -> None:
    """This process kills itself before the so manieth call that changes a name."""
    left = [number]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in MOVES:
        setattr(os, name, counted(getattr(os, name)))
    publish._exchange = counted(publish._exchange)


class Case:
    """One way to overwrite: how many files before and after, and what else is in the directory."""

    def __init__(self, folder: Path, before: int, after: int, beside: str) -> None:
        self.folder, self.before, self.after, self.beside = folder, before, after, beside
        self.target = folder / "out" / "tuned"
        self.old, self.new = folder / "old", folder / "new"
        for place, which, shard in ((self.old, 1, before), (self.new, 2, after)):
            export(place, which, shard)
        self.facts = {"old": facts(self.old), "new": facts(self.new)}
        assert all(len(found) == 3 for found in self.facts.values()) and self.facts["old"] != self.facts["new"]

    def set_up(self) -> None:
        shutil.rmtree(self.target.parent, ignore_errors=True)
        self.target.parent.mkdir()
        shutil.copytree(self.old, self.target)
        if self.beside != "nothing":
            (self.target / "mine.log").write_text("precious")
        if self.beside == "folder":
            (self.target / "logs").mkdir()
            (self.target / "logs" / "mine.txt").write_text("precious")

    def overwrite(self, kill: int | None = None) -> None:
        if self.beside == "no exchange":
            publish._exchange = lambda one, other: False
        if kill is not None:
            kill_at(kill)
        export(self.target, 2, self.after)

    def look(self) -> str:
        return verdict(facts(self.target), self.facts["old"], self.facts["new"])

    def finish(self) -> list[str]:
        """What is wrong after one more export, let finish."""
        in_child(self.overwrite)
        wrong = [] if self.look() == "new" else ["the export after the kill is not whole"]
        extra = {p.name for p in self.target.parent.iterdir()} - {self.target.name}
        wrong += [f"left beside it: {sorted(extra)}"] if extra else []
        kept = {"nothing": (), "folder": ("mine.log", "logs/mine.txt")}.get(self.beside, ("mine.log",))
        wrong += [f"{name} is lost" for name in kept if not (self.target / name).is_file()]
        names = {p.name for p in self.target.iterdir()} - {"mine.log", "logs"}
        wrong += [f"files {sorted(names)}"] if len(names) != len(list(self.new.iterdir())) else []
        return wrong


def cases(folder: Path) -> Iterator[Case]:
    for number, (before, after, beside) in enumerate(product((ONE, MANY), (ONE, MANY), BESIDE)):
        yield Case(folder / f"case-{number}", before, after, beside)


def moves(folder: Path, every: int = 1) -> dict[str, Any]:
    """A kill before every `every`th call that changes a name."""
    seen: Counter[str] = Counter()
    by_beside: dict[str, Counter[str]] = {beside: Counter() for beside in BESIDE}
    wrong, kills = [], 0
    for index, case in enumerate(cases(folder)):
        at = index % every
        while True:
            case.set_up()
            if not in_child(lambda c=case, n=at: c.overwrite(n))[0]:
                break
            kills += 1
            state = case.look()
            seen[state] += 1
            by_beside[case.beside][state] += 1
            wrong += [f"{case.beside}, move {at}: mixture"] if state == "mixture" else []
            wrong += [f"{case.beside}, move {at}: {what}" for what in case.finish()]
            at += every
    return {"kind": "moves", "kills": kills, "found": dict(seen), "by_case": {k: dict(v) for k, v in by_beside.items()},
            "wrong": len(wrong), "what": wrong[:5]}  # fmt: skip


def at_random(folder: Path, count: int, rng: random.Random) -> dict[str, Any]:
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    all_cases = list(cases(folder))
    begin = time.monotonic()
    all_cases[0].set_up()
    in_child(all_cases[0].overwrite)
    seconds = time.monotonic() - begin
    for _ in range(count):
        case = rng.choice(all_cases)
        case.set_up()
        killed, _ = in_child(case.overwrite, rng.uniform(0, 1.2 * seconds))
        state = case.look()
        seen[f"{state}{'' if killed else ', not killed'}"] += 1
        wrong += [f"{case.beside}: mixture"] if state == "mixture" else []
        wrong += [f"{case.beside}: {what}" for what in case.finish()]
    return {"kind": "random", "kills": count, "found": dict(seen), "wrong": len(wrong), "what": wrong[:5]}


def readers(folder: Path, count: int) -> dict[str, Any]:
    """Loads while exports replace each other."""
    target = folder / "read" / "tuned"
    target.parent.mkdir()

    def put(which: int) -> None:
        model, tokenizer = make(1)
        torch.manual_seed(which)
        for parameter in model.parameters():
            parameter.data.normal_()
        save_pretrained(target, model=model, tokenizer=tokenizer, max_shard_bytes=MANY, overwrite=True)

    known = []
    for which in (1, 2):
        put(which)
        known.append(facts(target, parts=("model",))["weights"])
    seen: Counter[str] = Counter()
    for _ in range(count):
        writer = os.fork()
        if writer == 0:
            for which in (1, 2, 1, 2):
                put(which)
            os._exit(0)
        while os.waitpid(writer, os.WNOHANG) == (0, 0):
            weights = facts(target, parts=("model",)).get("weights")
            seen["loud" if weights is None else "whole" if weights in known else "mixture"] += 1
    return {"kind": "readers", "loads": seen.total(), "found": dict(seen), "wrong": seen["mixture"], "what": []}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=200)
    parser.add_argument("--every", type=int, default=1, help="of the moves")
    parser.add_argument("--readers", type=int, default=40, help="times that four exports follow each other")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    common, wrong = about("export_kills"), 0
    with tempfile.TemporaryDirectory() as folder:
        for name, result in (
            ("moves", lambda place: moves(place, options.every)),
            ("random", lambda place: at_random(place, options.random, random.Random(options.seed))),
            ("readers", lambda place: readers(place, options.readers)),
        ):
            place = Path(folder) / name
            place.mkdir()
            values = result(place)
            wrong += values["wrong"]
            emit(values, common)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
