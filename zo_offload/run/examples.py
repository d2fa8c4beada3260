"""A few rows with the model's answers, to show how a run has changed them.

An answer is the class or option with the best score; without classes or options, the text that the model generates
greedily in place of the row's own answer. A row of plain text is cut in half: the model continues the first half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..data.batches import RowBatches
from ..data.encode import Encoder
from ..data.metrics import Metrics
from ..errors import ConfigError
from .active import Run
from .batching import Batching
from .evaluation import parted, texts_said

LONGEST_ANSWER = 48  # tokens


@dataclass(frozen=True)
class Answered:
    """A row as text, its own answer, and the model's."""

    text: str
    wanted: str
    said: str


def answered(run: Run, batching: Batching, data: Any, count: int, options: Mapping[str, Any]) -> list[Answered]:
    """The model's answers to `count` rows of `data`, chosen by the run's seed as in an evaluation.

    options: of `make_batches`. Raises ConfigError for data whose answers are neither classes nor texts.
    """
    seen: list[tuple[Any, Any]] = []
    options = {name: value for name, value in options.items() if name not in ("length_buckets", "packing")}
    batches = batching.batches(data, count, options, shuffle=False, rows=count)
    if not isinstance(batches, RowBatches):
        raise ConfigError("examples are rows of a file or a list; this data is read in order, as batches")
    run.start(batches.first(), objective=batching.objective_of(batches))
    encoder, where = batches.encoder, [f"{batches.name} row {i}" for i in range(len(batches.rows))]
    encoded = [encoder(row, name, "") for row, name in zip(batches.rows, where, strict=True)]
    if encoder.words or encoder.options_of(batches.rows[0], where[0]) or encoder.kind.name == "classification":

        def keep(found: Any) -> dict[str, float]:
            seen.append((found.predictions, found.label_ids))
            return {}

        batches.metrics = Metrics(keep)
        run.measure(batches)
        [(scores, right)] = seen
        return [
            Answered(_input(encoder, row), *(_choice(encoder, raw, name, values) for values in (truth, chosen)))
            for row, raw, name, truth, chosen in zip(encoded, batches.rows, where, right, scores, strict=True)
        ]
    if encoder.kind.name not in ("causal", "seq2seq") or encoder.tokenizer is None:
        raise ConfigError(
            f"examples are of classes, of a prompt's options or of generated text; a {encoder.kind.model} without "
            "them, or rows without a tokenizer, have none"
        )
    cut = [_cut(encoder, row) for row in encoded]
    said = texts_said(run, encoder.tokenizer, [prompt for prompt, _ in cut], max_new_tokens=LONGEST_ANSWER)
    return [
        Answered(_text(encoder, prompt), _text(encoder, answer[:LONGEST_ANSWER]), text)
        for (prompt, answer), text in zip(cut, said, strict=True)
    ]


def _choice(encoder: Encoder, row: Any, where: str, values: Any) -> str:
    """The name of a class or option, or a number. values: its index, or the scores of all."""
    if getattr(values, "ndim", 0) == 0 and float(values) != int(values):
        return f"{float(values):.3g}"  # a regression
    if getattr(values, "ndim", 0) and len(values) == 1:
        return f"{float(values[0]):.3g}"
    index = int(values.argmax()) if getattr(values, "ndim", 0) else int(values)
    if encoder.words:
        return encoder.words[index].strip()
    if own := encoder.options_of(row, where):
        return _text(encoder, own[index])
    return next((name for name, number in encoder.kind.class_ids if number == index), str(index))


def _input(encoder: Encoder, encoded: Mapping[str, Any]) -> str:
    ids = encoded.get("input_ids")
    if ids is None:
        return ", ".join(encoded)
    labels = encoded.get("labels")
    own = encoder.kind.name == "causal" and isinstance(labels, (list, tuple))
    return _text(encoder, _cut(encoder, encoded)[0] if own else ids)


def _cut(encoder: Encoder, encoded: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """(prompt, answer); a plain text, which is all answer, in halves."""
    prompt, answer = parted(encoder, encoded)
    if len(prompt) > 1 or encoder.kind.name == "seq2seq":
        return prompt, answer
    ids = prompt + answer  # nothing predicts the first token of a plain text
    half = (len(ids) + 1) // 2
    return ids[:half], ids[half:]


def _text(encoder: Encoder, ids: Any) -> str:
    if encoder.tokenizer is None:
        return " ".join(str(int(token)) for token in ids)
    return str(encoder.tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)).strip()
