"""A rate past its limit is noticed early and named, and a brake halves it: alike in runs that stop and go on."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn

from support.compare import assert_same
from support.fake_cuda import DelayedCpuDevice
from zo_offload import Engine, MeZO
from zo_offload.cli import main
from zo_offload.journal.format import StepRecord
from zo_offload.journal.rising import Brake, LossWatch

STEPS = 60


def record(step, loss, skipped=False):
    return StepRecord(step, (), loss, 0.1, 1e-3, skipped)


@pytest.mark.parametrize("seed", range(5))
def test_batches_that_differ_are_no_rise(seed):
    rng, watch = random.Random(seed), LossWatch()
    for step in range(2000):
        loss = 0.4 + 0.3 * math.exp(-step / 100) + rng.gauss(0, 0.1)
        assert watch.see(record(step, loss)) is None


@pytest.mark.parametrize("growth", [1.02, 1.2, 3.0])
def test_a_rise_is_seen_soon(growth):
    rng, watch = random.Random(1), LossWatch()
    for step in range(300):
        loss = (0.6 if step < 40 else 0.6 * growth ** (step - 40)) + rng.gauss(0, 0.03)
        rise = watch.see(record(step, loss))
        if rise is not None:
            break
    assert 40 <= step < 40 + {1.02: 25, 1.2: 10, 3.0: 5}[growth]
    assert rise.now > rise.best and abs(rise.best - 0.6) < 0.05


def test_skipped_steps_and_losses_that_are_none_do_not_count():
    watch = LossWatch()
    for step in range(100):
        assert watch.see(record(step, math.nan if step % 2 else 1e9, skipped=True)) is None


def test_a_brake_reaches_the_step_after_the_next():
    brake = Brake()
    for step in range(30):
        before = brake.factor(step)
        rise = brake.see(record(step, 1.0 if step < 20 else 2.0))
        assert before == 1.0 or rise is None
        if rise is not None:
            assert [brake.factor(step + i) for i in range(4)] == [1.0, 1.0, 0.5, 0.5]
            return
    raise AssertionError("no rise was seen")


class Bowl(nn.Module):
    """A loss of a slope that grows with the distance: MeZO diverges if lr times the dimension is above 2."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(40))

    def forward(self, x):
        return (self.w * self.w).sum() / 2 + 0.0 * x.sum()


def fit(steps=STEPS, *, brake, run_dir=None, resume=False, **settings):
    data = [{"x": torch.full((1,), float(i))} for i in range(STEPS)]
    more = dict(objective=bowl_loss, example=data[0], **settings)
    if resume:
        engine = Engine.resume(run_dir, Bowl(), **more)
    else:
        engine = Engine(Bowl(), method=MeZO(lr=0.06, batch_size=1), run_dir=run_dir, **more)
    rates = []
    with engine:
        result = engine.fit(data, steps=steps, brake=brake, callback=lambda r: rates.append(r.lr))
        return rates, result, dict(engine.weights())


def bowl_loss(model, batch):
    return model(**batch)


def test_it_is_warned_of_with_its_numbers_and_what_to_do():
    with pytest.warns(RuntimeWarning, match=r"the loss rises: .* at best: the rate is past its limit"):
        rates, result, _ = fit(brake=None)
    assert set(rates) == {0.06} and result.losses[-1] > 2 * result.losses[0]
    assert "halves it" in result.warnings[0]


@pytest.mark.filterwarnings("ignore:the loss rises")
def test_a_brake_saves_the_run_and_is_the_same_after_a_stop_and_on_a_late_device(tmp_path, use):
    rates, result, weights = fit(brake=True, run_dir=tmp_path / "a")
    halved = sorted(set(rates), reverse=True)
    assert len(halved) > 1 and all(rate == 0.06 * 0.5**i for i, rate in enumerate(halved))
    assert result.losses[-1] < max(result.losses) / 2
    first = next(i for i, rate in enumerate(rates) if rate != 0.06)
    for stop in (first - 1, first, first + 5):
        fit(stop, brake=True, run_dir=tmp_path / str(stop))
        later, _, again = fit(STEPS, brake=None, run_dir=tmp_path / str(stop), resume=True)  # as it was called before
        assert later == rates[stop:]
        assert_same(([], weights), ([], again))
    use(DelayedCpuDevice(1))
    assert_same((rates, weights), fit(brake=True, offload="host")[::2])


def test_the_command_line_has_it(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert "--brake" in capsys.readouterr().out
