"""Starts or resumes a run of a prepared model: fills or reopens its tier, and makes or checks its identity."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, JournalError, StorageError
from ..journal import run_directory
from ..journal.format import history_start
from ..journal.gains import decide_gains, gains_of, record_of
from ..journal.identity import about_base, check_identity, check_sample, header_of, identity, warn_of_versions
from ..journal.journal import Journal
from ..journal.masks import decide_masks, masks_of, save_lists
from ..journal.masks import record_of as record_of_masks
from ..journal.mirror import Mirror
from ..kernels.records import Gains, Masks
from ..modules.class_heads import class_heads, wide_of
from ..modules.modes import modes_of
from ..numerics.updates import UpdateLog
from ..stream.ingest import Base, ModuleBase, ingest
from ..system import diskio
from ..system.closing import Closing
from ..system.lock import NAME as LOCK
from ..system.lock import RunLock, hold
from ..tiers import DiskTier, HostTier, ResidentTier, Tier
from ..tiers.disk import FileShape, shapes_of
from .opening import Opened
from .origin import RunOrigin
from .prepare import Prepared
from .snapshot import Snapshots
from .stepper import Stepper, make_stepper
from .tail import tail_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A started run: its tier, its log of steps, and the parts that make it durable (None without a run_dir)."""

    tier: Tier
    stepper: Stepper
    """Holds the log of the steps that blocks may lack."""
    gains: Gains
    masks: Masks
    wide: tuple[str, ...]
    """Layers that compute in float32 where forwards have 16 bits (`modules/class_heads.py`)."""
    journal: Journal | None = None
    lock: RunLock | None = None
    snapshots: Snapshots | None = None
    reopened: bool = False
    identity: dict[str, Any] | None = None
    """The identity that ranks compare; None: it is in the journal's header, or is not needed."""

    def settle(self) -> None:
        """Wait for the background snapshot; call this before anything else writes the blocks."""
        if self.snapshots is not None:
            self.snapshots.wait()

    def close(self) -> None:
        """Stop the background work, close the files, release the directory; all of it, even if a part fails. Then
        raises the error, if steps could not be written to the disk. Safe to call twice."""
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
    """Begins a session, or reopens the run directory's. objective: its name; None: the model's own loss.

    fresh: True to begin a new run, False to go on with the one in run_dir. told: on ranks other than 0, the bytes of
    the journal that goes on, or None if a new run begins.
    """

    opened: Opened
    objective: str | None = None
    fresh: bool = True
    told: bytes | None = None

    def start(self, admit: Callable[[Journal], None] = lambda journal: None) -> Session:
        """Fill a tier from the base and begin a run, or reopen an earlier run's tier, log and journal.

        A run is fresh if run_dir holds no journal. A reopened run uses its blocks on disk (for a run in memory: its
        snapshots) as they are, and reads the others from the base. Each block is brought up to date by replay at its
        next visit. admit: raises if a reopened journal cannot go on with this call's arguments; called before weights
        are read.
        """
        run_dir = self.opened.run_dir
        if run_dir is None and self.told is not None:
            return self._follow_in_memory(self.told, admit)
        if run_dir is None:
            gains, masks, wide = self._first_gains(), self._first_masks(), class_heads(self.opened.model)
            tier = self._memory_tier()
            self._ingest(tier)
            known = None
            if self.opened.ranks.world > 1:  # before a module gives its weights away
                told = {"gains": record_of(gains), "masks": record_of_masks(masks), "objective": self.objective}
                known = {**self._identity(self._base.digest()), **told}
            return Session(tier, self._stepper(self._log(), None, gains), gains, masks, wide, identity=known)
        home = self.opened.home
        assert home is not None
        try:
            return self._start_in(home, admit) if self._leads else self._follow_in(home, admit)
        except StorageError:
            raise
        except OSError as error:
            raise diskio.storage_error(error, "starting a run in", run_dir, then="No step was taken.") from error

    def _start_in(self, run_dir: Path, admit: Callable[[Journal], None]) -> Session:
        reopens = (run_dir / run_directory.JOURNAL).exists() and not (
            run_directory.is_without_steps(run_dir) and (self.fresh or not run_directory.takes_notes(run_dir))
        )
        if self.fresh or not reopens:
            run_directory.check_fresh(run_dir)
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise diskio.storage_error(error, "making", run_dir, then="Nothing was trained yet.") from error
        with ExitStack() as undo:  # closes what was opened if the rest fails: an open journal would stay locked
            lock = RunLock.take(run_dir)
            undo.callback(lock.release)
            session = self._reopen(run_dir, lock, undo, admit) if reopens else self._begin(run_dir, lock, undo)
            undo.pop_all()
            return session

    def _follow_in(self, home: Path, admit: Callable[[Journal], None]) -> Session:
        """On ranks other than 0: follow the run that rank 0 begins or resumes, with own blocks in `home`."""
        home.mkdir(parents=True, exist_ok=True)
        if self.opened.ranks.elastic and (home / run_directory.JOURNAL).exists():
            raise ConfigError(f"{home} holds a run: a member keeps its blocks in a directory of its own (--run-dir)")
        with ExitStack() as undo:
            lock = RunLock.take(home)
            undo.callback(lock.release)
            begins = self.told is None
            session = self._begin(home, lock, undo) if begins else self._reopen(home, lock, undo, admit)
            undo.pop_all()
            return session

    def _follow_in_memory(self, told: bytes, admit: Callable[[Journal], None]) -> Session:
        """Follow a run that another process keeps, in memory alone, from the base and that run's journal."""
        journal, updates = Mirror(Path(run_directory.JOURNAL), told), self._log()
        for record in journal.steps:
            updates.append(record.updates)
        known = journal.header
        check_identity(self._identity(str(known.get("base"))), known)  # before a weight is read
        admit(journal)
        warn_of_versions(known, "the run")
        check_identity(self._identity(self._base.digest()), known)
        plan, where = self._prepared.plan, "the run's journal"
        tier, gains, masks = (
            self._memory_tier(),
            gains_of(known, plan, where),
            masks_of(known, plan, where, method=self._prepared.method),
        )
        self._ingest(tier)
        wide = wide_of(known, self.opened.model)
        return Session(tier, self._stepper(updates, journal, gains), gains, masks, wide, journal, reopened=True)

    @property
    def _leads(self) -> bool:
        return self.opened.ranks.leads

    @property
    def _path(self) -> Path:
        """The path of the run's journal."""
        assert self.opened.run_dir is not None
        return self.opened.run_dir / run_directory.JOURNAL

    @property
    def _base(self) -> Base:
        return self.opened.base

    @property
    def _prepared(self) -> Prepared:
        return self.opened.prepared

    def _first_gains(self) -> Gains:
        prepared = self._prepared
        if self.opened.gains is not None:
            return self.opened.gains
        return decide_gains(prepared.plan, prepared.layout, prepared.method, self._base)

    def _first_masks(self) -> Masks:
        prepared = self._prepared
        return decide_masks(prepared.plan, prepared.method, self._base, prepared.config.seed)

    def _log(self) -> UpdateLog:
        return UpdateLog(parts=self._prepared.parts)

    def _memory_tier(self) -> Tier:
        block_bytes, device = self._prepared.layout.block_bytes, self.opened.device
        if self._prepared.in_place:
            return ResidentTier(block_bytes, device.alloc)
        return HostTier(block_bytes, device.host_alloc)

    def _ingest(self, tier: Tier, blocks: Iterable[int] | None = None) -> None:
        prepared, alloc = self._prepared, self.opened.device.host_alloc
        ingest(prepared.plan, prepared.layout, self._base, tier, alloc, blocks=blocks)

    def _stepper(self, log: UpdateLog, journal: Journal | None, gains: Gains) -> Stepper:
        waits = self.opened.ranks.elastic
        tail = tail_of(self.opened, log.version, journal)
        return make_stepper(self._prepared, self.opened.device, log, journal, gains, waits=waits, tail=tail)

    def _shapes(self) -> tuple[FileShape, ...]:
        layout = self._prepared.layout
        return shapes_of(layout.block_bytes, layout.spans, layout.stream_bytes)

    def _new_files(self, run_dir: Path, origin: RunOrigin) -> DiskTier:
        every = self._prepared.config.scrub_every
        return DiskTier.create(run_dir / run_directory.BLOCKS, self._shapes(), origin, scrub_every=every)

    def _identity(self, base_digest: str) -> dict[str, Any]:
        return identity_of(self.opened, base_digest)

    def _clear(self, run_dir: Path) -> None:
        """Remove the journal and metrics of a run without steps, which begins again. Its blocks are reused."""
        path = run_dir / run_directory.JOURNAL
        if not path.exists():
            return
        held = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            hold(held, path)
            if not run_directory.is_without_steps(run_dir):
                raise ConfigError(f"{run_dir} was begun by another engine. Give another run_dir")
            (run_dir / run_directory.METRICS).unlink(missing_ok=True)
            path.unlink()
            diskio.sync_directory(run_dir)
        finally:
            os.close(held)

    def _begin(self, run_dir: Path, lock: RunLock, undo: ExitStack) -> Session:
        opened, prepared, origin = self.opened, self._prepared, RunOrigin(self.opened)
        if self._leads:
            self._clear(run_dir)
        gains, masks, wide = self._first_gains(), self._first_masks(), class_heads(opened.model)
        if self._leads:
            save_lists(run_dir, masks)
            run_directory.save_config(run_dir, opened.name, opened.model_class, prepared.config, prepared.method)
        files = None
        if prepared.offload == "disk":
            files = self._new_files(run_dir, origin)
            undo.callback(files.close)
        tier = files if files is not None else self._memory_tier()
        self._ingest(tier)
        wanted = self._identity(self._base.digest())
        header = header_of(
            wanted, self._base, prepared.plan, prepared.layout, prepared.config, opened.name, opened.model_class, gains,
            masks, wide, self.objective,
        )  # fmt: skip
        if not lock.is_there(run_dir):
            raise ConfigError(f"{run_dir}: its file {LOCK!r} was removed while the run began. Begin it again")
        if files is not None:
            files.bind(history_start(header))  # before there is a journal: blocks must name their history
        journal = Journal.create(self._path, header) if self._leads else Mirror.begun(self._path, header)
        undo.callback(journal.close)
        stepper = self._stepper(self._log(), journal, gains)
        origin.begin(journal, stepper)
        return Session(tier, stepper, gains, masks, wide, journal, lock, self._snapshots(run_dir, tier, files, origin))

    def _reopen(self, run_dir: Path, lock: RunLock, undo: ExitStack, admit: Callable[[Journal], None]) -> Session:
        prepared, origin = self._prepared, RunOrigin(self.opened)
        journal = Journal.open(self._path, alone=True) if self.told is None else Mirror(self._path, self.told)
        undo.callback(journal.close)
        if journal.dropped_bytes:
            _log.warning("%s: dropped the unfinished last %d bytes", journal.path, journal.dropped_bytes)
        updates = self._log()
        for record in journal.steps:
            updates.append(record.updates)
        # Everything but the base is compared first: no weight is read for a run that cannot go on.
        known = journal.header
        unread = not isinstance(self._base, ModuleBase)  # all weights in memory are cheap to compare
        check_identity(self._identity(str(known.get("base")) if unread else self._base.digest()), known)
        blocks, files = run_dir / run_directory.BLOCKS, None
        if blocks.is_dir() and not DiskTier.is_unfinished(blocks, self._shapes()):
            files = self._open_files(run_dir, journal, origin, undo)
        admit(journal)
        if unread:
            check_sample(self._base, journal.header)
        warn_of_versions(journal.header, str(run_dir))
        all_blocks = list(range(len(prepared.layout.block_bytes)))
        tier: Tier
        if prepared.offload != "disk":
            tier = self._memory_tier()
            again = all_blocks if files is None else self._copy_in(files, tier)
        elif files is not None:
            tier, again = files, sorted(files.torn)
        else:
            tier = files = self._new_files(run_dir, origin)
            undo.callback(files.close)
            again = all_blocks
        gains = gains_of(journal.header, prepared.plan, str(journal.path))
        masks = masks_of(
            journal.header, prepared.plan, str(journal.path), method=prepared.method, run_dir=self.opened.run_dir
        )
        wide = wide_of(journal.header, self.opened.model)
        stepper = self._stepper(updates, journal, gains)
        origin.begin(journal, stepper)
        if again:
            # The base is read only if it is needed; then it is also checked, before a block made from it is written.
            check_identity(self._identity(self._base.digest()), known)
            self._ingest(tier, again)
        snapshots = self._snapshots(run_dir, tier, files, origin)
        return Session(tier, stepper, gains, masks, wide, journal, lock, snapshots, reopened=True)

    def _open_files(self, run_dir: Path, journal: Journal, origin: RunOrigin, undo: ExitStack) -> DiskTier:
        """The run's block files. Raises JournalError if their layout differs, or if the journal lacks their steps."""
        layout = self._prepared.layout
        if journal.header.get("layout") != layout.digest():
            raise JournalError(
                f"{run_dir / run_directory.BLOCKS}: written under byte layout {journal.header.get('layout')}, this "
                f"engine has {layout.digest()}. Remove that folder to rebuild the blocks from the base and the journal"
            )
        every = self._prepared.config.scrub_every
        files = DiskTier.open(run_dir / run_directory.BLOCKS, self._shapes(), origin, scrub_every=every)
        undo.callback(files.close)
        for block in range(len(layout.block_bytes)):
            for generation, header in files.headers(block):
                of_this = header.version <= len(journal.steps) and header.is_of(journal.chain, journal.history)
                if header.history == 0 or not (self._leads or of_this):
                    # the power failed between the write of the block and that of its header; or, on ranks other than 0,
                    # between the block and rank 0's journal; or the run went on without this rank, from an earlier step
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
                        f"journal or the blocks, or remove the folder {run_directory.BLOCKS} to rebuild all blocks "
                        "from the base"
                    )
        return files

    def _copy_in(self, files: DiskTier, tier: Tier) -> list[int]:
        """Copy blocks from disk to a memory tier, at their versions; returns the blocks that are not on the disk."""
        missing = sorted(files.torn)
        for block, nbytes in enumerate(self._prepared.layout.block_bytes):
            if block in files.torn:
                continue
            view = tier.view(block)
            in_place = view is not None and view.device.type == "cpu"  # a file can be read into host memory only
            buffer = view if in_place and view is not None else self.opened.device.host_alloc(nbytes)
            try:
                files.fetch(block, buffer)
            except CheckpointError:
                missing.append(block)
                continue
            if view is not None and not in_place:
                buffer = view.copy_(buffer)
            tier.flush(block, buffer, ((0, nbytes),), files.version(block))
        return missing

    def _snapshots(self, run_dir: Path, tier: Tier, files: DiskTier | None, origin: RunOrigin) -> Snapshots:
        def open_files() -> DiskTier:
            return self._new_files(run_dir, origin) if files is None else files

        plan, layout, config = self._prepared.plan, self._prepared.layout, self._prepared.config
        layers = groupby(plan.blocks, key=lambda block: block.name)
        written = [[block.index for block in layer if block.index in layout.written] for _, layer in layers]
        return Snapshots(
            tier, open_files, layout, [layer for layer in written if layer], self.opened.device.host_alloc,
            minutes=config.snapshot_minutes, steps=config.snapshot_steps,
        )  # fmt: skip


def identity_of(opened: Opened, base_digest: str) -> dict[str, Any]:
    """The identity of a run of this model, stored and trained like this: see `identity.py`."""
    prepared = opened.prepared
    about = about_base(opened.model, opened.directory, prepared.config, opened.adapter)
    return identity(
        prepared.plan, prepared.layout, prepared.config, prepared.method, prepared.fold_every, base_digest, about,
        modes_of(opened.model, prepared.config.mode), prepared.tail,
    )  # fmt: skip
