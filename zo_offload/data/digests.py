"""Digests that identify data: of all rows, and of the way that rows become a model's inputs.

A row's bytes are those of its columns in order of their names; equal rows have equal bytes in every container (a line
of a file, a dict, a row of a `datasets.Dataset`). Tensors and arrays count whole. Rows that a class of the caller's own
computes (a torch Dataset) are sampled, and `known` says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

SAMPLED = 4096
"""Number of evenly spaced rows that are read when reading all rows may take hours."""
HUGE = 1_000_000
"""A `datasets.Dataset` with at least this many rows is identified by its own fingerprint."""
TRIED = 64
_PLAIN = frozenset({int, float, str, bool, bytes, type(None)})


class RowsDigest:
    """blake2b-8 of rows that are added in order."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=8)

    def add(self, row: Any) -> None:
        _feed(self._digest.update, row)
        self._digest.update(b"\n")

    def hex(self) -> str:
        return self._digest.hexdigest()


def rows_identity(rows: Any) -> dict[str, Any]:
    """{"rows", "digest"} of rows with random access; also "known" if the digest does not cover all rows."""
    count = len(rows)
    whole = getattr(rows, "digest", None)
    if isinstance(whole, str):  # a file, which was digested while it was scanned
        return {"rows": count, "digest": whole}
    if isinstance(rows, (list, tuple)):
        return {"rows": count, "digest": _digest_of(rows)}
    if _is_hf(rows):
        if count >= HUGE:
            return {"rows": count, "digest": str(rows._fingerprint), "known": "the fingerprint of a datasets.Dataset"}
        return {"rows": count, "digest": _digest_of(_hf_rows(rows))}
    if count and _digest_of([rows[0]]) != _digest_of([rows[0]]):
        return {"rows": count, "digest": "", "known": "nothing of rows that differ at each reading"}
    if count <= SAMPLED:
        return {"rows": count, "digest": _digest_of(rows[i] for i in range(count))}
    sample = (rows[k * count // SAMPLED] for k in range(SAMPLED))
    return {"rows": count, "digest": _digest_of(sample), "known": f"{SAMPLED} rows of {count}"}


def stream_identity(batches: Any) -> dict[str, Any]:
    """The identity of ready batches before they are read: all of a list, the settings of a loader."""
    about: dict[str, Any] = {"batches": type(batches).__name__}
    if isinstance(batches, (list, tuple)):
        return {**about, **rows_identity(batches)}
    for name in ("batch_size", "drop_last"):
        if isinstance(value := getattr(batches, name, None), (int, bool)):
            about[name] = value
    if (sampler := getattr(batches, "sampler", None)) is not None:
        about["sampler"] = type(sampler).__name__
    rows: Any = getattr(batches, "dataset", None)
    if isinstance(rows, (list, tuple)) or _is_hf(rows):
        return {**about, **rows_identity(rows)}
    if hasattr(rows, "__len__"):
        about["rows"] = len(rows)
    return {**about, "known": "not which rows there are: each step's batch has its fingerprint in the journal"}


def encoder_identity(encoder: Any, rows: Any) -> dict[str, Any]:
    """The encoder's options, its tokenizer, and a digest of its output for TRIED evenly spaced rows."""
    options = {
        field.name: value
        for field in dataclasses.fields(encoder)
        if field.init and not field.name.startswith("_") and _is_option(value := getattr(encoder, field.name))
    }
    if isinstance(options.get("verbalizers"), Mapping):
        options["verbalizers"] = {str(label): word for label, word in options["verbalizers"].items()}
    count = min(TRIED, len(rows))
    made = (encoder(rows[i], f"row {i}", "") for i in (k * len(rows) // count for k in range(count)))
    return {**options, "tokenizer": _tokenizer_digest(encoder.tokenizer), "makes": _digest_of(made)}


def legacy_rows_identity(rows: Any, fingerprint: Callable[[Mapping[str, Any]], int]) -> dict[str, Any]:
    """Number and digest of rows in the earlier format of runs: of at most SAMPLED evenly spaced rows."""
    digest, count = hashlib.blake2b(digest_size=8), min(SAMPLED, len(rows))
    for i in (k * len(rows) // count for k in range(count)):
        row = rows[i]
        digest.update(f"{i} {fingerprint(row) if isinstance(row, Mapping) else repr(row)}\n".encode())
    return {"rows": len(rows), "digest": digest.hexdigest()}


def _digest_of(rows: Iterable[Any]) -> str:
    digest = RowsDigest()
    for row in rows:
        digest.add(row)
    return digest.hex()


def _is_hf(rows: Any) -> bool:
    return (
        type(rows).__module__.split(".")[0] == "datasets" and hasattr(rows, "_fingerprint") and hasattr(rows, "__len__")
    )


def _hf_rows(rows: Any) -> Iterator[dict[str, Any]]:
    """Rows of a `datasets.Dataset` in their stored form: images and sounds are not decoded, transforms not run."""
    for table in rows.with_format("arrow").iter(batch_size=1000):
        yield from table.to_pylist()


def _is_option(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(type(k) in _PLAIN and _is_option(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_option, value))
    return type(value) in (_PLAIN - {bytes})


def _tokenizer_digest(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    about: list[Any] = [type(tokenizer).__name__]
    if hasattr(tokenizer, "get_vocab"):
        about.append(sorted(tokenizer.get_vocab().items()))
        about.append(
            {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "sep", "cls")}
        )
    return _digest_of(about)


def _feed(update: Callable[[Any], None], value: Any) -> None:
    """Feed a value's bytes to `update`: the same bytes for equal values, in every process."""
    kind = type(value)
    if kind in _PLAIN:
        update(f"{value!r};".encode("utf-8", "surrogatepass"))
    elif isinstance(value, Mapping):
        items = sorted(value.items(), key=lambda item: str(item[0]))
        if all(type(k) is str and type(v) in _PLAIN for k, v in items):
            update(f"{items!r};".encode("utf-8", "surrogatepass"))
            return
        for key, item in items:
            update(f"{key!r}:".encode("utf-8", "surrogatepass"))
            _feed(update, item)
    elif isinstance(value, (list, tuple)):
        if set(map(type, value)) <= _PLAIN:
            update(f"{list(value)!r};".encode("utf-8", "surrogatepass"))
            return
        update(f"[{len(value)}".encode())
        for item in value:
            _feed(update, item)
    elif isinstance(value, (set, frozenset)):
        _feed(update, sorted(map(repr, value)))
    elif isinstance(value, Tensor):
        update(f"{value.dtype} {list(value.shape)}:".encode())
        flat = value.detach().cpu().to_dense().contiguous().reshape(-1)
        update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    elif hasattr(value, "tobytes") and str(getattr(value, "dtype", "")) != "object":  # an array, an image
        about = [getattr(value, name, None) for name in ("dtype", "shape", "mode", "size")]
        update(f"{kind.__name__} {about}:".encode())
        update(value.tobytes())
    elif hasattr(value, "tolist"):
        _feed(update, value.tolist())
    else:
        _feed_object(update, value)


def _feed_object(update: Callable[[Any], None], value: Any) -> None:
    text = repr(value)
    if " at 0x" not in text:
        update(f"{text};".encode("utf-8", "surrogatepass"))
        return
    try:  # only written, never read back
        update(pickle.dumps(value, protocol=4))
    except Exception:  # any error of its class: only its name is known then
        update(type(value).__qualname__.encode())
