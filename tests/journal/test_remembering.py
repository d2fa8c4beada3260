"""What methods remember is a function of the journal: through skipped steps, halved eps, interrupts and resumes."""

from __future__ import annotations

import math

import pytest
import torch

from support.compare import assert_same
from support.fake_cuda import DelayedCpuDevice
from support.training import batches, stored_weights
from support.zoo.small import tiny_opt
from zo_offload import MEAZO, Conservative, Engine, JournalError, Momentum
from zo_offload.methods import METHODS
from zo_offload.numerics.noise import step_seed

METHOD = {
    "meazo": MEAZO(lr=1e-4, beta=0.5, directions=2, batch_size=4),
    "momentum": Momentum(lr=1e-3, window=3, batch_size=4),
}
STEPS = 6


def some_lost(lost):
    """An objective whose losses are not finite on the batches of these numbers."""
    firsts = [batches()[i]["input_ids"][0] for i in lost]

    def objective(model, batch):
        loss = model(**batch).loss
        return loss * math.nan if any(torch.equal(batch["input_ids"][0], first) for first in firsts) else loss

    return objective


@pytest.mark.parametrize("policy", ["skip", "halve_eps"])
@pytest.mark.parametrize("name", METHOD)
def test_a_skipped_step_is_remembered_as_one(name, policy, tmp_path, use):
    method, objective = METHOD[name].with_options(on_nonfinite=policy), some_lost([1, 3])

    def run(run_dir, cuts, device=None):
        if device is not None:
            use(device)
        for first, last in zip([0, *cuts], [*cuts, STEPS], strict=True):
            engine = (
                Engine(tiny_opt(), method=method, objective=objective, run_dir=run_dir, offload="host")
                if first == 0
                else Engine.resume(run_dir, tiny_opt(), objective=objective)
            )
            with engine:
                for batch in batches()[first:last]:
                    engine.step(batch)
                records, weights = list(engine.journal.steps), stored_weights(engine)
        assert [math.isnan(record.loss) for record in records] == [i in (1, 3) for i in range(STEPS)]
        return [record.loss for record in records if not math.isnan(record.loss)], weights

    whole = run(tmp_path / "a", [])
    assert_same(whole, run(tmp_path / "b", [2, 4], DelayedCpuDevice(1)))


def test_momentum_reaches_back_so_many_steps_and_says_so_in_the_journal(tmp_path):
    method = METHOD["momentum"]
    with Engine(tiny_opt(), method=method, run_dir=tmp_path / "run") as engine:
        for batch in batches()[:STEPS]:
            engine.step(batch)
        records = engine.journal.steps
    for record in records:
        share, want = 1.0, []
        for before in range(method.window):
            if before <= record.step:
                slope = records[record.step - before].grad
                want.append(
                    (step_seed(0, record.step - before), float(torch.tensor(method.lr * (share * slope)).float()))
                )
            share *= method.beta
        found = [(update.seed, update.coeff) for update in record.updates]
        assert found[: len(want)] == want and all(coeff == 0 for _, coeff in found[len(want) :])
        assert len({seed for seed, _ in found}) == method.window


def test_a_slope_of_nothing_is_no_step():
    assert [u.coeff for u in MEAZO().update(0, 0, [1.5, 1.5], 1e-3).updates] == [0.0]


def test_the_first_step_of_meazo_is_as_long_as_its_rate():
    """v' of one step is its own slope's square."""
    step = MEAZO(lr=1e-3).update(0, 0, [1.5, 1.25], 1e-3)
    assert step.updates[0].coeff == pytest.approx(1e-3, rel=1e-6) and step.grad != 0


@pytest.mark.parametrize("losses, sign", [
    ([2.0, 1.0, 1.5, 1.0, 2.0], 1), ([2.0, 1.0, 1.5, 2.0, 1.0], -1), ([2.0, 1.0, 1.0, 1.0, 1.0], 0),
    ([2.0, 1.0, 1.0, 1.5, 1.25], 0),
], ids=["the step", "the opposite", "of equal ones none", "none"])  # fmt: skip
def test_a_conservative_step_is_the_best_of_three(losses, sign):
    method = Conservative(lr=1e-3, eps=0.5)
    step = method.update(0, 0, losses, 1e-3)
    assert step.updates[0].coeff == float(torch.tensor(sign * 1e-3).float())
    assert step.grad == (1.0 if sign else 0.0)


def test_the_lanes_it_comes_back_with_see_the_weights_it_would_leave():
    method = Conservative(lr=1e-3, eps=0.5)
    still, after, opposite = method.next_lanes(0, 4, [2.0, 1.25], 1e-3)
    (update,) = method.update(0, 4, [2.0, 1.25, 3.0, 1.0, 2.0], 1e-3).updates
    assert still.scale == 0 and after.seed == update.seed and -after.scale == update.coeff == opposite.scale
    assert method.next_lanes(0, 4, [2.0, 1.25, 3.0, 1.0, 2.0], 1e-3) == ()
    assert method.next_lanes(0, 4, [1e300, -1e300], 1e3)[1].scale == 0  # it is no step: `coefficients` says so


@pytest.mark.parametrize("name", METHOD)
def test_another_memory_is_another_run(name, tmp_path):
    with Engine(tiny_opt(), method=METHOD[name], run_dir=tmp_path / "run") as engine:
        engine.step(batches()[0])
    other = METHOD[name].with_options(beta=0.25)
    with Engine.resume(tmp_path / "run", tiny_opt(), method=other) as engine, pytest.raises(JournalError, match="beta"):
        engine.step(batches()[1])
    assert METHODS[name].own()
