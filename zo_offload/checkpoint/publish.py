"""Moves a finished export into place: a reader finds the old one, the new one, or none, but never parts of both.

Everything is written and synced in a directory next to the target, `.<target>.zo-export-<8 hex digits>`, which the
writing process locks; the next export to the same target removes one that a killed process left. Then:

    nothing there, or an empty directory     one rename
    an export, and files beside it           the files are linked into the new directory, and the two directories
                                             exchange their names (Linux: renameat2), which is one move; then the old
                                             one, which has the other's name now, is removed
    if that is impossible (directories in    the file without which no library opens the directory (config.json) is
    it, a mount point, no such system call)  removed first and added last: in between there is no export

Removed are the files that an earlier export of ours wrote (`files` in the metadata of its weights), and files whose
names the new one uses. All others stay. If the directories are exchanged during a read, the reader may find a shard
missing, which is an error: shards of two exports never have the same name.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..quantized.gguf_file import GGUFFile
from ..system import diskio
from .files import CONFIG, INDEX
from .safetensors_io import read_header
from .tokenizers import FILES as TOKENIZER_FILES

PRODUCER = "zo_offload"
OWN = "zo_offload."
"""Before the keys of an export in a GGUF file: producer, files."""
HEADS = (CONFIG, "adapter_config.json")
"""Files without which no library opens a directory."""
_OF_WEIGHTS = (".safetensors", ".gguf")
_EXCHANGE = 2  # RENAME_EXCHANGE
_AT_FDCWD = -100
_PLAIN = re.compile(r"(additional_chat_templates/)?[^/\\:\0]+")


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """A directory next to the target to write into, removed at the end; also removes those of killed exports."""
    _clear_left(target)
    work = target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}")
    work.mkdir(mode=0o777)
    fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # held until it is closed: others see that the directory is in use
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)  # ours, or the old export that was exchanged with it
        os.close(fd)


def publish(work: Path, target: Path) -> list[Path]:
    """Move the finished export in `work` to the target; returns its files there, weights first."""
    names = sorted((f.relative_to(work) for f in work.rglob("*") if f.is_file()), key=_order)
    for name in names:
        diskio.sync_path(work / name)
    for folder in {work, *(work / name.parent for name in names)}:
        diskio.sync_directory(folder)
    parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(parent, fcntl.LOCK_EX)  # one at a time, should two export to one place
        if not target.exists() or not any(target.iterdir()):
            os.replace(work, target)  # replaces an empty directory, fails on any other
        else:
            _replace(work, names, target)
        os.fsync(parent)
    finally:
        os.close(parent)
    return [target / name for name in names]


def earlier_files(target: Path, new: Collection[str]) -> set[Path]:
    """The files that an earlier export of ours wrote into a directory, relative to it. new: names of the new weights.

    Raises CheckpointError for other weights, which would be mixed with the new ones.
    """
    found: set[Path] = set()
    patterns = ("model*.safetensors", "adapter_model*.safetensors", "model*.gguf")
    for file in sorted(path for pattern in patterns for path in target.glob(pattern)):
        metadata = _metadata(file)
        if metadata.get("producer") != PRODUCER:
            if file.name in new:
                continue
            raise CheckpointError(
                f"{target}: {file.name} was not written by an export of ours and would mix with the new weights. Move "
                "it away, or give another directory."
            )
        found.add(Path(file.name))
        found.update(Path(name) for name in _listed(metadata.get("files")) if (target / name).is_file())
    if found and (target / INDEX).is_file():
        found.add(Path(INDEX))
    return found


def _metadata(file: Path) -> dict[str, Any]:
    """What an export says in its weights of itself."""
    if file.suffix != ".gguf":
        return dict(read_header(file)[0])
    with contextlib.closing(GGUFFile(file)) as opened:
        return {key.removeprefix(OWN): value for key, value in opened.values.items() if key.startswith(OWN)}


def _listed(text: object) -> list[str]:
    """File names from the metadata of an export's weights; only plain names, since the metadata is untrusted."""
    try:
        names = json.loads(text) if isinstance(text, str) else []
    except (ValueError, RecursionError):
        return []
    return (
        [name for name in names if isinstance(name, str) and _PLAIN.fullmatch(name)] if isinstance(names, list) else []
    )


def _replace(work: Path, names: list[Path], target: Path) -> None:
    old = earlier_files(target, [str(name) for name in names])
    kept = [f.relative_to(target) for f in target.rglob("*") if not f.is_dir() or f.is_symlink()]
    kept = [name for name in kept if name not in old and name not in names]
    if _can_link(kept, target) and _link(kept, target, work) and _exchange(work, target):
        _bring_late(work, target, {*old, *names, *kept})
        return
    for name in kept:  # that were linked without effect
        (work / name).unlink(missing_ok=True)
    try:
        _move_in(work, names, target, old)
    except OSError as error:
        raise CheckpointError(
            f"could not put the export into {target}: {error.strerror or error}. The one that was there is gone (where "
            "directories cannot change places their files are replaced one by one). Export again, or elsewhere."
        ) from error


def _can_link(kept: list[Path], target: Path) -> bool:
    """Whether all kept files are in the directory itself: another directory inside it may be in use."""
    folders = {p.name for p in target.iterdir() if p.is_dir()} - {"additional_chat_templates"}
    return not folders and all(len(name.parts) == 1 for name in kept)


def _link(kept: list[Path], target: Path, work: Path) -> bool:
    try:
        for name in kept:
            os.link(target / name, work / name, follow_symlinks=False)
        shutil.copymode(target, work)
        diskio.sync_directory(work)
    except OSError:
        return False
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two directories atomically. False: the system or the directory does not allow it."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    at, first, second = _AT_FDCWD, os.fsencode(one), os.fsencode(other)
    return int(library.renameat2(at, first, at, second, _EXCHANGE)) == 0


def _bring_late(work: Path, target: Path, known: set[Path]) -> None:
    """Move files that others added to the old directory meanwhile into the new one."""
    for file in work.iterdir():
        if (
            Path(file.name) not in known
            and file.name != "additional_chat_templates"
            and not (target / file.name).exists()
        ):
            os.rename(file, target / file.name)


def _move_in(work: Path, names: list[Path], target: Path, old: set[Path]) -> None:
    """Replace file by file. Without its head no library opens the directory, so it is removed first and added last."""
    for head in HEADS:
        (target / head).unlink(missing_ok=True)
    diskio.sync_directory(target)
    for name in sorted({*old, *names}, key=_order, reverse=True):
        if name.suffix not in _OF_WEIGHTS and name.name != INDEX:
            (target / name).unlink(missing_ok=True)
    for name in names:
        if name.name not in HEADS:
            (target / name).parent.mkdir(exist_ok=True)
            os.replace(work / name, target / name)
    if Path(INDEX) not in names:
        (target / INDEX).unlink(missing_ok=True)
    for name in old.difference(names):
        (target / name).unlink(missing_ok=True)
    for folder in {(target / name).parent for name in old} - {target}:
        with contextlib.suppress(OSError):  # something else is in it, or it is gone
            folder.rmdir()
    diskio.sync_directory(target)
    for name in names:
        if name.name in HEADS:
            os.replace(work / name, target / name)
    diskio.sync_directory(target)


def _order(name: Path) -> tuple[int, str]:
    """Order: weights, index, small files, config: a reader that finds an index finds all its files. A tokenizer's main
    files come last: without them there is no tokenizer, and once they exist all its settings do."""
    ranks = {INDEX: 1, "tokenizer.json": 3, **dict.fromkeys(HEADS, 5)}
    makes_one = name.name in TOKENIZER_FILES or name.suffix in (".model", ".tiktoken")
    rank = 0 if name.suffix in _OF_WEIGHTS else ranks.get(name.name, 4 if makes_one else 2)
    return rank, str(name)


def _prefix(target: Path) -> str:
    return f".{target.name}.zo-export-"


def _clear_left(target: Path) -> None:
    """Remove directories of killed exports to this target, recognised by name, if nobody holds their lock."""
    pattern = re.compile(re.escape(_prefix(target)) + "[0-9a-f]{8}")
    for left in [p for p in target.parent.iterdir() if pattern.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]:
        fd = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            pass  # another export is writing there
        finally:
            os.close(fd)
