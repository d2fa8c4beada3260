"""Encodes rows as model inputs and labels, by the kind of model.

A *row* is a dict with text columns, or a tokenised one. An `Encoder` turns it into a dict of lists (or tensors of one
shape), and `collate` pads those into a batch. A text is encoded like this:
    causal            every token is predicted from those before it; the text ends with EOS
    masked            some tokens are hidden and predicted, chosen by the run's seed and the row's index
    classification    the label is a class, a number or a vector, depending on the head
    prompt            a template makes a prompt, one of a few *verbalizers* answers it; the loss is on the answer only,
                      accuracy compares them all (MeZO, section 3). With {columns} in the verbalizers: multiple choice
    prompt, completion    the loss is on the completion (`target_column`, or columns of those names); messages likewise
Everything else is an error that names the row, the column and the value. An answer is never in the input that it is
predicted from.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import DataError
from ..modules.kind import IGNORED, ModelKind
from .collate import Batch, Collator
from .completions import Completion
from .first_encoding import FirstEncoding
from .instructions import has_conversation, instruction_template, is_instruction, messages_of, rendered
from .labels import class_label
from .masking import RandomMasks
from .options import check_values
from .prompts import Prompt, Template, check_kind, closed
from .tasks import KINDS, find_task
from .texts import as_text, check_not_empty, encoded_text, no_dict, text_ids
from .tokenised import WANTS, TokenisedRows, check_sizes, next_tokens, nothing_counts

__all__ = ["ENCODING", "IGNORED", "Batch", "Encoder", "Row", "Task"]

Row = Mapping[str, Any]
Task = Literal["auto", "lm", "classification", "prompt"]
ENCODING = 2
"""Number of the present encoding; a run keeps the one that it began with. 1: see first_encoding.py."""


@dataclass
class Encoder:
    """Encodes rows for one kind of model. Tokenised rows are kept; text needs a tokenizer. Raises DataError."""

    kind: ModelKind
    own_objective: bool
    """The loss is not the model's own, so the labels that it needs are not known here."""
    version: int
    """The encoding's number, see ENCODING."""
    tokenizer: Any = None
    task: str = "auto"
    """A task of the papers, your own FILE.toml (docs/data_and_tasks.md), or how a text is learned: lm (next tokens),
    classification, prompt, or auto (decided by the model and the columns)."""
    template: str | None = None
    """Prompt with columns in braces, such as 'Review: {text}\\nSentiment:'; with {mask} for a masked model."""
    verbalizers: Sequence[str] | Mapping[Any, str] | None = None
    """One word per label, such as ' negative' ' positive', or columns: {choice1} {choice2}."""
    text_column: str | Sequence[str] = "text"
    """Column of the text; two columns make a pair."""
    label_column: str = "label"
    """Column of the label."""
    target_column: str | None = None
    """A text column with the prompt's answer; without a template, the text column is the prompt."""
    prefix: str = ""
    """Text before every prompt, such as demonstrations."""
    max_length: int | None = None
    """Longer texts are cut to this many tokens. Default: texts that are too long for the model are an error."""
    packing: bool = False
    """Concatenate texts and cut them into rows of max_length tokens: nothing is padded or lost."""
    length_buckets: bool = False
    """Put rows of similar length into one batch: less padding, in an order that still depends on the seed."""
    pad_to_multiple_of: int = 1
    """Batches are padded to a multiple of this."""
    loss: Literal["model", "options"] = "model"
    """The model's own loss over the whole vocabulary, or the cross-entropy among the verbalizers alone."""
    _prompt: Prompt | None = field(default=None, repr=False)
    _first: FirstEncoding | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_values(self)
        if self.max_length is not None and self.kind.positions is not None and self.max_length > self.kind.positions:
            raise DataError(f"max_length={self.max_length}, but the model takes at most {self.kind.positions} tokens.")
        if self.task not in KINDS:
            find_task(self.task)  # raises an error that lists the tasks if this is none
            raise DataError(f"task={self.task!r} reads files of its own: pass it to fit or evaluate")
        if self.loss not in ("model", "options"):
            raise DataError(f"loss={self.loss!r}: choose 'model' (its own), or 'options' (among the verbalizers)")
        self.forms: set[str] = set()
        """Forms that rows were found to have so far: see idle.py."""
        self.uncounted = ("", 0)
        """The first row that was checked and has no label that counts, and how many there are."""
        self._texts = [self.text_column] if isinstance(self.text_column, str) else list(self.text_column)
        self._has_more_tokens = self._tokens() > (self.kind.vocabulary or math.inf)
        self._set_task()
        masks = RandomMasks(self.kind, self.tokenizer) if self._can_mask() else None
        self._tokenised = TokenisedRows(
            self.kind, self.own_objective, self.task, self.label_column, self.max_length, masks
        )
        self.collate = Collator(
            self._pad_token(),
            self.pad_to_multiple_of,
            self.kind.positions,
            self.kind.flags,
            alone=self.kind.needs_padding and not self.own_objective,
        )

    def _set_task(self) -> None:
        if self.verbalizers is not None and self.target_column is not None:
            raise DataError("verbalizers= and target_column= are two ways to answer a prompt: give one of them")
        if self.packing and self.task == "auto":
            self.task = "lm"
        answered = self.verbalizers is not None or self.target_column is not None
        if (self.template is not None and not answered) or (self.template is None and self.verbalizers is not None):
            raise DataError(
                "template and verbalizers go together: template='{text} It was', verbalizers=[' bad', ' good']; or "
                "template and target_column, for answers in a column"
            )
        if answered and self.task not in ("auto", "prompt"):
            raise DataError(f"task={self.task!r} with a prompt's answers: a template means task='prompt'")
        if self.verbalizers is not None:
            assert self.template is not None
            self.task = "prompt"
            given = self.verbalizers
            pairs = (
                given.items() if isinstance(given, Mapping) else enumerate([given] if isinstance(given, str) else given)
            )
            words = {str(label): str(word) for label, word in pairs}
            if self.version == 1:
                self._first = FirstEncoding(self, words)
            else:
                # a text by itself, and a list of one on the command line, names the column that lists options
                alone = next(iter(words.values())) if len(words) == 1 and not isinstance(given, Mapping) else None
                self._prompt = Prompt(self.kind, self.tokenizer, self.template, alone or words, self.label_column,
                                      checked=not self.own_objective, prefix=self.prefix)  # fmt: skip
        elif self.task == "prompt":
            raise DataError("task='prompt' needs a template and verbalizers")
        elif self.version == 1:
            self._first = FirstEncoding(self, {})

    def _tokens(self) -> int:
        """The tokenizer's number of tokens, 0 if unknown."""
        return len(self.tokenizer) if hasattr(self.tokenizer, "__len__") else 0

    def _can_mask(self) -> bool:
        return self.kind.name == "masked" and getattr(self.tokenizer, "mask_token", None) is not None

    def _pad_token(self) -> int:
        """The config's padding token, by which a model finds a row's end; else the tokenizer's, else any."""
        own = getattr(self.tokenizer, "pad_token_id", None)
        if self.version == 1:
            return own or 0
        known = [token for token in (self.kind.pad_token, own) if token is not None]
        return next((t for t in known if self.kind.vocabulary is None or t < self.kind.vocabulary), 0)

    @property
    def options(self) -> list[list[int]]:
        """The verbalizers' tokens, in the order of the labels; empty if each row has its own."""
        if self._first is not None:
            return self._first.answers
        return [] if self._prompt is None or self._prompt.by_row else self._prompt.options({}, "verbalizers")

    def options_of(self, row: Row, where: str) -> list[list[int]] | None:
        """The verbalizers' tokens of a row that has its own; None if all rows have the same."""
        by_row = self._first is None and self._prompt is not None and self._prompt.by_row
        return self._prompt.options(row, where) if by_row and self._prompt is not None else None

    @property
    def words(self) -> list[str]:
        """The verbalizers themselves, in the same order."""
        if self._first is not None:
            return self._first.words
        return [] if self._prompt is None else [word.text for word in self._prompt.words.values()]

    def shown(self, row: Row, where: str) -> str:
        """A row as a demonstration for other rows' prompts. Raises DataError for rows that are not prompts."""
        prompt = self._prompt or self._completion(row)
        if prompt is None:
            raise DataError("demonstrations are prompts with their answers: pass template= and verbalizers=, or "
                            "target_column=")  # fmt: skip
        self._columns(row, where)
        return prompt.shown(row, where)

    # ---- rows --------------------------------------------------------------------------------------------------------

    def __call__(self, row: Row, where: str, draw: str) -> dict[str, Any]:
        """One row's inputs and labels. where: the row's name in errors; draw: the key of its random masks."""
        if not isinstance(row, Mapping):
            raise DataError(no_dict(where, row))
        if self._first is not None:
            encoded = self._first(row, where)
        elif self._is_text(row):
            encoded = self._text(row, where, draw)
        else:
            self.forms.add("tokens" if "input_ids" in row else "features")
            encoded = self._tokenised(row, where, draw)
        check_sizes(encoded, self.kind, where)
        return encoded

    def check(self, row: Row, where: str) -> int:
        """Raise DataError if a row is wrong, without tokenising texts that surely fit. Returns the row's size."""
        if not isinstance(row, Mapping) or self._first is not None or not self._is_text(row) or self._is_chat(row):
            encoded = self(row, where, "")
            if not self.own_objective and nothing_counts(encoded, self.kind):
                self.uncounted = (self.uncounted[0] or where, self.uncounted[1] + 1)
            return len(encoded.get("input_ids", ()))
        self._check_tokenizer(row, where)
        names = self._columns(row, where)
        texts = [as_text(row[name], where, name) for name in names]
        check_not_empty(texts, where, names)
        self.forms.add(self._form(row))
        if self._prompt is not None:
            self._prompt.options(row, where), self._prompt.answer_of(row, where)
        elif self._completion(row) is None and self._has_class(row):
            self._class(row, where)
        size = sum(len(text.encode()) for text in texts)
        if self._may_not_fit(row, size) or self._may_be_odd(texts):
            self(row, where, "")
        return size

    def tell_uncounted(self, rows: int) -> None:
        """Warn of rows, of so many that were checked, that teach nothing."""
        (first, count), self.uncounted = self.uncounted, ("", 0)  # they are looked at again later
        if 0 < count < rows:  # of all of them the first batch says it
            warnings.warn(
                f"{count} of {rows} rows have no label that counts, the first is {first}: nothing is learned from "
                "them, and a batch of no others ends the run. Leave them out",
                stacklevel=4,
            )

    def _may_not_fit(self, row: Row, size: int) -> bool:
        """Whether a text of `size` bytes may be too long, or leave no room for its answer: tokens have >= 1 byte."""
        listed = () if self._prompt is None or self._prompt.listed is None else row[self._prompt.listed]
        around = sum(len(str(text).encode()) for text in (self.template or "", self.prefix, *self.words, *listed))
        size += around + 64  # special tokens
        if self.max_length is None:
            limits = [limit for limit in (self.kind.positions, self.kind.label_positions) if limit is not None]
            return bool(limits) and size > min(limits)
        return size > self.max_length and (self._prompt is not None or self._completion(row) is not None)

    def _may_be_odd(self, texts: Sequence[str]) -> bool:
        """Whether texts may have no tokens, a mask of their own, or tokens that the model does not have."""
        mask = getattr(self.tokenizer, "mask_token", None) if self.kind.name == "masked" else None
        masks = mask is not None and any(mask in text for text in texts)
        return masks or self._has_more_tokens or not any(c.isalnum() for text in texts for c in text)

    def _is_text(self, row: Row) -> bool:
        if "input_ids" in row:
            return False
        strings = any(isinstance(value, str) for name, value in row.items() if name != self.label_column)
        chat = has_conversation(row)
        named = any(name in row and not hasattr(row[name], "dtype") for name in self._texts)  # None, NaN, a number
        return strings or chat or named

    def _columns(self, row: Row, where: str) -> list[str]:
        """The text columns that this row needs. Raises DataError if it lacks one, or its label."""
        completion = self._completion(row)
        prompt = self._prompt or completion
        names = prompt.columns if prompt is not None else self._texts
        labels = [self.label_column] if self._prompt is not None or self._needs_class() else []
        if self._prompt is not None and self._prompt.listed is not None:
            labels.append(self._prompt.listed)
        if absent := [name for name in (*names, *labels) if name not in row]:
            if len(row) == 1 and ";" in (header := next(iter(row))):
                raise DataError(f"{where} has one column, {header!r}: write .csv with commas, or .tsv with tabs.")
            raise DataError(
                f"{where} lacks {', '.join(map(repr, absent))}, its columns are {', '.join(map(repr, row))}. Rename "
                "them, or pass text_column=, label_column=, or a template that uses them (with verbalizers= or "
                "target_column=)."
            )
        return list(names)

    def _check_tokenizer(self, row: Row, where: str) -> None:
        if self.tokenizer is None:
            raise DataError(f"{where} holds text (columns {', '.join(row)}): pass tokenizer=, or rows with input_ids.")

    # ---- text --------------------------------------------------------------------------------------------------------

    def _text(self, row: Row, where: str, draw: str) -> dict[str, Any]:
        self._check_tokenizer(row, where)
        self.forms.add(form := self._form(row))
        if form == "chat":
            return self._chat(row, where)
        names = self._columns(row, where)
        if self._prompt is not None:
            return self._prompt.encode(row, where, self.max_length)
        if (completion := self._completion(row)) is not None:
            return completion.encode(row, where, self.max_length)
        texts = [as_text(row[name], where, name) for name in names]
        check_not_empty(texts, where, names)
        if len(texts) > 2:
            raise DataError(f"text_column={names}: a tokenizer takes a text or a pair. Write a template for more.")
        if self._has_class(row):
            return {**self._read(texts), "labels": self._class(row, where)}
        return self._plain(texts, where, draw)

    def _form(self, row: Row) -> str:
        """What a row with text becomes: see idle.py."""
        if self._is_chat(row):
            return "chat"
        if self._prompt is not None:
            return "prompt"
        if self._completion(row) is not None:
            return "completion"
        return "class" if self._has_class(row) else "plain"

    def _completion(self, row: Row) -> Completion | None:
        """The encoding of the row's own columns as a prompt and its answer, if they are that."""
        kind, target, template = self.kind, self.target_column, self.template
        if self._prompt is not None or self.task not in ("auto", "prompt"):
            return None
        if target is None and {"prompt", "completion"} <= set(row) and self._texts[0] not in row:
            target, template = "completion", "{prompt}"
        elif target is None and template is None and is_instruction(row) and self._texts[0] not in row:
            target, template = "output", instruction_template(row)
        elif target is None and kind.name == "seq2seq" and isinstance(row.get("target"), str):
            target = "target"
        if target is None:
            return None
        text = Template(template if template is not None else " ".join(f"{{{t}}}" for t in self._texts), "template")
        return Completion(kind, self.tokenizer, text, target, checked=not self.own_objective, prefix=self.prefix)

    def _is_chat(self, row: Row) -> bool:
        """Whether the row is a conversation, or an instruction that the tokenizer has a template for."""
        if self._prompt is not None or self.target_column is not None or self.task not in ("auto", "prompt"):
            return False
        asked = is_instruction(row) and self._texts[0] not in row and self.template is None
        return has_conversation(row) or (asked and getattr(self.tokenizer, "chat_template", None) is not None)

    def _chat(self, row: Row, where: str) -> dict[str, Any]:
        """A conversation: the loss is on its last message, which is the assistant's."""
        start, answer = rendered(self.tokenizer, messages_of(row), where)
        completion = Completion(self.kind, self.tokenizer, Template("{prompt}", "template"), "messages",
                                checked=not self.own_objective)  # fmt: skip
        return completion.continued(start, answer, self.max_length, where, rendered=True)

    def _has_class(self, row: Row) -> bool:
        return self._needs_class() or (self.task == "auto" and row.get(self.label_column) is not None)

    def _needs_class(self) -> bool:
        heads = self.kind.name == "classification" and not self.own_objective
        return self.task == "classification" or (heads and self.task == "auto" and self._prompt is None)

    def _class(self, row: Row, where: str) -> Any:
        kind, value = self.kind, row[self.label_column]
        if not self.own_objective and kind.name not in ("classification", "other"):
            what = "causal LM" if kind.name == "causal" else f"{kind.name} model"
            raise DataError(
                f"{where} has a {self.label_column!r}, and {kind.model} is a {what} without classes. Pass "
                "template= and verbalizers= (--template, --verbalizers), task='lm' to ignore the label, or "
                "model_class='AutoModelForSequenceClassification' for a head of classes."
            )
        return class_label(value, kind, where, self.label_column)

    def _read(self, texts: Sequence[str]) -> dict[str, Any]:
        """The tokenizer's output for the texts, as far as the model takes it."""
        encoded = encoded_text(self.tokenizer, texts, self.max_length)
        known = self.kind.takes | {"input_ids", "attention_mask"}
        return {name: values for name, values in encoded.items() if name in known}

    def _plain(self, texts: Sequence[str], where: str, draw: str) -> dict[str, Any]:
        """Text without an answer, for models that learn from text alone."""
        kind = self.kind
        if kind.name == "masked":
            encoded = self._read(texts)
            return {**encoded, **self._tokenised.hidden(encoded["input_ids"], where, draw)}
        if self.own_objective and kind.name != "causal" and self.task != "lm":
            return self._read(texts)
        if kind.sees_ahead:
            check_kind(kind, "text")
        if kind.name not in ("causal", "other") or (kind.name == "other" and self.task != "lm"):
            raise DataError(f"{where} is text, and {kind.model} {WANTS[kind.name]}.")
        return next_tokens(self.kind, closed(self.tokenizer, text_ids(self.tokenizer, *texts)), self.max_length, where)
