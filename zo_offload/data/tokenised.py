"""Rows that are tokenised, or hold pictures or sound: selects the model's inputs, and makes labels for its kind.

Labels are made only if they follow from the tokens: next tokens of a causal model, hidden tokens of a masked one. Given
labels are checked against the head.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..modules.kind import IGNORED, ModelKind
from .labels import SPANS, check_span, choice_label, class_label, token_labels, whole_numbers
from .masking import RandomMasks
from .prompts import check_kind
from .texts import is_sequence

Encoded = dict[str, Any]


WANTS = {
    "unknown": "may be of any kind: name it (kind=)",
    "causal": "learns from text",
    "masked": "learns from text with a mask token",
    "seq2seq": "answers a text: pass target_column=, columns prompt and completion, or template= and verbalizers=",
    "classification": "learns classes: give each row a label",
    "tokens": "learns a class per token: tokenise the text, and give labels of the same length",
    "questions": f"learns an answer's position: tokenise the text, and give {' and '.join(SPANS)}",
    "choice": "learns which input is right: tokenise the choices (input_ids a list of lists), and give labels",
    "bare": "has no head and therefore no loss: pass model_class= (--model-class), such as "
            "AutoModelForSequenceClassification, or an objective=",
    "other": "is none of transformers' kinds: pass task='lm' for next tokens, task='classification' for labels, or an "
             "objective=",
}  # fmt: skip


@dataclass
class TokenisedRows:
    """Encodes tokenised rows for one kind of model; see `encode.Encoder` for the fields."""

    kind: ModelKind
    own_objective: bool
    task: str
    label_column: str
    max_length: int | None
    masks: RandomMasks | None
    _left_out: set[str] = field(default_factory=set)

    def __call__(self, row: Mapping[str, Any], where: str, draw: str) -> Encoded:
        encoded = self._kept(row, where)
        if not encoded:
            raise DataError(
                f"{where}: {self.kind.model} takes none of its columns {', '.join(map(repr, row))}. Name them as its "
                "arguments, pass text_column= for text, or an objective= that takes them."
            )
        if "input_ids" not in encoded:
            return self._labelled(encoded, None, where, draw)
        given = encoded["input_ids"]
        if is_sequence(given) and len(given) and is_sequence(given[0]):
            return self._choices(encoded, where)
        ids, room = whole_numbers(given, where, "input_ids"), self.max_length
        counted = _counts(encoded.get("labels"), where)
        for name, value in encoded.items():
            if room is not None and is_sequence(value) and len(value) == len(ids):
                encoded[name] = value[:room]
        if room is not None and len(ids) > room and "labels" not in encoded and room < 2:
            raise DataError(f"{where}: max_length={room} leaves nothing to predict. Raise it.")
        encoded["input_ids"] = ids[:room]
        encoded.setdefault("attention_mask", [1] * len(encoded["input_ids"]))
        _check_lengths(encoded, where)
        encoded = self._labelled(encoded, encoded["input_ids"], where, draw)
        if counted and not _counts(encoded.get("labels"), where):
            raise DataError(f"{where}: max_length={room} cuts away every label that counts. Raise it.")
        return encoded

    def _kept(self, row: Mapping[str, Any], where: str) -> Encoded:
        """The columns that go to the model, the label under its name; others are left out, with one warning each."""
        kind, kept = self.kind, {}
        for name, value in row.items():
            label = name in ("labels", "label_ids", "label", self.label_column)
            if value is None or (isinstance(value, str) and not (label and kind.name == "classification")):
                continue
            open_to = str(name).startswith("decoder_") or kind.name in ("other", "unknown")
            takes = name in kind.takes or label or (kind.takes_any and open_to and _is_numeric(value))
            if takes or self.own_objective:
                kept[name] = value
            elif name not in self._left_out:
                self._left_out.add(name)
                warnings.warn(f"{kind.model} takes no {name!r}: the column is left out", stacklevel=2)
        self._check_one_label(row, kept, where)
        for name in (self.label_column, "label", "label_ids"):
            if name in kept and "labels" not in kept and name not in kind.takes:
                kept["labels"] = kept.pop(name)
        return kept

    def _check_one_label(self, row: Mapping[str, Any], kept: Encoded, where: str) -> None:
        """Raise DataError where it cannot be told which of two columns is the label."""
        if self.own_objective or self.kind.name in ("other", "unknown") or "labels" not in kept:
            return
        for name in dict.fromkeys((self.label_column, "label", "label_ids")):
            if name == "labels" or name not in kept or name in self.kind.takes:
                continue
            said = name == self.label_column != "label"  # by the caller
            if said or (self.kind.name == "classification" and not _are_equal(kept[name], kept["labels"])):
                raise DataError(
                    f"{where} has {name!r} ({str(kept[name])[:40]}) and 'labels' ({str(kept['labels'])[:40]}): which "
                    "is the label cannot be told. Take one of the columns out"
                )

    def _labelled(self, encoded: Encoded, ids: list[int] | None, where: str, draw: str) -> Encoded:
        """The row with labels for the kind of model: given ones are checked, missing ones made if possible."""
        kind, labels = self.kind, encoded.get("labels")
        if kind.name == "questions" and not self.own_objective:
            check_span(encoded, len(ids or ()), where)
        elif labels is None:
            if ids is not None and (kind.name == "causal" or (kind.name == "other" and self.task == "lm")):
                if kind.sees_ahead and not self.own_objective:
                    check_kind(kind, "text")
                mask = encoded["attention_mask"]
                return {**encoded, **next_tokens(kind, ids, None, where, mask), "attention_mask": mask}
            if kind.name == "masked" and ids is not None and not self.own_objective:
                return {**encoded, **self.hidden(ids, where, draw)}
            if kind.name not in ("other", "unknown", "bare", "causal") and not self.own_objective:
                raise DataError(f"{where} has no labels (its columns: {', '.join(encoded)}), and {kind.model} "
                                f"{WANTS[kind.name]}.")  # fmt: skip
        elif kind.name == "classification" and not self.own_objective:
            encoded["labels"] = class_label(labels, kind, where, "labels")
        elif kind.name in ("causal", "masked", "seq2seq", "tokens") and is_sequence(labels) and not self.own_objective:
            encoded["labels"] = token_labels(labels, kind, len(ids) if ids is not None else len(labels), where)
        elif isinstance(labels, bool):
            encoded["labels"] = int(labels)
        return encoded

    def _choices(self, encoded: Encoded, where: str) -> Encoded:
        """A row of several inputs, one of which is right."""
        if self.kind.name not in ("choice", "other", "unknown") and not self.own_objective:
            raise DataError(f"{where}: input_ids are nested, but {self.kind.model} takes one sequence per row.")
        nested = [whole_numbers(ids, where, "input_ids")[: self.max_length] for ids in encoded["input_ids"]]
        encoded["input_ids"] = nested
        if "attention_mask" not in encoded:
            encoded["attention_mask"] = [[1] * len(ids) for ids in nested]
        for name in ("attention_mask", "token_type_ids"):
            if name in encoded:
                encoded[name] = [
                    torch.as_tensor(values, device="cpu").tolist()[: self.max_length] for values in encoded[name]
                ]
        if self.kind.name == "choice" and not self.own_objective:
            if "labels" not in encoded:
                raise DataError(f"{where} has no labels, and {self.kind.model} {WANTS['choice']}.")
            encoded["labels"] = choice_label(encoded["labels"], len(nested), where, "labels")
        return encoded

    def hidden(self, ids: list[int], where: str, draw: str) -> Encoded:
        """The row with some tokens hidden, to be predicted."""
        if self.masks is None:
            raise DataError(f"{where} has no labels, and there is no tokenizer with a mask token to hide tokens with.")
        given, labels = self.masks(ids, draw)
        if all(label == IGNORED for label in labels):
            raise DataError(f"{where} has no tokens to hide. Remove empty rows.")
        return {"input_ids": given, "labels": labels}


def next_tokens(kind: ModelKind, ids: list[int], room: int | None, where: str, mask: Any = None) -> Encoded:
    """Labels by which every token is predicted from those before it; the first token has no prediction.

    mask: attention mask of rows that are already padded: padding is not learned, and nothing is predicted from it.
    """
    cut = ids[:room]
    if len(cut) < 2 <= len(ids):
        raise DataError(f"{where}: max_length={room} leaves nothing to predict. Raise it.")
    labels = [IGNORED, *cut[1:]]
    if mask is not None and len(
        seen := [bool(x) for x in torch.as_tensor(mask, device="cpu").reshape(-1).tolist()]
    ) == len(labels):
        pairs = zip(labels[1:], itertools.pairwise(seen), strict=True)
        labels[1:] = [label if before and here else IGNORED for label, (before, here) in pairs]
    return {"input_ids": cut, "attention_mask": [1] * len(cut), "labels": kind.placed(labels)}


def _check_lengths(encoded: Mapping[str, Any], where: str) -> None:
    """Raise DataError for a per-token column whose length differs from the number of tokens."""
    tokens = len(encoded["input_ids"])
    for name in ("attention_mask", "token_type_ids", "position_ids", "special_tokens_mask"):
        value: Any = encoded.get(name)
        if is_sequence(value) and not (len(value) and is_sequence(value[0])) and len(value) != tokens:
            raise DataError(f"{where}: {len(value)} {name} for {tokens} input_ids. Give one per token.")


def check_sizes(encoded: Encoded, kind: ModelKind, where: str) -> None:
    """Raise DataError unless the tokens are in the model's vocabulary and fit its positions."""
    if "input_ids" not in encoded:
        return
    ids: Any = encoded["input_ids"]
    labels: Any = encoded.get("labels")
    rows = ids if len(ids) and is_sequence(ids[0]) else [ids]
    longest = max(map(len, rows))
    if longest == 0:
        raise DataError(f"{where} has no tokens. Remove empty rows.")
    if kind.positions is not None and longest > kind.positions:
        raise DataError(
            f"{where} has {longest} tokens, but the model takes at most {kind.positions}. Pass "
            f"max_length={kind.positions} to cut such rows, or split them."
        )
    if kind.label_positions is not None and is_sequence(labels) and len(labels) > kind.label_positions:
        raise DataError(
            f"{where} has {len(labels)} labels, but the decoder takes at most {kind.label_positions}. Shorten the "
            "answer, or cut it with max_length."
        )
    features = any(isinstance(v, Tensor) and v.is_floating_point() for v in encoded.values())  # may replace tokens
    wrong = [] if kind.vocabulary is None or features else [t for r in rows for t in r if not 0 <= t < kind.vocabulary]
    if wrong:
        raise DataError(
            f"{where} has token {wrong[0]}, but {kind.model} has {kind.vocabulary} tokens: is the tokenizer the "
            "model's? Call model.resize_token_embeddings for tokens that were added."
        )


def nothing_counts(encoded: Encoded, kind: ModelKind) -> bool:
    """Whether a row's labels are all such as have no loss."""
    labels: Any = encoded.get("labels")
    if labels is None or isinstance(labels, (float, str)):
        return False
    if not is_sequence(labels):
        return bool(kind.name == "classification" and labels == IGNORED)
    values = labels.reshape(-1).tolist() if hasattr(labels, "reshape") else labels
    return not any(label != IGNORED for label in values[kind.shift :])


def _are_equal(one: Any, other: Any) -> bool:
    values = [torch.as_tensor(x, device="cpu").tolist() if hasattr(x, "dtype") else x for x in (one, other)]
    return bool(values[0] == values[1])


def _counts(labels: Any, where: str) -> bool:
    """Whether some of a row's labels count."""
    if not is_sequence(labels):
        return False
    try:
        return bool((torch.as_tensor(labels, device="cpu") != IGNORED).any())
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(f"{where}: labels={labels!r} are not numbers: {error}.") from error


def _is_numeric(value: Any) -> bool:
    if isinstance(value, (bool, int, float, Tensor)):
        return True
    return hasattr(value, "dtype") or (isinstance(value, (list, tuple)) and all(_is_numeric(v) for v in value[:1]))
