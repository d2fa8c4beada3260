"""How a finished export takes its place: a reader finds the old one, the new one, or none, and never parts of both.

Everything is written and synced in a directory beside the target, `.<target>.zo-export-<8 hex digits>`, and locked by
the process that writes it; one that a killed process left is removed by the next export to the same place. Then:

    nothing there, or an empty directory     one rename
    an export, and files beside it           the files are linked into the new directory, and the two directories
                                             exchange their names (Linux: renameat2), which is one move; then the old
                                             one, which has the other's name now, is removed
    where that cannot be (directories in     the file without which no library opens the directory (config.json) is
    it, a mount point, no such system call)  removed first and put there last: in between there is no export

What goes away is what an earlier export of ours says it wrote (`files` in the metadata of its weights), and files that
the new one has by the same name. All else stays. A reader that is under way while the directories change hands may
find a shard gone, which is an error: shards of two exports never have the same name.
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

from ..errors import CheckpointError
from ..system import diskio
from .files import CONFIG, INDEX
from .safetensors_io import read_header
from .tokenizers import FILES as TOKENIZER_FILES

PRODUCER = "zo_offload"
HEADS = (CONFIG, "adapter_config.json")
"""Without them nothing opens a directory."""
_EXCHANGE = 2  # RENAME_EXCHANGE
_AT_FDCWD = -100
_PLAIN = re.compile(r"(additional_chat_templates/)?[^/\\:\0]+")


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """A directory beside the target to write into, gone at the end; so is what killed exports left there."""
    _clear_left(target)
    work = target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}")
    work.mkdir(mode=0o777)
    fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # held until it is closed: nobody else takes the directory for a left one
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)  # ours, or the old export that changed places with it
        os.close(fd)


def publish(work: Path, target: Path) -> list[Path]:
    """Put the finished export in `work` into the target's place; returns its files there, weights first."""
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
    """Of a directory: what an earlier export of ours wrote there, by names inside of it. new: names of the new weights.

    Raises CheckpointError for weights of others, which the new ones would stand beside.
    """
    found: set[Path] = set()
    for file in sorted([*target.glob("model*.safetensors"), *target.glob("adapter_model*.safetensors")]):
        metadata = read_header(file)[0]
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


def _listed(text: object) -> list[str]:
    """Names in the metadata of an export's weights, which anyone could have written: plain ones only."""
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
    for name in kept:  # that were linked in vain
        (work / name).unlink(missing_ok=True)
    try:
        _move_in(work, names, target, old)
    except OSError as error:
        raise CheckpointError(
            f"could not put the export into {target}: {error.strerror or error}. The one that was there is gone (where "
            "directories cannot change places their files are replaced one by one). Export again, or elsewhere."
        ) from error


def _can_link(kept: list[Path], target: Path) -> bool:
    """Whether all that stays are files in the directory itself: another directory may be in use where it is."""
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
    """Two directories get each other's names in one move. False: this system, or this directory, cannot do it."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    at, first, second = _AT_FDCWD, os.fsencode(one), os.fsencode(other)
    return int(library.renameat2(at, first, at, second, _EXCHANGE)) == 0


def _bring_late(work: Path, target: Path, known: set[Path]) -> None:
    """What others put into the old directory after it was looked at goes on into the new one."""
    for file in work.iterdir():
        if (
            Path(file.name) not in known
            and file.name != "additional_chat_templates"
            and not (target / file.name).exists()
        ):
            os.rename(file, target / file.name)


def _move_in(work: Path, names: list[Path], target: Path, old: set[Path]) -> None:
    """File by file. Without its head nothing opens the directory, so that is removed first and put there last."""
    for head in HEADS:
        (target / head).unlink(missing_ok=True)
    diskio.sync_directory(target)
    for name in sorted({*old, *names}, key=_order, reverse=True):
        if name.suffix != ".safetensors" and name.name != INDEX:
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
    """Weights, index, small files, config: a reader that finds an index finds all that it names. Of a tokenizer the
    files that make one come last: without them its settings are none, and with them all of its settings are there."""
    ranks = {INDEX: 1, "tokenizer.json": 3, **dict.fromkeys(HEADS, 5)}
    makes_one = name.name in TOKENIZER_FILES or name.suffix in (".model", ".tiktoken")
    rank = 0 if name.suffix == ".safetensors" else ranks.get(name.name, 4 if makes_one else 2)
    return rank, str(name)


def _prefix(target: Path) -> str:
    return f".{target.name}.zo-export-"


def _clear_left(target: Path) -> None:
    """Remove directories that a killed export to this place left: by their names, and if nobody holds their lock."""
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
