"""A one-line summary of data, and its first rows as the model will see them, with learned tokens marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from ..modules.kind import IGNORED
from .batches import Batches, RowBatches
from .encode import Encoder

LOOKED_AT = 64  # number of evenly spaced rows that are read
LONGEST_SHOWN = 1200  # characters of a row


def survey(batches: Batches) -> str:
    """One line: rows, steps per epoch, tokens per row, and the answers that occur."""
    if not isinstance(batches, RowBatches):
        return f"{getattr(batches, 'name', 'data')}: read in order; its rows are checked as they come"
    rows, name = batches.rows, batches.name
    many = min(LOOKED_AT, len(rows))
    places = [k * len(rows) // many for k in range(many)]
    made = [batches.encoder(rows[i], f"{name} row {i}", "") for i in places]
    sizes = [len(row["input_ids"]) for row in made if "input_ids" in row]
    said = [f"{name}: {len(rows)} rows, {len(batches)} steps of {batches.batch_size} an epoch"]
    if sizes:
        looked = "" if many == len(rows) else f" (of {many} looked at)"
        said.append(f"{sum(sizes) / len(sizes):.0f} tokens a row, {max(sizes)} at most{looked}")
    if learned := [count for row in made if (count := _learned(row)) is not None]:
        said.append(f"{sum(learned) / len(learned):.1f} of them learned")
    answers = Counter(_answer(batches.encoder, rows[i], f"{name} row {i}") for i in places)
    del answers[None]
    if 1 < len(answers) <= 20:
        said.append("labels " + ", ".join(f"{label!r} {n}" for label, n in sorted(answers.items(), key=str)))
    return "; ".join(said)


def examples(batches: Batches, count: int = 3) -> list[str]:
    """The first rows as the model will see them: learned tokens are in »«, hidden ones follow an arrow."""
    if not isinstance(batches, RowBatches):
        batch = batches.first()
        shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in batch.items() if isinstance(v, torch.Tensor))
        return [f"a batch of {shapes}"]
    shown = []
    for i in range(min(count, len(batches.rows))):
        encoded = batches.encoder(batches.rows[i], f"{batches.name} row {i}", f"{batches.seed} 0 {i}")
        text = _marked(batches.encoder, encoded)
        cut = text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN // 2]} ... {text[-LONGEST_SHOWN // 2 :]}"
        shown.append(f"{batches.name} row {i} ({len(encoded.get('input_ids', ()))} tokens): {cut}")
    return shown


def _learned(row: dict[str, Any]) -> int | None:
    labels = row.get("labels")
    return sum(label != IGNORED for label in labels) if isinstance(labels, (list, tuple)) else None


def _answer(encoder: Encoder, row: Any, where: str) -> Any:
    """A row's label, if it is one of a few."""
    value = row.get(encoder.label_column) if hasattr(row, "get") else None
    return value if isinstance(value, (str, int, bool)) else None


def _marked(encoder: Encoder, encoded: dict[str, Any]) -> str:
    ids, labels, kind = encoded.get("input_ids"), encoded.get("labels"), encoder.kind
    if ids is None:
        return ", ".join(
            f"{name} {list(torch.as_tensor(value, device='cpu').shape)}" for name, value in encoded.items()
        )
    if not isinstance(labels, (list, tuple)) or kind.name not in ("causal", "masked", "seq2seq"):
        return f"{_text(encoder, ids)} -> {labels}"
    if kind.name == "seq2seq":
        return f"{_text(encoder, ids)} -> »{_text(encoder, [x for x in labels if x != IGNORED])}«"
    if kind.name == "causal":  # a label is at its token's position, or where it is predicted
        later = 1 - kind.shift
        learned = [i >= later and labels[i - later] != IGNORED for i in range(len(ids))]
        return _runs(encoder, ids, learned, ids)
    return _runs(encoder, ids, [label != IGNORED for label in labels], labels)


def _runs(encoder: Encoder, ids: Sequence[int], learned: Sequence[bool], asked: Sequence[int]) -> str:
    """The text, with runs of learned tokens marked; asked: the tokens that are learned."""
    parts: list[str] = []
    begin = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or learned[end] != learned[begin]:
            tokens = asked[begin:end] if learned[begin] else ids[begin:end]
            text = _text(encoder, tokens)
            parts.append(f"»{text}«" if learned[begin] else text)
            begin = end
    return "".join(parts)


def _text(encoder: Encoder, ids: Sequence[int]) -> str:
    if encoder.tokenizer is None:
        return " ".join(map(str, ids))
    return str(encoder.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
