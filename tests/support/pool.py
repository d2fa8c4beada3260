"""A pool on this machine: the keeper and members are processes forked from the test's."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from zo_offload import Engine, Pool

from .ranks import FORK
from .training import batches, stored_weights

TOKEN = "known to all of us"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def digest(engine: Any) -> str:
    """Of all stored weights."""
    found = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(stored_weights(engine).items()):
        found.update(name.encode() + weight.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Process:
    """body(tell) in a process of its own, which gives what it tells on the way, and its value or error at the end."""

    def __init__(self, body: Callable[[Callable[[Any], None]], Any]) -> None:
        self._here, there = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=_child, args=(there, body), daemon=True)
        self.process.start()
        there.close()
        self.told: list[Any] = []
        self.end: dict[str, Any] | None = None

    def until(self, found: Callable[[Any], bool], seconds: float = 60.0) -> Any:
        """What it told first of which this is so."""
        end = time.monotonic() + seconds
        while True:
            for thing in self.told:
                if found(thing):
                    return thing
            assert self._read(end), f"nothing like it within {seconds} s; it told {self.told}, and {self.end}"

    def _read(self, end: float) -> bool:
        if self.end is not None or not self._here.poll(max(0.0, end - time.monotonic())):
            return False
        try:
            kind, thing = pickle.loads(self._here.recv_bytes())
        except EOFError:
            kind, thing = "end", {}
        if kind == "told":
            self.told.append(thing)
        else:
            self.end = thing
        return True

    def result(self, seconds: float = 60.0) -> dict[str, Any]:
        """{"value": ...}, {"error": ...}, or nothing of one that was killed."""
        end = time.monotonic() + seconds
        try:
            while self.end is None:
                assert self._read(end), f"it hangs: no end in {seconds} s; it told {self.told}"
        finally:
            self.process.join(5)
            if self.process.is_alive():
                self.process.kill()
        return self.end

    def value(self, seconds: float = 60.0) -> Any:
        result = self.result(seconds)
        assert "value" in result, result.get("traceback", "it was killed")
        return result["value"]

    def error(self, seconds: float = 60.0) -> str:
        result = self.result(seconds)
        assert "error" in result, result
        return str(result["error"])

    def send(self, signum: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signum)


def _child(pipe: Any, body: Callable[[Callable[[Any], None]], Any]) -> None:
    def send(kind: str, thing: Any) -> None:
        pipe.send_bytes(pickle.dumps((kind, thing)))

    try:
        end: dict[str, Any] = {"value": body(lambda thing: send("told", thing))}
    except BaseException as error:
        end = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    send("end", end)
    pipe.close()
    os._exit(0)


def instead_of_computing(engine: Any, do: Callable[[Callable[[], list[float]]], list[float]]) -> None:
    """In this process do(compute) gives the losses of lanes that were leased; compute(): what they are."""
    computed = engine.ranks._computed
    engine.ranks._computed = lambda cells, compute: do(lambda: computed(cells, compute))


class Party:
    """A run that a keeper serves, and who joins it.

    make: the base; settings: of the run's engine; fit: of its `fit`.
    """

    def __init__(self, folder: Any, make: Callable[[], Any], settings: dict[str, Any], fit: dict[str, Any]) -> None:
        self.run_dir, self.make, self.settings, self.fit = folder / "run", make, settings, fit
        self.port = free_port()
        self._all: list[Process] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, body: Callable[[Callable[[Any], None]], Any]) -> Process:
        self._all.append(Process(body))
        return self._all[-1]

    def keeper(self, *, resumes: bool = False, each_step: Callable[[Any], Any] = lambda record: None,
               data: Any = None, before: Callable[[Any], Any] = lambda engine: None,
               **pool: Any) -> Process:  # fmt: skip
        """Tells "step N" after each; gives losses, the weights' digest and how many lanes it computed itself."""

        def body(tell: Callable[[Any], None]) -> Any:
            ranks = Pool(address=self.address, token=TOKEN, **pool)
            if resumes:
                engine = Engine.resume(self.run_dir, self.make(), ranks=ranks)
            else:
                engine = Engine(self.make(), run_dir=self.run_dir, ranks=ranks, **self.settings)
            with engine:
                tell("up")
                before(engine)

                def after(record: Any) -> None:
                    tell(("step", record.step, engine.ranks._store.num_keys()))
                    each_step(record)

                engine.fit(data or batches(), callback=after, **self.fit)
                losses = [record.loss for record in engine.journal.steps]
                return {"losses": losses, "weights": digest(engine), "lanes": engine.ranks._lanes}

        return self.start(body)

    def member(self, *, each_step: Callable[[Any], Any] = lambda record: None, data: Any = None, make: Any = None,
               token: str = TOKEN, before: Callable[[Any], Any] = lambda engine: None, wait: float = 60.0,
               address: str | None = None, **settings: Any) -> Process:  # fmt: skip
        """As `keeper`."""

        def body(tell: Callable[[Any], None]) -> Any:
            model = (make or self.make)()
            with Engine.join(address or self.address, model, token=token, wait=wait, **settings) as engine:
                tell(("joined", len(engine.ranks.journal)))
                before(engine)

                def after(record: Any) -> None:
                    tell(("step", record.step))
                    each_step(record)

                result = engine.fit(data or batches(), callback=after)
                return {"weights": digest(engine), "lanes": engine.ranks._lanes, "steps": result.steps}

        return self.start(body)

    def end(self) -> None:
        for process in self._all:
            if process.process.is_alive():
                process.process.kill()
