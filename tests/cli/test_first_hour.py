"""examples/first_hour.sh with a tiny model: every command of a first hour, as processes, in the order of a user."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from support.texts import write_text_model

ROOT = Path(__file__).resolve().parents[2]


def test_a_first_hour_from_the_package_to_the_page(tmp_path):
    write_text_model(tmp_path / "base")
    for name, count in (("train", 24), ("dev", 8)):
        rows = [{"text": f"film {i}", "label": i % 2} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(
        ["bash", ROOT / "examples/first_hour.sh", "out", "base", "train.jsonl", "dev.jsonl", "--template",
         "{text} It was", "--verbalizers", " bad", " good"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env={**os.environ, "ZO": f"{sys.executable} -m zo_offload", "PYTHON": sys.executable, "STEPS": "200",
             "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "exit code 143" in said, "it was stopped, and went on"
    steps = [int(step) for step in re.findall(r"step (\d+)/200,", said)]
    assert max(steps) == 200
    before, after = (json.loads(line)["loss"] for line in re.findall(r'^{"loss".*}$', said, re.MULTILINE))
    assert after < before
    assert "<svg" in (tmp_path / "out/report.html").read_text()
    assert (tmp_path / "out/adapter/adapter_model.safetensors").exists()


def test_it_ends_at_the_first_command_that_fails(tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "examples/first_hour.sh", "out", "base", "train.jsonl", "dev.jsonl"], cwd=tmp_path,
        capture_output=True, text=True, timeout=60, env={**os.environ, "ZO": "false", "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 1 and "What a step will cost" not in done.stdout
