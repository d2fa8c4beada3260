"""Rows into model inputs: tokenisation and padding; what a batch's outputs say about the task is in `measures.py`.

A *row* is a dict with text columns, or one that is tokenised already. An `Encoder` turns it into a dict of lists (or
tensors of one shape), `collate` pads those into a batch. Three tasks for text:
    lm               every token is predicted from those before it
    classification   "label" is the class, for models with a classification head
    prompt           a template makes a prompt, the model continues it with one of a few *verbalizers*; the loss is on
                     the tokens of the right one only, accuracy compares them all (as in MeZO, section 3)
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import DataError
from .model_kind import ModelKind

Batch = dict[str, Any]
Row = Mapping[str, Any]
Task = Literal["auto", "lm", "classification", "prompt"]
IGNORED = -100  # label of a position without a loss, as everywhere in transformers

# anything else that is a sequence of integers is padded with the tokenizer's pad token, or 0
_PAD_WITH = {
    "labels": IGNORED,
    "attention_mask": 0,
    "decoder_attention_mask": 0,
    "token_type_ids": 0,
    "position_ids": 0,
}


@dataclass
class Encoder:
    """Encodes rows for one task. Tokenised rows pass; text needs a tokenizer."""

    kind: ModelKind
    tokenizer: Any = None
    task: Task = "auto"
    template: str | None = None
    verbalizers: Sequence[str] | Mapping[Any, str] | None = None
    text_column: str | tuple[str, str] = "text"
    label_column: str = "label"
    max_length: int | None = None  # longer texts are cut to this; None: they are an error if the model cannot take them
    pad_to_multiple_of: int = 1
    loss: Literal["model", "options"] = "model"  # options: cross-entropy among the verbalizers alone
    _words: dict[str, str] = field(default_factory=dict)  # label, as text -> verbalizer
    _answers: dict[str, list[int]] = field(default_factory=dict)  # label -> the verbalizer's tokens after the template

    def __post_init__(self) -> None:
        if self.loss not in ("model", "options"):
            raise DataError(f"loss={self.loss!r}: choose 'model' (its own), or 'options' (among the verbalizers)")
        if (self.template is None) != (self.verbalizers is None):
            raise DataError(
                "template and verbalizers go together: template='{text} It was', verbalizers=[' bad', ' good']"
            )
        if self.template is not None and self.task in ("auto", "prompt"):
            self.task = "prompt"
        elif self.task == "prompt" or self.template is not None:
            raise DataError(f"task={self.task!r} with template={self.template!r}: a template means task='prompt'")
        if self.verbalizers is not None:
            given = self.verbalizers
            pairs = given.items() if isinstance(given, Mapping) else enumerate(given)
            self._words = {str(label): word for label, word in pairs}
            if len(self._words) < 2 or len(set(self._words.values())) < len(self._words):
                raise DataError(f"verbalizers={list(self._words.values())}: give at least two different ones")
            if self.tokenizer is None:
                raise DataError("template and verbalizers need a tokenizer: pass tokenizer=")
            self._answers = {label: self._continuation(word) for label, word in self._words.items()}
        if self.max_length is not None and self.kind.positions is not None and self.max_length > self.kind.positions:
            raise DataError(f"max_length={self.max_length}, but the model takes at most {self.kind.positions} tokens.")

    @property
    def columns(self) -> list[str]:
        """Columns that a row of text must have."""
        if self.template is not None:
            fields = [name for _, name, _, _ in string.Formatter().parse(self.template) if name]
            return [*dict.fromkeys(fields), self.label_column]
        text = [self.text_column] if isinstance(self.text_column, str) else list(self.text_column)
        return text + [self.label_column] * (self.task == "classification")

    @property
    def options(self) -> list[list[int]]:
        """The verbalizers' tokens, in the order of the labels."""
        return list(self._answers.values())

    @property
    def words(self) -> list[str]:
        """The verbalizers themselves, in the same order."""
        return list(self._words.values())

    def __call__(self, row: Row, where: str) -> dict[str, Any]:
        """One row's model inputs. where: how errors name the row."""
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: expected a dict, found {type(row).__name__}.")
        if "input_ids" in row or not any(isinstance(value, str) for value in row.values()):
            encoded = self._tokenised(row)
        else:
            encoded = self._text(row, where)
        self._check_length(encoded, where)
        return encoded

    def size_of(self, row: Row) -> int:
        """A cheap stand-in for a row's number of tokens, to find the longest ones."""
        ids = row.get("input_ids")
        return len(ids) if ids is not None else sum(len(value) for value in row.values() if isinstance(value, str))

    def _tokenised(self, row: Row) -> dict[str, Any]:
        encoded = {key: value for key, value in row.items() if value is not None and not isinstance(value, str)}
        if self.label_column in encoded and "labels" not in encoded and self.label_column == "label":
            encoded["labels"] = encoded.pop("label")
        if "input_ids" in encoded:
            ids = [int(token) for token in encoded["input_ids"]]
            encoded["input_ids"] = ids[: self.max_length]
            for key in ("attention_mask", "token_type_ids", "position_ids"):
                if key in encoded:
                    encoded[key] = list(encoded[key])[: self.max_length]
            encoded.setdefault("attention_mask", [1] * len(encoded["input_ids"]))
            if "labels" not in encoded:
                encoded["labels"] = _next_token_labels(encoded["input_ids"])
            elif _is_sequence(encoded["labels"]) and len(encoded["labels"]) == len(ids):
                encoded["labels"] = list(encoded["labels"])[: self.max_length]
        return encoded

    def _text(self, row: Row, where: str) -> dict[str, Any]:
        if self.tokenizer is None:
            raise DataError(f"{where} holds text (columns {', '.join(row)}): pass tokenizer=, or rows with input_ids.")
        absent = [column for column in self.columns if row.get(column) is None]
        if absent:
            raise DataError(
                f"{where} lacks {', '.join(map(repr, absent))}, its columns are {', '.join(map(repr, row))}. Rename "
                "them, or pass text_column=, label_column= or a template that uses them."
            )
        if self.task == "prompt":
            return self._prompt(row, where)
        names = (self.text_column,) if isinstance(self.text_column, str) else self.text_column
        truncation = {"truncation": True, "max_length": self.max_length} if self.max_length else {}
        encoded = dict(self.tokenizer(*(str(row[name]) for name in names), **truncation))
        classes = self.task == "classification" or (self.task == "auto" and row.get(self.label_column) is not None)
        if classes and self.kind.name == "causal":
            raise DataError(
                f"{where} has a {self.label_column!r}, and the model is a causal LM without classes. Pass template= "
                "and verbalizers=, or task='lm' to ignore the label."
            )
        encoded["labels"] = self._class(row, where) if classes else _next_token_labels(encoded["input_ids"])
        return encoded

    def _class(self, row: Row, where: str) -> int | float:
        label = row[self.label_column]
        if isinstance(label, bool):
            return int(label)
        if isinstance(label, (int, float)):
            return label
        try:
            return int(label)
        except (TypeError, ValueError):
            raise DataError(
                f"{where}: {self.label_column}={label!r} is not a number. Number the classes, or use template= and "
                "verbalizers={label: word, ...}."
            ) from None

    def _prompt(self, row: Row, where: str) -> dict[str, Any]:
        assert self.template is not None
        answer = self._answers.get(str(row[self.label_column]))
        if answer is None:
            label, known = row[self.label_column], ", ".join(map(repr, self._answers))
            raise DataError(f"{where}: {self.label_column}={label!r}, but the verbalizers are for {known}.")
        start = self._encode(self.template.format_map(row))
        room = self.max_length
        if room is not None and len(start) + len(answer) > room:
            # the end of the prompt asks the question, so the cut is after the first token (it may be a BOS)
            start = start[:1] + start[1:][len(start) + len(answer) - room :]
        ids = start + answer
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(start) + answer}

    def _continuation(self, word: str) -> list[int]:
        """The word's tokens as the tokenizer splits them after the template's last words."""
        assert self.template is not None
        literal = [text for text, *_ in string.Formatter().parse(self.template)][-1]
        start, both = self._encode("a" + literal), self._encode("a" + literal + word)
        if both[: len(start)] == start and len(both) > len(start):
            return both[len(start) :]
        return list(self.tokenizer(word, add_special_tokens=False)["input_ids"])

    def _encode(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text)["input_ids"])
        closing = {self.tokenizer.eos_token_id, getattr(self.tokenizer, "sep_token_id", None)} - {None}
        while len(ids) > 1 and ids[-1] in closing:
            ids.pop()
        return ids

    def _check_length(self, encoded: dict[str, Any], where: str) -> None:
        ids = encoded.get("input_ids")
        if ids is None:
            return
        if len(ids) == 0:
            raise DataError(f"{where} has no tokens. Remove empty rows.")
        if self.kind.positions is not None and len(ids) > self.kind.positions:
            raise DataError(
                f"{where} has {len(ids)} tokens, but the model takes at most {self.kind.positions}. Pass "
                f"max_length={self.kind.positions} to cut such rows, or split them."
            )

    def collate(self, rows: Sequence[dict[str, Any]], where: str) -> Batch:
        """Encoded rows as one batch: sequences padded on the right, equal shapes stacked."""
        keys = list(rows[0])
        for row in rows:
            if set(row) != set(keys):
                raise DataError(f"{where}: rows with different columns, {sorted(keys)} and {sorted(row)}.")
        pad_token = getattr(self.tokenizer, "pad_token_id", None)
        return {key: self._stack([row[key] for row in rows], key, pad_token or 0, where) for key in keys}

    def _stack(self, values: list[Any], key: str, pad_token: int, where: str) -> Tensor:
        try:
            tensors = [torch.as_tensor(value) for value in values]
            if key == "labels" and any(t.dtype.is_floating_point for t in tensors):
                tensors = [t.float() for t in tensors]  # regression; Python's floats are doubles
            if tensors[0].dim() == 1 and not tensors[0].dtype.is_floating_point:
                return self._pad(tensors, _PAD_WITH.get(key, pad_token))
            return torch.stack(tensors)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{where}: column {key!r} does not make a batch: {error}") from error

    def _pad(self, tensors: list[Tensor], value: int) -> Tensor:
        longest = max(len(t) for t in tensors)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        if self.kind.positions is not None:
            length = max(longest, min(length, self.kind.positions))
        return torch.stack([torch.nn.functional.pad(t, (0, length - len(t)), value=value) for t in tensors])


def _next_token_labels(ids: Sequence[int]) -> list[int]:
    """The tokens themselves; the first is predicted from nothing, and saying so makes loss weights exact."""
    return [IGNORED, *ids[1:]]


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 1
