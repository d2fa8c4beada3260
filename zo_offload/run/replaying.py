"""The weights of an earlier step, from the base and a journal: a run that makes its blocks when they are fetched.

A block is read from the base and brought to the last fold in one pass over it; nothing is written. Memory: two blocks
and one forward's memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import EngineConfig
from ..data.losses import model_loss
from ..errors import ConfigError, JournalError
from ..journal import run_directory, tail_files
from ..journal.format import Contents, histories
from ..journal.gains import gains_of
from ..journal.identity import check_identity, check_sample
from ..journal.journal import Journal
from ..journal.masks import masks_of
from ..kernels.records import Gains, Masks
from ..modules.class_heads import wide_of
from ..numerics.updates import UpdateLog
from ..plan.layout import Layout
from ..plan.plan import Plan
from ..stream.ingest import Base, Filler
from ..stream.slots import WindowSize
from ..stream.streamer import Streamer
from ..system.plain import user_path
from ..tiers import Fetched
from .active import Run
from .opening import Opened, open_model
from .session import Session, identity_of
from .stepper import make_stepper
from .tail import Tail, tail_at


def replayed_run(
    base: str | Path | nn.Module, contents: Contents, where: str, *, to: int | None = None, **options: Any
) -> Run:
    """A run at the weights after `to` steps of a journal's contents (default: all). See `replay.replayed`."""
    header, steps = contents.header, contents.steps
    to = len(steps) if to is None else to
    if not 0 <= to <= len(steps):
        raise ConfigError(f"step {to} was requested; {where} holds {len(steps)}")
    if not isinstance(header.get("settings"), dict) or not isinstance(header.get("method"), dict):
        raise JournalError(f"{where}: the header lacks settings or method")
    run_directory.check_settings(header["settings"], where)
    settings = run_directory.with_mode(header["settings"], header.get("model"))
    settings |= {"offload": "auto", "device_memory": None, "num_slots": None, "prefetch": None}
    passed: dict[str, Any] = {k: options.pop(k, None) for k in ("objective", "example", "method", "tail_file")}
    opened = open_model(
        base, run_directory.make_method(header["method"], passed["method"]),
        EngineConfig(**{**settings, **options, "run_dir": None}), example=passed["example"],
        model_class=None if isinstance(base, nn.Module) else header.get("model_class"), fresh=False, offload="disk",
        recorded=header,
    )  # fmt: skip
    log = UpdateLog(parts=opened.prepared.parts)
    for record in steps[:to]:
        log.append(record.updates)
    objective = model_loss if passed["objective"] is None else passed["objective"]
    tail = _tail(opened, contents, to, where, passed["tail_file"])
    begin = partial(_begin, opened, header, log, where, tail)
    return Run(opened, objective, begin, example=passed["example"], replays=True)


def _tail(opened: Opened, contents: Contents, to: int, where: str, given: str | Path | None) -> Tail | None:
    """The tail after `to` steps, from the given file, or from the run's directory. Raises ConfigError, JournalError."""
    if given is not None and not opened.prepared.tail:
        raise ConfigError(f"tail_file={str(given)!r}: {where} is of a run without a tail; leave it out")
    run_dir = Path(where) if Path(where).is_dir() else Path(where).parent
    paths = tail_files.paths_of(run_dir, to) if given is None else [user_path(given)]
    history = next(islice(histories(contents.header, contents.steps), to, None))
    return tail_at(opened, to, history, where, paths)


def _begin(
    opened: Opened, header: dict[str, Any], log: UpdateLog, where: str, tail: Tail | None,
    admit: Callable[[Journal], None],
) -> Session:  # fmt: skip
    """The session of a replay: nothing is written, and blocks are made from the base when they are fetched."""
    check_identity(identity_of(opened, str(header.get("base"))), header)
    check_sample(opened.base, header)
    plan, run_dir = opened.prepared.plan, Path(where)
    run_dir = run_dir if run_dir.is_dir() else run_dir.parent
    gains = gains_of(header, plan, where)
    masks = masks_of(header, plan, where, method=opened.prepared.method, run_dir=run_dir)

    def check() -> None:
        check_identity({"base": opened.base.digest()}, header)

    return Session(
        ReplayTier(opened, log, gains, masks, check),
        make_stepper(opened.prepared, opened.device, log, None, gains, tail=tail), gains, masks,
        wide_of(header, opened.model),
    )  # fmt: skip


class _BaseTier(Fetched):
    """The base's blocks, at version 0; keeps the block that was brought up to date last."""

    in_memory = False

    def __init__(self, plan: Plan, layout: Layout, base: Base) -> None:
        self._layout, self._filler = layout, Filler(plan, layout, base)
        self.held, self.data = -1, torch.empty(0, dtype=torch.uint8, device="cpu")

    def fetch(self, block: int, out: Tensor, start: int = 0) -> None:
        self.held, self.data = -1, torch.empty(0, dtype=torch.uint8, device="cpu")
        self.data = torch.zeros(self._layout.block_bytes[block], dtype=torch.uint8, device="cpu")
        self._filler.fill(block, self.data)
        self.held = block
        out.copy_(self.data[start : start + out.numel()])

    def flush(self, block: int, data: Tensor, spans: tuple[tuple[int, int], ...], version: int) -> None:
        assert block == self.held
        self.data.copy_(data)

    def version(self, block: int) -> int:
        return 0

    def view(self, block: int) -> Tensor | None:
        return None

    def close(self) -> None:
        self.held, self.data = -1, torch.empty(0, dtype=torch.uint8, device="cpu")


class ReplayTier(Fetched):
    """A tier whose blocks are made when they are fetched, at the log's last fold. Read-only.

    check: called once all blocks have been made, when the whole base has been read; raises if it is not the journal's.
    """

    in_memory = False

    def __init__(self, opened: Opened, log: UpdateLog, gains: Gains, masks: Masks, check: Callable[[], None]) -> None:
        prepared = opened.prepared
        plan, layout, config = prepared.plan, prepared.layout, prepared.config
        self._layout, self._log, self._check = layout, log, check
        self._source = _BaseTier(plan, layout, opened.base)
        self._streamer = Streamer(
            plan, layout, self._source, opened.device, log, window=WindowSize(1, 0, frozenset(), 0),
            fold_every=prepared.fold_every, noise=prepared.method.noise, rounding=config.rounding, gains=gains,
            masks=masks, threads=config.threads,
        )  # fmt: skip
        self._made: set[int] = set()
        self._lock = threading.Lock()

    def fetch(self, block: int, out: Tensor, start: int = 0) -> None:
        with self._lock:
            if self._source.held != block:
                self._streamer.bring(block)
                self._made.add(block)
                if len(self._made) == len(self._layout.block_bytes):
                    self._check()
            out.copy_(self._source.data[start : start + out.numel()])

    def flush(self, block: int, data: Tensor, spans: tuple[tuple[int, int], ...], version: int) -> None:
        raise AssertionError("nothing changes a replayed block")

    def version(self, block: int) -> int:
        return self._log.folded if block in self._layout.written else 0

    def view(self, block: int) -> Tensor | None:
        return None

    def close(self) -> None:
        self._streamer.close()
        self._source.close()
