"""Rows with a prompt and its answer: a text in a column, or a conversation's last message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import DataError
from ..modules.kind import ModelKind
from .prompts import Template, check_kind, closed, continued, keep_end, keep_start, text_ids_of_answer
from .texts import as_text, bare_ids, check_not_empty, end_of_text, open_ids, text_ids


class Completion:
    """Encodes rows with a prompt and, in a column, the text of the answer."""

    def __init__(
        self, kind: ModelKind, tokenizer: Any, prompt: Template, target_column: str, *, checked: bool, prefix: str = ""
    ):
        self.prefix = prefix
        if tokenizer is None:
            raise DataError(f"{target_column!r} is text: pass tokenizer=")
        if kind.name == "masked":
            raise DataError(f"{kind.model} does not write {target_column!r}: it predicts single tokens, at masks.")
        if checked:
            check_kind(kind, f"an answer in {target_column!r}")
        if target_column in prompt.columns:
            raise DataError(f"template={prompt.text!r} holds the answer: {target_column!r} is the target's column.")
        self.kind, self.tokenizer, self.prompt, self.target_column = kind, tokenizer, prompt, target_column

    @property
    def columns(self) -> list[str]:
        return [*self.prompt.columns, self.target_column]

    def encode(self, row: Mapping[str, Any], where: str, room: int | None) -> dict[str, Any]:
        """As `Prompt.encode`; the answer ends with EOS, and is cut only if it does not fit alone."""
        values = {column: as_text(row.get(column), where, column) for column in self.prompt.columns}
        check_not_empty(list(values.values()) or ["-"], where, list(values))
        target = as_text(row.get(self.target_column), where, self.target_column)
        check_not_empty([target], where, [self.target_column])
        text = self.prefix + self.prompt.fill(values)
        if self.kind.name == "seq2seq":
            ids = text_ids(self.tokenizer, text)
            ending = len(ids) - len(open_ids(self.tokenizer, text))
            return self._answered(ids, text_ids_of_answer(self.tokenizer, target), room, ending)
        return self.continued(text, target, room, where)

    def shown(self, row: Mapping[str, Any], where: str) -> str:
        """The row as a demonstration: its prompt, and its answer."""
        values = {column: as_text(row.get(column), where, column) for column in self.columns}
        return self.prompt.fill(values) + values[self.target_column]

    def continued(
        self, text: str, target: str, room: int | None, where: str, *, rendered: bool = False
    ) -> dict[str, Any]:
        """The target after the text, or in the decoder if the model has one. rendered: a chat template wrote both, with
        all special tokens around them."""
        if rendered:
            start, both = bare_ids(self.tokenizer, text), bare_ids(self.tokenizer, text + target)
        else:
            start, both = open_ids(self.tokenizer, text), open_ids(self.tokenizer, text + target)
        answer = both[len(start) :] if both[: len(start)] == start else bare_ids(self.tokenizer, target)
        if self.kind.name == "seq2seq":  # a decoder's text must end with EOS, whatever the template ends with
            return self._answered(start, closed(self.tokenizer, answer), room, 0)
        answer = answer if rendered else closed(self.tokenizer, answer)
        if room is not None:
            answer = answer[: max(1, room - 1)]
            start = keep_end(start, room - len(answer), where)
        return continued(self.kind, start, answer)

    def _answered(self, ids: list[int], answer: list[int], room: int | None, ending: int) -> dict[str, Any]:
        """An encoder-decoder's row; text and answer are cut as tokenizers truncate: the closing tokens stay."""
        ids, closes = keep_start(ids, room, ending), answer[-1:] == [end_of_text(self.tokenizer)]
        answer = keep_start(answer, room, int(closes))
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": answer}
