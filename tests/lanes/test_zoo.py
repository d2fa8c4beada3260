"""The zoo of `benchmarks.zoo`: all plain modules, and a part of the transformers classes, another one each commit."""

from __future__ import annotations

import json
import subprocess

import pytest

from benchmarks.common import ROOT
from benchmarks.zoo import Result, compare, summary
from benchmarks.zoo_modules import MODULES

RESULTS = ROOT / "benchmarks" / "results" / "zoo_cpu.jsonl"
PART = 25


def _part_of_this_commit() -> list[str]:
    """The next `PART` classes of those that were tried, from one commit to the next; the first ones without git."""
    entries = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    names = [e["name"] for e in entries if e["kind"] == "model" and e["outcome"] == "equal" and e["seconds"] < 10]
    names = [name for name in names if name not in MODULES]
    count = subprocess.run(["git", "-C", str(ROOT), "rev-list", "--count", "HEAD"], capture_output=True, text=True)
    start = PART * int(count.stdout or 0) % len(names)
    return [*names, *names][start : start + PART]


def _said(result: Result) -> str:
    return f"{result.name}: {result.outcome} {result.why}"


@pytest.mark.parametrize("name", MODULES)
def test_plain_modules_are_trained_as_by_a_plain_loop_or_refused(name: str) -> None:
    result = compare(name)
    assert result.outcome in ("equal", "refused"), _said(result)


def test_transformers_models_are_trained_as_by_a_plain_loop() -> None:
    results = [compare(name) for name in _part_of_this_commit()]
    found = summary(results)
    assert found["wrong"] == 0, "\n".join(_said(r) for r in results if r.outcome == "wrong")
    assert found["equal"] >= PART - 2, "\n".join(_said(r) for r in results if r.outcome != "equal")
