"""Commands for a journal: show it, check it and its blocks, cut off its last steps, write it as CSV."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch

from ..errors import ConfigError, JournalError
from ..journal import run_directory, tail_files
from ..journal.format import Contents, histories, load_journal, read_journal
from ..journal.learning_watch import is_skipped, warnings_of
from ..system import diskio
from ..system.lock import RunLock, hold
from ..tiers.disk import DiskTier, load_shapes

COLUMNS = (
    "step", "loss", "grad", "lr", "skipped", "eps_halved", "batch_crc", "seed", "coefficient", "decay", "fold"
)  # fmt: skip


def journal_file(path: Path) -> Path:
    """The journal's file, given by its path or by its run directory."""
    file = path / run_directory.JOURNAL if path.is_dir() else path
    if not file.is_file():
        raise JournalError(f"{file} does not exist")
    return file


def show(path: Path, last: int = 10) -> Iterator[str]:
    """Lines for people: a description of the run, and its last steps."""
    file = journal_file(path)
    size = file.stat().st_size
    contents = load_journal(file)
    header, steps = contents.header, contents.steps
    skipped = sum(is_skipped(record) for record in steps)
    yield f"{file}: {len(steps)} steps ({skipped} skipped), {size} bytes"
    yield from _warnings(contents)
    for key in ("model", "base", "plan", "storage", "fold_every", "rounding", "seed", "noise", "method",
                "tail", "objective", "data", "versions", "created"):  # fmt: skip
        if key not in ("data", "tail") or key in header:  # data may also be a note, shown below
            yield f"  {key:<11} {json.dumps(header.get(key))}"
    for note in (note for note in contents.notes if "warning" not in note.values):
        yield f"  note after {note.step} steps: {json.dumps(note.values, sort_keys=True)}"
    for record in steps[len(steps) - last if last < len(steps) else 0 :]:
        state = " skipped" * record.skipped + ", eps halved" * record.halved
        yield f"  step {record.step:>7}  loss {record.loss:.6f}  grad {record.grad: .4e}  lr {record.lr:.3e}{state}"


def _warnings(contents: Contents) -> Iterator[str]:
    """Warnings of steps that taught the model nothing, from the records, and warnings noted during the run."""
    noted = [str(note.values["warning"]) for note in contents.notes if "warning" in note.values]
    for text in (*warnings_of(contents.steps), *noted):
        yield f"  warning: {text}"


def check(path: Path) -> Iterator[tuple[bool, str]]:
    """(sound, line) of everything that can be checked without the model: each record, and each block of a run."""
    file = journal_file(path)
    data = diskio.read_file(file)
    try:
        contents = read_journal(data, str(file))
    except JournalError as error:
        yield False, str(error)
        return
    tail = len(data) - contents.good
    cut = f", and {tail} bytes of an unfinished step that a resume drops" if tail else ""
    yield True, f"{file}: {len(contents.steps)} steps are sound{cut}"
    yield from ((True, line) for line in _warnings(contents))
    if path.is_dir() and "tail" in contents.header and contents.steps:
        yield _check_tail(path, contents)
    blocks = path / run_directory.BLOCKS
    if path.is_dir() and blocks.is_dir():
        yield from _check_blocks(blocks, contents)


def _check_tail(run_dir: Path, contents: Contents) -> tuple[bool, str]:
    """Whether the numbers of the run's tail after the last step are there."""
    step = len(contents.steps)
    try:
        _tail_at(run_dir, contents, step)
    except JournalError as error:
        return False, str(error)
    kept = sorted((run_dir / tail_files.TAIL).glob("step-*.safetensors"))
    return True, f"tail: its numbers after {step} steps are sound; {len(kept)} evaluated steps are kept"


def _tail_at(run_dir: Path, contents: Contents, step: int) -> None:
    """Raise JournalError unless a file holds the run's tail after `step` steps."""
    history = list(histories(contents.header, contents.steps[:step]))[-1]
    tail_files.read_at(tail_files.paths_of(run_dir, step), step, history, str(run_dir))


def _check_blocks(directory: Path, contents: Contents) -> Iterator[tuple[bool, str]]:
    shapes = load_shapes(directory)
    files = DiskTier.open(directory, shapes, write=False)
    try:
        buffer = torch.empty(max(shape.nbytes for shape in shapes), dtype=torch.uint8, device="cpu")
        history = list(histories(contents.header, contents.steps))
        for shape in shapes:
            sound = files.verify(shape.index, buffer)
            states, usable = [], []
            for generation, header in sorted(files.headers(shape.index)):
                known = header.version < len(history) and header.is_of(contents.chain.__getitem__, history.__getitem__)
                state = "sound" if sound[generation] else "DAMAGED"
                states.append(f"step {header.version} {state if known else 'is NOT OF THIS JOURNAL'}")
                usable.append(known and sound[generation])
            fine = any(usable) or not states
            yield fine, f"block {shape.index:>5}: {'; '.join(states) or 'never written'}"
    finally:
        files.close()


def cut(path: Path, to: int) -> Path:
    """Discard the steps from `to` on; returns the path of the old journal's copy. Later block states are dropped.

    Works on a journal that is damaged after step `to`. Raises JournalError if fewer than `to` steps can be read, or if
    no file holds the run's tail of that step.
    """
    file = journal_file(path)
    lock = RunLock.take(file.parent)
    held = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        hold(held, file)
        data = diskio.read_file(file)
        contents = read_journal(data, str(file), damaged_end=True)
        if not 0 <= to <= len(contents.steps):
            raise ConfigError(f"cut to {to} steps: {file} holds {len(contents.steps)} that can be read")
        if "tail" in contents.header and to:
            _tail_at(file.parent, contents, to)  # without it the run could not go on from there
        backup = next(p for n in range(1 << 20) if not (p := file.with_name(f"{file.name}.before-cut-{n}")).exists())
        os.link(file, backup)
        _forget_blocks(
            file.parent / run_directory.BLOCKS, to
        )  # first: a discarded step must not come back in a newer block
        diskio.replace_file(file, data[: contents.ends[to]])
        return backup
    finally:
        os.close(held)
        lock.release()


def _forget_blocks(directory: Path, to: int) -> None:
    if not directory.is_dir():
        return
    files = DiskTier.open(directory, load_shapes(directory))
    try:
        for shape in files.shapes:
            for generation, header in files.headers(shape.index):
                if header.version > to:
                    files.forget(shape.index, generation)
    finally:
        files.close()


def write_csv(path: Path, out: IO[str]) -> None:
    """Write one row per update (a step may have several), with a header line."""
    file = journal_file(path)
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for r in load_journal(file).steps:
        about = (r.step, r.loss, r.grad, r.lr, int(r.skipped), int(r.halved), f"{r.batch_crc:08x}")
        for update in r.updates:
            writer.writerow((*about, update.seed, update.coeff, update.decay, int(update.fold)))
        if not r.updates:
            writer.writerow((*about, "", "", "", ""))
