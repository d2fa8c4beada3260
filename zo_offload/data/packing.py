"""Texts concatenated and cut into rows of equal length: no padding, and no part of a long text is lost.

Each text ends with EOS, and a row may hold the end of one text and the beginning of the next; attention crosses that
border, as in transformers' own run_clm. The tokens are kept in memory, 4 bytes each.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

from ..errors import DataError
from .digests import RowsDigest
from .encode import Encoder
from .prompts import closed
from .texts import as_text, no_dict, text_ids

PackedRow = dict[str, list[int]]


class PackedRows(Sequence[PackedRow]):
    """Rows of `encoder.max_length` tokens; the last row may be shorter. Raises DataError with the row."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], encoder: Encoder, name: str) -> None:
        tokenizer, kind = encoder.tokenizer, encoder.kind
        if kind.name not in ("causal", "other", "unknown"):
            raise DataError(
                f"packing=True is for texts of which every token is learned, but {kind.model} is not a causal LM."
            )
        if tokenizer is None:
            raise DataError("packing=True needs a tokenizer: pass tokenizer=")
        width = encoder.max_length or kind.positions
        if width is None or width < 2:
            raise DataError("packing=True needs max_length=, the tokens of a row")
        self._width, self._ids = width, array("i")
        self.texts = 0
        columns = [encoder.text_column] if isinstance(encoder.text_column, str) else list(encoder.text_column)
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise DataError(no_dict(f"{name} row {i}", row))
            absent = [column for column in columns if column not in row]
            if absent:
                raise DataError(f"{name} row {i} lacks {', '.join(map(repr, absent))}, its columns are "
                                f"{', '.join(map(repr, row))}. Pass text_column=.")  # fmt: skip
            ids = text_ids(tokenizer, *(as_text(row[column], f"{name} row {i}", column) for column in columns))
            self._ids.extend(closed(tokenizer, ids))
            self.texts += 1
        if len(self._ids) % width == 1:
            self._ids.pop()  # one token predicts nothing
        if not self._ids:
            raise DataError(f"{name} has no text to pack.")
        digest = RowsDigest()
        digest.add(self._ids.tobytes())
        self.digest = f"{width} {digest.hex()}"
        """Digest of all tokens, with the width, as a run keeps it."""
        self.longest = [0]

    def __len__(self) -> int:
        return -(-len(self._ids) // self._width)

    @overload
    def __getitem__(self, index: int) -> PackedRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[PackedRow]: ...
    def __getitem__(self, index: int | slice) -> PackedRow | list[PackedRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        place = index % len(self) * self._width
        return {"input_ids": self._ids[place : place + self._width].tolist()}
