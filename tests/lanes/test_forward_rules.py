"""The mode that modules run in, the random numbers that forwards get, and what a run owes to neither."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from support.zoo.models import ZOO
from zo_offload import FZOO, ConfigError, Engine, JournalError, MeZO
from zo_offload.replay import replayed

METHOD = MeZO(lr=1e-2, eps=1e-2, batch_size=8)


class Net(nn.Module):
    """Dropout, batch norm and Python's and numpy's generators; in training mode, as constructors leave it."""

    def __init__(self, dropout: float = 0.5, random_numbers: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(dropout)
        self.second, self.random_numbers = nn.Linear(6, 1), random_numbers

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        h = self.drop(self.norm(self.first(x)))
        if self.random_numbers:
            h = h * random.random() + float(np.random.rand()) + torch.rand(())
        return type("Out", (), {"loss": (self.second(h)[:, 0] - labels).square().mean()})()


def rows(n: int = 4) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(8, 6, generator=g), "labels": torch.randn(8, generator=g)} for _ in range(n)]


def statistics(model: Any) -> list[Any]:
    return [model.norm.running_mean.tolist(), model.norm.running_var.tolist(), int(model.norm.num_batches_tracked)]


def disturb(seed: int) -> None:
    """Another process has other generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def ambient() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
    ]


# ---- modes -----------------------------------------------------------------------------------------------------------


def test_a_module_fresh_from_its_constructor_evaluates_while_the_engine_runs_it() -> None:
    model = Net()
    assert model.training
    model.drop.eval()  # one of its own
    before, modes = statistics(model), [m.training for m in model.modules()]
    plain = copy.deepcopy(model).eval()
    with torch.no_grad():
        want = float(plain(**rows()[0]).loss)
    with Engine(model, method=METHOD, example=rows()[0]) as engine:
        assert [engine.evaluate(rows()[:1])["loss"] for _ in range(3)] == [want] * 3
        assert float(engine.run(rows()[0]).loss) == want
        assert engine.step(rows()[0]).loss == pytest.approx(want, rel=1e-2)
        assert [m.training for m in model.modules()] == modes
        model = engine.restore()  # type: ignore[assignment]
    assert [m.training for m in model.modules()] == modes and statistics(model) == before


def test_modules_train_or_stay_as_they_are_when_asked_to() -> None:
    seen: dict[str, list[bool]] = {}

    def objective(model: Any, batch: Any) -> Any:
        seen[mode] = [model.training, model.norm.training, model.drop.training]
        return model(**batch).loss

    for mode in ("eval", "train", "as_is"):
        model = Net()
        model.norm.eval()
        before = statistics(model)
        with Engine(model, method=METHOD, objective=objective, mode=mode) as engine:
            engine.step(rows()[0], micro_batches=2)
            assert [model.training, model.norm.training, model.drop.training] == [True, False, True]
            assert statistics(engine.restore()) == before
    assert seen == {"eval": [False] * 3, "train": [True] * 3, "as_is": [True, False, True]}
    with pytest.raises(ConfigError, match="mode='evaluation': choose one of eval, train, as_is"):
        Engine(Net(), mode="evaluation")


@pytest.mark.parametrize("mode", ["train", "as_is"])
@pytest.mark.parametrize("settings", [
    dict(offload="none"), dict(offload="host", order="block"), dict(offload="host", order="lane"), dict(offload="disk"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("method", [METHOD, FZOO(lr=1e-3, directions=3, batch_size=8)], ids=["mezo", "fzoo"])
def test_training_mode_is_the_same_run_in_every_tier_and_order(
    tmp_path: Path, method: Any, settings: dict[str, Any], mode: str
) -> None:
    def losses(**settings: Any) -> list[float]:
        model = Net(random_numbers=True)
        before = statistics(model)
        disturb(hash(str(settings)) % 1000)
        with Engine(model, method=method, mode=mode, **settings) as engine:
            found = [engine.step(batch, micro_batches=2).loss for batch in rows()]
            assert statistics(engine.restore()) == before
        return found

    more = {"run_dir": tmp_path / "run"} if settings["offload"] == "disk" else {}
    want = losses()
    assert losses(**settings, **more) == want and len(set(want)) == len(want)


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train", "as_is"])
@pytest.mark.parametrize("offload", ["host", "disk"])
def test_a_run_with_random_numbers_resumes_and_replays_bit_for_bit(tmp_path: Path, offload: str, mode: str) -> None:
    def fit(engine: Engine, steps: int) -> list[float]:
        return engine.fit(rows(), steps=steps, eval_data=rows(2), eval_every=1).losses

    settings: dict[str, Any] = dict(method=METHOD, offload=offload, mode=mode)
    disturb(1)
    with Engine(Net(random_numbers=True), run_dir=tmp_path / "a", **settings) as engine:
        whole = fit(engine, 6)
        evals, weights, buffers = engine.evals, dict(engine.weights()), statistics(engine.model)
    disturb(2)
    with Engine(Net(random_numbers=True), run_dir=tmp_path / "b", **settings) as engine:
        first = fit(engine, 3)
    disturb(3)
    with Engine.resume(tmp_path / "b", Net(random_numbers=True)) as engine:
        assert engine.config.mode == mode
        engine.evaluate(rows(1))
        assert first + fit(engine, 6) == whole and engine.evals == evals
        assert all(torch.equal(value, weights[name]) for name, value in engine.weights())
        assert statistics(engine.model) == buffers == statistics(Net())
    with replayed(Net(random_numbers=True), tmp_path / "b") as engine:
        loss = engine.evaluate(rows(2))["loss"]
        assert loss == evals[-1]["loss"]


def test_a_run_cannot_change_its_mode(tmp_path: Path) -> None:
    for name, mode in (("eval", "eval"), ("as_is", "as_is")):
        with Engine(Net(), method=METHOD, run_dir=tmp_path / name, offload="host", mode=mode) as engine:
            engine.step(rows()[0])
    with pytest.raises(JournalError, match="mode: the journal has 'eval', this engine 'train'"):
        Engine.resume(tmp_path / "eval", Net(), mode="train").evaluate(rows(1))
    with pytest.raises(JournalError, match="mode: the journal has 'as_is, 5 modules in training mode .*'as_is, 0"):
        Engine.resume(tmp_path / "as_is", Net().eval()).evaluate(rows(1))


def test_a_run_of_before_there_was_a_mode_goes_on_as_it_was(tmp_path: Path) -> None:
    """A module was run in the modes it was given in; a checkpoint's modules evaluated."""

    def forget_mode(run: Path) -> None:
        config = json.loads((run / "config.json").read_text())
        del config["settings"]["mode"]
        (run / "config.json").write_text(json.dumps(config))

    with Engine(Net(), method=METHOD, run_dir=tmp_path / "a", offload="host", mode="as_is") as engine:
        engine.step(rows()[0])
    forget_mode(tmp_path / "a")
    with Engine.resume(tmp_path / "a", Net()) as engine:
        assert engine.config.mode == "as_is"
        engine.step(rows()[1])
    ZOO["llama"].build().save_pretrained(tmp_path / "base")
    batch = {"input_ids": torch.arange(3, 12)[None], "labels": torch.arange(3, 12)[None]}
    with Engine(tmp_path / "base", method=METHOD, run_dir=tmp_path / "b", offload="host") as engine:
        engine.step(batch)
    forget_mode(tmp_path / "b")
    with Engine.resume(tmp_path / "b") as engine:
        assert engine.config.mode == "eval"
        engine.step(batch)


# ---- the caller's generators -----------------------------------------------------------------------------------------


def collated(rows: list[Any]) -> dict[str, Tensor]:
    return {"x": torch.stack([x for x, _ in rows]), "labels": torch.stack([y for _, y in rows])}


class Jittered(Dataset[Any]):
    """Rows that are drawn when they are asked for."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.rand(6) + float(np.random.rand()), torch.tensor(random.random())


class JitteredRows(Jittered):
    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return {"x": x, "labels": y}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("loaded", ["rows", "loader", "loader with workers"])
def test_no_call_for_training_or_evaluating_touches_the_callers_generators(mode: str, loaded: str) -> None:
    def data() -> Any:
        if loaded == "rows":
            return rows()
        fixed = [(x, y) for row in rows() for x, y in zip(row["x"], row["labels"], strict=True)]
        workers = 2 if loaded == "loader with workers" else 0
        return DataLoader(fixed, 8, shuffle=True, collate_fn=collated, num_workers=workers)  # type: ignore[arg-type]

    disturb(4)
    model = Net(random_numbers=True)
    disturb(5)
    before = ambient()
    with Engine(model, method=METHOD, example=rows()[0], mode=mode) as engine:
        assert ambient() == before, "making an engine"
        engine.fit(data(), steps=5, batch_size=4, eval_data=data(), eval_every=2, micro_batches=2)
        assert ambient() == before, "training"
        engine.evaluate(data())
        assert ambient() == before, "evaluating"
        engine.restore()
        assert ambient() == before, "closing"


def test_a_forward_of_the_callers_own_draws_from_the_callers_generators() -> None:
    model = Net(random_numbers=True)
    plain = copy.deepcopy(model).eval()

    def both() -> list[float]:
        disturb(6)
        with torch.no_grad():
            return [float(plain(**rows()[0]).loss) for _ in range(2)]

    want = both()
    after = ambient()
    with Engine(model, method=METHOD) as engine:
        for _ in range(2):  # watched at first, then not
            disturb(6)
            assert [float(engine.run(rows()[0]).loss) for _ in range(2)] == want
            assert ambient() == after
    assert want[0] != want[1]


@pytest.mark.parametrize("loaded", ["rows", "loader", "loader with workers"])
def test_data_that_is_drawn_is_evaluated_as_the_same_at_every_evaluation(loaded: str) -> None:
    def data() -> Any:
        if loaded == "rows":
            return JitteredRows()
        return DataLoader(Jittered(), 4, shuffle=True, collate_fn=collated, num_workers=2 * (loaded != "loader"))

    with Engine(Net(), method=METHOD, example=rows()[0]) as engine:
        found = []
        for seed in (1, 2, 3):
            disturb(seed)
            before = ambient()
            found.append(engine.evaluate(data(), batch_size=4))
            assert ambient() == before
        assert found[0] == found[1] == found[2]


def test_evaluations_draw_the_same_numbers_for_the_same_batch() -> None:
    with Engine(Net(random_numbers=True), method=METHOD) as engine:
        disturb(1)
        first = engine.evaluate(rows(3))
        disturb(2)
        assert engine.evaluate(rows(3)) == first
