"""The files of a tail: the numbers of a run that scalars cannot rebuild (`run/tail.py`).

    RUN/tail/0.safetensors, RUN/tail/1.safetensors       after an even and an odd number of steps: the last two
    RUN/tail/step-200.safetensors                        after 200 steps: kept at each evaluation, for `replay`

Each holds the tail after some number of steps: a tensor a parameter under its name, and the optimiser's under
`first.NAME` and `second.NAME`, all float32. Its metadata says of what: `step`, the number of steps; `taken`, how many
of them changed the tail; `history`, the journal's after that step, which ties the file to its run; `crc32`, of the
bytes of all tensors.

Order of writes (write-ahead): the file after t + 1 steps, then the record of step t. So when the journal ends with t
steps, the file after t steps is there, whatever was interrupted: a file that is a step ahead is ignored, and that step
is taken again. The file that is replaced is of t - 1 steps; the journal's first t steps are synced before, so that not
even a power cut can bring the run back to t - 1.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..errors import JournalError
from ..system import diskio

TAIL = "tail"
"""The folder in a run directory."""


@dataclass(frozen=True)
class TailFile:
    """A tail after `step` steps, `taken` of which changed it. tensors: see the module."""

    step: int
    taken: int
    history: int
    tensors: Mapping[str, Tensor]


def path_of(run_dir: Path, step: int) -> Path:
    """Where the tail after `step` steps is kept."""
    return run_dir / TAIL / f"{step % 2}.safetensors"


def paths_of(run_dir: Path, step: int) -> list[Path]:
    """Where the tail after `step` steps may be: as the last, or as one that was kept."""
    return [path_of(run_dir, step), run_dir / TAIL / f"step-{step}.safetensors"]


def keep(run_dir: Path, step: int) -> None:
    """Keep the last file, which is after `step` steps, beside those to come. Raises StorageError."""
    last, kept = paths_of(run_dir, step)
    if step == 0:  # the base has it
        return
    try:
        diskio.replace_file(kept, diskio.read_file(last))
    except OSError as error:
        raise diskio.storage_error(error, "keeping the tail in", kept, then="The run is as it was.") from error


def write(path: Path, tail: TailFile) -> None:
    """Replace a file atomically, synced. Raises StorageError."""
    about = {"step": str(tail.step), "taken": str(tail.taken), "history": f"{tail.history:016x}"}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tail.tensors.items()}
    data = save(tensors, metadata={**about, "crc32": f"{zlib.crc32(_payload(save(tensors))):08x}"})
    try:
        path.parent.mkdir(exist_ok=True)
        diskio.replace_file(path, data)
    except OSError as error:
        then = f"The step was not taken, the run is as after {tail.step - 1} steps."
        raise diskio.storage_error(error, "writing the tail to", path, then=then) from error


def read(path: Path) -> TailFile:
    """A file's contents. Raises JournalError if it is missing, damaged, or not a tail's."""
    try:
        data = diskio.read_file(path)
    except OSError as error:
        raise JournalError(f"{path}, the numbers of the run's tail, cannot be read: {error.strerror}") from error
    try:
        about = json.loads(data[8 : 8 + struct.unpack_from("<Q", data)[0]])["__metadata__"]
        step, taken, history = int(about["step"]), int(about["taken"]), int(about["history"], 16)
        crc, tensors = int(about["crc32"], 16), load(data)
    except (SafetensorError, struct.error, ValueError, KeyError, TypeError) as error:
        raise JournalError(f"{path} does not hold the numbers of a tail: {type(error).__name__}: {error}") from None
    if zlib.crc32(_payload(data)) != crc:
        raise JournalError(f"{path} is damaged: its tensors do not have the checksum {crc:08x}. Restore it")
    return TailFile(step, taken, history, tensors)


def read_at(paths: list[Path], step: int, history: int, where: str) -> TailFile:
    """The file, among `paths`, that holds the tail after `step` steps of the run with that history.

    Raises JournalError that names the files and what each holds.
    """
    told = []
    for path in [path for path in paths if path.exists()] or paths[:1]:
        try:
            found = read(path)
        except JournalError as error:
            told.append(str(error))
            continue
        if (found.step, found.history) == (step, history):
            return found
        told.append(f"{path} is after {found.step} steps" + (" of another run" if found.step == step else ""))
    raise JournalError(
        f"{where}: this run trains a tail by its exact gradient, which the journal's scalars cannot rebuild: its "
        f"numbers after {step} steps are needed, from the run's folder {TAIL}/. {'; '.join(told)}. Restore the file, "
        "or take a step that a file is of"
    )


def _payload(data: bytes) -> bytes:
    return data[8 + struct.unpack_from("<Q", data)[0] :]
