"""`make demo`: a real model learns a real task by forward passes only, its weights streamed from disk.

    python examples/demo.py --out demo [--steps 40] [--seed 0] [--compute auto]

all-MiniLM-L6-v2 learns to tell spam from ham, with two sentences as its head (`demo_assets.py`), in two ways:

    all weights   every weight of its six layers, FZOO with 8 directions; the embedding and the head stay
    adapter       the base in four bits and only read; what trains is an adapter in a basis of the layers' own inputs

The accuracy is that of 200 messages which are neither trained on nor chosen by: rates were tried on tune.jsonl, by

    zo-offload sweep demo/model --model-class AutoModelForSequenceClassification --max-length 32 --data demo/train.jsonl --eval-data demo/tune.jsonl --trainable bert.encoder --storage bf16+16 --method fzoo --eps 1e-3 --schedule linear --steps 40 --rates 0.01 0.02 --run-dir sweep

Plain transformers then loads what was exported, and says the same accuracy; of the adapter, but for the rounding to
bf16 that merging has. It is exported for peft too, and belongs to the base as four bits have it. The last lines are the
plot and the page of both runs. It takes some 200 s of one core in all.
"""  # noqa: E501 - a command is one line

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from demo_assets import write_assets
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from zo_offload import FZOO, Engine
from zo_offload.cli import main as zo_offload

CLASSES = "AutoModelForSequenceClassification"
ROWS: dict[str, Any] = dict(max_length=32)
LAYERS = "bert.encoder"
FZOO_ALL = dict(lr=0.02, eps=1e-3, directions=8, batch_size=16, schedule="linear")
FZOO_BASIS = dict(lr=0.12, eps=1e-3, directions=16, batch_size=16, schedule="linear")
BLOCK = 1 << 20  # elements: the embedding is half of this model, and is cut into pieces too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="demo", help="where model, data, runs and exports go")
    parser.add_argument(
        "--steps", type=int, default=40, help="with all weights; the adapter takes 2 for each 5 of them"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compute", default="fp32", help="dtype of forwards; auto: bf16 where this CPU is faster with it"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, to peft
    print("preparing the model and the data ...", flush=True)
    folder = write_assets(options.out)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    model = folder / "model"
    common: dict[str, Any] = dict(
        model_class=CLASSES, seed=options.seed, offload="disk", num_slots=2, compute=options.compute
    )

    runs = [folder / f"all-weights-{stamp}", folder / f"adapter-{stamp}"]
    with Engine(
        model, method=FZOO(**FZOO_ALL), trainable=LAYERS, storage="bf16+16", block_numel=BLOCK, run_dir=runs[0],
        **common,
    ) as engine:  # fmt: skip
        learn("all weights", engine, folder, options.steps)

    basis = folder / f"basis-{stamp}"
    with Engine(model, model_class=CLASSES) as engine:
        batch = engine.batching.batches(folder / "train.jsonl", 16, ROWS).first()
        engine.activation_basis(batch, rank=4, layers=LAYERS).save(basis)
    with Engine(
        model, method=FZOO(**FZOO_BASIS), adapter=basis, trainable="lora_B", keep="lora_A", storage="int4",
        block_numel=BLOCK, run_dir=runs[1], **common,
    ) as engine:  # fmt: skip
        learn("adapter", engine, folder, max(1, options.steps * 2 // 5))

    for view in ("plot", "report"):
        zo_offload([view, *map(str, runs), *(("--y", "accuracy") if view == "plot" else ())])


def learn(name: str, engine: Engine, folder: Path, steps: int) -> None:
    """Train, export, and say what came of it."""
    test = folder / "test.jsonl"
    before = engine.evaluate(test, **ROWS)
    show(name, "before", before)
    result = engine.fit(
        folder / "train.jsonl", steps=steps, eval_data=test, eval_every=max(1, steps // 2), progress=True, **ROWS
    )
    after = result.evals[-1]
    show(name, f"{steps} steps", after)
    gain, moved = 100 * (after["accuracy"] - before["accuracy"]), result.fetch_bytes + result.flush_bytes
    print(
        f"{name:<12} {gain:+.1f} points in {result.seconds:.0f} s, {moved / 1e6:.0f} MB moved; weights in memory: "
        f"{result.resident_bytes / 1e6:.1f} MB of {result.model_bytes / 1e6:.1f} MB "
        f"({100 * result.resident_bytes / result.model_bytes:.0f} %)"
    )
    tuned = whole = folder / f"tuned-{engine.run_dir.name}"
    engine.save_pretrained(tuned)
    if (tuned / "adapter_config.json").exists():  # it belongs to the base as four bits have it, which goes along here
        print(f"{name:<12} for peft: {tuned}")
        whole = tuned.with_name(f"{tuned.name}-merged")
        engine.save_pretrained(whole, merge=True)
    print(f"{name:<12} plain transformers: accuracy {100 * plainly(folder, whole):.1f} %   ({whole})")


def show(name: str, when: str, values: dict[str, float]) -> None:
    print(
        f"{name:<12} {when:<9} held-out accuracy {100 * values['accuracy']:.1f} %   loss {values['loss']:.3f}",
        flush=True,
    )


@torch.no_grad()
def plainly(folder: Path, tuned: Path) -> float:
    """Accuracy of an exported model in the library that others have."""
    model = AutoModelForSequenceClassification.from_pretrained(tuned).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    limits = dict(padding=True, truncation=True, max_length=ROWS["max_length"], return_tensors="pt")
    logits = model(**tokenizer([row["text"] for row in rows], **limits)).logits
    return float((logits.argmax(-1) == torch.tensor([row["label"] for row in rows])).float().mean())


if __name__ == "__main__":
    main()
