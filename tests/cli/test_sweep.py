"""`zo-offload sweep`: each run is the run that `fit` makes; what ended is not run again, what was stopped goes on."""

from __future__ import annotations

import json

import pytest

from support.training import batches
from support.zoo.small import tiny_opt
from zo_offload.cli import main
from zo_offload.cli.history import read_history
from zo_offload.cli.sweep import Reached, lines, table

STEPS = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "opt"
    tiny_opt().save_pretrained(path)
    rows = [{"input_ids": row} for batch in batches(3) for row in batch["input_ids"].tolist()]
    (path.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def call(*args):
    return main([str(arg) for arg in args])


def data(base):
    return ("--data", base.parent / "rows.jsonl", "--eval-data", base.parent / "rows.jsonl", "--eval-rows", 4,
            "--steps", STEPS, "--batch-size", 4, "--quiet")  # fmt: skip


@pytest.fixture(scope="module")
def swept(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept") / "s"
    grid = ("--methods", "mezo", "fzoo", "--directions", 2, "--times", 1, 1e12, "--seeds", 3, "--run-dir", folder)
    assert call("sweep", base, *data(base), *grid) == 0
    return folder, grid


def test_each_run_is_the_one_that_fit_makes(base, swept, tmp_path):
    folder, _ = swept
    record = json.loads((folder / "sweep.json").read_text())
    found = {run["run"]: run for run in record["runs"]}
    assert list(found) == ["mezo-lr1e-06-seed3", "mezo-lr1e+06-seed3", "fzoo-lr5e-05-seed3", "fzoo-lr5e+07-seed3"]
    more = ("--method", "fzoo", "--directions", 2, "--seed", 3, "--run-dir", tmp_path / "a")
    assert call("fit", base, *data(base), *more) == 0
    want, run = read_history(tmp_path / "a"), found["fzoo-lr5e-05-seed3"]
    got = read_history(folder / run["run"])
    assert [p.loss for p in got.points] == [p.loss for p in want.points] and got.evals == want.evals
    assert run["values"] == want.evals[-1] and run["steps"] == STEPS
    # a run's own file is varied: its seed is the one of all runs, its rate is what --times are factors of
    varied = ("--config", tmp_path / "a" / "config.json", "--times", 1, "--run-dir", tmp_path / "varied", "--quiet")
    assert call("sweep", *varied) == 0
    again = read_history(tmp_path / "varied" / "fzoo-lr5e-05-seed3")
    assert [p.loss for p in again.points] == [p.loss for p in want.points]
    best = record["table"][0]
    assert (best["method"], best["lr"]) != ("mezo", 1e6) and best["failed"] == 0
    assert {run["what"] == "" for run in record["runs"]} == {True, False}, "a rate that diverges is told as such"


def test_the_same_command_goes_on_where_it_was(base, swept, capsys):
    folder, grid = swept
    record = json.loads((folder / "sweep.json").read_text())
    journals = {path: path.read_bytes() for path in folder.glob("*/journal.zoj")}
    last = record["runs"].pop()
    (folder / "sweep.json").write_text(json.dumps(record))  # as if it was stopped within its last run
    assert call("sweep", base, *data(base), *grid) == 0
    out = capsys.readouterr().out
    assert out.count("(from before)") == 3
    assert json.loads((folder / "sweep.json").read_text())["runs"][-1]["run"] == last["run"]
    assert all(path.read_bytes() == held for path, held in journals.items() if last["run"] not in str(path))


@pytest.mark.parametrize(
    "more, said",
    [
        (("--batch-size", 2), "holds a sweep with batch_size=4, but 2 is given now"),
        (("--seeds", 1, 1), "twice"),
        (("--rates", 1e-3), "give one of them"),
        (("--window", 3), "is an option of none of mezo, fzoo"),
        (("--eval-data", ""), "exist"),
    ],
)
def test_what_cannot_be_compared_is_refused(base, swept, capsys, more, said):
    folder, grid = swept
    before = (folder / "sweep.json").read_bytes()
    assert call("sweep", base, *data(base), *grid, *more) == 2
    assert said in capsys.readouterr().err or said == "exist"
    assert (folder / "sweep.json").read_bytes() == before


def run(lr, seed, **values):
    return Reached(f"{lr}-{seed}", "mezo", lr, seed, 5, values)


def test_the_mean_over_seeds_decides_and_the_worst_is_told():
    runs = [run(1.0, 0, loss=0.5, accuracy=0.9), run(1.0, 1, loss=0.5, accuracy=0.5),
            run(2.0, 0, loss=0.9, accuracy=0.8), run(2.0, 1, loss=0.9, accuracy=0.7),
            run(3.0, 0, loss=0.1, accuracy=1.0), run(3.0, 1)]  # fmt: skip
    name, rows = table(runs)
    assert name == "accuracy" and [row.lr for row in rows] == [2.0, 1.0, 3.0], "one that failed is no candidate"
    assert (rows[0].mean, rows[0].worst, rows[0].best) == (0.75, 0.7, 0.8)
    assert rows[0].spread == pytest.approx(0.0707, abs=1e-4)
    name, rows = table(runs, "loss")
    assert name == "loss" and rows[0].lr == 1.0 and rows[0].worst == 0.5
    *_, last = lines(name, rows)
    assert "--lr 1." in last and "report results on others" in last
