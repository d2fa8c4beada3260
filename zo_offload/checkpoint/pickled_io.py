"""pytorch_model.bin, read one chunk of elements at a time, through torch's weights-only loader.

The loader makes tensors on meta: it unpickles names, shapes and offsets (tensors and plain containers, no code), and
reads no values. Elements are then `pread` at their offsets, as from a safetensors file. A tensor that is not row-major
in its storage is read whole, and held until another one is read; files from before torch 1.6, which are not archives,
are read whole.

File layout: a zip archive, stored and not compressed: `<name>/data.pkl`, and one storage in each `<name>/data/<key>`.
"""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError
from .safetensors_io import Entry, SafetensorsFile

MAX_PICKLE_BYTES = 256 << 20
"""Limit of the pickle with names and shapes: half a million tensors take a hundred MiB."""
_ADVICE = (
    "If you trust it: load it in transformers and save_pretrained it to another directory, which writes safetensors."
)


def open_weights(path: Path) -> SafetensorsFile:
    """Open a file of weights, by its suffix."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickledFile(path)


class PickledFile(SafetensorsFile):
    """One file, with the interface of SafetensorsFile. Raises CheckpointError if the loader refuses it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        self._lock = threading.Lock()
        self._whole: dict[str, Tensor] = {}
        """All tensors of a file that is not an archive."""
        self._strided: dict[str, Tensor] = {}
        """Tensors that are not row-major, on meta."""
        self._held: tuple[str, Tensor] | None = None
        self.metadata: dict[str, str] = {}
        archive = zipfile.is_zipfile(path)
        records = _records(path) if archive else {}
        tensors = _load(path, "meta" if archive else "cpu")
        self.entries = {name: self._entry(name, tensor, records) for name, tensor in tensors.items()}

    def _entry(self, name: str, tensor: Tensor, records: Mapping[int, int]) -> Entry:
        shape, dtype = tuple(tensor.shape), tensor.dtype
        if not tensor.is_meta:
            self._whole[name] = tensor.detach()
            return Entry(name, dtype, shape, 0, tensor.numel() * dtype.itemsize)
        storage = tensor.untyped_storage()
        begin, nbytes = _place(storage, f"{self.path}: tensor {name!r}"), storage.nbytes()
        if records.get(begin, -1) < nbytes:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} takes {nbytes} bytes of a record of {records.get(begin, 0)}; the file "
                "is damaged. Download or copy it again."
            )
        last = sum((n - 1) * step for n, step in zip(shape, tensor.stride(), strict=True)) if tensor.numel() else -1
        if (tensor.storage_offset() + last + 1) * dtype.itemsize > nbytes:
            raise CheckpointError(f"{self.path}: tensor {name!r} goes beyond its record; the file is damaged.")
        if not tensor.is_contiguous():
            self._strided[name] = tensor.detach()
        at = begin + int(tensor.storage_offset()) * dtype.itemsize
        return Entry(name, dtype, shape, at, at + tensor.numel() * dtype.itemsize)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        if name in self._whole:
            out.copy_(self._whole[name].reshape(-1)[start : start + len(out)])
        elif name in self._strided:
            out.copy_(self._row_by_row(name)[start : start + len(out)])
        else:
            super().read_into(name, start, out)

    def _row_by_row(self, name: str) -> Tensor:
        with self._lock:
            held = self._held
        if held is None or held[0] != name:
            tensor, entry = self._strided[name], self.entries[name]
            last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
            around = Entry(name, entry.dtype, (last + 1,), entry.begin, entry.begin + (last + 1) * entry.dtype.itemsize)
            flat = torch.empty(last + 1, dtype=entry.dtype, device="cpu")
            self._read(around, 0, flat)
            held = (name, flat.as_strided(tensor.shape, tensor.stride()).reshape(-1))
            with self._lock:
                self._held = held
        return held[1]


def _load(path: Path, where: str) -> dict[str, Tensor]:
    try:
        found: Any = torch.load(path, map_location=where, weights_only=True)
    except Exception as error:  # whatever a stranger's pickle makes of the loader
        said = str(error).strip().splitlines()
        raise CheckpointError(
            f"{path}: torch's weights-only loader refuses it ({type(error).__name__}: {said[0] if said else ''}): it "
            f"holds more than tensors, or is damaged. {_ADVICE}"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not tensors by name. {_ADVICE}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout is not torch.strided:
            inner = " Its weights may be inside: save that part alone." if isinstance(value, dict) else ""
            raise CheckpointError(
                f"{path}: {name!r} is a {type(value).__name__}, where a model's file has plain tensors by name.{inner}"
            )
    return found


def _records(path: Path) -> dict[int, int]:
    """Offset -> size of the archive's records. Raises CheckpointError if it is not in torch's form."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            name = entries[0].filename.partition("/")[0]
            sizes = {entry.filename.removeprefix(f"{name}/"): entry for entry in entries}
            order = archive.read(sizes["byteorder"]).decode() if "byteorder" in sizes else "little"
            packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
            if packed or order != "little" or sizes["data.pkl"].file_size > MAX_PICKLE_BYTES:
                what = f"{packed[0]} is compressed" if packed else f"byte order {order}, or an unusually large data.pkl"
                raise CheckpointError(f"{path}: not as torch.save writes it ({what}). {_ADVICE}")
            return {_begin(file, entry): entry.file_size for entry in entries}
    except CheckpointError:
        raise
    except Exception as error:  # whatever Python's reader makes of a damaged archive
        raise CheckpointError(
            f"{path}: a damaged archive ({type(error).__name__}: {error}). Download or copy it again."
        ) from error


def _begin(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """The offset of a record's bytes: after its header, whose name and extra field vary in length."""
    file.seek(entry.header_offset + 26)
    lengths = file.read(4)
    return entry.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def _place(storage: Any, what: str) -> int:
    """A storage's offset in its file, as the loader reports it for a storage on meta."""
    place = getattr(storage, "_checkpoint_offset", None)
    if not isinstance(place, int):
        raise CheckpointError(
            f"{what}: this torch ({torch.__version__}) does not say where it lies. Update torch, or convert the file. "
            f"{_ADVICE}"
        )
    return place
