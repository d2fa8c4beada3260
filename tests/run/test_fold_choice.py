"""fold_every="auto": how often a run on disk folds, from measured costs; decided once, and part of the run's record."""

import json
import math
import os

import pytest
import torch

from support.compare import assert_same
from support.zoo.models import ZOO
from zo_offload import FZOO, Engine, MeZO
from zo_offload.cli import main
from zo_offload.errors import ConfigError, StorageError
from zo_offload.numerics.noise import NoiseSpec
from zo_offload.run import folding
from zo_offload.run.folding import FoldCosts

pytestmark = pytest.mark.usefixtures("quiet_transformers")

IDS = torch.arange(3, 21).reshape(2, 9)
BATCH = {"input_ids": IDS, "labels": IDS}
NS = 1e-9


@pytest.fixture
def base(tmp_path):
    ZOO["llama"].build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def costing(monkeypatch, noise_s, byte_s):
    monkeypatch.setattr(folding, "measure", lambda *_: FoldCosts(noise_s, byte_s))


def never(*_):
    raise AssertionError("measured again")


@pytest.mark.parametrize(
    "method, storage, byte_s, chosen",
    [
        (MeZO(), "fp32", 2 * NS, 4),  # sqrt(2 * 8 / 1)
        (MeZO(), "fp32", 0.02 * NS, 1),
        (MeZO(), "fp32", 900 * NS, folding.MOST),
        (FZOO(directions=8), "fp32", 16 * NS, 4),  # eight noises a step
        (MeZO(), "bf16", 9 * NS, 6),  # two bytes
        (MeZO(), "bf16", 1 * NS, 4),  # would be 2, which rounds twice as often as the default
    ],
)
def test_the_least_costly_number_is_taken(base, tmp_path, monkeypatch, method, storage, byte_s, chosen):
    costing(monkeypatch, 1 * NS, byte_s)
    settings = dict(offload="disk", storage=storage, run_dir=tmp_path / "run", fold_every="auto")
    with Engine(base, method=method, **settings) as engine:
        assert engine.fold_every == chosen
        assert f"fold_every auto takes {chosen}: a weight's noise takes" in engine.decided[-1]


def test_a_run_keeps_its_number_and_has_its_numbers(base, tmp_path, monkeypatch):
    costing(monkeypatch, 1 * NS, 9 * NS)
    settings = dict(method=MeZO(lr=1e-2), offload="disk", storage="bf16")
    with Engine(base, run_dir=tmp_path / "auto", fold_every="auto", **settings) as engine:
        losses = [engine.step(BATCH).loss for _ in range(4)]
    monkeypatch.setattr(folding, "measure", never)
    with Engine.resume(tmp_path / "auto") as engine:
        assert (engine.fold_every, engine.config.fold_every) == (6, 6)
        losses += [engine.step(BATCH).loss for _ in range(4)]
    with Engine(base, run_dir=tmp_path / "given", fold_every=6, **settings) as engine:
        assert_same(losses, [engine.step(BATCH).loss for _ in range(8)])


def test_where_nothing_depends_on_it_it_is_measured_anew(base, tmp_path, monkeypatch):
    costing(monkeypatch, 1 * NS, 2 * NS)
    with Engine(base, offload="disk", storage="fp32", run_dir=tmp_path / "run", fold_every="auto") as engine:
        engine.step(BATCH)
    costing(monkeypatch, 1 * NS, 1 / 2 * NS)
    with Engine.resume(tmp_path / "run") as engine:
        assert engine.fold_every == 2
        engine.step(BATCH)


@pytest.mark.parametrize("free, through", [(1 << 40, False), (1 << 10, True)])
def test_what_the_page_cache_does_not_hold_is_measured_to_the_medium(base, tmp_path, monkeypatch, free, through):
    asked = []
    monkeypatch.setattr(folding, "available_bytes", lambda: free)
    monkeypatch.setattr(folding, "measure", lambda *given: asked.append(given[-1]) or FoldCosts(1 * NS, 2 * NS))
    Engine(base, offload="disk", storage="fp32", run_dir=tmp_path / "run", fold_every="auto").close()
    assert asked == [through]


@pytest.mark.parametrize("storage, usual", [("fp32", 1), ("bf16", 4)])
def test_what_writes_no_files_keeps_the_default(base, monkeypatch, storage, usual):
    monkeypatch.setattr(folding, "measure", never)
    with Engine(base, offload="none", storage=storage, fold_every="auto") as engine:
        assert (
            engine.fold_every == usual
            and f"auto takes {usual}: only a CPU that writes files is measured" in engine.decided[-1]
        )


def test_fit_prints_what_was_taken(base, tmp_path, monkeypatch, capsys):
    costing(monkeypatch, 1 * NS, 2 * NS)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input_ids": [3, 4, 5], "labels": [3, 4, 5]}) + "\n")
    words = ["--data", str(tmp_path / "rows.jsonl"), "--steps", "1", "--offload", "disk", "--storage", "fp32"]
    run = tmp_path / "run"
    assert main(["fit", str(base), *words, "--fold-every", "auto", "--run-dir", str(run), "--quiet"]) == 0
    assert "fold_every auto takes 4: a weight's noise takes 1.00 ns a step here" in capsys.readouterr().out


def test_a_plan_measures_nothing_and_says_so(base, monkeypatch, capsys):
    monkeypatch.setattr(folding, "measure", never)
    assert main(["plan", str(base), "--offload", "disk", "--storage", "bf16", "--fold-every", "auto"]) == 0
    out = capsys.readouterr().out
    assert "fold_every auto is measured when a run" in out and "folded every 4 steps" in out
    assert "noise: 3.5 numbers a trained weight and step (gaussian, 10 rounds); --rounds 7" in out


@pytest.mark.parametrize("wrong", ["often", "", 0, True, 1.5])
def test_other_values_are_refused(base, wrong):
    with pytest.raises(ConfigError, match=r"fold_every=.*expected"):
        Engine(base, fold_every=wrong)


@pytest.mark.parametrize("through", [False, True])
def test_costs_are_measured(tmp_path, monkeypatch, through):
    synced = []
    monkeypatch.setattr(folding.diskio, "sync", synced.append)
    costs = folding.measure(NoiseSpec(), tmp_path / "not yet" / "run", None, through)
    assert 0 < costs.noise_s < 1e-6 and 0 < costs.byte_s < 1e-6 and math.isfinite(costs.noise_s + costs.byte_s)
    assert bool(synced) == through and not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(folding.diskio, "write_at", full)
    with pytest.raises(StorageError, match=r"No space left.*Nothing was trained yet"):
        folding.measure(NoiseSpec(), tmp_path, None, True)
