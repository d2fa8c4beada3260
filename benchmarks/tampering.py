"""Runs that are gone on with after something of theirs was changed. One JSON line a kind; exit 1 on anything silent.

    python -m benchmarks.tampering [--trials 100] [--seed 0] [--only data config blocks journal lock]

A small run on disk stops after half of its steps, is copied, one thing of it is changed, and it is resumed to its end.
Each trial must be refused with an error of ours, or end with the weights of the run that nobody touched, bit for bit;
what goes on to other weights is silent.

data       a file of 10,000 rows: one edited, two swapped, one added, removed, renamed; or only written otherwise
config     the base's config.json: a number, a name, a part of it changed; or only where it comes from
blocks     block files of this run swapped, cut, as they were earlier; of a run on another base, with another seed, of
           another storage; of a run that took the same steps
journal    of another run, of an earlier moment, missing, not a journal
lock       the lock file removed while an engine holds the run: by this process and by another one
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import about, emit
from zo_offload import Engine, MeZO
from zo_offload.errors import ZOError
from zo_offload.journal import run_directory

HALF, WHOLE, ROWS = 4, 8, 10_000
VOCAB = 64


def make_base(folder: Path, seed: int = 0) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_rows(count: int) -> list[dict[str, Any]]:
    return [{"input_ids": [3 + (7 * r + 5 * c + r * c) % (VOCAB - 4) for c in range(6)], "id": r} for r in range(count)]


def write_rows(path: Path, rows: list[dict[str, Any]], **form: Any) -> None:
    path.write_text("".join(json.dumps(row, **form) + "\n" for row in rows))


def begin(base: Path, run: Path, data: Path, steps: int, **settings: Any) -> None:
    chosen = dict(offload="disk", storage="bf16", fold_every=1, trainable=["layers.0", "layers.1"], snapshot_steps=2)
    with Engine(str(base), method=MeZO(lr=1e-3, batch_size=4), run_dir=run, **{**chosen, **settings}) as engine:
        engine.fit(data, steps=steps)


def finish(run: Path) -> str:
    """Go on to the end; a digest of the weights and losses."""
    with Engine.resume(run) as engine:
        engine.fit(steps=WHOLE)
        digest = hashlib.sha256()
        for name, tensor in engine.weights():
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
        assert engine.journal is not None
        digest.update(json.dumps([record.loss for record in engine.journal.steps]).encode())
    return digest.hexdigest()


class Scene:
    """A run that stopped half way, everything that it stands on, and others to take pieces from."""

    def __init__(self, folder: Path, rows: int = ROWS) -> None:
        self.folder, self.rows = folder, make_rows(rows)
        self.data = folder / "data.jsonl"
        write_rows(self.data, self.rows)
        self.base, other = make_base(folder / "base"), make_base(folder / "other", 1)
        self.config = (self.base / "config.json").read_text()
        begin(self.base, folder / "half", self.data, HALF)
        begin(self.base, folder / "earlier", self.data, HALF - 2)
        begin(self.base, folder / "twin", self.data, HALF)
        begin(other, folder / "on another base", self.data, HALF)
        begin(self.base, folder / "of another seed", self.data, HALF, seed=1)
        begin(self.base, folder / "of another storage", self.data, HALF, storage="fp16")
        whole = self.copy()
        self.want = finish(whole)
        shutil.rmtree(whole)

    def copy(self) -> Path:
        return Path(shutil.copytree(self.folder / "half", self.folder / "run"))

    def put_back(self) -> None:
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        write_rows(self.data, self.rows)
        (self.base / "config.json").write_text(self.config)

    def outcome(self, change: Callable[[Path], object]) -> str:
        run = self.copy()
        try:
            change(run)
            return "equal" if finish(run) == self.want else "SILENT"
        except ZOError as error:
            return f"refused: {type(error).__name__}"
        finally:
            self.put_back()


Changes = dict[str, Callable[[Path], object]]


def data(scene: Scene, rng: random.Random) -> Changes:
    rows, at, other = list(scene.rows), rng.randrange(len(scene.rows)), rng.randrange(len(scene.rows) - 1)
    other += other >= at
    ids = list(rows[at]["input_ids"])
    ids[rng.randrange(len(ids))] = rng.choice((1, 2))

    def put(changed: list[dict[str, Any]], **form: Any) -> Callable[[Path], None]:
        return lambda run: write_rows(scene.data, changed, **form)

    swapped = list(rows)
    swapped[at], swapped[other] = rows[other], rows[at]
    return {
        "row edited": put([*rows[:at], {**rows[at], "input_ids": ids}, *rows[at + 1 :]]),
        "rows swapped": put(swapped),
        "row added": put([*rows[:at], rows[other], *rows[at:]]),
        "row removed": put([*rows[:at], *rows[at + 1 :]]),
        "column renamed": put([*rows[:at], {"input_ids": rows[at]["input_ids"], "no": at}, *rows[at + 1 :]]),
        "written otherwise": put([dict(reversed(row.items())) for row in rows], separators=(", ", " :  ")),
    }


def config(scene: Scene, rng: random.Random) -> Changes:
    known = json.loads(scene.config)
    number = rng.choice(["rms_norm_eps", "initializer_range", "max_position_embeddings", "bos_token_id"])

    def put(**changed: Any) -> Callable[[Path], object]:
        return lambda run: (scene.base / "config.json").write_text(json.dumps({**known, **changed}))

    return {
        f"{number} changed": put(**{number: (known.get(number) or 1) * 2}),
        "activation changed": put(hidden_act=rng.choice(["relu", "gelu", "gelu_new", "tanh"])),
        "heads cut otherwise": put(num_attention_heads=4, num_key_value_heads=2, head_dim=4),
        "rope changed": put(rope_parameters={"rope_theta": float(rng.randrange(2, 9999)), "rope_type": "default"}),
        "key added": put(attention_bias=False, extra=rng.random()),
        "key removed": lambda run: (scene.base / "config.json").write_text(
            json.dumps({k: v for k, v in known.items() if k != "rms_norm_eps"})
        ),
        "written elsewhere": put(_name_or_path="elsewhere", transformers_version="9.9.9"),
    }  # fmt: skip


OTHERS = {
    "on another base": "on another base", "of another seed": "of another seed",
    "of another storage": "of another storage", "of earlier": "earlier", "of a twin": "twin",
}  # fmt: skip
"""Runs whose files are put in this one's place: what is said of them, and their folder."""


def blocks(scene: Scene, rng: random.Random) -> Changes:
    names = sorted(path.name for path in (scene.folder / "half" / "blocks").glob("*.zob"))
    some = rng.sample(names, rng.randrange(1, len(names) + 1))

    def taken(source: str) -> Callable[[Path], None]:
        def change(run: Path) -> None:
            for name in some:
                shutil.copy(scene.folder / source / "blocks" / name, run / "blocks" / name)

        return change

    def swapped(run: Path) -> None:
        one, two = rng.sample(names, 2)
        (run / "blocks" / one).rename(run / "kept")
        (run / "blocks" / two).rename(run / "blocks" / one)
        (run / "kept").rename(run / "blocks" / two)

    def cut(run: Path) -> None:
        path = run / "blocks" / rng.choice(names)
        os.truncate(path, rng.randrange(path.stat().st_size))

    return {
        **{name: taken(source) for name, source in OTHERS.items()},
        "swapped": swapped,
        "cut": cut,
        "removed": lambda run: shutil.rmtree(run / "blocks"),
    }


def journal(scene: Scene, rng: random.Random) -> Changes:
    def taken(source: str) -> Callable[[Path], object]:
        return lambda run: shutil.copy(scene.folder / source / run_directory.JOURNAL, run / run_directory.JOURNAL)

    return {
        **{name: taken(source) for name, source in OTHERS.items()},
        "missing": lambda run: (run / run_directory.JOURNAL).unlink(),
        "not a journal": lambda run: (run / run_directory.JOURNAL).write_bytes(rng.randbytes(300)) and None,
    }


KINDS: dict[str, Callable[[Scene, random.Random], Changes]] = {
    "data": data, "config": config, "blocks": blocks, "journal": journal
}  # fmt: skip


def tampered(scene: Scene, kind: str, trials: int, rng: random.Random) -> dict[str, Any]:
    found: dict[str, Counter[str]] = {}
    done = 0
    while done < trials:
        for name, change in KINDS[kind](scene, rng).items():
            found.setdefault(name, Counter())[scene.outcome(change)] += 1
            done += 1
    silent = sum(outcomes["SILENT"] for outcomes in found.values())
    return {"kind": kind, "trials": done, "silent": silent, "outcomes": {k: dict(v) for k, v in found.items()}}


def lock(scene: Scene, trials: int, rng: random.Random) -> dict[str, Any]:
    """A second engine, of this process and of another, on a run whose lock file is gone; the first goes on."""
    outcomes: Counter[str] = Counter()
    for trial in range(trials):
        run = scene.copy()
        second = [in_child, finish][trial % 2]
        with Engine.resume(run) as engine:
            engine.fit(steps=HALF + rng.randrange(1, WHOLE - HALF))
            (run / "lock").unlink()
            try:
                second(run)
                outcomes["SILENT"] += 1
            except ZOError as error:
                outcomes[f"refused: {type(error).__name__}"] += 1
            engine.fit(steps=WHOLE)
        outcomes["the first goes on, equal" if finish(run) == scene.want else "SILENT"] += 1
        scene.put_back()
    return {"kind": "lock", "trials": trials, "silent": outcomes["SILENT"], "outcomes": dict(outcomes)}


def in_child(run: Path) -> None:
    """`finish` in a process of its own. Raises ZOError if that did."""
    import subprocess

    command = [sys.executable, "-c", "import sys; from zo_offload.cli import main; sys.exit(main(sys.argv[1:]))",
               "fit", str(run), "--resume", "--steps", str(WHOLE), "--quiet"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode == 2:
        raise ZOError(done.stderr)
    assert done.returncode == 0, done.stderr


def results(folder: Path, trials: int, seed: int, only: list[str], rows: int = ROWS) -> Iterator[dict[str, Any]]:
    scene = Scene(folder, rows)
    for kind in only:
        begin_s, rng = time.monotonic(), random.Random(f"{seed} {kind}")
        found = lock(scene, max(2, trials // 10), rng) if kind == "lock" else tampered(scene, kind, trials, rng)
        yield {**found, "seed": seed, "took_s": round(time.monotonic() - begin_s, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="of each kind, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=[*KINDS, "lock"], default=[*KINDS, "lock"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    import logging

    logging.getLogger("zo_offload").setLevel(logging.ERROR)
    silent = 0
    with tempfile.TemporaryDirectory() as folder:
        for result in results(Path(folder), options.trials, options.seed, options.only):
            silent += result["silent"]
            emit(result, about("tampering"))
    return 1 if silent else 0


if __name__ == "__main__":
    sys.exit(main())
