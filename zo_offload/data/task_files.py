"""Reads the papers' data sets, in their file formats, as records.

jsonl    one object per line                    tsv     tabs, a header, quotes are ordinary characters (GLUE)
json     one object or a list of them           csv     commas, a header, quotes as usual
trees    "(3 (2 It) (4 works))": text and label of the whole (Stanford Sentiment Treebank)
trec     "HUM:ind Who wrote it ?": text, label (HUM) and fine (HUM:ind)
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError

Record = Any


def read_records(path: Path, form: str | None) -> Iterator[Record]:
    """The records of a file in order; form: None: by the suffix. Raises DataError with the line."""
    form = path.suffix.lower().lstrip(".").replace("ndjson", "jsonl") if form is None else form
    if form not in FORMATS:
        raise DataError(f"{path}: {path.suffix or 'no suffix'} says no format; give one of {', '.join(FORMATS)}.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # TREC's files
    yield from FORMATS[form](text, path)


def _jsonl(text: str, path: Path) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path} line {number} is not JSON: {error}.") from error


def _json(text: str, path: Path) -> Iterator[Record]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from error
    yield from found if isinstance(found, list) else [found]


def _table(text: str, path: Path, delimiter: str, quoting: Literal[0, 3]) -> Iterator[Record]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
    for row in reader:
        if None in row or None in row.values():
            raise DataError(f"{path} line {reader.line_num}: {len(row)} fields do not match the header "
                            f"{', '.join(reader.fieldnames or ())}.")  # fmt: skip
        yield row


def _tsv(text: str, path: Path) -> Iterator[Record]:
    return _table(text, path, "\t", csv.QUOTE_NONE)


def _csv(text: str, path: Path) -> Iterator[Record]:
    return _table(text, path, ",", csv.QUOTE_MINIMAL)


_LEAF = re.compile(r"\(\d+ ([^()]+)\)")
_PLAIN = {"-LRB-": "(", "-RRB-": ")"}


def _trees(text: str, path: Path) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        words = [_PLAIN.get(word, word) for word in _LEAF.findall(line)]
        if not words or not (root := re.match(r"\((\d+)\s", line.strip())):
            raise DataError(f"{path} line {number} is not a tree such as '(3 (2 It) (4 works))'.")
        yield {"text": " ".join(words).replace("\\/", "/"), "label": int(root[1])}


def _trec(text: str, path: Path) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        fine, _, question = line.strip().partition(" ")
        coarse, colon, _ = fine.partition(":")
        if not colon or not question.strip():
            raise DataError(f"{path} line {number} is not a question such as 'HUM:ind Who wrote it ?'.")
        yield {"text": question.strip(), "label": coarse, "fine": fine}


FORMATS: dict[str, Callable[[str, Path], Iterator[Record]]] = {
    "jsonl": _jsonl, "json": _json, "tsv": _tsv, "csv": _csv, "trees": _trees, "trec": _trec,
}  # fmt: skip
