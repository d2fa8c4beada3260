"""Labels in the form of a model's head: classes within the head, numbers for a regression, a vector of several labels.

Nothing is guessed: a label that is not a class of the head is an error that names the row, the column and the value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..modules.kind import IGNORED, ModelKind
from .texts import is_sequence

SPANS = ("start_positions", "end_positions")  # columns of an answer's span, for question answering


def class_label(value: Any, kind: ModelKind, where: str, column: str) -> int | float | list[float]:
    """A row's label for classification: a class, a number if the head is for regression, or 0/1 for each label."""
    if is_sequence(value) and not (isinstance(value, Tensor) and value.dim() == 0):
        return _vector(value, kind, where, column)
    if kind.problem == "multi_label_classification":
        raise DataError(f"{where}: {column}={value!r}, but {kind.model} has several labels per row: give 0 or 1 each.")
    if kind.problem == "regression":
        return _number(value, where, column)
    names = dict(kind.class_ids)
    if isinstance(value, str) and value.strip() in names:
        return names[value.strip()]
    number = _number(value, where, column) if kind.name == "classification" else _number_or_text(value, where, column)
    if kind.name != "classification":
        return number
    if number != int(number):
        raise DataError(
            f"{where}: {column}={value!r} is not a class. {kind.model} has {kind.classes} classes, 0 to "
            f"{(kind.classes or 0) - 1}; for numbers load it with num_labels=1."
        )
    return _class(int(number), value, kind, where, column)


def token_labels(labels: Sequence[Any], kind: ModelKind, tokens: int, where: str, column: str = "labels") -> list[int]:
    """One label per token, each a class of the head (for language models, a token of the vocabulary)."""
    values = whole_numbers(labels, where, column)
    if kind.name == "tokens":
        if len(values) != tokens:
            raise DataError(f"{where}: {len(values)} {column} for {tokens} tokens. Give one per token, -100 for none.")
        for value in values:
            _class(value, value, kind, where, column)
    elif kind.name in ("causal", "masked") and len(values) != tokens:
        raise DataError(f"{where}: {len(values)} {column} for {tokens} tokens of a {kind.name} language model.")
    elif kind.vocabulary is not None and kind.name in ("causal", "masked", "seq2seq"):
        wrong = next((v for v in values if v != IGNORED and not 0 <= v < kind.vocabulary), None)
        if wrong is not None:
            raise DataError(f"{where}: {column} holds {wrong}, and {kind.model} has {kind.vocabulary} tokens.")
    return values


def choice_label(value: Any, choices: int, where: str, column: str) -> int:
    """Which of a row's choices is right."""
    number = _number(value, where, column)
    if number != int(number) or not (0 <= number < choices or number == IGNORED):
        raise DataError(f"{where}: {column}={value!r}, and the row has {choices} choices, 0 to {choices - 1}.")
    return int(number)


def check_span(row: Mapping[str, Any], tokens: int, where: str) -> None:
    """Raise DataError unless an answer's start and end are given and are within the tokens."""
    for column in SPANS:
        if column not in row:
            raise DataError(f"{where} lacks {column!r}: question answering learns from {' and '.join(SPANS)}.")
        place = _number(row[column], where, column)
        if place != int(place) or not 0 <= place < tokens:
            raise DataError(
                f"{where}: {column}={row[column]!r}, and the row has {tokens} tokens. Keep the answer within "
                "max_length, or point both to the first token for no answer."
            )


def whole_numbers(values: Any, where: str, column: str) -> list[int]:
    """A sequence of integers. Raises DataError for anything else."""
    try:
        tensor = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where}: column {column!r} is not a list of integers: {error}.") from error
    if tensor.dim() != 1 or (len(tensor) and (tensor.is_floating_point() or tensor.dtype == torch.bool)):
        raise DataError(
            f"{where}: column {column!r} is {tensor.dtype} of shape {list(tensor.shape)}; expected integers."
        )
    return [int(value) for value in tensor.tolist()]


def _vector(value: Any, kind: ModelKind, where: str, column: str) -> list[float]:
    try:
        vector = torch.as_tensor(value, device="cpu").tolist()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(f"{where}: {column}={value!r} is not a list of numbers: {error}.") from error
    if kind.name == "classification":
        numbers = [_number(v, where, column) for v in vector]
        single = kind.problem == "single_label_classification"
        if single or (kind.classes is not None and len(numbers) != kind.classes):
            raise DataError(
                f"{where}: {column} holds {len(numbers)} numbers, and {kind.model} has {kind.classes} classes."
            )
        if kind.problem != "regression" and any(not 0 <= v <= 1 for v in numbers):
            raise DataError(f"{where}: {column}={vector!r}; each of several labels must be between 0 and 1.")
        return numbers
    return vector


def _number(value: Any, where: str, column: str) -> float:
    number = _number_or_text(value, where, column)
    if not math.isfinite(number):
        raise DataError(f"{where}: {column}={value!r} is not a number. Remove such rows.")
    return float(number)


def _number_or_text(value: Any, where: str, column: str) -> int | float:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, Tensor) or hasattr(value, "item"):
        value = value.item()
    if isinstance(value, (int, float)):
        return value
    try:
        return int(value)
    except (TypeError, ValueError):
        pass
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DataError(
            f"{where}: {column}={value!r} is not a number. Number the classes from 0, or name them in the model's "
            "config (label2id); for a language model use template= and verbalizers={label: word, ...}."
        ) from None


def _class(number: int, value: Any, kind: ModelKind, where: str, column: str) -> int:
    if kind.classes is not None and number != IGNORED and not 0 <= number < kind.classes:
        raise DataError(
            f"{where}: {column}={value!r}, and {kind.model} has {kind.classes} classes, 0 to {kind.classes - 1}. Load "
            f"it with num_labels={max(number, 1) + 1}, or number the classes from 0."
        )
    return number
