"""`make gpu-check` without a GPU: a dry run goes through, a part that fails does not stop the others, ZO2's lines are
read as its own script reads them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Part

ROOT = Path(__file__).resolve().parent.parent


def check(tmp_path, *options):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry", "--out", str(tmp_path), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_a_dry_run_measures_nothing_and_says_so(tmp_path):
    done = check(tmp_path, "--only", "opt-1.3b")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert {row["way"] for row in rows} == {"ours host", "ours none", "naive MeZO, resident"}
    assert all(row["measured"] is False for row in rows)
    page = (tmp_path / "gpu_check.md").read_text()
    assert "no number here is a measurement" in page and "ours host" in page


def test_a_part_that_fails_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    say = 'print(\'{"part": "link", "fetch_gbs": 1.0}\')'
    made = [
        Part("bad", [sys.executable, "-c", "raise SystemExit(3)"], 20),
        Part("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 1),
        Part("missing", [str(tmp_path / "no-such-program")], 5),
        Part("good", [sys.executable, "-c", say], 20),
    ]
    monkeypatch.setattr(gpu_check, "parts", lambda options: made)
    assert gpu_check.main(["--dry", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "bad (exit status 3)" in said and "slow (stopped after 1 s)" in said and "missing (could not start" in said
    assert json.loads((tmp_path / "gpu_check.jsonl").read_text())["fetch_gbs"] == 1.0


def test_what_zo2_prints_is_read():
    part = Part("zo2", [], 1, label={"model": "opt-1.3b", "tokens": 2048}, status="ok")
    text = "".join(f"Time cost after iteration {i}: 100.00 ms, {r:.2f} tok/s\n" for i, r in enumerate((1, 1, 30, 50)))
    (row,) = gpu_check.read_speed(text, part)
    assert row["tokens_per_s"] == 40.0 and row["model"] == "opt-1.3b"
    text = "Peak GPU Memory after iteration 1: 100.00 MB\nPeak CPU Memory after iteration 1: 7.00 MB\n"
    (row,) = gpu_check.read_memory(text + text.replace("100", "300"), part)
    assert row["peak_driver_bytes"] == 300 << 20
    list(gpu_check.read_speed("nothing", part))
    assert part.status == "printed no throughput"


def test_zo2_runs_from_its_own_directory_unmodified(tmp_path):
    (tmp_path / gpu_check.ZO2_TEST).mkdir(parents=True)
    (tmp_path / gpu_check.ZO2_TEST / "test_speed.py").touch()
    options = type("Options", (), {"zo2": tmp_path, "zo2_packages": None, "dtype": "fp16"})()
    made = list(gpu_check.zo2_parts(options))
    assert [p.name for p in made][:2] == ["zo2 speed opt_1_3b", "zo2 memory opt_1_3b"]
    assert all(p.folder == tmp_path and p.environment["PYTHONPATH"] == str(tmp_path) for p in made)
    options.zo2 = tmp_path / "elsewhere"
    with pytest.raises(SystemExit, match="root of a ZO2 checkout"):
        list(gpu_check.zo2_parts(options))
