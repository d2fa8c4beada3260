"""A run that learns nothing says so: in the log, the result, the progress line and the journal, with the number."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from torch import nn

from support.training import batches
from support.zoo.small import tiny_llama, tiny_opt
from zo_offload import FZOO, QZO, Engine, MeZO
from zo_offload.cli import command as cli
from zo_offload.journal.journal import StepRecord
from zo_offload.journal.learning_watch import LearningWatch, warnings_of

METHOD = MeZO(lr=1e-3, eps=1e-3, batch_size=4)
DATA = [batches()[0], batches()[1]] * 12


def fit(tmp_path, steps=8, method=METHOD, model=None, **settings):
    """(warnings of the result, output of `journal show`, of `journal check`)."""
    engine = Engine(model if model is not None else tiny_opt(2), method=method, run_dir=tmp_path / "run", **settings)
    with engine:
        return engine.fit(DATA, steps=steps).warnings


def told(tmp_path, capsys, recwarn, warnings):
    """Each warning is given once, and where people look at a journal."""
    given = [str(w.message) for w in recwarn if w.category is RuntimeWarning]
    assert len(given) == len(set(given)) == len(warnings)
    for action in ("show", "check"):
        assert cli.main(["journal", action, str(tmp_path / "run")]) == 0
        out = capsys.readouterr().out
        assert all(f"warning: {text}" in out for text in warnings), (action, out)


@pytest.mark.parametrize("method", [METHOD, FZOO(directions=2, batch_size=4)], ids=lambda method: method.name)
def test_lanes_that_do_not_differ_and_a_constant_loss(method, tmp_path, capsys, recwarn):
    def constant(model, batch):
        model(**batch)
        return torch.tensor(0.5)

    found = fit(tmp_path, method=method, objective=constant)
    assert len(found) == 2
    assert found[0].startswith("8 of 8 steps had equal losses in all lanes")
    assert found[1].startswith("the loss was the same in 8 steps in a row")
    told(tmp_path, capsys, recwarn, found)


@pytest.mark.parametrize("method", [METHOD, FZOO(directions=2, batch_size=4)], ids=lambda method: method.name)
def test_most_steps_skipped(method, tmp_path, capsys, recwarn):
    calls = []

    def often_nan(model, batch):
        calls.append(1)
        return model(**batch).loss * (1.0 if len(calls) % 60 < 3 else math.nan)

    found = fit(tmp_path, 24, method.with_options(on_nonfinite="skip"), objective=often_nan)
    assert len(found) == 1 and " of 24 steps were skipped" in found[0] and int(found[0].split()[0]) > 12
    told(tmp_path, capsys, recwarn, found)


@pytest.mark.parametrize("storage, lr", [("bf16", 1e-9), ("fp16", 1e-9), ("fp32", 1e-14), ("int8", 1e-7)])
def test_updates_that_vanish_in_the_storage_format(storage, lr, tmp_path, recwarn, capsys):
    found = fit(tmp_path, 8, MeZO(lr=lr, eps=1e-3, batch_size=4), storage=storage, fold_every=1)
    assert len(found) == 1 and re.match(r"0\.\d\d% of a sample of [\d,]+ stored values changed", found[0])
    assert f"stored values changed where updates were folded into {storage}" in found[0]
    told(tmp_path, capsys, recwarn, found)


@pytest.mark.parametrize("settings", [
    dict(), dict(storage="bf16", fold_every=2, lr=1e-2), dict(storage="int8+8", fold_every=2),
    dict(storage="bf16", rounding="stochastic", fold_every=1), dict(storage="int4", method=QZO(batch_size=4)),
    dict(offload="disk"), dict(trainable="embed_tokens", lr=1e-2),
], ids=str)  # fmt: skip
def test_a_run_that_learns_is_not_warned_of(settings, tmp_path, recwarn):
    settings = dict(settings)
    method = settings.pop("method", METHOD.with_options(lr=settings.pop("lr", 1e-3)))
    assert fit(tmp_path, 8, method, tiny_llama(2), **settings) == []
    assert not [w for w in recwarn if w.category is RuntimeWarning]


def test_steps_taken_one_by_one_are_watched_too(recwarn):
    with Engine(tiny_opt(2), method=METHOD, objective=lambda m, b: m(**b).loss.double() * 0 + 1) as engine:
        for step in range(20):
            assert not engine.active.learning.warnings or step == 20
            engine.step(batches()[0])
        assert engine.active.learning.warnings[0].startswith("20 of 20 steps had equal losses")
        assert engine.active.learning.short.startswith("20 of 20 steps had equal losses in all lanes")
    assert sum("equal losses" in str(w.message) for w in recwarn) == 1


def test_the_progress_line_says_it_first(tmp_path, capsys):
    with Engine(tiny_opt(2), method=METHOD, objective=lambda m, b: m(**b).loss * 0) as engine:
        engine.fit(DATA, steps=22, progress=True)
    assert re.search(r"WARNING 2\d of 2\d steps had equal losses in all lanes; loss", capsys.readouterr().err)


def test_numbers_go_on_counting_and_a_change_for_the_better_is_not_forgotten():
    told = []
    watch = LearningWatch(tell=lambda kind, text: told.append((kind, text)))
    for step in range(30):
        skipped = step < 25
        watch.see(StepRecord(step, (), math.nan if skipped else step, math.nan if skipped else 1.0, 1e-3, skipped))
    watch.finish()
    assert told == [("skipped", told[0][1])] and told[0][1].startswith("20 of 20 steps")
    assert watch.warnings[0].startswith("25 of 30 steps were skipped")


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_too_few_steps_say_nothing(steps):
    assert warnings_of([StepRecord(i, (), 1.0, 0.0, 1e-3) for i in range(steps)]) == []


def test_the_watch_costs_no_bit(tmp_path):
    """A resumed run is watched from there on, and its weights are those of one that never stopped."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.linspace(-1, 1, 600).view(30, 20))

        def forward(self, x):
            return (self.w @ x).square().sum()

    data = [{"x": torch.full((20,), 0.1 * i)} for i in range(8)]
    settings = dict(method=METHOD, objective=lambda m, b: m(b["x"]), storage="bf16", fold_every=1)
    with Engine(One(), **settings) as engine:
        for batch in data:
            engine.step(batch)
        want = dict(engine.weights())["w"]
    with Engine(One(), run_dir=tmp_path / "run", offload="disk", **settings) as engine:
        for batch in data[:4]:
            engine.step(batch)
    with Engine.resume(tmp_path / "run", One(), objective=settings["objective"]) as engine:
        for batch in data[4:]:
            engine.step(batch)
        assert torch.equal(dict(engine.weights())["w"], want)


def test_metrics_are_json_whatever_the_loss(tmp_path):
    fit(tmp_path, 4, METHOD.with_options(on_nonfinite="skip"), objective=lambda m, b: m(**b).loss * math.nan)
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
