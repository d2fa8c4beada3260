"""A pool whose members are killed, stopped, continued and started at random, for as long as you like.

    python -m benchmarks.pool [--minutes 60] [--seed 0] [--members 4] [--every 6] [--pause 0.15]

A keeper trains a small OPT (int8+8, FZOO of 3 directions on 2 micro-batches: 8 lanes) and members join it, each a
process of its own, on tiers that differ. Every few seconds (`--every`, on average) something happens to one of them, by
the seed: a member is started, killed (SIGKILL), stopped for some seconds (SIGSTOP) and continued, or sent away
(SIGTERM); the keeper is killed and started again, or stopped for a while. `--pause` seconds lie between steps, so that
one process can take as many steps afterwards: its weights, and those of all members that are there at the end, must be
the keeper's, bit for bit. Counted as wrong: other weights, a member that ends by itself, a minute without a step. Also
recorded: the most keys that the store had; resident memory of the keeper's process at the begin and at the end (it is
another process after each kill), which must not grow with the run; what a step of 8 lanes costs in the store alone, in
ms [p20, p50, p80].

Exit status 1 where something was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import OPTConfig, OPTForCausalLM

from benchmarks.common import about, emit, quantile
from zo_offload import FZOO, Engine, Pool, Stopped
from zo_offload.journal.format import StepRecord, load_journal
from zo_offload.ranks.keeper import Keeper
from zo_offload.ranks.line import Lost, dialled
from zo_offload.ranks.member import Parted

TOKEN = "of this benchmark"
SETTINGS: dict[str, Any] = {"storage": "int8+8", "block_numel": 20_000, "seed": 5}
TIERS: list[dict[str, Any]] = [
    {"offload": "none"}, {"offload": "host", "num_slots": 2}, {"offload": "host", "order": "lane"},
]  # fmt: skip
ENDLESS = 10_000_000  # steps: the trial's end is a signal
HANGS_S = 60.0
FORK = multiprocessing.get_context("fork")
EVENTS = {"start": 30, "kill": 20, "stop": 20, "leave": 10, "kill the keeper": 3, "stop the keeper": 3}
"""What happens, and how often beside the others."""


def model() -> Any:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=211, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": ids.tolist()} for ids in torch.randint(3, 211, (64, 12), generator=generator)]


METHOD = FZOO(lr=1e-3, directions=3, batch_size=4)


def digest(engine: Any) -> str:
    """Of all stored weights."""
    found = hashlib.blake2b(digest_size=8)
    for name, weight in engine.weights():
        found.update(name.encode() + weight.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# ---- the processes ---------------------------------------------------------------------------------------------------


def keep(run_dir: Path, port: int, pause: float) -> dict[str, Any]:
    pool = Pool(address=f"127.0.0.1:{port}", token=TOKEN)
    if (run_dir / "journal.zoj").exists():
        engine = Engine.resume(run_dir, model(), ranks=pool)
    else:
        engine = Engine(model(), method=METHOD, offload="host", run_dir=run_dir, ranks=pool, **SETTINGS)
    with engine:
        with contextlib.suppress(Stopped):
            engine.fit(rows(), steps=ENDLESS, micro_batches=2, callback=lambda record: time.sleep(pause))
        return {"steps": engine.log.version, "weights": digest(engine)}


def join(port: int, tier: dict[str, Any]) -> dict[str, Any]:
    while True:
        try:
            with Engine.join(f"127.0.0.1:{port}", model(), token=TOKEN, wait=120.0, **tier) as engine:
                try:
                    why = engine.fit(rows()).stopped
                except Stopped:
                    why = "sent away"
                lanes = engine.ranks._lanes  # type: ignore[attr-defined]
                return {"steps": engine.log.version, "weights": digest(engine), "why": why, "lanes": lanes}
        except Parted:
            continue


def alone(steps: int) -> dict[str, Any]:
    with Engine(model(), method=METHOD, offload="none", **SETTINGS) as engine:
        engine.fit(rows(), steps=steps, micro_batches=2)
        return {"steps": steps, "weights": digest(engine)}


def exchange(turns: int = 300) -> dict[str, Any]:
    """What the store costs a keeper that is alone, in a step of 8 lanes that take no time."""
    keeper, times = Keeper(Pool(address="127.0.0.1:0", token=TOKEN)), []
    for step in range(turns):
        begin = time.perf_counter()
        keeper.share(step, 8, lambda cells: [1.0] * len(cells))
        keeper.publish(StepRecord(step, (), 1.0, 0.0, 1e-3), "0" * 16)
        times.append(1e3 * (time.perf_counter() - begin))
    keeper.leave()
    return {"exchange_ms": [round(quantile(times, q), 2) for q in (0.2, 0.5, 0.8)]}


class Child:
    """A process, and the file that its result or error is written to."""

    def __init__(self, folder: Path, name: str, body: Callable[[], dict[str, Any]]) -> None:
        self.name, self._file = name, folder / f"{name}.json"
        self.is_stopped = False
        self.process = FORK.Process(target=_run, args=(self._file, body), daemon=True)
        self.process.start()

    def send(self, signum: signal.Signals) -> None:
        assert self.process.pid is not None
        if self.process.is_alive():
            os.kill(self.process.pid, signum)
        self.is_stopped = signum == signal.SIGSTOP

    def result(self, seconds: float) -> dict[str, Any]:
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            return {"error": f"no end within {seconds:.0f} s"}
        if not self._file.exists():
            return {"error": f"it left no word, and status {self.process.exitcode}"}
        found: dict[str, Any] = json.loads(self._file.read_text())
        return found

    def rss(self) -> float:
        try:
            return float(psutil.Process(self.process.pid).memory_info().rss) / 1e6
        except psutil.Error:
            return 0.0


def _run(file: Path, body: Callable[[], dict[str, Any]]) -> None:
    try:
        found = body()
    except BaseException as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    file.write_text(json.dumps(found))
    os._exit(0)


# ---- the trial -------------------------------------------------------------------------------------------------------


class Trial:
    """What happens to a pool in `folder`, by a seed."""

    def __init__(self, folder: Path, seed: int, members: int, pause: float) -> None:
        self.folder, self.most, self.pause = folder, members, pause
        self.run_dir, self.random = folder / "run", random.Random(seed)
        self.port = free_port()
        self.events: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.members: list[Child] = []
        self.started = 0
        self.keeper = self._start_keeper()
        self.continues: list[tuple[float, Child]] = []  # when one that is stopped goes on
        self.steps, self.last_step, self.begin = 0, time.monotonic(), time.monotonic()
        self.longest, self.keys = 0.0, [0]
        self.memory: list[float] = []  # of the keeper, MB
        self.back_s: list[float] = []  # from a keeper's death to its first step; below 0: when it died

    def _start_keeper(self) -> Child:
        return Child(self.folder, f"keeper-{self.started}-{time.monotonic_ns()}",
                     lambda: keep(self.run_dir, self.port, self.pause))  # fmt: skip

    def happen(self) -> None:
        """One event; nothing where there is nobody for it."""
        there = [member for member in self.members if not member.is_stopped]
        event = self.random.choices(list(EVENTS), list(EVENTS.values()))[0]
        if event == "start" and len(self.members) < self.most:
            tier = self.random.choice(TIERS)
            self.started += 1
            self.members.append(Child(self.folder, f"member-{self.started}", lambda: join(self.port, tier)))
        elif event in ("kill", "leave", "stop") and there:
            member = self.random.choice(there)
            self._do_to(member, event)
        elif event == "kill the keeper" and not self.keeper.is_stopped and self.steps > 0:
            self.keeper.send(signal.SIGKILL)
            self.keeper.process.join()
            self.keeper, self.back_s = self._start_keeper(), [*self.back_s, -time.monotonic()]
        elif event == "stop the keeper" and not self.keeper.is_stopped:
            self._do_to(self.keeper, "stop")
        else:
            return
        self.events[event] += 1

    def _do_to(self, child: Child, event: str) -> None:
        child.send({"kill": signal.SIGKILL, "leave": signal.SIGTERM, "stop": signal.SIGSTOP}[event])
        if event == "stop":
            self.continues.append((time.monotonic() + self.random.uniform(0.2, 8.0), child))
        elif event == "kill":
            self.members.remove(child)

    def watch(self) -> None:
        """What there is to be seen between events."""
        now = time.monotonic()
        for when, child in [due for due in self.continues if due[0] <= now]:
            child.send(signal.SIGCONT)
            self.events["continue"] += 1
            self.continues.remove((when, child))
        for member in [member for member in self.members if not member.process.is_alive()]:
            self.members.remove(member)
            found = member.result(1)
            at_once = member.process.exitcode == -signal.SIGTERM  # it was sent away before its first step
            if found.get("why") != "sent away" and not at_once:
                self.wrong.append(f"{member.name} ended by itself: {found}")
        steps = self._steps()
        if steps > self.steps:
            self.longest, self.last_step = max(self.longest, now - self.last_step), now
            self.steps = steps
            self.back_s = [s + now if s < 0 else s for s in self.back_s]
        if now - self.last_step > HANGS_S:
            self.wrong.append(f"no step within {HANGS_S:.0f} s, {now - self.begin:.0f} s after the begin")
            self.last_step = now

    def _steps(self) -> int:
        """Bytes of the journal: they grow with each step."""
        try:
            return (self.run_dir / "journal.zoj").stat().st_size
        except OSError:
            return 0

    def measure(self) -> None:
        self.memory.append(self.keeper.rss())
        if self.keeper.is_stopped:
            return
        try:
            line = dialled(f"127.0.0.1:{self.port}", 2.0)
            self.keys.append(line.size())
            line.close()
        except Lost:  # killed, or not there yet
            pass

    def end(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What the keeper and the members that are left have in the end."""
        for _, child in self.continues:
            child.send(signal.SIGCONT)
        time.sleep(5 + 10 * self.pause)  # who was stopped catches up; a keeper that was killed is there again
        self.keeper.send(signal.SIGTERM)
        return self.keeper.result(120), [{"name": member.name, **member.result(120)} for member in self.members]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--members", type=int, default=4, help="at most so many at a time, beside the keeper")
    parser.add_argument("--every", type=float, default=6.0, help="seconds between two events, on average")
    parser.add_argument("--pause", type=float, default=0.15, help="seconds between two steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="zo-pool-"))
    trial = Trial(folder, args.seed, args.members, args.pause)
    begin, next_event, next_look = time.monotonic(), time.monotonic() + 3.0, 0.0
    while (now := time.monotonic()) - begin < 60 * args.minutes:
        if now >= next_event:
            trial.happen()
            next_event = now + trial.random.expovariate(1 / args.every)
        if now >= next_look:
            trial.measure()
            next_look = now + 5.0
        trial.watch()
        time.sleep(0.05)
    keeper, members = trial.end()
    steps = len(load_journal(trial.run_dir / "journal.zoj").steps)
    one = Child(folder, "one process", lambda: alone(steps)).result(7200)
    wrong = list(trial.wrong)
    if keeper != one:
        wrong.append(f"the keeper has {keeper}, one process {one}")
    wrong += [f"at the end: {found}" for found in members if (found.get("steps"), found.get("weights")) != (
        steps, one.get("weights"))]  # fmt: skip
    third = max(1, len(trial.memory) // 3)
    memory = [x for x in trial.memory if x] or [0.0]
    back = sorted(s for s in trial.back_s if s >= 0) or [0.0]
    emit({
        "minutes": args.minutes, "seed": args.seed, "events": sum(trial.events.values()), "of": dict(trial.events),
        "members_started": trial.started, "members_at_the_end": len(members), "steps": steps,
        "bits_equal": keeper == one, "wrong": wrong[:10], "longest_without_a_step_s": round(trial.longest, 1),
        "keeper_back_s": [round(quantile(back, q), 1) for q in (0.5, 1.0)], "store_keys_most": max(trial.keys),
        "keeper_mb": [round(quantile(memory[:third], 0.5)), round(quantile(memory[-third:], 0.5))],
        **Child(folder, "exchange", exchange).result(60), "journal_bytes": trial._steps(),
        "load": round(os.getloadavg()[0], 1), "cores": len(os.sched_getaffinity(0)),
    }, about("pool"))  # fmt: skip
    shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
