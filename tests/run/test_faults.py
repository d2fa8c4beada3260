"""The fault harness (benchmarks/faults.py) in its small version: a few kills, power cuts, flips, a second of fuzzing.

The kills and the draws run in processes of their own: they fork, and a fork is only safe where no thread was ever
started.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from benchmarks import faults


def test_killed_runs_end_with_the_weights_of_one_that_never_was():
    command = [sys.executable, "-m", "benchmarks.faults", "--only", "kills", "--kills", "4", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] >= 4 and result["wrong"] == 0


def test_runs_drawn_at_random_come_to_the_bits_of_a_plain_loop():
    command = [sys.executable, "-m", "benchmarks.draws", "--count", "3", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["equal"] == 3


def test_any_power_cut_leaves_a_run_that_ends_the_same(tmp_path):
    ways = [way for way in faults.all_settings() if way["storage"] == "bf16"]
    result = faults.power_cuts(tmp_path, 12, random.Random(4), ways)
    assert result["cuts"] >= 12 and result["wrong"] == 0 and result["settings"] == len(ways)


def test_power_cut_at_every_single_write_and_sync(tmp_path):
    """The write-ahead rule at each of its ordering points: step journaled | synced | block marked | written | headed |
    sealed. Two steps on disk; from each point the run goes on to the same weights."""
    base, original, result = faults.make_base(tmp_path), tmp_path / "original", tmp_path / "result.txt"
    way = dict(offload="disk", storage="bf16", fold_every=1, snapshot_steps=1)
    with faults.Recorder(original) as recorder:
        faults.work(base, original, way, result, steps=2)
    want, rng = result.read_text(), random.Random(7)
    sizes = {f"blocks/{p.name}": p.stat().st_size for p in (original / "blocks").glob("*.zob")}
    points = range(recorder.begin_of_run(), len(recorder.ops) + 1)
    kinds = {(path.endswith(".zob"), kind) for path, kind, _, _ in recorder.ops[points.start :]}
    assert {(False, "append"), (False, "sync"), (True, "write"), (True, "sync")} <= kinds and len(points) > 25
    for upto in points:
        run = tmp_path / f"cut-{upto}"
        recorder.cut_power(upto, sizes, run, rng)
        faults.work(base, run, way, result, steps=2)
        assert result.read_text() == want, f"op {upto}: {recorder.ops[upto - 1][:3]}"


def test_flips_and_cuts_are_found_or_harmless(tmp_path):
    results = list(faults.flips(tmp_path, 300, random.Random(5), every=997))
    assert [(r["kind"], r["of"]) for r in results] == [
        ("flips", "journal"), ("flips", "blocks"), ("cuts", "journal"), ("cuts", "blocks")
    ]  # fmt: skip
    assert all(result["wrong"] == 0 for result in results)
    assert results[0]["outcomes"]["error"] > 100 and results[1]["outcomes"]["older generation taken"] > 5


def test_readers_of_files_raise_our_errors_only(tmp_path):
    result = faults.fuzz(tmp_path, 1.5, random.Random(6))
    assert result["failures"] == [] and result["inputs"] > 50
