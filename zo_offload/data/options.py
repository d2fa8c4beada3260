"""Options for encoding rows: their names for type checkers, and checks of their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from ..errors import DataError
from ..system.plain import is_whole, plain_option


class DataOptions(TypedDict, total=False):
    """The options of `fit` and `evaluate` for encoding rows: the fields of `Encoder`, for type checkers.
    preprocess_logits_for_metrics: (logits, labels) -> the part of the logits that compute_metrics gets."""

    tokenizer: Any
    task: str
    template: str | None
    verbalizers: Sequence[str] | Mapping[Any, str] | None
    text_column: str | Sequence[str]
    label_column: str
    target_column: str | None
    prefix: str
    max_length: int | None
    packing: bool
    length_buckets: bool
    pad_to_multiple_of: int
    loss: Literal["model", "options"]
    preprocess_logits_for_metrics: Callable[[Any, Any], Any]


def check_values(options: Any) -> None:
    """Make the values of an `Encoder` plain, and raise DataError for a value that its option does not take.

    A config file may hold no, 5 or nothing where a text was meant, and none of these may become a trained word.
    """
    for name in ("template", "prefix", "label_column", "target_column", "text_column", "max_length",
                 "pad_to_multiple_of", "packing", "length_buckets"):  # fmt: skip
        setattr(options, name, plain_option(getattr(options, name)))
    for name, may_be_none in (("template", True), ("target_column", True), ("label_column", False), ("prefix", False)):
        value = getattr(options, name)
        if not isinstance(value, str) and not (value is None and may_be_none):
            raise DataError(f"{name}={value!r}: expected a text")
    columns = [options.text_column] if isinstance(options.text_column, str) else options.text_column
    if not isinstance(columns, list) or not columns or not all(isinstance(name, str) and name for name in columns):
        raise DataError(f"text_column={options.text_column!r}: expected the name of a column, or of two")
    for name, may_be_none in (("max_length", True), ("pad_to_multiple_of", False)):
        value = getattr(options, name)
        if not is_whole(value, 1) and not (value is None and may_be_none):
            raise DataError(f"{name}={value!r}: expected a whole number of at least 1")
    for name in ("packing", "length_buckets"):
        if not isinstance(value := getattr(options, name), bool):
            raise DataError(f"{name}={value!r}: expected True or False")
    _check_words(options.verbalizers)
    tokenizer = options.tokenizer
    for_export = hasattr(tokenizer, "save_pretrained")  # tokenised rows need no more of a tokenizer
    if tokenizer is not None and (isinstance(tokenizer, type) or not (callable(tokenizer) or for_export)):
        what = f"the class {tokenizer.__name__}" if isinstance(tokenizer, type) else f"a {type(tokenizer).__name__}"
        raise DataError(
            f"tokenizer= is {what}: expected a tokenizer of transformers, AutoTokenizer.from_pretrained(...), or "
            "PreTrainedTokenizerFast(tokenizer_object=...) of one of tokenizers'"
        )


def _check_words(verbalizers: Any) -> None:
    if verbalizers is None or isinstance(verbalizers, str):
        return
    words = verbalizers.values() if isinstance(verbalizers, Mapping) else verbalizers
    if not isinstance(verbalizers, (Mapping, Sequence)):
        raise DataError(f"verbalizers={verbalizers!r}: expected a word for each label")
    for word in words:
        if isinstance(word, bool) or not isinstance(word, (str, int, float)):
            raise DataError(
                f"verbalizers={plain_option(verbalizers)!r}: {word!r} is not a text. YAML reads yes, no, on, off and "
                "null as other values: put words in quotes"
            )
