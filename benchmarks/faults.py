"""Faults on purpose: kills, power cuts, flipped bits, cut files, forged files. One JSON line a kind; exit 1 on a miss.

    python -m benchmarks.faults [--kills 240] [--power-cuts 200] [--flips 10000] [--fuzz-s 120] [--seed 0] [--only ...]

kills        a real (tiny) run killed with SIGKILL at random moments, from before its first file to after its last
             step, resumed, killed again, ..., then resumed to its end: the final weights must equal those of a run
             that was never stopped, bit for bit. All tiers x all storage formats that train. Children are forked from
             this process, which has imported everything and started no thread.
power_cuts   the writes and syncs of a run are recorded; at a random one the power goes: what was synced is there, of
             every 512-byte sector written since then any of its states, of a growing file any length. The directory
             that leaves is resumed to the end: same weights.
flips        random bits of a run's journal and blocks: found, or harmless (an older sound state is taken); the steps or
             bytes that come out are those that were written.
cuts         the journal at every length, block files at every 64th: the same.
fuzz         mutated journals, block headers, safetensors files, shard indexes, run configurations, block shapes and
             metrics: a reader returns or raises an error of ours, nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import about, emit
from zo_offload import QZO, Engine, MeZO
from zo_offload.checkpoint.files import find_weights
from zo_offload.checkpoint.safetensors_io import SafetensorsFile
from zo_offload.cli import journal_tools
from zo_offload.errors import ZOError
from zo_offload.formats import FORMATS
from zo_offload.journal import run_directory
from zo_offload.journal.journal import read_journal
from zo_offload.system import diskio
from zo_offload.tiers import summed_io
from zo_offload.tiers.block_file import HEADER_BYTES
from zo_offload.tiers.disk import DiskTier, load_shapes

STEPS, VOCAB = 30, 64
IDS = torch.randint(3, VOCAB, (16, 8), generator=torch.Generator().manual_seed(1)).tolist()
ROWS = [{"input_ids": ids} for ids in IDS]


def make_base(folder: Path) -> Path:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2,
        max_position_embeddings=16, word_embed_proj_dim=16,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder / "base")
    return folder / "base"


def all_settings() -> list[dict[str, Any]]:
    """Every tier with every format (one that is never rewritten trains its scales); schedules of folds, snapshots."""
    ways = [
        dict(offload="disk", fold_every=1, snapshot_steps=3, block_numel=300),  # in pieces
        dict(offload="disk", fold_every=4, snapshot_steps=5, num_slots=2),
        dict(offload="host", fold_every=1, snapshot_steps=4, block_numel=700),
        dict(offload="none", fold_every=4, snapshot_steps=3),
    ]
    return [dict(way, storage=name) for way in ways for name in FORMATS]


def work(base: Path, run: Path, settings: dict[str, Any], result: Path, steps: int = STEPS) -> None:
    """Begin the run or go on with it, to its end; write the digest of its weights."""
    if (run / run_directory.CONFIG).exists():
        engine = Engine.resume(run)
    else:
        method = MeZO if FORMATS[settings["storage"]].trains else QZO
        engine = Engine(str(base), method=method(lr=1e-3, batch_size=4), run_dir=run, **settings)
    with engine:
        engine.fit(ROWS, steps=steps, batch_size=4)
        digest = hashlib.sha256()
        for name, tensor in engine.weights():
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
        losses = [record.loss for record in engine.journal.steps] if engine.journal is not None else []
        digest.update(json.dumps(losses).encode())
    result.write_text(digest.hexdigest())


def in_child(job: Callable[[], None], kill_after: float | None = None) -> tuple[bool, float]:
    """Run job in a forked child; kill it after so many seconds. (was it killed, seconds). RuntimeError if it fails."""
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            try:
                job()
                status = 0
            except BaseException as error:
                print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)  # a child that has ended but was not waited for is still there to be signalled
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"the child died of signal {os.WTERMSIG(status)}"
        return True, time.monotonic() - begin
    if os.WEXITSTATUS(status) != 0:
        raise RuntimeError("a run could not be resumed, see above")
    return False, time.monotonic() - begin


def kills(folder: Path, wanted: int, rng: random.Random, deaths_a_run: int = 4) -> dict[str, Any]:
    base = make_base(folder)
    choices = all_settings()
    rng.shuffle(choices)
    reference: dict[str, tuple[str, float]] = {}
    done = chains = wrong = 0
    at_step: Counter[str] = Counter()
    used: set[str] = set()
    while done < wanted:
        settings = choices[chains % len(choices)]
        chains += 1
        # what the weights depend on; on the pieces because layers are computed in them
        numbers = json.dumps([settings["storage"], settings["fold_every"], settings.get("block_numel")])
        if numbers not in reference:
            never = folder / f"never-{len(reference)}"
            _, seconds = in_child(lambda s=settings, r=never: work(base, r, s, r.with_suffix(".txt")))
            reference[numbers] = (never.with_suffix(".txt").read_text(), seconds)
            shutil.rmtree(never)
        want, seconds = reference[numbers]
        run, result = folder / f"run-{chains}", folder / f"run-{chains}.txt"
        for _ in range(deaths_a_run):
            killed, _ = in_child(lambda s=settings, r=run, o=result: work(base, r, s, o), rng.uniform(0, seconds))
            if not killed:
                break
            journal = run / run_directory.JOURNAL
            steps = len(read_journal(journal.read_bytes()).steps) if journal.exists() else -1
            done += steps >= 0  # one that fell before the run began is survived too, but proves less
            at_step["before the run began" if steps < 0 else f"after {10 * (steps // 10)}+ steps"] += 1
        if not result.exists():
            in_child(lambda s=settings, r=run, o=result: work(base, r, s, o))
        used.add(f"{settings['offload']} {settings['storage']}")
        if result.read_text() != want:
            wrong += 1
            print(f"WRONG weights: {settings} in {run}", file=sys.stderr)
        else:
            shutil.rmtree(run)
    return {"kind": "kills", "kills": done, "runs": chains, "wrong": wrong, "killed": dict(at_step),
            "settings": len(choices), "tiers_and_formats": sorted(used)}  # fmt: skip


# ---- power cuts ------------------------------------------------------------------------------------------------------


class Recorder:
    """All writes and syncs of the files under a folder, in order: (path, op, offset, bytes)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ops: list[Any] = []
        self._real = {name: getattr(diskio, name) for name in ("write_at", "append", "sync", "cut", "replace_file")}
        self._native_write = summed_io.write_summed

    def _path(self, fd: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), self.root)

    def __enter__(self) -> Recorder:
        real = self._real

        def write_at(fd: int, data: Any, offset: int) -> None:
            real["write_at"](fd, data, offset)
            self.ops.append((self._path(fd), "write", offset, bytes(data)))

        def append(fd: int, data: bytes) -> None:
            real["append"](fd, data)
            self.ops.append((self._path(fd), "append", 0, bytes(data)))

        def sync(fd: int) -> None:
            seen = len(self.ops)
            real["sync"](fd)
            # other threads may have written since: what is known to be there is what was written before the call
            self.ops.append((self._path(fd), "sync", seen, b""))

        def replace_file(path: Path, data: bytes) -> None:
            real["replace_file"](path, data)
            self.ops.append((os.path.relpath(path, self.root), "replace", 0, data))

        diskio.write_at, diskio.append, diskio.sync = write_at, append, sync  # undone in __exit__
        diskio.replace_file = replace_file
        summed_io.write_summed = summed_io.reference_write_summed  # which writes through diskio
        return self

    def __exit__(self, *exc: object) -> None:
        for name, function in self._real.items():
            setattr(diskio, name, function)
        summed_io.write_summed = self._native_write

    def begin_of_run(self) -> int:
        """The op after which the run exists: the sync of the journal's header."""
        first = next(i for i, op in enumerate(self.ops) if op[0] == run_directory.JOURNAL and op[1] == "append")
        return (
            next(i for i, op in enumerate(self.ops) if i > first and op[0] == run_directory.JOURNAL and op[1] == "sync")
            + 1
        )

    def cut_power(self, upto: int, sizes: dict[str, int], into: Path, rng: random.Random) -> None:
        """Write the directory that a power cut after `upto` ops may leave."""
        for name in {op[0] for op in self.ops[:upto]}:
            ops = [(i, op) for i, op in enumerate(self.ops[:upto]) if op[0] == name]
            synced = max((op[2] for _, op in ops if op[1] == "sync"), default=0)
            image = bytearray(sizes.get(name, 0))
            states: dict[int, list[bytes]] = {}
            length, later = len(image), bytearray()
            for i, (_, kind, offset, data) in ops:
                if kind == "replace":
                    image, length = bytearray(data), len(data)
                elif kind in ("write", "append"):
                    at = offset if kind == "write" else max(length, len(later))
                    if i < synced:
                        image[at : at + len(data)] = data
                        length = len(image)
                        later = bytearray(image)
                        continue
                    if len(later) < len(image):
                        later = bytearray(image)
                    later[at : at + len(data)] = data
                    for sector in range(at // 512, (at + len(data) - 1) // 512 + 1):
                        states.setdefault(sector, []).append(bytes(later[sector * 512 : (sector + 1) * 512]))
            grown = max(len(later), len(image))
            kept = rng.randint(len(image), grown)  # how much of a growing file's size reached the disk
            image += bytes(kept - len(image))
            for sector, found in states.items():
                choice = rng.randrange(-1, len(found))
                if choice >= 0:
                    image[sector * 512 : sector * 512 + len(found[choice])] = found[choice]
            path = into / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image[: max(kept, sizes.get(name, 0))])
        made = any(op[0].endswith("shapes.json") for op in self.ops[:upto])
        for name, size in sizes.items():
            if not (into / name).exists() and (made or rng.random() < 0.5):
                (into / name).parent.mkdir(parents=True, exist_ok=True)
                (into / name).write_bytes(bytes(size if made else rng.choice((0, size))))


def power_cuts(
    folder: Path, wanted: int, rng: random.Random, ways: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    base = make_base(folder)
    ways = ways or [way for way in all_settings() if way["storage"] in ("fp32", "bf16", "bf16+16")]
    cuts = wrong = 0
    resumed_at: Counter[int] = Counter()
    for way in ways:
        original, result = folder / "original", folder / "result.txt"
        with Recorder(original) as recorder:
            work(base, original, way, result)
        want = result.read_text()
        sizes = {
            f"{run_directory.BLOCKS}/{p.name}": p.stat().st_size
            for p in (original / run_directory.BLOCKS).glob("*.zob")
        }
        for _ in range(-(-wanted // len(ways))):
            upto = rng.randint(recorder.begin_of_run(), len(recorder.ops))
            run = folder / f"cut-{cuts}"
            run.mkdir()
            recorder.cut_power(upto, sizes, run, rng)
            resumed_at[len(read_journal((run / run_directory.JOURNAL).read_bytes()).steps)] += 1
            work(base, run, way, result)
            cuts += 1
            if result.read_text() != want:
                wrong += 1
                print(f"WRONG weights after a power cut at op {upto}: {way} in {run}", file=sys.stderr)
            else:
                shutil.rmtree(run)
        shutil.rmtree(original)
    return {"kind": "power_cuts", "cuts": cuts, "wrong": wrong, "settings": len(ways),
            "resumed_at_steps": [min(resumed_at), max(resumed_at)]}  # fmt: skip


# ---- damage ----------------------------------------------------------------------------------------------------------


def a_run(folder: Path) -> Path:
    base = make_base(folder)
    settings = dict(
        offload="disk", storage="bf16", fold_every=1, snapshot_steps=3, trainable=["layers", "embed_tokens"]
    )
    work(base, folder / "run", settings, folder / "result.txt")
    return folder / "run"


def flips(folder: Path, wanted: int, rng: random.Random, every: int = 64) -> Iterator[dict[str, Any]]:
    run = a_run(folder)
    data = (run / run_directory.JOURNAL).read_bytes()
    whole = read_journal(data)
    outcome: Counter[str] = Counter()
    for _ in range(wanted // 2):
        broken = bytearray(data)
        broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        outcome[_journal_outcome(bytes(broken), whole)] += 1
    yield {"kind": "flips", "of": "journal", "flips": wanted // 2, "bytes": len(data), **_summed(outcome)}
    outcome.clear()
    files = BlockFiles(run / run_directory.BLOCKS)
    for _ in range(wanted - wanted // 2):
        block = rng.randrange(len(files.shapes))
        good = files.good[block]
        headers = [rng.randrange(HEADER_BYTES), 4096 + rng.randrange(HEADER_BYTES)]
        at = rng.choice(headers) if rng.random() < 0.1 else rng.randrange(len(good))
        broken = bytearray(good)
        broken[at] ^= 1 << rng.randrange(8)
        outcome[files.outcome(block, bytes(broken))] += 1
    yield {"kind": "flips", "of": "blocks", "flips": wanted - wanted // 2,
           "bytes": sum(map(len, files.good)), **_summed(outcome)}  # fmt: skip
    outcome.clear()
    for length in range(0, len(data), max(1, every // 64)):
        outcome[_journal_outcome(data[:length], whole)] += 1
    yield {"kind": "cuts", "of": "journal", "cuts": outcome.total(), **_summed(outcome)}
    outcome.clear()
    for block, good in enumerate(files.good):
        for length in range(0, len(good), every):
            outcome[files.outcome(block, good[:length])] += 1
    yield {"kind": "cuts", "of": "blocks", "cuts": outcome.total(), **_summed(outcome)}


def _summed(outcome: Counter[str]) -> dict[str, Any]:
    return {"wrong": outcome["wrong"], "outcomes": dict(outcome)}


def _journal_outcome(data: bytes, whole: Any) -> str:
    try:
        found = read_journal(data)
    except ZOError:
        return "error"
    if found.header != whole.header or found.steps != whole.steps[: len(found.steps)]:
        return "wrong"
    return "harmless" if len(found.steps) == len(whole.steps) else "tail dropped"


class BlockFiles:
    """A run's block files and what each of their generations holds."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.shapes = directory, load_shapes(directory)
        self.good = [(directory / f"{shape.index:05d}.zob").read_bytes() for shape in self.shapes]
        self.states: list[dict[int, bytes]] = []
        for shape in self.shapes:
            found: dict[int, bytes] = {}
            for hidden in (None, 0, 1):  # as it is, and with one generation's header out of the way
                image = bytearray(self.good[shape.index])
                if hidden is not None:
                    image[4096 * hidden : 4096 * hidden + HEADER_BYTES] = bytes(HEADER_BYTES)
                with contextlib.suppress(ZOError):
                    version, content = self._read(shape.index, bytes(image))
                    found[version] = content
            self.states.append(found)

    def _read(self, block: int, image: bytes) -> tuple[int, bytes]:
        path = self.directory / f"{block:05d}.zob"
        path.write_bytes(image)
        try:
            tier = DiskTier.open(self.directory, self.shapes)
            try:
                out = torch.empty(self.shapes[block].nbytes, dtype=torch.uint8)
                tier.fetch(block, out)
                return tier.version(block), out.numpy().tobytes()
            finally:
                tier.close()
        finally:
            path.write_bytes(self.good[block])

    def outcome(self, block: int, image: bytes) -> str:
        try:
            version, content = self._read(block, image)
        except ZOError:
            return "error"
        if self.states[block].get(version) != content:
            return "wrong"
        return "harmless" if version == max(self.states[block]) else "older generation taken"


# ---- fuzz ------------------------------------------------------------------------------------------------------------


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few random edits: bits, bytes, numbers at their limits, pieces cut, doubled, moved."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(8)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.choice((0, 1, 127, 128, 255, 34, 44, 91, 93, 123, 125))
        elif kind == 2:
            width = rng.choice((4, 8))
            value = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, len(out)))
            out[at : at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
        elif kind == 3:
            del out[at : at + rng.randrange(64)]
        elif kind == 4:
            out[at:at] = out[at : at + rng.randrange(64)]
        elif kind == 5:
            del out[at:]
        elif kind == 6:
            tokens = (
                b"-1",
                b"1e999",
                b"null",
                b"[]",
                b"{}",
                b'"x"',
                b"99999999999999999999",
                b"\\u0000",
                b"NaN",
                b"true",
            )
            out[at : at + rng.randrange(8)] = rng.choice(tokens)
        else:
            other = rng.randrange(len(out) + 1)
            out[at:at] = out[other : other + rng.randrange(16)]
    return bytes(out)


def fuzz(folder: Path, seconds: float, rng: random.Random) -> dict[str, Any]:
    run = a_run(folder)
    base = folder / "base"
    work_file, blocks = folder / "fuzzed", run / run_directory.BLOCKS
    index = folder / "index"
    index.mkdir()
    (index / "config.json").write_text("{}")
    shapes = load_shapes(blocks)

    def safetensors(data: bytes) -> None:
        work_file.write_bytes(data)
        file = SafetensorsFile(work_file)
        for name in file.entries:
            file.read(name)
        file.metadata.get("producer")
        file.close()

    def shard_index(data: bytes) -> None:
        (index / "model.safetensors.index.json").write_bytes(data)
        assert all(path.parent == index for path in find_weights(index)), "a path outside the checkpoint"

    def block(data: bytes) -> None:
        path = blocks / "00001.zob"
        path.write_bytes(data[: shapes[1].file_bytes].ljust(shapes[1].file_bytes, b"\0"))
        tier = DiskTier.open(blocks, shapes)
        try:
            tier.fetch(1, torch.empty(shapes[1].nbytes, dtype=torch.uint8))
        finally:
            tier.close()

    def config(data: bytes) -> None:
        (folder / run_directory.CONFIG).write_bytes(data)
        Engine.resume(folder).close()

    def block_shapes(data: bytes) -> None:
        (folder / "shapes.json").write_bytes(data)
        load_shapes(folder)

    def metrics(data: bytes) -> None:
        work_file.write_bytes(data)
        run_directory.evaluations(run_directory.read_metrics(work_file))

    def journal_show(data: bytes) -> None:
        work_file.write_bytes(data)
        for _ in journal_tools.show(work_file):
            pass

    weights = {"a": "model-1.safetensors", "b": "../x", "c": "/etc/passwd", "d": "model-2.safetensors"}
    (index / "model-1.safetensors").write_bytes(b"")
    targets: dict[str, tuple[Callable[[bytes], Any], bytes]] = {
        "safetensors": (safetensors, next(base.glob("*.safetensors")).read_bytes()[:6000]),
        "safetensors whole": (safetensors, next(base.glob("*.safetensors")).read_bytes()),
        "shard index": (shard_index, json.dumps({"metadata": {}, "weight_map": weights}).encode()),
        "journal": (read_journal, (run / run_directory.JOURNAL).read_bytes()),
        "journal show": (journal_show, (run / run_directory.JOURNAL).read_bytes()[:3000]),
        "block": (block, (blocks / "00001.zob").read_bytes()),
        "run config": (config, (run / run_directory.CONFIG).read_bytes()),
        "block shapes": (block_shapes, (blocks / "shapes.json").read_bytes()),
        "metrics": (metrics, b'{"step": 3, "eval_loss": 1.0}\n{"step": 4, "loss": 2}\n'),
    }
    tried: Counter[str] = Counter()
    bad: list[str] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end and not bad:
        for name, (target, seed) in targets.items():
            data = mutate(seed, rng)
            tried[name] += 1
            try:
                target(data)
            except ZOError:
                tried[f"{name}: refused"] += 1
            except Exception as error:
                bad.append(f"{name}: {type(error).__name__}: {error}")
                (Path(tempfile.gettempdir()) / "fuzz-failure.bin").write_bytes(data)
    return {"kind": "fuzz", "seconds": seconds, "inputs": sum(n for k, n in tried.items() if ":" not in k),
            "refused": sum(n for k, n in tried.items() if ":" in k), "targets": sorted(targets), "wrong": len(bad),
            "failures": bad}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=240)
    parser.add_argument("--power-cuts", type=int, default=200)
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--fuzz-s", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=["kills", "power_cuts", "flips", "fuzz"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    import logging

    logging.getLogger("zo_offload").setLevel(logging.ERROR)  # every damaged generation is reported; here that is all
    wanted = options.only or ["kills", "power_cuts", "flips", "fuzz"]
    jobs: dict[str, Callable[[Path, random.Random], Any]] = {
        "kills": lambda folder, rng: [kills(folder, options.kills, rng)],
        "power_cuts": lambda folder, rng: [power_cuts(folder, options.power_cuts, rng)],
        "flips": lambda folder, rng: flips(folder, options.flips, rng),
        "fuzz": lambda folder, rng: [fuzz(folder, options.fuzz_s, rng)],
    }
    wrong = 0
    for name in wanted:  # kills first: nothing has started a thread that a fork would lose
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            for result in jobs[name](Path(folder), random.Random(options.seed)):
                wrong += result["wrong"]
                took = round(time.monotonic() - begin, 1)
                emit({**result, "seed": options.seed, "took_s": took}, about("faults"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
