"""Rows of a .jsonl, .csv, .tsv or .txt file, read on demand: memory holds only each row's offset, 8 bytes.

Opening reads the file once and checks every row, so an error in a row is raised at once, with its line. A row is then
read at its offset and parsed again. If the file changes after it was opened, the next row raises an error, so that a
step never sees other rows than the run began with.
"""

from __future__ import annotations

import contextlib
import csv
import heapq
import io
import json
import os
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from ..errors import DataError
from ..system.plain import once, user_path
from .digests import RowsDigest

LONGEST_KEPT = 8

FileRow = dict[str, Any]


class RowFile(Sequence[FileRow]):
    """The rows of one file; `open_rows` chooses the class by the suffix. May be read from several threads.

    longest: indices of the LONGEST_KEPT rows with the largest `size_of`, largest first; among equal rows the first
    ones.
    """

    def __init__(self, path: Path, size_of: Callable[[FileRow], int]) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._stamp = self._stamp_now()
        self._begins = array("q")
        largest: list[tuple[int, int]] = []  # a heap of (size, -index)
        digest = RowsDigest()
        for place, (begin, row) in enumerate(self._scan()):
            self._begins.append(begin)
            digest.add(row)
            heapq.heappush(largest, (size_of(row), -place))
            if len(largest) > LONGEST_KEPT:
                heapq.heappop(largest)
        self.longest = [-place for _, place in sorted(largest, reverse=True)]
        self._begins.append(self._stamp[0])
        self.digest = digest.hex()
        """Digest of all rows: see digests.py."""

    def _scan(self) -> Iterator[tuple[int, FileRow]]:
        """(first byte, row) of each row in order. Raises DataError with the line of a malformed row."""
        raise NotImplementedError

    def _parse(self, data: bytes) -> FileRow:
        """Parse the row at the start of `data`."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._begins) - 1

    @overload
    def __getitem__(self, index: int) -> FileRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[FileRow]: ...
    def __getitem__(self, index: int | slice) -> FileRow | list[FileRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.path}")
        place = index % len(self)
        begin, end = self._begins[place], self._begins[place + 1]
        data = os.pread(self._fd, end - begin, begin)
        if len(data) < end - begin or self._stamp_now() != self._stamp:
            raise DataError(
                f"{self.path} was changed after it was opened. Restore it, or begin again: which rows a step sees is "
                "part of a run."
            )
        return self._parse(data)

    def _stamp_now(self) -> tuple[int, int]:
        found = os.fstat(self._fd)
        return found.st_size, found.st_mtime_ns

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # not opened, or the interpreter exits
            os.close(self._fd)


class JsonlFile(RowFile):
    """One object per line; empty lines are skipped."""

    def _scan(self) -> Iterator[tuple[int, FileRow]]:
        begin = 0
        with open(os.dup(self._fd), "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield begin, self._checked(line, number)
                begin += len(line)

    def _parse(self, data: bytes) -> FileRow:
        row: FileRow = json.loads(data.split(b"\n", 1)[0])
        return row

    def _checked(self, line: bytes, number: int) -> FileRow:
        try:
            row = json.loads(line.removesuffix(b"\n"), object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path} line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise DataError(
                f"{self.path} line {number} is a JSON {type(row).__name__}; expected an object with columns."
            )
        return row


class TextFile(RowFile):
    """One text per line, in column "text"; empty lines are skipped."""

    def _scan(self) -> Iterator[tuple[int, FileRow]]:
        begin = _mark(self._fd)
        with open(os.dup(self._fd), "rb") as file:
            file.seek(begin)
            for number, line in enumerate(file, start=1):
                if number == 1 and b"\r" in line.rstrip(b"\r\n") and not line.endswith(b"\n"):
                    raise DataError(f"{self.path} has carriage returns and no line ends: all of it would be one text. "
                                    "Write it with line feeds.")  # fmt: skip
                if line.strip():
                    try:
                        yield begin, self._parse(line)
                    except UnicodeDecodeError as error:
                        what = f"{self.path} line {number} is not UTF-8"
                        raise DataError(f"{what}: {error}. Save it as UTF-8.") from error
                begin += len(line)

    def _parse(self, data: bytes) -> FileRow:
        return {"text": data.split(b"\n", 1)[0].removesuffix(b"\r").decode()}


class CsvFile(RowFile):
    """A header, then one record per row; a quoted record may span several lines. Fields may have any length."""

    delimiter = ","

    def _scan(self) -> Iterator[tuple[int, FileRow]]:
        with open(os.dup(self._fd), newline="", encoding="utf-8-sig") as file:
            at = _mark(self._fd)  # the decoder removes it

            def lines() -> Iterator[str]:
                nonlocal at
                for line in file:
                    at += len(line.encode())
                    yield line

            reader = csv.DictReader(lines(), strict=True, delimiter=self.delimiter)
            try:
                self._header = list(reader.fieldnames or ())
                if twice := sorted({name for name in self._header if self._header.count(name) > 1}):
                    raise DataError(f"{self.path}: the header has {', '.join(map(repr, twice))} twice. Rename one.")
                begin, lines_before = at, reader.line_num
                while True:
                    with _fields_of_any_length():
                        row = next(reader, None)  # reads lines until a record is complete
                    if row is None:
                        break
                    if None in row or None in row.values():
                        raise DataError(
                            f"{self.path} line {reader.line_num}: {len(row)} fields do not match the header "
                            f"{', '.join(self._header)}."
                        )
                    if self.delimiter == "\t" and any("\t" in v and "\n" in v for v in row.values()):
                        raise DataError(
                            f"{self.path} line {lines_before + 1}: a field begins with a quote, and all up to the next "
                            f"one, in line {reader.line_num}, would be its text, tabs too. {_QUOTES}"
                        )
                    yield begin, row
                    begin, lines_before = at, reader.line_num
            except (csv.Error, UnicodeDecodeError) as error:
                hint = f" {_QUOTES}" if isinstance(error, csv.Error) and '"' in str(error) else ""
                hint += " Save it as UTF-8." if isinstance(error, UnicodeDecodeError) else ""
                raise DataError(f"{self.path} after line {reader.line_num}: {error}.{hint}") from error

    def _parse(self, data: bytes) -> FileRow:
        text = io.StringIO(data.decode(), newline="")
        with _fields_of_any_length():
            return next(csv.DictReader(text, self._header, strict=True, delimiter=self.delimiter))


_QUOTES = "If quotes are ordinary characters, put the field in quotes and double the quotes in it, or write .jsonl."


def _mark(fd: int) -> int:
    """Length in bytes of the byte order mark that some editors write before UTF-8."""
    return 3 if os.pread(fd, 3, 0) == b"\xef\xbb\xbf" else 0


class TsvFile(CsvFile):
    """The same with tabs."""

    delimiter = "\t"


@contextlib.contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """Lift csv's limit on a field, which holds for the whole process, while a record is read."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def open_rows(path: str | Path, size_of: Callable[[FileRow], int] = lambda row: 0) -> RowFile:
    """Rows of a .jsonl (one object per line) or .csv (with a header). Raises DataError with the line."""
    path = user_path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file.")
    kinds: dict[str, type[RowFile]] = {".jsonl": JsonlFile, ".ndjson": JsonlFile, ".csv": CsvFile, ".tsv": TsvFile,
                                     ".txt": TextFile}  # fmt: skip
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"{path}: {path.suffix or 'no suffix'} is not read; give .jsonl or .csv, or a list of dicts.")
    rows = kind(path, size_of)
    if not rows:
        raise DataError(f"{path} holds no rows.")
    return rows
