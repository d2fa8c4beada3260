"""Turns texts into tokens, with each special token once and only where it belongs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import DataError


def no_dict(where: str, row: Any) -> str:
    """The message for a row that is no dict."""
    hint = " For a text, {'text': ...}." if isinstance(row, str) else ""
    return f"{where}: expected a dict, found {type(row).__name__}.{hint}"


def text_ids(tokenizer: Any, *texts: str) -> list[int]:
    """Tokens of a text (or a pair) as the tokenizer gives them; with one BOS even if the text has its own."""
    return without_second_start(tokenizer, list(tokenizer(*texts)["input_ids"]))


def without_second_start(tokenizer: Any, ids: list[int]) -> list[int]:
    """The tokens without the first, if that is the tokenizer's BOS (or CLS) and the text has its own."""
    starts = {getattr(tokenizer, name, None) for name in ("bos_token_id", "cls_token_id")} - {None}
    return ids[1:] if len(ids) > 1 and ids[0] == ids[1] and ids[0] in starts else ids


def bare_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text alone, nothing added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_of_text(tokenizer: Any) -> int | None:
    """The tokenizer's EOS, if it has one; a tokenizer may be any function."""
    return getattr(tokenizer, "eos_token_id", None)


def open_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text to be continued: without the closing tokens (EOS, SEP) that the tokenizer adds.

    Closing tokens of the text itself stay: a template may put an EOS between a question and its answer.
    """
    ids = text_ids(tokenizer, text)
    closing = {end_of_text(tokenizer), getattr(tokenizer, "sep_token_id", None)} - {None}
    if ends := _closings(ids, closing):
        added = max(0, ends - _closings(bare_ids(tokenizer, text), closing))
        ids = ids[: max(1, len(ids) - added)]
    return ids


def _closings(ids: list[int], closing: set[int | None]) -> int:
    """The number of closing tokens at the end."""
    return next((n for n, token in enumerate(reversed(ids)) if token not in closing), len(ids))


def continuation(tokenizer: Any, start: str, word: str) -> list[int]:
    """The word's tokens as the tokenizer splits them after `start`."""
    before, both = open_ids(tokenizer, start), open_ids(tokenizer, start + word)
    if both[: len(before)] == before and len(both) > len(before):
        return both[len(before) :]
    return bare_ids(tokenizer, word)


def as_text(value: Any, where: str, column: str) -> str:
    """A column's value as text. Raises DataError for None, NaN, lists, and text that is not valid Unicode."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{where}: column {column!r} is empty ({value}). Remove such rows, or fill them in.")
    if isinstance(value, (int, float)):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: column {column!r} is a {type(value).__name__}; expected text.")
    check_unicode(value, f"{where}: column {column!r}")
    return value


def check_unicode(text: str, what: str) -> None:
    """Raise DataError for half a surrogate pair, which no tokenizer takes. what: names the text in messages."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} is not valid text: character {error.start} is half of a surrogate pair "
            f"({text[error.start]!a}). Repair the file, or remove the row."
        ) from error


def check_not_empty(texts: Sequence[str], where: str, columns: Sequence[str]) -> None:
    """Raise DataError if there is no text in any of the columns, or no column."""
    if not columns:
        raise DataError(f"{where}: the template has no column in braces; all rows would read the same. Add {{text}}.")
    if not any(text.strip() for text in texts):
        raise DataError(f"{where}: no text in {', '.join(map(repr, columns))}. Remove empty rows.")


def encoded_text(tokenizer: Any, texts: Sequence[str], max_length: int | None) -> dict[str, Any]:
    """All outputs of the tokenizer for a text or a pair (masks, token types), in at most `max_length` tokens."""
    cut = {"truncation": True, "max_length": max_length} if max_length else {}
    encoded = {name: list(values) for name, values in tokenizer(*texts, **cut).items()}
    extra = len(encoded["input_ids"]) - len(without_second_start(tokenizer, encoded["input_ids"]))
    return {name: values[extra:] for name, values in encoded.items()}


def is_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) >= 1
