"""`zo-offload rate`: the same start, batches and noise at each rate; one that diverges is named and not chosen."""

from __future__ import annotations

import json

import pytest

from support.training import batches
from support.zoo.small import tiny_opt
from zo_offload import Engine, MeZO
from zo_offload.cli import main
from zo_offload.cli.rates import Trial, best, try_rates


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "opt"
    tiny_opt().save_pretrained(path)
    rows = [{"input_ids": row} for batch in batches(6) for row in batch["input_ids"].tolist()]
    (path.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_trial_is_a_run_at_that_rate_without_the_schedule():
    method = MeZO(lr=1e-3, schedule="linear", warmup_steps=2, batch_size=4)
    fit = {"train_data": batches(6)}
    found = list(try_rates(lambda m: Engine(tiny_opt(), method=m), method, fit, [1e-3, 1e-2, 1e9], 6))
    for trial in found[:2]:
        with Engine(tiny_opt(), method=MeZO(lr=trial.lr, batch_size=4)) as engine:
            losses = engine.fit(batches(6), steps=6).losses
        assert (trial.first, trial.last, trial.what) == (sum(losses[:3]) / 3, sum(losses[3:]) / 3, "")
    assert found[2].last != found[2].last and "losses" in found[2].what
    assert best(found) is min(found[:2], key=lambda trial: trial.last)
    assert best([Trial(1.0, 1.0, float("nan"), "no")]) is None


def test_the_command_line_tries_rates_and_names_the_best(base, tmp_path, capsys):
    data = base.parent / "rows.jsonl"
    args = ["rate", base, "--data", data, "--batch-size", 4, "--steps", 4, "--method", "sign", "--offload", "disk",
            "--run-dir", tmp_path / "trials", "--rates", "1e-4", "1e9"]  # fmt: skip
    assert main([str(arg) for arg in args]) == 0
    *trials, last = capsys.readouterr().out.splitlines()
    assert len(trials) == 2 and last.startswith("best of these in 4 steps: --lr 0.0001.")


def test_too_few_steps_are_refused(base, capsys):
    assert main(["rate", str(base), "--data", str(base.parent / "rows.jsonl"), "--steps", "2"]) == 2
    assert "at least 4" in capsys.readouterr().err


def test_a_runs_snapshots_are_left_out_where_trials_have_no_directory(base):
    args = ["rate", base, "--data", base.parent / "rows.jsonl", "--batch-size", 4, "--steps", 4, "--rates", "1e-4"]
    assert main([str(arg) for arg in [*args, "--snapshot-steps", 2]]) == 0
