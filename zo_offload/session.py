"""From settings to a running engine: which tier, which identity, fresh or resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from . import runs
from .config import EngineConfig, show_bytes
from .devices import CpuDevice
from .errors import BudgetError, JournalError
from .ingest import Base, ingest
from .journal import Journal
from .layout import Layout
from .memory import available_bytes
from .methods import MeZO
from .noise import NoiseSpec
from .plan import Plan
from .storage import is_lossless
from .tiers import DiskTier, HostTier, ResidentTier, Tier
from .updates import UpdateLog


def choose_offload(config: EngineConfig, layout: Layout) -> str:
    """`offload`, with "auto" decided: none if the stored model takes at most half of the free memory, else disk.

    Raises BudgetError if a memory tier cannot hold the model.
    """
    need, free = layout.total_bytes, available_bytes()
    if config.offload == "auto":
        if need <= free / 2 or (config.run_dir is None and need <= 0.9 * free):
            return "none"
        if config.run_dir is None:
            raise BudgetError(
                f"the stored model takes {show_bytes(need)} and {show_bytes(free)} of memory is free: "
                "give run_dir=... so that it can stream from disk"
            )
        return "disk"
    if config.offload in ("none", "host") and need > free:
        raise BudgetError(
            f"offload={config.offload!r} keeps the whole model in memory: {show_bytes(need)}, but "
            f"{show_bytes(free)} is free. Use offload='disk', or a smaller storage format"
        )
    return config.offload


def identity(
    plan: Plan, layout: Layout, config: EngineConfig, method: MeZO, fold_every: int, base_digest: str
) -> dict[str, Any]:
    """What must be equal for a journal to mean the same weights; checked on resume, key by key."""
    trained = "\n".join(sorted(name for name, spec in plan.params.items() if spec.trainable))
    formats = "\n".join(f"{name} {place.fmt.name}" for name, place in sorted(layout.places.items()))
    dtypes = "\n".join(f"{name} {spec.dtype}" for name, spec in sorted(plan.params.items()))
    return {
        "format": 1,
        "base": base_digest,
        "trainable": _digest(trained),
        "storage": _digest(formats),
        "compute": _digest(dtypes),
        "rounding": config.rounding,
        "fold_every": "any" if is_lossless(plan, layout) else fold_every,
        "seed": config.seed,
        "noise": {"distribution": method.distribution, "rounds": method.rounds, "layout": NoiseSpec.layout_version},
        "method": {k: v for k, v in asdict(method).items() if k not in ("steps", "batch_size", "on_nonfinite")},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def start(
    plan: Plan,
    layout: Layout,
    base: Base,
    config: EngineConfig,
    method: MeZO,
    offload: str,
    fold_every: int,
    device: CpuDevice,
    *,
    model_name: str | None,
    model_class: str | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> tuple[Tier, UpdateLog, Journal | None]:
    """Fill a tier from the base and begin a run, or reopen an earlier run's tier, log and journal.

    A run is fresh if run_dir holds no journal. Reopened, its blocks on disk are taken as they are; torn ones, and all
    blocks of a memory tier, are read from the base again and brought up to date by replay when they are next visited.
    """
    run_dir = Path(config.run_dir) if config.run_dir is not None else None
    if run_dir is not None and (run_dir / runs.JOURNAL).exists():
        return _reopen(plan, layout, base, config, method, offload, fold_every, device, run_dir, progress)
    if run_dir is not None:
        runs.check_fresh(run_dir)
    tier = _new_tier(layout, offload, device, run_dir)
    ingest(plan, layout, base, tier, device.alloc, progress=progress)
    journal = None
    if run_dir is not None:
        runs.save_config(run_dir, model_name, model_class, config, method)
        header = identity(plan, layout, config, method, fold_every, base.digest())
        journal = Journal.create(run_dir / runs.JOURNAL, header)
    return tier, UpdateLog(), journal


def _new_tier(layout: Layout, offload: str, device: CpuDevice, run_dir: Path | None) -> Tier:
    if offload == "disk":
        assert run_dir is not None, "EngineConfig checked this"
        return DiskTier.create(run_dir / runs.BLOCKS, layout.block_bytes)
    return (ResidentTier if offload == "none" else HostTier)(layout.block_bytes, device.alloc)


def _reopen(
    plan: Plan,
    layout: Layout,
    base: Base,
    config: EngineConfig,
    method: MeZO,
    offload: str,
    fold_every: int,
    device: CpuDevice,
    run_dir: Path,
    progress: Callable[[int], None],
) -> tuple[Tier, UpdateLog, Journal]:
    journal = Journal.open(run_dir / runs.JOURNAL)
    log = UpdateLog()
    for record in journal.steps:
        log.append(record.updates)
    on_disk = offload == "disk" and (run_dir / runs.BLOCKS).is_dir()
    tier: Tier
    if on_disk:
        tier = disk = DiskTier.open(run_dir / runs.BLOCKS, layout.block_bytes)
        ahead = [b for b in range(len(layout.block_bytes)) if disk.version(b) > log.version and b not in disk.torn]
        if ahead:
            raise JournalError(
                f"{run_dir}: block {ahead[0]} has {disk.version(ahead[0])} steps folded in, the journal holds "
                f"{log.version}: the journal was cut or replaced. Restore it, or start again from the base"
            )
        again = sorted(disk.torn)
    else:
        tier, again = _new_tier(layout, offload, device, run_dir), list(range(len(layout.block_bytes)))
    # The base is read again only where it is needed; then its identity is checked too, before anything is written.
    found = base.digest() if again else journal.header.get("base", "")
    runs.check_identity(identity(plan, layout, config, method, fold_every, found), journal.header)
    ingest(plan, layout, base, tier, device.alloc, blocks=again, progress=progress)
    return tier, log, journal
