"""Several ranks on this machine: processes forked from the test's, which meet in a store that the test keeps.

Forked and not started anew: a child has torch, transformers and the test's functions at once.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

FORK = multiprocessing.get_context("fork")


class Failed(AssertionError):
    """A rank's error, with its traceback."""


class Ranks:
    """`world` processes, each of which runs body(rank). results: what it returned, or its error as (class, text).

    again: those that a launcher starts these in place of; they meet in the same store.
    """

    def __init__(self, world: int, body: Callable[[int], Any], again: Ranks | None = None) -> None:
        new = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False) if again is None else None
        self._store: Any = new if again is None else again._store
        self._attempt = 0 if again is None else again._attempt + 1
        self._pipes, self.processes = [], []
        for rank in range(world):
            here, there = FORK.Pipe(duplex=False)
            process = FORK.Process(target=_child, args=(there, rank, self, world, body), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self.processes.append(process)

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self.processes]

    def results(self, seconds: float = 120) -> list[Any]:
        """Of all ranks, within so many seconds, or none of them lives on. Of one that was killed: None."""
        until = time.monotonic() + seconds
        found: list[Any] = []
        try:
            for rank, pipe in enumerate(self._pipes):
                assert pipe.poll(max(0.0, until - time.monotonic())), f"rank {rank} hangs: nothing in {seconds} s"
                try:
                    found.append(pickle.loads(pipe.recv_bytes()))
                except EOFError:
                    found.append(None)
        finally:
            for process in self.processes:
                process.join(1)
                if process.is_alive():
                    process.kill()
        return found


def on_ranks(world: int, body: Callable[[int], Any], seconds: float = 120) -> list[Any]:
    """What body(rank) returned on each rank. Raises `Failed` where one raised or was killed."""
    found = Ranks(world, body).results(seconds)
    for rank, result in enumerate(found):
        if result is None or "error" in result:
            raise Failed(f"rank {rank} of {world}: {'killed' if result is None else result['traceback']}")
    return [result["value"] for result in found]


def errors_on_ranks(world: int, body: Callable[[int], Any], seconds: float = 120) -> list[str]:
    """ "Class: text" of what body(rank) raised on each rank; "" where it raised nothing."""
    return ["killed" if r is None else r.get("error", "") for r in Ranks(world, body).results(seconds)]


def _child(pipe: Any, rank: int, ranks: Ranks, world: int, body: Callable[[int], Any]) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(ranks._store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(ranks._attempt),
    }  # fmt: skip
    try:
        answer: dict[str, Any] = {"value": body(rank)}
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    pipe.send_bytes(pickle.dumps(answer))  # whole: a connection's own `send` would share the memory of tensors
    pipe.close()
    os._exit(0)  # what pytest has to do at its end is not this process's
