"""Exceptions at any bytecode of a run, and what the same engine and a resumed one make of it. One JSON line a kind.

    python -m benchmarks.interrupts [--interrupts 540] [--alarms 120] [--second-signals 216] [--seed 0]

interrupts      KeyboardInterrupt at a chosen bytecode of the main thread, in our code or in what of the standard
                library it calls: the places where the interpreter looks at signals (after a call, at the begin of a
                function, at a jump back) are counted, and the n-th raises. Seeded. In steps, evaluations, reads, closes
                and openings; some while an earlier one is being mended.
alarms          a SIGALRM handler of the user's that raises TimeoutError, by a timer, at random moments of steps.
second_signals  two SIGINTs to a `fit` under way, a random moment apart.

A run takes a dozen steps and is broken off several times; after each the same engine goes on, or the run is closed and
resumed. Its weights and losses are compared, bit for bit, with those of a run that nobody disturbed; then it is resumed
once more and compared again. All tiers, six formats. Counted as wrong: other weights or losses, steps that were taken
and are gone, and any error that is not ours or does not say that the engine must be reopened.
"""

from __future__ import annotations

import argparse
import contextlib
import dis
import hashlib
import itertools
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

from benchmarks.common import about, emit
from benchmarks.faults import IDS, ROWS, make_base
from zo_offload import QZO, Engine, MeZO
from zo_offload.errors import TornError, ZOError
from zo_offload.formats import FORMATS

STEPS = 12
TIERS = ("none", "host", "disk")
STORAGE = ("fp32", "bf16", "bf16+16", "int8", "fp8_e4m3", "fp16")
LINES = ("/zo_offload/", "/contextlib.py", "/threading.py")  # whose bytecodes are counted
# where the interpreter looks at signals; dis names them
_LOOKS = {"RESUME", "CALL", "CALL_FUNCTION_EX", "CALL_KW"}


class Interrupt(KeyboardInterrupt):
    """Ours, so that it is told from one that somebody at the keyboard sends."""


class AtBytecode:
    """`with` it: the n-th place where the interpreter looks at signals raises; n None counts them only."""

    def __init__(self, n: int | None) -> None:
        self.n, self.seen = n, 0
        self._last: dict[int, int] = {}
        self.fired = ""

    def __enter__(self) -> AtBytecode:
        global _at
        _at = self
        sys.settrace(self.enter)
        return self

    def __exit__(self, *exc: object) -> None:
        global _at
        sys.settrace(None)
        _at = None

    def enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not any(part in frame.f_code.co_filename for part in LINES):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self.step

    def step(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event != "opcode":
            if event == "return":
                self._last.pop(id(frame), None)
            return self.step
        before, self._last[id(frame)] = self._last.get(id(frame), -1), frame.f_lasti
        if before in places(frame.f_code).get(frame.f_lasti, ()):
            self.seen += 1
            if self.seen == self.n:
                self.fired = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
                raise Interrupt(self.fired)
        return self.step


_at: AtBytecode | None = None


def objective(model: Any, inputs: Any) -> Any:
    """The model's loss. Each lane is traced by itself, so this lets the tracing into it."""
    if _at is not None and not _at.fired:
        sys.settrace(_at.enter)
    return model(**inputs).loss


_places: dict[CodeType, dict[int, frozenset[int]]] = {}


def places(code: CodeType) -> dict[int, frozenset[int]]:
    """Offset -> the instructions before it after which a signal's exception would come there.

    Only where both are covered by the same handlers: the interpreter raises at the instruction that looked.
    """
    if code not in _places:
        table = [
            (e.start, e.end, e.target) for e in vars(dis)["_parse_exception_table"](code)
        ]  # fmt: skip

        def handler(offset: int) -> int:
            return next((target for start, end, target in table if start <= offset < end), -1)

        found: dict[int, set[int]] = {}
        listed = list(dis.get_instructions(code))
        for here, after in itertools.pairwise(listed):
            jumps = "JUMP_BACKWARD" in here.opname and "NO_INTERRUPT" not in here.opname
            if jumps or here.opname in _LOOKS:
                goal = here.argval if jumps else after.offset
                if handler(here.offset) == handler(goal):
                    found.setdefault(goal, set()).add(here.offset)
        _places[code] = {offset: frozenset(before) for offset, before in found.items()}
    return _places[code]


# ---- a run -----------------------------------------------------------------------------------------------------------


def settings() -> list[dict[str, Any]]:
    ways = {
        "none": dict(fold_every=2, snapshot_steps=4),
        "host": dict(fold_every=1, snapshot_steps=3, block_numel=700),
        "disk": dict(fold_every=2, snapshot_steps=3, num_slots=2),
    }
    return [dict(ways[tier], offload=tier, storage=name) for name in STORAGE for tier in TIERS]


def batch(step: int) -> dict[str, Any]:
    ids = torch.tensor([IDS[(4 * step + i) % len(IDS)] for i in range(4)])
    return {"input_ids": ids, "labels": ids}


def new_engine(base: Path, run: Path | None, way: dict[str, Any]) -> Engine:
    method = MeZO if FORMATS[way["storage"]].trains else QZO
    return Engine(str(base), method=method(lr=1e-3, batch_size=4), run_dir=run, objective=objective, **way)


def resumed(run: Path) -> Engine:
    engine = Engine.resume(run, objective=objective)
    engine.weights()  # from here on its log has the run's steps
    return engine


def outcome(engine: Engine) -> dict[str, str]:
    """Digests of all weights, by name, and the losses, by step."""
    found = {}
    for name, tensor in engine.weights():
        found[name] = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    assert engine.journal is not None
    return found | {f"loss {record.step}": str(record.loss) for record in engine.journal.steps}


class Runs:
    """Runs of one kind of disturbance: `outcomes` counts them, `wrong` tells what should not be."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng, self.base = folder, rng, make_base(folder)
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.used: set[str] = set()
        self._wanted: dict[str, dict[str, str]] = {}
        self._count = 0

    def fresh(self) -> Path:
        self._count += 1
        return self.folder / f"run-{self._count}"

    def wanted(self, way: dict[str, Any], by_fit: bool = False) -> dict[str, str]:
        """What a run has that nobody disturbed."""
        key = f"{way['storage']} {way['fold_every']} {way.get('block_numel')} {by_fit}"
        if key not in self._wanted:
            with new_engine(self.base, self.fresh(), way) as engine:
                if by_fit:
                    engine.fit(ROWS, steps=STEPS, batch_size=4)
                else:
                    for step in range(STEPS):
                        engine.step(batch(step))
                self._wanted[key] = outcome(engine)
        return self._wanted[key]

    def end(self, engine: Engine, run: Path, way: dict[str, Any], told: str, by_fit: bool = False) -> None:
        """The run is over: compare what the engine has, then what a resumed one has."""
        self.used.add(f"{way['offload']} {way['storage']}")
        want = self.wanted(way, by_fit)
        for who in ("the engine", "a resumed one"):
            found = outcome(engine)
            engine.close()
            if found != want:
                other = [name for name in want | found if want.get(name) != found.get(name)]
                self.wrong.append(f"{who} has other values of {other[-3:]} ({len(other)}): {way} in {run}: {told}")
                return
            if who == "the engine":
                engine = resumed(run)
        shutil.rmtree(run)


class Trial:
    """A run that is stepped as in a notebook, and is being disturbed."""

    def __init__(self, made: Runs, way: dict[str, Any]) -> None:
        self.made, self.way, self.rng, self.run = made, way, made.rng, made.fresh()
        self.engine = new_engine(made.base, self.run, way)
        self.engine.weights()  # there is a run that can be reopened
        self.told: list[str] = []

    def take(self) -> None:
        self.engine.step(batch(self.engine.log.version))

    def evaluate(self) -> None:
        self.engine.evaluate(ROWS[:4], batch_size=4)

    def read(self) -> None:
        for _ in self.engine.weights():
            pass

    def close(self) -> None:
        self.engine.close()

    def reopen(self) -> None:
        self.engine.close()
        self.engine = Engine.resume(self.run, objective=objective)
        for _ in self.engine.weights():
            pass

    def any_job(self) -> Callable[[], None]:
        jobs = [self.take, self.evaluate, self.read, self.close, self.reopen]
        return self.rng.choices(jobs, (70, 10, 10, 5, 5))[0]

    def go_on(self, how_often_reopened: float) -> None:
        """After something broke in: with the same engine, or the run reopened."""
        again = self.rng.random() < how_often_reopened
        self.made.outcomes["resumed" if again else "the same engine went on"] += 1
        if again:
            self.engine.close()
            self.engine = resumed(self.run)

    def to_the_end(self, disturb: Callable[[int], None]) -> None:
        """disturb(turn) does something, most often a step, until all are taken. Then the results are compared."""
        try:
            for turn in range(20 * STEPS):
                if self.engine.log.version >= STEPS or self.made.wrong:
                    break
                before = self.engine.log.version
                try:
                    disturb(turn)
                except TornError as torn:
                    self.told.append(str(torn))
                    self.made.outcomes["torn, and reopened"] += 1
                    self.engine.close()
                    self.engine = resumed(self.run)
                if self.engine.journal is not None and self.engine.log.version < before:
                    self.made.wrong.append(f"{before} steps were taken, then {self.engine.log.version}: {self.told}")
            self.made.end(self.engine, self.run, self.way, "; ".join(self.told))
        except Exception as error:
            whose = "" if isinstance(error, ZOError) else "not ours, "
            self.made.wrong.append(f"{whose}{type(error).__name__}: {error}; {self.way} in {self.run}: {self.told}")


def interrupts(
    folder: Path, wanted: int, rng: random.Random, ways: list[dict[str, Any]] | None = None, each: int = 6
) -> dict[str, Any]:
    made, ways = Runs(folder, rng), ways or settings()
    fired: Counter[str] = Counter()
    size: dict[tuple[str, str], int] = {}  # of each kind of job: places where it could be broken off
    number = 0
    while fired.total() < wanted and not made.wrong:
        trial = Trial(made, ways[number % len(ways)])
        number += 1
        due = set(rng.sample(range(STEPS + 2 * each), 2 * each))

        def disturb(turn: int, trial: Trial = trial, due: set[int] = due) -> None:
            job = trial.any_job()
            kind = (trial.way["offload"], job.__name__)
            at = AtBytecode(1 + int(1.2 * rng.random() * size.get(kind, 3000)))
            try:
                with at if turn in due else contextlib.nullcontext():  # tracing is slow
                    job()
            except Interrupt as broken:
                fired[job.__name__] += 1
                trial.told.append(f"{job.__name__} at {broken}")
                if rng.random() < 0.3:  # once more, while that is mended
                    again = AtBytecode(1 + int(rng.random() * 1500))
                    with contextlib.suppress(Interrupt), again:
                        trial.take() if job.__name__ not in ("close", "reopen") else trial.close()
                    if again.fired:
                        fired["mending"] += 1
                        trial.told.append(f"mending at {again.fired}")
                trial.go_on(1.0 if job.__name__ in ("close", "reopen") else 0.25)
                return
            if turn in due:  # it has no more places than this (a watched pass has ten times as many)
                size[kind] = at.seen
            if job.__name__ == "close":
                trial.engine = resumed(trial.run)

        trial.to_the_end(disturb)
    return _result("interrupts", fired.total(), number, made, {"in": dict(fired)})


def alarms(folder: Path, wanted: int, rng: random.Random, ways: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """TimeoutError out of a handler of SIGALRM, by a timer, while steps are taken."""
    made, ways = Runs(folder, rng), ways or settings()
    number = fired = 0

    def handler(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError("a SIGALRM handler of the user's")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        while fired < wanted and not made.wrong:
            trial = Trial(made, ways[number % len(ways)])
            number += 1
            seconds = [0.02]

            def disturb(turn: int, trial: Trial = trial, seconds: list[float] = seconds) -> None:
                nonlocal fired
                begin = time.monotonic()
                try:
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, seconds[0]) if turn % 2 else 0)
                    trial.take()
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    seconds[0] = time.monotonic() - begin
                except TimeoutError as broken:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    if isinstance(broken, ZOError):
                        raise
                    fired += 1
                    trial.go_on(0.25)

            trial.to_the_end(disturb)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return _result("alarms", fired, number, made, {})


def second_signals(
    folder: Path, wanted: int, rng: random.Random, ways: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Two SIGINTs to this very process while it is in `fit`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    made, ways = Runs(folder, rng), ways or settings()
    number = 0
    ended: Counter[str] = Counter()
    while ended["by the second signal"] < wanted and not made.wrong:
        way = ways[number % len(ways)]
        run = made.fresh()
        number += 1
        engine = new_engine(made.base, run, way)
        made.wanted(way, by_fit=True)
        engine.weights()  # there is a run that can be reopened
        told: list[str] = []
        length = 0.5
        try:
            for _ in range(40):
                done = threading.Event()
                wait, gap = rng.uniform(0, length), rng.choice((0.0, 0.0005, rng.uniform(0, 0.02)))

                def send(done: threading.Event = done, wait: float = wait, gap: float = gap) -> None:
                    for pause in (wait, gap):
                        if done.wait(pause):
                            return
                        os.kill(os.getpid(), signal.SIGINT)

                sender = threading.Thread(target=send)
                begin = time.monotonic()
                try:
                    sender.start()
                    engine.fit(ROWS, steps=STEPS, batch_size=4)
                except KeyboardInterrupt as broken:
                    told.append(f"{broken} at step {engine.log.version}")
                    how = "by the second signal" if "second" in str(broken) else "after a step"
                    ended[how if type(broken).__name__ == "Stopped" or "second" in str(broken) else "elsewhere"] += 1
                    again = rng.random() < 0.4
                    made.outcomes["resumed" if again else "the same engine went on"] += 1
                    _quietly(lambda done=done, sender=sender: (done.set(), sender.join()))
                    if again:
                        engine.close()
                        engine = resumed(run)
                    continue
                finally:
                    _quietly(lambda done=done, sender=sender: (done.set(), sender.join()))
                    length = 0.5 * length + 0.4 * (time.monotonic() - begin)
                break
            else:
                engine.fit(ROWS, steps=STEPS, batch_size=4)
            made.end(engine, run, way, "; ".join(told), by_fit=True)
        except Exception as error:
            whose = "" if isinstance(error, ZOError) else "not ours, "
            made.wrong.append(f"{whose}{type(error).__name__}: {error}; {way} in {run}: {told}")
    return _result("second_signals", ended["by the second signal"], number, made, {"ended": dict(ended)})


def _quietly(job: Callable[[], Any]) -> None:
    """A signal that was on its way when `fit` ended comes here at the latest."""
    for _ in range(3):
        try:
            job()
            return
        except KeyboardInterrupt:
            continue


def _result(kind: str, count: int, number: int, made: Runs, more: dict[str, Any]) -> dict[str, Any]:
    for line in made.wrong:
        print(f"WRONG {line}", file=sys.stderr)
    return {"kind": kind, kind: count, "runs": number, "wrong": len(made.wrong), **more,
            "outcomes": dict(made.outcomes), "tiers_and_formats": sorted(made.used)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interrupts", type=int, default=540)
    parser.add_argument("--alarms", type=int, default=120)
    parser.add_argument("--second-signals", type=int, default=216)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=["interrupts", "alarms", "second_signals"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("zo_offload").setLevel(logging.ERROR)
    jobs: dict[str, Callable[[Path, random.Random], dict[str, Any]]] = {
        "interrupts": lambda folder, rng: interrupts(folder, options.interrupts, rng),
        "alarms": lambda folder, rng: alarms(folder, options.alarms, rng),
        "second_signals": lambda folder, rng: second_signals(folder, options.second_signals, rng),
    }
    wrong = 0
    for name in options.only or list(jobs):
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            result = jobs[name](Path(folder), random.Random(options.seed))
        wrong += result["wrong"]
        emit({**result, "seed": options.seed, "took_s": round(time.monotonic() - begin, 1)}, about("interrupts"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
