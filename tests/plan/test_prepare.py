"""One preparation for runs and plans: what `zo-offload plan` says is what `fit` then does, whatever the settings."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import nn

from support.planning import plan_report
from support.zoo.models import ZOO
from zo_offload import FZOO, QZO, BudgetError, ConfigError, Engine, MeZO
from zo_offload.cli import main
from zo_offload.cli.hardware import CONTEXT_BYTES
from zo_offload.system.units import show_bytes

TOKENS, ROWS = 24, 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "llama"
    ZOO["llama"].build().save_pretrained(path)
    return path


def batch():
    ids = torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) % 90
    return {"input_ids": ids, "labels": ids}


# ---- what is planned is what is run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["none", "host", "disk"])
@pytest.mark.parametrize(
    "make, settings",
    [
        (MeZO, {}),
        (MeZO, {"storage": "int8+8"}),
        (MeZO, {"storage": "bf16", "compute": "bf16", "order": "block", "num_slots": 2}),
        (MeZO, {"storage": "int8", "trainable": "*norm*"}),
        (MeZO, {"device_memory": "250KB", "block_numel": 2048}),
        (FZOO, {"storage": "fp8+8"}),
        (QZO, {"storage": "int4"}),
        (QZO, {"storage": "nf4", "keep": "*embed*"}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(map(str, value.values())) or "plain",
)
def test_a_plan_is_that_of_the_run(checkpoint, tmp_path, make, settings, offload):
    parts = 1 + (len(str(settings)) + len(offload)) % 2  # one and two, in turns
    if offload == "none" and "device_memory" in settings:
        settings = {**settings, "device_memory": "2MB"}
    settings = {**settings, "offload": offload}
    lines = plan_report(str(checkpoint), method=make(), tokens=TOKENS, batch_size=ROWS, micro_batches=parts, **settings)
    with Engine(checkpoint, method=make(), run_dir=tmp_path / "run", **settings) as engine:
        engine.step(batch(), micro_batches=parts)
        memory, layout, plan = engine.memory, engine.layout, engine.active.prepared.plan
        assert f"{show_bytes(layout.total_bytes)} in {len(plan.blocks)} blocks" in lines[1]
        assert f"offload {offload}:" in lines[2]
        said = [line.split()[:3] for line in lines if line.startswith("  ")]
        for name, nbytes in (*memory.rows(), ("device", memory.device_bytes)):
            if name != "process":
                assert [name, *show_bytes(nbytes).split()] in said, name
        lanes = len(engine.method.perturbations(0, 0)) * parts
        assert any(f", {lanes} lanes in {memory.order} order" in line for line in lines)
        assert any(f"(updates folded every {engine.fold_every} step" in line for line in lines)


def test_the_command_line_plans_any_method(checkpoint, capsys):
    assert (
        main(
            [
                "plan",
                str(checkpoint),
                "--method",
                "fzoo",
                "--directions",
                "3",
                "--batch-size",
                "1",
                "--micro-batches",
                "2",
            ]
        )
        == 2
    )
    assert "a batch of 1 rows cannot be cut into 2" in capsys.readouterr().err
    assert main(["plan", str(checkpoint), "--method", "fzoo", "--directions", "3", "--tokens", "8"]) == 0
    assert ", 4 lanes in module order" in capsys.readouterr().out
    assert main(["plan", "opt-125m", "--storage", "int4", "--method", "qzo", "--tokens", "8"]) == 0
    assert "stored as int4" in capsys.readouterr().out
    assert main(["plan", "opt-125m", "--storage", "int4", "--tokens", "8"]) == 2
    assert "method=QZO()" in capsys.readouterr().err, "as the run would be refused"


def test_auto_says_what_it_took(checkpoint, tmp_path, capsys):
    assert main(["plan", str(checkpoint), "--storage", "auto", "--tokens", "8"]) == 0
    out = capsys.readouterr().out
    assert "storage auto takes fp32: " in out and "offload none (auto)" in out


def test_a_plan_of_a_checkpoint_knows_the_files_dtypes(tmp_path):
    """fp32 files under a config that says bf16 are stored as fp32, as the run would store them."""
    model = ZOO["llama"].build()
    model.save_pretrained(tmp_path / "base")
    config = (tmp_path / "base" / "config.json").read_text().replace('"float32"', '"bfloat16"')
    (tmp_path / "base" / "config.json").write_text(config)
    planned = plan_report(str(tmp_path / "base"), tokens=8)[1]
    with Engine(tmp_path / "base") as engine:
        assert f"stored as fp32: {show_bytes(engine.layout.total_bytes)}" in planned


def test_a_gpu_that_is_not_here_needs_more_than_its_context():
    lines = plan_report("opt-125m", device="cuda", storage="fp16", tokens=8, device_memory="0.8GB")
    assert any("of CUDA and its libraries" in line for line in lines)
    with pytest.raises(BudgetError, match="CUDA context and libraries take about"):
        plan_report("opt-125m", device="cuda", storage="fp16", tokens=8, device_memory=CONTEXT_BYTES)
    with pytest.raises(BudgetError, match="the CUDA context and libraries take"):
        plan_report("opt-125m", device="cuda", storage="fp16", tokens=8, device_memory=CONTEXT_BYTES + 1000)


# ---- activations that cannot be measured without weights -------------------------------------------------------------


class Net(nn.Module):
    """Two wide layers. leaves: for numpy and back in the middle, which nothing without values can follow."""

    def __init__(self, leaves):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(16, 256), nn.Linear(256, 256), nn.Linear(256, 1)
        self.leaves = leaves

    def forward(self, x, labels):
        h = self.a(x).relu()
        if self.leaves:
            h = torch.from_numpy(np.maximum(h.numpy(), 0))
        return type("Out", (), {"loss": ((self.c(self.b(h).relu())[:, 0] - labels) ** 2).mean()})()


def wide(rows=512):
    g = torch.Generator().manual_seed(3)
    return {"x": torch.randn(rows, 16, generator=g), "labels": torch.randn(rows, generator=g)}


def start(leaves, **settings):
    return Engine(Net(leaves), method=MeZO(lr=1e-3), offload="host", block_numel=1 << 15, **settings)


def test_an_unmeasured_budget_is_kept():
    with start(False, device_memory="1MB") as engine, pytest.raises(BudgetError, match="activations"):
        engine.step(wide())
    with start(True, device_memory="1MB") as engine:
        weights = dict(engine.weights())
        for _ in range(2):  # a second try is no way around it
            with pytest.raises(BudgetError, match=r"activations of this batch take 1\.\d MB.*whose results are not"):
                engine.step(wide())
        assert engine.log.version == 0
        assert all(torch.equal(value, weights[name]) for name, value in engine.weights())
        engine.step(wide(32))  # a smaller one fits, and the run goes on
        assert engine.log.version == 1


def test_what_is_needed_is_told_and_is_enough(caplog):
    with start(True, device_memory="1MB") as engine, pytest.raises(BudgetError) as caught:
        engine.step(wide())
    least = str(caught.value).rsplit("at least ", 1)[1]
    caplog.clear()
    with start(True, device_memory=least.replace(" ", "")) as engine, start(False) as plain:
        assert engine.step(wide()).loss == plain.step(wide()).loss
        assert engine.memory.unknown.startswith("RuntimeError") or engine.memory.unknown
        assert engine.memory.device_bytes == engine.memory.budget, "the rest is reserved for what is not known"
        assert not engine.memory.window.pinned
    assert "activations could not be measured without weights" in caplog.text
    assert "are kept for them" in caplog.text


def test_the_measured_pass_is_as_predicted_where_both_can_be_known():
    with start(False) as engine:
        predicted = engine.active.prepared.plan_memory(wide(), objective=engine.objective).terms["activations"]
        seen = []
        engine.step(wide(1))
        engine.active.parts.passes._on_measured = seen.append
        engine.active.parts.passes._hub.adopt(engine.plan)
        engine.step(wide())
    assert len(seen) == 1 and 0.8 * predicted <= seen[0] <= 1.05 * predicted


def test_without_a_budget_the_plan_says_that_it_does_not_know(caplog):
    with caplog.at_level(logging.WARNING), start(True) as engine:
        engine.step(wide(8))
        assert "they are not in the figures" in engine.memory.notes[0]
    assert caplog.text.count("activations could not be measured") == 1
    caplog.clear()
    with start(False) as engine:
        engine.step(wide(8))
        assert engine.memory.notes == ()
    assert caplog.text == ""


def test_a_module_that_cannot_be_copied_trains_and_its_plan_says_so():
    class Uncopied(Net):
        def __deepcopy__(self, memo):
            raise TypeError("holds a file")

    with Engine(Uncopied(False), method=MeZO(lr=1e-3)) as engine, start(False) as plain:
        assert engine.step(wide(8)).loss == plain.step(wide(8)).loss
        assert "cannot be copied: TypeError: holds a file" in engine.memory.notes[0]


def test_an_evaluation_keeps_the_budget_too():
    with start(True, device_memory="1MB") as engine:
        engine.step(wide(32))
        with pytest.raises(BudgetError, match="activations of this batch take"):
            engine.run({**wide(4096), "x": torch.randn(4096, 16, dtype=torch.float32)}, lambda m, b: m(**b).loss)


@pytest.mark.parametrize("leaves", [False, True], ids=["measured before", "measured in the pass"])
@pytest.mark.parametrize("begin", ["weights", "a small batch"])
def test_a_batch_that_grows_keeps_the_budget(leaves, begin):
    with start(leaves, device_memory="1MB") as engine:
        if begin == "weights":
            dict(engine.weights())
        else:
            engine.step(wide(32))
        engine.step(wide(64))
        before, version = dict(engine.weights()), engine.log.version
        for _ in range(2):
            with pytest.raises(BudgetError, match="is too small"):
                engine.step(wide(512))
        assert engine.log.version == version
        assert all(torch.equal(value, before[name]) for name, value in engine.weights())
        engine.step(wide(64))
        with pytest.raises(BudgetError, match="is too small"):
            engine.step(wide(512))


def test_memory_is_planned_for_the_longest_row(checkpoint):
    """It comes in the third step: the budget is refused before the first."""
    rows = [{"input_ids": list(range(3, 3 + n)), "labels": list(range(3, 3 + n))} for n in (4, 5, 4, 5, 40, 4)]

    def run(budget):
        with Engine(checkpoint, method=MeZO(lr=1e-4), offload="host", device_memory=budget) as engine:
            return engine.fit(rows, steps=3, batch_size=2).losses, engine.memory

    losses, memory = run("2MB")
    with pytest.raises(BudgetError, match="is too small: the least that works"):
        run(memory.terms["scratch"] + memory.terms["activations"])
    short = [row for row in rows if len(row["input_ids"]) < 40]
    with Engine(checkpoint, method=MeZO(lr=1e-4), offload="host", device_memory="2MB") as engine:
        engine.fit(short, steps=1, batch_size=2)
        assert engine.memory.terms["activations"] < memory.terms["activations"] / 4
    assert len(losses) == 3


# ---- several processes -----------------------------------------------------------------------------------------------


def test_several_processes_that_cannot_meet_are_refused_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2, and RANK, MASTER_ADDR, MASTER_PORT is not set.*torchrun"):
        Engine(checkpoint, offload="disk", run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    Engine(checkpoint, offload="disk", run_dir=tmp_path / "run").close()
