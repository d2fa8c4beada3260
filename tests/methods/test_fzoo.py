"""FZOO: the engine's steps are the paper's formulas wherever blocks live, and a run is a journal like any other."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from support.compare import assert_same
from support.fake_cuda import DelayedCpuDevice, FakeBackend, FakeCudaDevice
from support.training import batches, stored_weights
from support.zoo.small import tiny_llama, tiny_opt
from zo_offload import FZOO, QZO, ConfigError, DivergenceError, Engine, MeZO
from zo_offload.methods import method_from
from zo_offload.numerics.noise import noise, step_seed
from zo_offload.plan.plan import make_plan
from zo_offload.replay import replayed

STEPS = 4
METHOD = FZOO(lr=1e-2, eps=1e-3, directions=5, weight_decay=0.1, batch_size=4)


def run(model=None, steps=STEPS, micro_batches=1, method=METHOD, **settings):
    with Engine(model if model is not None else tiny_opt(), method=method, **settings) as engine:
        losses = engine.fit(batches()[:steps], steps=steps, micro_batches=micro_batches).losses
        return losses, stored_weights(engine)


def plain(model, steps, method, seed=0):
    """The formulas, one parameter and one direction after another, in memory."""
    ids = {name: spec.param_id for name, spec in make_plan(model, batches()[0]).params.items()}
    losses_at_w = []
    for step in range(steps):
        seeds = [step_seed(seed, step, i) for i in range(method.directions)]
        w = {name: p.detach().clone() for name, p in model.named_parameters()}

        def along(name, seed, w=w):
            return noise(method.noise, seed, ids[name], w[name].numel()).view(w[name].shape)

        def loss_at(direction, w=w, step=step, along=along):
            for name, p in model.named_parameters():
                p.data = w[name] if direction is None else w[name] + method.eps * along(name, direction)
            with torch.no_grad():
                return float(model(**batches()[step]).loss)

        first = loss_at(None)
        others = [loss_at(s) for s in seeds]
        mean = sum(others) / len(others)
        spread = math.sqrt(sum((x - mean) ** 2 for x in others) / (len(others) - 1))
        for name, p in model.named_parameters():
            value = w[name] * torch.tensor(1 - method.lr * method.weight_decay) if p.ndim > 1 else w[name]
            for s, loss in zip(seeds, others, strict=True):
                coefficient = torch.tensor(method.lr * (loss - first) / (len(others) * spread))
                value = value - coefficient * along(name, s)
            p.data = value
        losses_at_w.append(first)
    return losses_at_w, {name: p.detach() for name, p in model.named_parameters()}


def test_steps_are_the_papers_formulas_bit_for_bit():
    model = tiny_opt()
    want = plain(copy.deepcopy(model), STEPS, METHOD)
    assert_same(want, run(model))
    assert len(set(want[0])) == STEPS


@pytest.mark.parametrize("settings", [
    dict(offload="host", num_slots=2, fold_every=1), dict(offload="host", fold_every=3), dict(offload="disk"),
    dict(offload="host", order="block"), dict(offload="host", order="lane", num_slots=2),
    dict(offload="host", block_numel=900),
], ids=str)  # fmt: skip
def test_where_blocks_live_and_how_lanes_are_served_changes_nothing(tmp_path, settings):
    more = dict(run_dir=tmp_path / "run") if settings.get("offload") == "disk" else {}
    cut = {k: v for k, v in settings.items() if k == "block_numel"}  # products of cut layers round differently
    assert_same(run(**cut), run(**settings, **more))


@pytest.mark.parametrize("storage", ["bf16", "int8+8"])
def test_narrow_storage_and_micro_batches(storage):
    fixed = dict(storage=storage, fold_every=2, micro_batches=2)
    assert_same(run(offload="none", **fixed), run(offload="host", num_slots=2, **fixed))


DEVICES = {"late": lambda: DelayedCpuDevice(1), "cuda": lambda: FakeCudaDevice(FakeBackend())}


@pytest.mark.parametrize("device", DEVICES)
def test_coefficients_made_on_the_device_are_the_hosts(use, device):
    want = run(offload="host")
    use(DEVICES[device]())
    assert_same(want, run(offload="host"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method, settings", [
    (METHOD, dict(storage="int8+8", fold_every=2)), (MeZO(lr=1e-3, weight_decay=0.1), dict(fold_every=2)),
    (QZO(lr=1e-3), dict(storage="nf4")), (QZO(lr=1e-3, weight_decay=0.1), dict(storage="int4", fold_every=2)),
], ids=lambda part: getattr(part, "name", None))  # fmt: skip
def test_gains_of_parameters_are_the_hosts_on_the_device(use, device, method, settings):
    """Lanes of 16 bits and scales in units of weights: coefficients times what is a parameter's own."""
    want = run(tiny_llama(2, torch.bfloat16), method=method, offload="host", **settings)
    use(DEVICES[device]())
    assert_same(want, run(tiny_llama(2, torch.bfloat16), method=method, offload="host", **settings))


def test_a_run_resumes_replays_and_keeps_its_method(tmp_path):
    whole = run(offload="disk", run_dir=tmp_path / "a")
    run(offload="disk", run_dir=tmp_path / "b", steps=2)
    with Engine.resume(tmp_path / "b", tiny_opt()) as engine:
        assert engine.method == METHOD
        engine.fit(batches()[:STEPS], steps=STEPS, new_data=True)
        assert_same(whole[1], stored_weights(engine))
        assert [len(record.updates) for record in engine.journal.steps] == [METHOD.directions] * STEPS
    with replayed(tiny_opt(), tmp_path / "a") as engine:
        assert_same(whole[1], stored_weights(engine))


def test_losses_that_tie_change_nothing_but_decay():
    step = METHOD.update(0, 3, [2.0] * 6, 1e-2)
    assert [u.coeff for u in step.updates] == [0.0] * 5 and step.grad == 0.0 and step.loss == 2.0
    assert [u.decay != 1 for u in step.updates] == [True] + [False] * 4
    assert METHOD.coefficients(torch.full((6,), 2.0, dtype=torch.float64), 1e-2).tolist() == [0.0] * 5


@pytest.mark.parametrize("losses", [
    [2.0, 2.5, 1.0, 3.0, 2.25, 2.0], [1e-3, 1e-9, 0.0, -1e5, 7.0, 7.0], [2.0, 2.0, 2.0, 2.0, 2.0, 2.0000001],
    [0.1, 0.2, 0.3, 0.7, 1.1, 1.3], [-0.0, -0.0, -0.0, -0.0, -0.0, -0.0],
], ids=str)  # fmt: skip
def test_both_ways_to_the_coefficients_are_one(losses):
    found = METHOD.coefficients(torch.tensor(losses, dtype=torch.float64), 3e-3).to(torch.float32).tolist()
    assert found == [u.coeff for u in METHOD.update(0, 0, losses, 3e-3).updates]


@pytest.mark.parametrize("losses", [
    [math.nan] + [1.0] * 5, [1.0] * 5 + [math.inf], [1.0, 1e200, 1.0, 2.0, 3.0, 4.0], [0.0, 1e308, 1e308, 1, 1, 1],
], ids=str)  # fmt: skip
def test_what_is_not_finite_is_no_step_on_either_side(losses):
    with pytest.raises(DivergenceError, match="step 0: losses .* give an update of"):
        METHOD.update(0, 0, losses, 1e-3)
    values = torch.tensor(losses, dtype=torch.float64)
    assert not (torch.isfinite(values).all() and (METHOD.coefficients(values, 1e-3).abs() < 3e38).all())


def test_it_learns_faster_than_one_direction_does():
    """The same batch again and again: with more directions the loss falls further in as many steps."""
    data = [batches()[0]] * 30
    fallen = []
    for directions in (2, 16):
        with Engine(tiny_llama(), method=FZOO(lr=3e-3, eps=1e-3, directions=directions)) as engine:
            losses = engine.fit(data, steps=30, batch_size=4).losses
            fallen.append(losses[0] - losses[-1])
    assert fallen[1] > fallen[0] > 0


def test_fewer_folds_where_a_step_has_more_noises():
    with Engine(tiny_opt(), offload="host", storage="bf16", method=FZOO(batch_size=4)) as engine:
        assert engine.fold_every == 3
    with Engine(tiny_opt(), offload="host", storage="bf16", method=FZOO(directions=200)) as engine:
        assert engine.fold_every == 1


def test_options_are_checked():
    assert method_from({"name": "fzoo", "directions": 3}) == FZOO(directions=3, noise_layout=1)
    with pytest.raises(ConfigError, match="directions=1"):
        FZOO(directions=1)
