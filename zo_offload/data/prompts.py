"""Prompts: a template makes a text from a row, and the answer is one of a few *verbalizers*, or the text of a column.

The model's kind decides where the answer goes: after the prompt (causal), at the mask (masked), in the decoder
(seq2seq). The loss is on the answer only, and the answer is never in the input of its own prediction.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError
from ..modules.kind import IGNORED, ModelKind
from ..system.plain import plain_value
from .texts import as_text, bare_ids, check_not_empty, continuation, end_of_text, is_sequence, open_ids, text_ids

MASK = "mask"  # {mask} in a template is the position that a masked model fills in


class Template:
    """A text with {column} in it; {{ and }} are literal braces. Raises DataError if it cannot be filled in."""

    def __init__(self, text: str, what: str):
        self.text, hint = text, "Braces are for columns, {column}; write {{ and }} for braces themselves."
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise DataError(f"{what}={text!r}: {error}. {hint}") from error
        self.columns = list(dict.fromkeys(name for _, name, _, _ in parts if name is not None))
        self.literals = [literal for literal, *_ in parts]
        self.ends_open = not parts or parts[-1][1] is None
        for _, name, spec, conversion in parts:
            odd = name is not None and not all(c.isalnum() or c in "_- " for c in name)
            if name is not None and (spec or conversion or not name or name.isdigit() or odd):
                shown = f"{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}"
                raise DataError(f"{what}={text!r}: {{{shown}}} is not a column's name. {hint}")

    def fill(self, values: Mapping[str, Any]) -> str:
        return string.Formatter().vformat(self.text, (), values)

    @property
    def text_alone(self) -> str:
        """The text of a template without columns."""
        return self.fill({})

    @property
    def last_words(self) -> str:
        """The fixed end of the text, after the last column."""
        return self.literals[-1] if self.literals and self.ends_open else ""


class Prompt:
    """Encodes rows as prompts with answers, for one kind of model. Raises DataError if that cannot be right.

    checked: the loss is the model's own, so the model must be of a kind that answers with words.
    """

    def __init__(
        self,
        kind: ModelKind,
        tokenizer: Any,
        template: str,
        words: Mapping[str, str] | str,
        label_column: str,
        *,
        checked: bool,
        prefix: str = "",
    ):
        if tokenizer is None:
            raise DataError("template and verbalizers need a tokenizer: pass tokenizer=")
        if checked:
            check_kind(kind, "a template with verbalizers")
        self.kind, self.tokenizer, self.label_column = kind, tokenizer, label_column
        self.template, self.prefix = Template(template, "template"), prefix
        self._each = Template(words, "verbalizers") if isinstance(words, str) else None
        self.words = {} if isinstance(words, str) else {k: Template(word, "verbalizers") for k, word in words.items()}
        texts = [word.text for word in self.words.values()]
        if self._each is not None and len(self._each.columns) != 1:
            raise DataError(
                f"verbalizers={words!r}: give at least two words ([...], --verbalizers bad good), or {{column}}, the "
                "column that lists a row's own"
            )
        if self._each is None and (len(texts) < 2 or len(set(texts)) < len(texts)):
            raise DataError(f"verbalizers={texts}: give at least two different ones")
        self.masks = self._masks_in_template() if kind.name == "masked" else 0
        self.by_row = self._each is not None or any(word.columns for word in self.words.values())
        if label_column in self.template.columns:
            raise DataError(f"template={template!r} holds the answer: {label_column!r} is the label's column.")
        self._fixed = None if self.by_row else self._options([word.text_alone for word in self.words.values()],
                                                             "verbalizers")  # fmt: skip

    @property
    def listed(self) -> str | None:
        """The column that lists a row's own options, as many as there are."""
        return self._each.columns[0] if self._each is not None else None

    @property
    def columns(self) -> list[str]:
        """The text columns that a row must have, besides the label's."""
        named = [c for t in (self.template, *self.words.values()) for c in t.columns]
        return [c for c in dict.fromkeys(named) if c != MASK or self.kind.name != "masked"]

    def answer_of(self, row: Mapping[str, Any], where: str) -> int:
        """Index of the row's verbalizer, found by its label."""
        label, known = plain_value(row.get(self.label_column)), list(self.words)
        if self._each is not None:
            return self._listed_answer(label, self._listed(row, where), where)
        names = [str(label), str(label).strip(), *_as_whole_number(label)]
        found = next((name for name in names if name in self.words), None)
        if found is None:
            name = f"{{{json.dumps(label)}: ...}}" if isinstance(label, str) else ""
            hint = f" Name them by label: verbalizers={name} (--verbalizers '{name}')." if name else ""
            raise DataError(f"{where}: {self.label_column}={label!r}, but the verbalizers are for "
                            f"{', '.join(map(repr, known))}.{hint}")  # fmt: skip
        return known.index(found)

    def _listed_answer(self, label: Any, known: list[str], where: str) -> int:
        """Index of the answer among the row's own options: the label is one of their texts, or else an index."""
        said = f"{where}: {self.label_column}={label!r}"
        index = next((int(text) for text in _as_whole_number(label) if 0 <= int(text) < len(known)), None)
        if isinstance(label, str):
            index = known.index(label) if label in known else index
        elif index is not None and str(label) in known and known.index(str(label)) != index:
            raise DataError(
                f"{said} is the index of {known[index]!r} in {self.listed!r}, but {str(label)!r} is also a text "
                "in it. Give the label as a text."
            )
        if index is None:
            raise DataError(f"{said} is none of {self.listed!r}: {known}, nor an index of them, from 0.")
        return index

    def options(self, row: Mapping[str, Any], where: str) -> list[list[int]]:
        """The tokens of each verbalizer; columns in it are filled in from the row."""
        if self._fixed is not None:
            return self._fixed
        values = self._values(row, where)
        return self._options([word.fill(values) for word in self._templates(row, where)], where)

    def shown(self, row: Mapping[str, Any], where: str) -> str:
        """The row as a demonstration: its prompt, and its answer."""
        values = self._values(row, where)
        return self.template.fill(values) + self._templates(row, where)[self.answer_of(row, where)].fill(values)

    def _templates(self, row: Mapping[str, Any], where: str) -> list[Template]:
        """The verbalizers; a row may list its own."""
        if self._each is None:
            return list(self.words.values())
        braces = {ord("{"): "{{", ord("}"): "}}"}
        around = self._each.text.replace(f"{{{self.listed}}}", "{}")
        return [Template(around.format(text.translate(braces)), "verbalizers") for text in self._listed(row, where)]

    def _listed(self, row: Mapping[str, Any], where: str) -> list[str]:
        found: Any = row.get(self.listed or "")
        texts = [as_text(text, where, str(self.listed)) for text in found] if is_sequence(found) else []
        if len(texts) < 2 or len(set(texts)) < len(texts):
            raise DataError(f"{where}: column {self.listed!r} is {found!r}; expected a list of two or more different "
                            "texts.")  # fmt: skip
        return texts

    def encode(self, row: Mapping[str, Any], where: str, room: int | None) -> dict[str, Any]:
        """Inputs and labels of one row in at most `room` tokens; the template's text is cut, never the answer."""
        values, options = self._values(row, where), self.options(row, where)
        answer = options[self.answer_of(row, where)]
        text = self.prefix + self.template.fill(values)
        if self.kind.name == "masked":
            return self._masked(text, answer, where, room)
        if self.kind.name == "seq2seq":
            ids = text_ids(self.tokenizer, text)
            closed = len(ids) - len(open_ids(self.tokenizer, text))
            ids = keep_end(ids, room, where, tail=closed)
            return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": answer}
        start = keep_end(open_ids(self.tokenizer, text), None if room is None else room - len(answer), where)
        self._check_longest(len(start), len(answer), options, where)
        return continued(self.kind, start, answer)

    def _check_longest(self, start: int, own: int, options: Sequence[Sequence[int]], where: str) -> None:
        """Raise DataError if the row has too few positions for the other answers, which an evaluation needs."""
        limit, longest = self.kind.positions, max(map(len, options))
        if limit is None or start + longest <= limit or start + own > limit:  # the last: an error of the row
            return
        cut = f"Pass max_length={limit - longest + 1} to cut the prompt" if longest < limit - 1 else "Leave it out"
        raise DataError(
            f"{where}: with the longest verbalizer it has {start + longest} tokens, but the model takes at most "
            f"{limit}. {cut}, or choose shorter ones."
        )

    def _values(self, row: Mapping[str, Any], where: str) -> dict[str, str]:
        values = {column: as_text(row.get(column), where, column) for column in self.columns}
        check_not_empty(list(values.values()) or ["-"], where, list(values))
        return {**values, MASK: self.tokenizer.mask_token} if self.masks else values

    def _options(self, words: Sequence[str], where: str) -> list[list[int]]:
        options = [self._word_ids(word) for word in words]
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        for word, ids in zip(words, options, strict=True):
            if not ids or (unknown is not None and unknown in bare_ids(self.tokenizer, word)):
                raise DataError(f"{where}: {word!r} is not in the tokenizer's vocabulary. Choose another word.")
            if self.masks and len(ids) != self.masks:
                raise DataError(
                    f"{where}: {word!r} is {len(ids)} tokens, but the template has {self.masks} masks. A masked model "
                    f"predicts one token per mask: choose words of as many tokens as there are {{{MASK}}}."
                )
        for i, ids in enumerate(options):
            if (first := options.index(ids)) < i:
                raise DataError(
                    f"{where}: {words[first]!r} and {words[i]!r} are the same tokens {ids}: the answers could not be "
                    "told apart. Choose other words."
                )
        return options

    def _word_ids(self, word: str) -> list[int]:
        if self.kind.name == "seq2seq":
            return text_ids_of_answer(self.tokenizer, word)
        if self.kind.name != "masked":
            return continuation(self.tokenizer, "a" + self.template.last_words, word)
        before = self._before_mask()
        space = " " if before != before.rstrip() or word != word.lstrip() else ""
        return continuation(self.tokenizer, "a" + before.rstrip(), space + word.lstrip())

    # ---- masks -----------------------------------------------------------------------------------------------------

    def _masks_in_template(self) -> int:
        mask = mask_token(self.tokenizer, self.kind)
        filled = self.template.fill(dict.fromkeys(self.template.columns, "") | {MASK: mask})
        if mask not in filled:
            raise DataError(
                f"template={self.template.text!r}: {self.kind.model} predicts the token at a mask. Put {{{MASK}}} "
                f"where the answer belongs, such as '{{text}} It was {{{MASK}}}.'"
            )
        return filled.count(mask)

    def _before_mask(self) -> str:
        """The template's fixed text right before its first mask."""
        mask = self.tokenizer.mask_token
        for literal, name, *_ in string.Formatter().parse(self.template.text):
            if mask in literal:
                return str(literal.split(mask)[0])
            if name == MASK:
                return literal
        return ""

    def _masked(self, text: str, answer: list[int], where: str, room: int | None) -> dict[str, Any]:
        ids, mask = text_ids(self.tokenizer, text), self.tokenizer.mask_token_id
        if ids.count(mask) != self.masks:
            raise DataError(
                f"{where}: {ids.count(mask)} masks in the text, {self.masks} in the template: the row's own text "
                f"contains {self.tokenizer.mask_token!r}, or the tokenizer does not know it."
            )
        ids = keep_around(ids, mask, room, where)
        rest = iter(answer)
        labels = [next(rest) if token == mask else IGNORED for token in ids]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def check_kind(kind: ModelKind, what: str) -> None:
    """Raise DataError for models that do not answer with words."""
    if kind.sees_ahead:
        raise DataError(
            f"{kind.model} with config.is_decoder=False sees each answer ahead of its place, so {what} would teach it "
            "nothing. Use its ForMaskedLM class, or set is_decoder."
        )
    if kind.name in ("classification", "tokens", "questions", "choice", "bare"):
        raise DataError(f"{kind.model} has no head that predicts words, so {what} does not work with it: leave it out.")


def mask_token(tokenizer: Any, kind: ModelKind) -> str:
    """The tokenizer's mask as text. Raises DataError if it has none."""
    if getattr(tokenizer, "mask_token", None) is None:
        raise DataError(f"{kind.model} predicts the token at a mask, but the tokenizer has no mask token.")
    return str(tokenizer.mask_token)


def text_ids_of_answer(tokenizer: Any, text: str) -> list[int]:
    """A decoder's labels: the answer as the tokenizer encodes targets, closed with EOS."""
    ids = list(tokenizer(text_target=text)["input_ids"])
    return closed(tokenizer, ids)


def continued(kind: ModelKind, start: list[int], answer: list[int]) -> dict[str, Any]:
    """A causal model's row: the loss is on the answer, which comes after all tokens that it is predicted from."""
    ids = start + answer
    labels = kind.placed([IGNORED] * len(start) + answer)
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def closed(tokenizer: Any, ids: list[int]) -> list[int]:
    """Tokens with an EOS at the end, if the tokenizer has one."""
    end = end_of_text(tokenizer)
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def keep_start(ids: list[int], room: int | None, tail: int) -> list[int]:
    """At most `room` tokens: the first ones and the `tail` closing ones, as tokenizers truncate a text."""
    if room is None or len(ids) <= room:
        return ids
    return ids[: max(0, room - tail)] + ids[len(ids) - tail :] if tail < room else ids[:room]


def keep_end(ids: list[int], room: int | None, where: str, tail: int = 0) -> list[int]:
    """At most `room` tokens: the first one (it may be a BOS) and the last ones, where a prompt asks its question.

    tail: number of closing tokens, counted among the last ones.
    """
    if room is None or len(ids) <= room:
        return ids
    if room < 2 + tail:
        raise DataError(f"{where}: max_length leaves {max(room, 0)} tokens for the prompt. Raise it.")
    return ids[:1] + ids[len(ids) - room + 1 :]


def keep_around(ids: list[int], mask: int, room: int | None, where: str) -> list[int]:
    """At most `room` tokens with all masks, the first and the last token; text before the masks is cut first."""
    if room is None or len(ids) <= room:
        return ids
    places = [i for i, token in enumerate(ids) if token == mask]
    first, last, over = places[0], places[-1], len(ids) - room
    left = min(over, max(0, first - 1))
    right = min(over - left, max(0, len(ids) - 2 - last))
    if left + right < over:
        raise DataError(f"{where}: max_length={room} leaves no room for the template around its masks. Raise it.")
    end = len(ids) - 1
    return ids[:1] + ids[1 + left : end - right] + ids[end:]


def _as_whole_number(label: Any) -> list[str]:
    """The whole number that a label means, if it is written as a truth value or a float."""
    if isinstance(label, bool):
        return [str(int(label))]
    try:
        number = float(label)
    except (TypeError, ValueError):
        return []
    return [str(int(number))] if math.isfinite(number) and number == int(number) else []
