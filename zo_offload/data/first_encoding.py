"""The first encoding of rows, from before encodings had a number, for runs that began with it: the same bits.

Text for a causal model had no EOS, and a text's own BOS was kept in addition to the tokenizer's. If that encoding was
wrong (an answer in the input of a masked or an encoder-decoder model, labels that nobody gave), the run is refused.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError
from ..modules.kind import IGNORED, ModelKind
from .texts import is_sequence

PER_TOKEN = ("attention_mask", "token_type_ids", "position_ids")


class FirstEncoding:
    """The first encoding with an encoder's options. Raises DataError for runs that it encoded wrongly."""

    def __init__(self, encoder: Any, words: Mapping[str, str]):
        self.options = encoder
        self.kind: ModelKind = encoder.kind
        self.words = list(words.values())
        if words:
            self._check_kind("put the answer into the input", "causal", "classification")
        self._answers = {label: self._continuation(word) for label, word in words.items()}
        alike = len({tuple(ids) for ids in self._answers.values()}) < len(self._answers)
        if alike or any("{" in word for word in words.values()):
            raise self._wrong(f"did not tell the verbalizers {list(words.values())} apart")

    @property
    def answers(self) -> list[list[int]]:
        return list(self._answers.values())

    def __call__(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        tokenised = "input_ids" in row or not any(isinstance(value, str) for value in row.values())
        return self._tokenised(row) if tokenised else self._text(row, where)

    def _wrong(self, what: str) -> DataError:
        return DataError(
            f"this run was begun by a version that {what}, so it was trained on wrong inputs. Start the run again."
        )

    def _check_kind(self, what: str, *right: str) -> None:
        kind = self.kind
        shifts = kind.name != "causal" or (kind.shift == 1 and not kind.sees_ahead)
        if not self.options.own_objective and (kind.name not in (*right, "other") or not shifts):
            raise self._wrong(f"{what} ({kind.model}, {kind.name})")

    def _tokenised(self, row: Mapping[str, Any]) -> dict[str, Any]:
        room = self.options.max_length
        encoded = {key: value for key, value in row.items() if value is not None and not isinstance(value, str)}
        if self.options.label_column == "label" and "label" in encoded and "labels" not in encoded:
            encoded["labels"] = encoded.pop("label")
        if "input_ids" in encoded:
            ids = [int(token) for token in encoded["input_ids"]]
            encoded["input_ids"] = ids[:room]
            for key in PER_TOKEN:
                if key in encoded:
                    encoded[key] = list(encoded[key])[:room]
            encoded.setdefault("attention_mask", [1] * len(encoded["input_ids"]))
            if "labels" not in encoded:
                self._check_kind("made labels of the tokens of any model", "causal")
                encoded["labels"] = [IGNORED, *encoded["input_ids"][1:]]
            elif is_sequence(encoded["labels"]) and len(encoded["labels"]) == len(ids):
                encoded["labels"] = list(encoded["labels"])[:room]
        return encoded

    def _text(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        options = self.options
        self._check_kind("put the answer into the input", "causal", "classification")
        if options.template is not None:
            return self._prompt(row, where)
        names = (options.text_column,) if isinstance(options.text_column, str) else options.text_column
        if options.tokenizer is None or any(row.get(name) is None for name in names):
            raise DataError(f"{where}: columns {', '.join(map(repr, row))}, and a tokenizer: {options.tokenizer!r}.")
        truncation = {"truncation": True, "max_length": options.max_length} if options.max_length else {}
        encoded = dict(options.tokenizer(*(str(row[name]) for name in names), **truncation))
        label = row.get(options.label_column)
        if options.task == "classification" or (options.task == "auto" and label is not None):
            if self.kind.name == "causal" and not options.own_objective:
                raise DataError(
                    f"{where} has a {options.label_column!r}, and the model is a causal LM without classes."
                )
            encoded["labels"] = label if isinstance(label, float) else int(label)  # type: ignore[arg-type]
        else:
            encoded["labels"] = [IGNORED, *encoded["input_ids"][1:]]
        return encoded

    def _prompt(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        options = self.options
        answer = self._answers.get(str(row.get(options.label_column)))
        if answer is None:
            label, known = row.get(options.label_column), ", ".join(map(repr, self._answers))
            raise DataError(f"{where}: {options.label_column}={label!r}, but the verbalizers are for {known}.")
        start = self._encode(options.template.format_map(row))
        room = options.max_length
        if room is not None and len(start) + len(answer) > room:
            start = start[:1] + start[1:][len(start) + len(answer) - room :]
        ids = start + answer
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(start) + answer}

    def _continuation(self, word: str) -> list[int]:
        literal = [text for text, *_ in string.Formatter().parse(self.options.template)][-1]
        start, both = self._encode("a" + literal), self._encode("a" + literal + word)
        if both[: len(start)] == start and len(both) > len(start):
            return both[len(start) :]
        return list(self.options.tokenizer(word, add_special_tokens=False)["input_ids"])

    def _encode(self, text: str) -> list[int]:
        tokenizer = self.options.tokenizer
        ids: list[int] = list(tokenizer(text)["input_ids"])
        closing: Sequence[Any] = [tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)]
        while len(ids) > 1 and ids[-1] in closing and ids[-1] is not None:
            ids.pop()
        return ids
