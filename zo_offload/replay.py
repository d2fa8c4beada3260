"""Replay: the weights of any step from the base checkpoint and a journal, block by block, in small memory.

    replay("base/", "run/journal.zoj", "out/", to=1200)         # writes a plain transformers checkpoint
    with replayed("base/", "run/journal.zoj") as engine:        # or: an engine at that step, to evaluate or generate
        engine.evaluate("dev.jsonl")

The journal's header holds all settings for storing and computing the weights, so no others are needed; a fine-tune can
be shared as that one file. `run/replaying.py` implements it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .engine import Engine
from .journal import run_directory
from .journal.format import Contents
from .journal.format import load_journal as read_file
from .run.replaying import replayed_run


def load_journal(path: str | Path) -> Contents:
    """A journal's contents, from its file or its run directory; nothing is changed. Raises JournalError."""
    path = Path(path)
    file = path / run_directory.JOURNAL if path.is_dir() else path
    return read_file(file)


def replay(
    base: str | Path | nn.Module,
    journal: str | Path,
    out: str | Path,
    *,
    to: int | None = None,
    max_shard_bytes: int | float | str = 5e9,
    overwrite: bool = False,
    merge: bool = False,
    **options: Any,
) -> list[Path]:
    """Write the weights after `to` steps (default: all) as a checkpoint for plain transformers; returns its files.

    merge: for a run with an adapter, see `Engine.save_pretrained`. options: those of `replayed`. Raises JournalError if
    the base is not the journal's: a sample of its tensors is compared first, and the whole base before anything appears
    under `out`.
    """
    with replayed(base, journal, to=to, **options) as engine:
        return engine.save_pretrained(out, max_shard_bytes=max_shard_bytes, overwrite=overwrite, merge=merge)


def replayed(
    base: str | Path | nn.Module, journal: str | Path, *, to: int | None = None, tokenizer: Any = None, **options: Any
) -> Engine:
    """An engine at the weights after `to` steps of a journal. It evaluates, generates and exports; it does not train.

    options: `objective`, `method` (the caller's own method or its class) and settings that do not alter the numbers
    (device, threads, order, ...). tail_file: for a run with a tail, the file of its numbers after `to` steps; default:
    that of the run's directory. Raises JournalError if that step's is not there: a journal cannot rebuild a tail.
    """
    return Engine.of(replayed_run(base, load_journal(journal), str(journal), to=to, **options), tokenizer)
