"""From a prepared model to a run under way: its tier, its identity, fresh or resumed."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import diskio, runs
from .closing import Closing
from .config import EngineConfig
from .devices import Device
from .errors import CheckpointError, ConfigError, JournalError, StorageError
from .gains import decide_gains, gains_of
from .identity import about_base, check_identity, check_sample, header_of, identity, warn_of_versions
from .ingest import Base, Filler, ModuleBase, ingest
from .journal import Journal
from .journal_format import history_start
from .layout import Layout
from .lock import NAME as LOCK
from .lock import RunLock, hold
from .methods import MeZO
from .plan import Plan
from .records import Gains
from .snapshot import Snapshots
from .tiers import DiskTier, HostTier, ResidentTier, Tier
from .tiers.disk import Shape, shapes_of
from .updates import UpdateLog

_log = logging.getLogger(__name__)


@dataclass
class Session:
    """A run under way: where its blocks live, what they lack, and what makes it durable (None without a run_dir)."""

    tier: Tier
    log: UpdateLog
    journal: Journal | None = None
    lock: RunLock | None = None
    snapshots: Snapshots | None = None
    reopened: bool = False
    gains: Gains = field(default_factory=dict)
    bare: Tier | None = None
    """The tier, before the device wrapped it."""

    def settle(self) -> None:
        """Wait for the background snapshot, before somebody else writes the blocks."""
        if self.snapshots is not None:
            self.snapshots.wait()

    def close(self) -> None:
        """Stop the background work, close the files, give the directory up; all of it, whatever fails. Raises what kept
        steps from the disk. Safe to call twice."""
        closing = Closing()
        if self.lock is not None:
            closing.add(self.lock.release)
        if self.journal is not None:
            closing.add(self.journal.close)
        closing.add(self.tier.close)
        if self.snapshots is not None:
            closing.add(self.snapshots.close)
        closing.close()


@dataclass(frozen=True)
class Maker:
    """Begins a session, or opens the one that the run directory holds. The engine's parts, and how it was asked for."""

    plan: Plan
    layout: Layout
    base: Base
    config: EngineConfig
    method: MeZO
    offload: str
    fold_every: int
    device: Device
    model_name: str | None = None
    model_class: str | None = None
    modes: str = "eval"
    gains: Gains | None = None
    """Of a run that begins; None: to be decided then. A run that is reopened has those of its journal."""
    directory: Path | None = None
    """Of the checkpoint; None for a module in memory."""
    model: nn.Module | None = None
    objective: str | None = None
    fresh: bool = True
    """Whether a new run was asked for; else what run_dir holds is to go on."""
    progress: Callable[[int], None] = lambda nbytes: None

    def start(self, admit: Callable[[Journal], None] = lambda journal: None) -> Session:
        """Fill a tier from the base and begin a run, or reopen an earlier run's tier, log and journal.

        A run is fresh if run_dir holds no journal. Reopened, its blocks on disk (of a run in memory: its snapshots) are
        taken as they are; the others are read from the base. Each is brought up to date by replay at its next visit.
        admit: raises if a journal that is reopened cannot go on with what is asked for; called before weights are read.
        """
        run_dir = self._run_dir
        if run_dir is None:
            session = Session(self._memory_tier(), UpdateLog(), gains=self._first_gains())
            self._ingest(session.tier)
            return session
        try:
            return self._start_in(run_dir, admit)
        except StorageError:
            raise
        except OSError as error:
            raise diskio.storage_error(error, "starting a run in", run_dir, then="No step was taken.") from error

    def _start_in(self, run_dir: Path, admit: Callable[[Journal], None]) -> Session:
        reopens = (run_dir / runs.JOURNAL).exists() and not (
            runs.is_without_steps(run_dir) and (self.fresh or not runs.takes_notes(run_dir))
        )
        if self.fresh or not reopens:
            runs.check_fresh(run_dir)
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise diskio.storage_error(error, "making", run_dir, then="Nothing was trained yet.") from error
        with ExitStack() as undo:  # of what was opened, if the rest fails: a journal that is left open stays held
            lock = RunLock.take(run_dir)
            undo.callback(lock.release)
            session = self._reopen(run_dir, lock, undo, admit) if reopens else self._begin(run_dir, lock, undo)
            undo.pop_all()
            return session

    @property
    def _run_dir(self) -> Path | None:
        return Path(self.config.run_dir) if self.config.run_dir is not None else None

    def _first_gains(self) -> Gains:
        return decide_gains(self.plan, self.layout, self.method, self.base) if self.gains is None else self.gains

    def _memory_tier(self) -> Tier:
        if self.offload == "none":
            return ResidentTier(self.layout.block_bytes, self.device.alloc)
        return HostTier(self.layout.block_bytes, self.device.host_alloc)

    def _ingest(self, tier: Tier, blocks: Iterable[int] | None = None) -> None:
        ingest(self.plan, self.layout, self.base, tier, self.device.host_alloc, blocks=blocks, progress=self.progress)

    def _shapes(self) -> tuple[Shape, ...]:
        return shapes_of(self.layout.block_bytes, self.layout.spans, self.layout.stream_bytes)

    def _identity(self, base_digest: str) -> dict[str, Any]:
        about = about_base(self.model, self.directory, self.config)
        return identity(
            self.plan, self.layout, self.config, self.method, self.fold_every, base_digest, about, self.modes
        )

    def _clear(self, run_dir: Path) -> None:
        """Remove the journal and metrics of a run without steps, which is begun anew. Its blocks are taken over."""
        path = run_dir / runs.JOURNAL
        if not path.exists():
            return
        held = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            hold(held, path)
            if not runs.is_without_steps(run_dir):
                raise ConfigError(f"{run_dir} was begun by another engine. Give another run_dir")
            (run_dir / runs.METRICS).unlink(missing_ok=True)
            path.unlink()
            diskio.sync_directory(run_dir)
        finally:
            os.close(held)

    def _begin(self, run_dir: Path, lock: RunLock, undo: ExitStack) -> Session:
        self._clear(run_dir)
        gains = self._first_gains()
        runs.save_config(run_dir, self.model_name, self.model_class, self.config, self.method)
        files = DiskTier.create(run_dir / runs.BLOCKS, self._shapes()) if self.offload == "disk" else None
        if files is not None:
            undo.callback(files.close)
        tier = files if files is not None else self._memory_tier()
        self._ingest(tier)
        wanted = self._identity(self.base.digest())
        header = header_of(
            wanted, self.base, self.plan, self.layout, self.config, self.model_name, self.model_class, gains,
            self.objective,
        )  # fmt: skip
        if not lock.is_there(run_dir):
            raise ConfigError(f"{run_dir}: its file {LOCK!r} was removed while the run began. Begin it again")
        if files is not None:
            files.bind(history_start(header))  # before there is a journal: a run's blocks say what they are of
        journal = Journal.create(run_dir / runs.JOURNAL, header)
        undo.callback(journal.close)
        if files is not None:
            self._bind(files, journal)
        return Session(tier, UpdateLog(), journal, lock, self._snapshots(run_dir, tier, files, journal), gains=gains)

    def _reopen(self, run_dir: Path, lock: RunLock, undo: ExitStack, admit: Callable[[Journal], None]) -> Session:
        journal = Journal.open(run_dir / runs.JOURNAL, alone=True)
        undo.callback(journal.close)
        if journal.dropped_bytes:
            _log.warning("%s: dropped the unfinished last %d bytes", journal.path, journal.dropped_bytes)
        updates = UpdateLog()
        for record in journal.steps:
            updates.append(record.updates)
        blocks, files = run_dir / runs.BLOCKS, None
        if blocks.is_dir() and not DiskTier.is_unfinished(blocks, self._shapes()):
            files = self._open_files(run_dir, journal, undo)
        # All but the base is compared first: no weight is read for a run that cannot go on.
        known = journal.header
        unread = not isinstance(self.base, ModuleBase)  # weights in memory are cheap to compare whole
        check_identity(self._identity(str(known.get("base")) if unread else self.base.digest()), known)
        admit(journal)
        if unread:
            check_sample(self.base, journal.header)
        warn_of_versions(journal.header, str(run_dir))
        elsewhere = self.offload != "disk"
        tier: Tier
        if files is not None and not elsewhere:
            tier, again = files, sorted(files.torn)
        elif elsewhere:
            tier = self._memory_tier()
            again = list(range(len(self.layout.block_bytes))) if files is None else self._copy_in(files, tier)
        else:
            tier = files = DiskTier.create(run_dir / runs.BLOCKS, self._shapes())
            undo.callback(files.close)
            again = list(range(len(self.layout.block_bytes)))
        if files is not None:
            self._bind(files, journal)
        if again:
            # The base is read only where it is needed; then it is checked too, before a block of it is written.
            check_identity(self._identity(self.base.digest()), known)
            self._ingest(tier, again)
        return Session(
            tier, updates, journal, lock, self._snapshots(run_dir, tier, files, journal), reopened=True,
            gains=gains_of(journal.header, self.plan, str(journal.path)),
        )  # fmt: skip

    def _open_files(self, run_dir: Path, journal: Journal, undo: ExitStack) -> DiskTier:
        """The run's block files. Raises JournalError if they are of another layout, or know more than the journal."""
        if journal.header.get("layout") != self.layout.digest():
            raise JournalError(
                f"{run_dir / runs.BLOCKS}: written under byte layout {journal.header.get('layout')}, this engine has "
                f"{self.layout.digest()}. Remove that folder to rebuild the blocks from the base and the journal"
            )
        files = DiskTier.open(run_dir / runs.BLOCKS, self._shapes())
        undo.callback(files.close)
        for block in range(len(self.layout.block_bytes)):
            for generation, header in files.headers(block):
                if header.history == 0:  # a power cut fell between the block and the word of what it is
                    files.forget(block, generation)
                    continue
                version = header.version
                if version > len(journal.steps):
                    raise JournalError(
                        f"{run_dir}: block {block} has {version} steps folded in, the journal holds "
                        f"{len(journal.steps)}: the journal was cut or replaced. Restore it, or give up those steps: "
                        f"zo-offload journal cut {run_dir} --to {len(journal.steps)}"
                    )
                if not header.is_of(journal.chain, journal.history):
                    base = " (or is of another base)" if version == 0 else ""
                    raise JournalError(
                        f"{run_dir}: block {block} at step {version} comes from another history{base}: it has "
                        f"{header.history or header.chain:08x}, journal {journal.history(version):08x}. Restore the "
                        f"journal or the blocks, or remove the folder {runs.BLOCKS} to rebuild all blocks from the base"
                    )
        return files

    def _copy_in(self, files: DiskTier, tier: Tier) -> list[int]:
        """Blocks on disk -> a memory tier, at the versions they have; returns those that the disk does not have."""
        missing = sorted(files.torn)
        for block, nbytes in enumerate(self.layout.block_bytes):
            if block in files.torn:
                continue
            view = tier.view(block)
            in_place = view is not None and view.device.type == "cpu"  # a file is read into the host's memory only
            buffer = view if in_place and view is not None else self.device.host_alloc(nbytes)
            try:
                files.fetch(block, buffer)
            except CheckpointError:
                missing.append(block)
                continue
            if view is not None and not in_place:
                buffer = view.copy_(buffer)
            tier.flush(block, buffer, ((0, nbytes),), files.version(block))
            self.progress(nbytes)
        return missing

    def _bind(self, files: DiskTier, journal: Journal) -> None:
        """Tie block files to their journal: write-ahead, history, and the base to rebuild from."""
        files.before_write, files.history_of = journal.make_durable, journal.history
        checked = threading.Lock()
        good: list[bool] = []

        def rebuild(block: int, out: Tensor) -> None:
            with checked:
                if not good:
                    check_identity({"base": self.base.digest()}, journal.header)
                    good.append(True)
                Filler(self.plan, self.layout, self.base).fill(block, out)

        if not isinstance(self.base, ModuleBase):  # a module in memory lets its weights go
            files.rebuild = rebuild

    def _snapshots(self, run_dir: Path, tier: Tier, files: DiskTier | None, journal: Journal) -> Snapshots:
        def open_files() -> DiskTier:
            made = files if files is not None else DiskTier.create(run_dir / runs.BLOCKS, self._shapes())
            self._bind(made, journal)
            return made

        layers = groupby(self.plan.blocks, key=lambda block: block.name)
        written = [[block.index for block in layer if block.index in self.layout.written] for _, layer in layers]
        return Snapshots(
            tier, open_files, self.layout, [layer for layer in written if layer], self.device.host_alloc,
            minutes=self.config.snapshot_minutes, steps=self.config.snapshot_steps,
        )  # fmt: skip
