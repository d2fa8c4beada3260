"""Finds the ranks that this process was started with: by torchrun, accelerate launch, or the caller's process group.

ranks="auto"       several, if torch.distributed is initialised with several or WORLD_SIZE says so; else alone
ranks=Group(...)   the same, with settings
ranks=Pool(...)    this process keeps a run that others may join, and leave again: `pool.py`
ranks=None         alone, even under a launcher
"""

from __future__ import annotations

import itertools
import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as _distributed

from ..errors import ConfigError, RankError
from .alone import Alone
from .exchange import StoreExchange
from .keeper import Keeper
from .launcher import launched, variable
from .pool import Pool
from .team import Team

_log = logging.getLogger(__name__)

MEET_S = 300.0
"""How long a rank waits for the store that all ranks meet in."""

dist: Any = _distributed  # much of it is untyped
_engines = itertools.count()  # each engine of this process has its own keys
_store: Any = None  # one per process


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that were launched together. patience: seconds to wait for the others; None: from measured turns."""

    patience: float | None = None

    def __post_init__(self) -> None:
        if self.patience is not None and not self.patience > 0:
            raise ConfigError(f"patience={self.patience}: expected seconds, more than 0")


Ranks = Group | Pool | str | None
"""Values of `Engine(ranks=...)`: "auto", a Group, a Pool, or None."""


def find(ranks: Ranks) -> Alone:
    """This process among its ranks; `Alone` if it is the only one. Waits until all ranks make their engine.

    Raises ConfigError if the launcher's variables are invalid, RankError if the other ranks do not come.
    """
    if ranks is None:
        return Alone()
    if isinstance(ranks, Pool):
        if launched()[1] > 1:
            raise ConfigError(
                f"a pool is kept by one process, but this is one of {launched()[1]} that a launcher started: start the "
                "keeper alone, and members by Engine.join (zo-offload join)"
            )
        return Keeper(ranks)
    if not (ranks == "auto" or isinstance(ranks, Group)):
        raise ConfigError(f"ranks={ranks!r}: expected 'auto', a Group, a Pool, or None (this process alone)")
    patience = ranks.patience if isinstance(ranks, Group) else None
    initialised = dist.is_available() and dist.is_initialized()
    if initialised:
        rank, world = dist.get_rank(), dist.get_world_size()
    else:
        rank, world = variable("RANK", 0), variable("WORLD_SIZE", 1)
    if world == 1:
        return Alone()
    if not 0 <= rank < world:
        raise ConfigError(f"RANK={rank} with WORLD_SIZE={world}: expected 0 .. {world - 1}")
    index = next(_engines)
    attempt = variable("TORCHELASTIC_RESTART_COUNT", 0)  # torchrun's store outlives ranks that it restarts
    store = dist.PrefixStore(f"zo_offload/{attempt}/{index}", _meet(rank, world, initialised))
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    team = Team(StoreExchange(store, rank, world), index=index, serves=serves, patience=patience)
    _tell_of_threads(team)
    return team


def _tell_of_threads(team: Team) -> None:
    """Log a hint: by default torchrun gives each process one thread, even on a host with many cores."""
    cores = len(os.sched_getaffinity(0)) // team.local_world
    if team.leads and team.index == 0 and cores > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        _log.warning(
            "OMP_NUM_THREADS=1, which is torchrun's default: each rank computes on one thread. This host has %d cores "
            "a rank: OMP_NUM_THREADS=%d torchrun ...", cores, cores,
        )  # fmt: skip


def _meet(rank: int, world: int, initialised: bool) -> Any:
    """The store that all ranks share: the process group's, or the launcher's."""
    global _store
    if initialised:
        return dist.distributed_c10d._get_default_store()
    if _store is None:
        lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if lacking:
            raise ConfigError(
                f"WORLD_SIZE={world}, and {', '.join(lacking)} is not set: start ranks with torchrun or accelerate "
                "launch, or unset WORLD_SIZE; ranks=None if each process is to train on its own"
            )
        try:
            _store = next(dist.rendezvous("env://", rank, world, timeout=timedelta(seconds=MEET_S)))[0]
        except (RuntimeError, OSError, ValueError) as error:
            raise RankError(
                f"rank {rank} of {world}: nobody answers at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, "
                f"where ranks meet ({str(error).splitlines()[0][:150]})"
            ) from None
    return _store
