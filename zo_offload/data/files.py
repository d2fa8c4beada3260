"""Files of rows: rows of .jsonl, .csv, .tsv and .txt are read from disk on demand (`row_file.py`), a folder that
`datasets` saved through its memory map; .json, .parquet and compressed files are read into memory.

The text formats are read here and not by `datasets`, which needs pandas and pyarrow (200 MB), copies its input into a
cache of its own, and does not name the line of an error.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..system.plain import once, user_path
from .row_file import FileRow, JsonlFile, open_rows

_READ = (
    ".jsonl, .ndjson, .csv, .tsv, .txt (a text a line), .json (a list of objects), .parquet, a text file with .gz, "
    ".bz2 or .xz, or a folder that datasets saved"
)
_PACKED = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}


def open_file(path: str | Path, check: Callable[[FileRow], int]) -> Sequence[FileRow]:
    """The rows of a file. check: called with each row of a file read on demand. Raises DataError with the line."""
    path = user_path(path)
    if path.is_dir():
        saved: Sequence[FileRow] = _saved(path)
        return saved
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file.")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson", ".csv", ".tsv", ".txt"):
        return open_rows(path, check)
    if suffix in _PACKED:
        return _unpacked(path)
    rows: Sequence[FileRow]
    if suffix == ".json":
        rows = _json(path, check)
    elif suffix == ".parquet":
        rows = _parquet(path)
    else:
        raise DataError(f"{path}: {path.suffix or 'no suffix'} is not read; give {_READ}, or a list of dicts.")
    if not rows:
        raise DataError(f"{path} holds no rows.")
    return rows


def _unpacked(path: Path) -> list[FileRow]:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.stem
        try:
            copy.write_bytes(_PACKED[path.suffix.lower()](path.read_bytes()))
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{path} is not a {path.suffix} file, or is cut short: {error}.") from error
        try:
            return list(open_file(copy, lambda row: 0))
        except DataError as error:
            raise DataError(str(error).replace(str(copy), str(path))) from error


def _json(path: Path, check: Callable[[FileRow], int]) -> Sequence[FileRow]:
    """A list of objects, or one object per line, which some programs also write as .json."""
    try:
        rows = json.loads(path.read_bytes(), object_pairs_hook=once)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return JsonlFile(path, check)
        raise DataError(f"{path} is not JSON: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} is a JSON {type(rows).__name__}; expected a list of objects.")
    return rows


def _parquet(path: Path) -> list[Any]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{path}: reading .parquet needs pyarrow (pip install pyarrow).") from error
    try:
        return list(parquet.read_table(path).to_pylist())
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is not read as parquet: {error}.") from error


def _saved(path: Path) -> Any:
    """A dataset that `save_to_disk` wrote."""
    if (path / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in path.iterdir() if child.is_dir())
        raise DataError(f"{path} is a DatasetDict of {', '.join(splits)}: give one of them, {path / splits[0]}.")
    if not (path / "state.json").is_file():
        raise DataError(f"{path} is a folder, but not a dataset that datasets saved. Give {_READ}, or --task for a "
                        "folder of a task's files.")  # fmt: skip
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise DataError(f"{path}: reading a saved dataset needs datasets (pip install datasets).") from error
    return load_from_disk(str(path))
