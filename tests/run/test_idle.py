"""Settings that have no effect: which are refused, which are told, and that no other is; weights read past torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.training import METHOD, batches
from support.zoo.small import tiny_opt
from zo_offload import QZO, ConfigError, DivergenceError, Engine, MeZO
from zo_offload.journal.journal import StepRecord
from zo_offload.journal.learning_watch import LearningWatch
from zo_offload.run.idle import RULES

SNAPSHOTS = "snapshots are files in the run's directory, and there is none. Pass run_dir=..."
FP32 = "all that trains is stored in fp32, which keeps every update exactly, so nothing is rounded"
NO_WINDOW = "has all blocks in the device's memory, so there is no window"

REFUSED = {
    "snapshot_steps=3: " + SNAPSHOTS: dict(snapshot_steps=3),
    "snapshot_minutes=2.5: " + SNAPSHOTS: dict(snapshot_minutes=2.5, offload="none"),
}

TOLD = {
    "rounding='stochastic': " + FP32: dict(rounding="stochastic"),
    "rounding='stochastic': all that trains is stored in bf16+16": dict(rounding="stochastic", storage="bf16+16"),
    "rounding='stochastic': the scales that train are stored in fp32": dict(
        rounding="stochastic", storage="int4", method=QZO()
    ),
    "keep=['embed_tokens']: the base's own dtype keeps those": dict(keep=["embed_tokens"]),
    "keep='layers': storage='fp32' keeps those": dict(keep="layers", storage="fp32"),
    "num_slots=2, prefetch=1: offload='none' " + NO_WINDOW: dict(offload="none", num_slots=2, prefetch=1),
    "overlap=False: offload='auto' took 'none', which " + NO_WINDOW: dict(overlap=False),
    "io_threads=2: offload='host' has all blocks in host memory": dict(offload="host", io_threads=2),
    "scrub_every=4: it is about blocks that are read from the system's page cache": dict(scrub_every=4),
    "host_memory='staged': it is about copies from host memory to a GPU": dict(host_memory="staged", offload="host"),
}

TAKEN = [
    dict(rounding="stochastic", storage="bf16"), dict(rounding="stochastic", storage="bf16+8"),
    dict(storage="int8+8", keep="embed_tokens"), dict(storage="bf16", keep="layers"),
    dict(offload="host", num_slots=2, io_threads=2), dict(offload="host", overlap=False, num_slots=1),
    dict(offload="none", device_memory="1GB"), dict(snapshot_minutes=None), dict(order="block", threads=1),
]  # fmt: skip


def told(caplog):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("no effect here")]


@pytest.mark.parametrize("message, settings", REFUSED.items())
def test_what_would_not_happen_is_refused_before_anything_is_read(message, settings):
    model = tiny_opt(1)
    with pytest.raises(ConfigError) as caught:
        Engine(model, method=METHOD, **settings)
    assert message in str(caught.value) and not any(p.isnan().any() for p in model.parameters())


@pytest.mark.parametrize("message, settings", TOLD.items())
def test_what_holds_anyway_or_costs_nothing_is_told(message, settings, caplog):
    Engine(tiny_opt(1), **{"method": METHOD, **settings})
    assert len(told(caplog)) == 1 and message in told(caplog)[0]


@pytest.mark.parametrize("settings", TAKEN, ids=str)
def test_what_has_an_effect_is_not_told(settings, caplog):
    Engine(tiny_opt(1), method=METHOD, **settings)
    assert told(caplog) == []


def test_every_rule_is_tried_and_all_that_is_wrong_is_told_at_once(tmp_path, caplog):
    tried = {name for settings in (*REFUSED.values(), *TOLD.values()) for name in settings}
    assert {name for rule in RULES for name in rule.names} <= tried
    Engine(tiny_opt(1), method=METHOD, offload="none", rounding="stochastic", num_slots=2, host_memory="pinned")
    assert len(told(caplog)) == 3


def test_a_run_that_goes_on_is_not_told(tmp_path, caplog):
    settings = dict(rounding="stochastic", keep="layers", storage="fp32", io_threads=2, offload="none")
    with Engine(tiny_opt(1), method=METHOD, run_dir=tmp_path / "run", **settings) as engine:
        engine.fit(batches(2), steps=1)
    assert len(told(caplog)) == 3
    with Engine.resume(tmp_path / "run", tiny_opt(1), num_slots=2) as engine:
        engine.fit(batches(2), steps=2)
    assert len(told(caplog)) == 3


# ---- weights that are read past torch --------------------------------------------------------------------------------


class Reads(nn.Module):
    """A parent that reads its child's weight where the child does not run."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.read = nn.Linear(4, 4), nn.Linear(4, 1), read

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * self.read(self.first.weight))


def step(read: Any, method: Any = MeZO(lr=1e-4)) -> StepRecord:  # noqa: B008
    x = torch.ones(3, 4)
    with Engine(Reads(read), method=method, objective=lambda m, b: m(b["x"]).square().mean()) as engine:
        return engine.step({"x": x})


def test_a_weight_that_is_read_past_torch_is_nan_and_the_error_says_where_to_look():
    for read in (lambda w: float(w.detach().numpy().mean()), lambda w: w.tolist()[0][0],
                 lambda w: float(np.asarray(w.detach())[0, 0])):  # fmt: skip
        with pytest.raises(DivergenceError) as caught:
            step(read)
        said = str(caught.value)
        assert "losses nan and nan" in said and "The weights are the base's, so lr is not the cause" in said
        assert ".tolist(), numpy.asarray" in said and "Lower lr" not in said

    def seen(w: Tensor) -> float:
        return w.detach()[0, 0].item()

    plain = float(Reads(seen)(torch.ones(3, 4)).detach().square().mean())
    assert step(seen).loss == pytest.approx(plain, rel=1e-2), "what torch sees is right"


def test_only_nan_in_all_lanes_of_the_first_step_is_told_so():
    for losses, number in (((float("nan"), 1.0), 0), ((float("nan"),) * 2, 5), ((1e300, -1e300), 0)):
        with pytest.raises(DivergenceError, match="Lower lr or eps") as caught:
            METHOD.update(0, number, losses, 1e-3)
        assert ("as after step 4" if number else "the base's") in str(caught.value)


@pytest.mark.parametrize("first", [0, 7])
def test_a_run_that_skips_all_its_steps_is_told_so_too(first):
    watch = LearningWatch()
    for number in range(first, first + 20):
        watch.see(StepRecord(number, (), float("nan"), float("nan"), 1e-3, True))
    assert ("numpy.asarray" in watch.warnings[0]) == (first == 0)
