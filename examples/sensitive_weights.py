"""The most sensitive weights of a model, as a file for `--method senszoq`: those with the largest squared gradients.

    python examples/sensitive_weights.py base/ --text corpus.txt --share 0.001 --out mask.safetensors
    zo-offload fit base/ --data train.jsonl --method senszoq --mask-file mask.safetensors --run-dir run

Backpropagates once a line of text, so the model and its gradients have to fit; with the same architecture a smaller
machine may be given the file. The share is of all weights together, embeddings aside. The measure is that of Guo et al.
2024, arXiv 2406.02913.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def sensitive(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], share: float) -> dict[str, Tensor]:
    """By parameter, the indices of its elements among the `share` with the largest mean squared gradients."""
    left_out = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    params = {name: p for name, p in model.named_parameters() if id(p) not in left_out}
    for p in model.parameters():
        p.requires_grad_(id(p) not in left_out)
    squares = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, p in params.items():
            if p.grad is not None:
                squares[name] += p.grad.float() ** 2
    numel = sum(p.numel() for p in params.values())
    least = _threshold(list(squares.values()), max(1, round(share * numel)))
    return {name: (of.flatten() > least).nonzero().flatten() for name, of in squares.items()}


def _threshold(values: list[Tensor], count: int) -> float:
    """A number that about `count` of all values are above: by halving, to spare a sort of all."""
    low, high = 0.0, max(float(x.max()) for x in values)
    for _ in range(60):
        middle = (low + high) / 2
        if sum(int((x > middle).sum()) for x in values) > count:
            low = middle
        else:
            high = middle
    return high


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="a file; each line is a text")
    parser.add_argument("--share", type=float, default=0.001)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with open(options.text, encoding="utf-8") as file:
        rows = [tokenizer(line, truncation=True, max_length=options.max_length, return_tensors="pt") for line in file]
    model = AutoModelForCausalLM.from_pretrained(options.model)
    found = sensitive(
        model, ({**row, "labels": row["input_ids"]} for row in rows if row["input_ids"].numel() > 1), options.share
    )
    save_file(found, options.out)
    print(f"{sum(map(len, found.values())):,} weights in {options.out}")


if __name__ == "__main__":
    main()
