"""What the loss sees is what is updated: eps of a parameter's own in 16-bit lanes, presets, and an eps that is none."""

from __future__ import annotations

import json
import logging
import warnings

import pytest
import torch
from torch import nn

from support.compare import assert_same
from support.training import batches, stored_weights, train
from support.zoo.small import tiny_llama
from zo_offload import FZOO, PRESETS, QZO, ConfigError, Engine, JournalError, MeZO, PlanError, QZOShift
from zo_offload.journal.journal import read_journal
from zo_offload.numerics.noise import noise
from zo_offload.replay import replayed
from zo_offload.run import opening

KINDS = {"norm": 1.0, "head norm": 3.0, "matrix": 0.02, "embedding": 0.3, "bias": 0.0}
METHOD = MeZO(lr=1e-3, eps=1e-3, batch_size=4)


class Seen(nn.Module):
    """One parameter of each kind; the loss is the sum of their products with c. lanes: what each lane sees of them."""

    def __init__(self, dtype, lanes):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.values = nn.ParameterList()
        for size in KINDS.values():
            spread = 0.05 * size if size >= 1 else size
            middle = size if size >= 1 else 0.0
            self.values.append(nn.Parameter((middle + spread * torch.randn(8192, generator=g)).to(dtype)))
        self.record = lambda seen: lanes.append(seen)  # outside: what a lane leaves in the module is put back

    def forward(self, c):
        self.record([p.detach().float().clone() for p in self.values])
        return sum((p.double() * c).sum() for p in self.values)


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a, b]).double())[0, 1])


def seen_and_updated(dtype, method, storage="fp32"):
    """By kind, of one step: (correlation of what the lanes saw with what was updated, gain, update / (lr grad z))."""
    lanes = []
    model, c = Seen(dtype, lanes), torch.linspace(-1, 1, 8192, dtype=torch.float64)
    with Engine(model, method=method, storage=storage, objective=lambda m, batch: m(batch["c"])) as engine:
        before = stored_weights(engine)
        lanes.clear()
        record = engine.step({"c": c})
        after, gains = stored_weights(engine), engine.gains
        ids = {name: spec.param_id for name, spec in engine.plan.params.items()}
    found = {}
    for i, kind in enumerate(KINDS):
        name = f"values.{i}"
        saw = lanes[0][i] - lanes[1][i]
        moved = (after[name] - before[name]).double()
        z = noise(method.noise, record.updates[0].seed, ids[name], 8192).double()
        slope = float((moved * z).sum() / (z * z).sum()) / (-method.lr * record.grad)
        gain = gains[name].lane if name in gains else 1.0
        found[kind] = (abs(correlation(saw, moved)), gain, slope)
    return found


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_kind_of_parameter_is_updated_along_what_the_loss_saw(dtype, distribution):
    found = seen_and_updated(dtype, MeZO(lr=1e-3, eps=1e-3, distribution=distribution))
    assert all(seen > 0.96 for seen, _, _ in found.values()), found
    # (L+ - L-) / (2 eps g) is the slope along z, so lr means the same: the update is divided by g
    assert all(slope == pytest.approx(1 / gain, rel=1e-3) for _, gain, slope in found.values()), found
    assert found["matrix"][1] == found["bias"][1] == 1.0
    assert found["norm"][1] == {torch.bfloat16: 8, torch.float16: 1, torch.float32: 1}[dtype]


def test_without_gains_norms_are_updated_along_what_the_loss_never_saw(monkeypatch):
    """What the gains are for: the test above must be able to fail."""
    monkeypatch.setattr(opening, "decide_gains", lambda *parts: {})
    found = seen_and_updated(torch.bfloat16, METHOD)
    assert found["norm"][0] < 0.5 and not found["head norm"][0] > 0.1 and found["matrix"][0] > 0.99


def test_the_eps_of_a_method_is_published_with_its_lr_and_is_resolved_too():
    assert (FZOO().lr, FZOO().eps) == (5e-5, 1e-4)
    found = seen_and_updated(torch.bfloat16, MeZO(lr=1e-3, eps=1e-4))
    assert all(seen > 0.96 for seen, _, _ in found.values()), found


def bf16_llama(layers=2):
    return tiny_llama(layers, dtype=torch.bfloat16)


@pytest.mark.parametrize("method", [METHOD, FZOO(directions=3, batch_size=4)], ids=lambda method: method.name)
@pytest.mark.parametrize("settings", [
    dict(offload="host", num_slots=2), dict(offload="disk"), dict(offload="disk", order="lane"),
    dict(offload="host", order="block"),
], ids=str)  # fmt: skip
def test_gains_are_the_same_in_every_tier_after_a_resume_and_in_a_replay(method, settings, tmp_path):
    fixed = dict(method=method, storage="int8+8", fold_every=2)
    never = train(bf16_llama(), 4, **fixed)
    more = dict(run_dir=tmp_path / "run") if settings["offload"] == "disk" else {}
    assert_same(never, train(bf16_llama(), 4, **fixed, **settings, **more))
    if not more:
        return
    longer = train(bf16_llama(), 6, **fixed)
    with Engine.resume(tmp_path / "run", bf16_llama()) as engine:
        assert engine.gains is None, "a resumed run takes them from its journal"
        rest = engine.fit(batches(), steps=6).losses
        assert max(gain.lane for gain in engine.gains.values()) >= 8
        assert_same(longer, (longer[0][:4] + rest, stored_weights(engine)))
    with replayed(bf16_llama(), tmp_path / "run") as engine:
        assert_same(longer[1], stored_weights(engine))


def test_a_run_whose_journal_tells_of_no_gains_has_none(tmp_path, monkeypatch):
    with monkeypatch.context() as without:
        without.setattr(opening, "decide_gains", lambda *parts: {})
        never = train(bf16_llama(), 6, method=METHOD)
        train(bf16_llama(), 4, method=METHOD, run_dir=tmp_path / "run")
    with Engine.resume(tmp_path / "run", bf16_llama()) as engine:
        rest = engine.fit(batches(), steps=6).losses
        assert_same(never, (never[0][:4] + rest, stored_weights(engine)))
    assert train(bf16_llama(), 6, method=METHOD)[0] != never[0]


def test_gains_are_told_in_the_log_and_the_journal(tmp_path, caplog):
    with caplog.at_level(logging.INFO), Engine(bf16_llama(), method=METHOD, run_dir=tmp_path / "run") as engine:
        engine.fit(batches(), steps=1)
        names = set(engine.gains)
    assert "perturbed by up to 8 times" in caplog.text and f"at {len(names)} of" in caplog.text
    header = read_journal((tmp_path / "run/journal.zoj").read_bytes()).header
    assert set(header["gains"]) == names and header["gains"]["model.norm.weight"] == [8.0, 0.125]


@pytest.mark.parametrize("gains", [
    {"model.norm.weight": [8.0]}, {"model.norm.weight": ["a", 1]}, {"nobody": [2.0, 0.5]}, [1], "gain",
    {"model.norm.weight": [0.0, 1.0]}, {"model.norm.weight": [float("nan"), 1.0]},
], ids=json.dumps)  # fmt: skip
def test_gains_that_no_run_wrote_are_refused(gains):
    from zo_offload.journal.gains import gains_of

    with Engine(bf16_llama(), method=METHOD) as engine, pytest.raises(JournalError, match="gains"):
        gains_of({"gains": gains}, engine.plan, "journal.zoj")


# ---- an eps that is none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-46, 1e-40, 1e30, float("nan"), -1e-3])
@pytest.mark.parametrize("kind", [MeZO, FZOO, QZO])
def test_an_eps_that_float32_does_not_have_is_refused(kind, eps):
    with pytest.raises(ConfigError, match="eps="):
        kind(eps=eps)


@pytest.mark.parametrize("dtype, eps, least", [
    (torch.float32, 1e-12, "e-09"), (torch.float32, 1e-20, "e-09"), (torch.bfloat16, 1e-9, "e-04"),
    (torch.float16, 1e-9, "e-05"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", [MeZO, FZOO])
def test_an_eps_that_vanishes_in_the_lanes_is_refused_before_training(dtype, eps, least, kind, tmp_path):
    with pytest.raises(ConfigError, match=rf"eps={eps:g} vanishes in .* (?s:.*) are .*{least} apart"):
        Engine(tiny_llama(dtype=dtype), method=kind(eps=eps), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_module_without_values_is_named(dtype):
    with (
        pytest.raises(PlanError, match="is on the meta device, without values"),
        Engine(tiny_llama(2, dtype).to("meta"), method=METHOD) as engine,
    ):
        engine.step(batches()[0])


# ---- presets ---------------------------------------------------------------------------------------------------------


def test_a_preset_is_of_its_method():
    assert MeZO.preset("opt") == MeZO(lr=1e-6, eps=1e-3, steps=20_000, tunes="all")
    assert (FZOO.preset("opt").lr, FZOO.preset("opt").eps) == (5e-5, 1e-4)
    assert (FZOO.preset("opt-script").lr, FZOO.preset("opt-script").eps) == (1e-5, 1e-3)
    assert QZO.preset("llama", steps=7) == QZO.preset("llama").with_options(steps=7)
    assert QZO().lr == pytest.approx(QZO.preset("llama").lr, rel=0.02)
    assert set(PRESETS) == {"mezo", "fzoo", "qzo"}
    for kind, name, message in (
        (QZO, "opt", r"'opt' is not known to qzo: there are llama; it is one of mezo, fzoo"),
        (FZOO, "opt-lora", r"not known to fzoo: .*it is one of mezo"),
        (QZOShift, "llama", r"not known to qzo-shift: it has none; it is one of qzo"),
        (MeZO, "opus", r"'opus' is not known to mezo: there are opt, opt-lora"),
    ):
        with pytest.raises(ConfigError, match=message):
            kind.preset(name)


@pytest.mark.parametrize("name", ["opt-lora", "opt-prefix"])
def test_a_preset_of_adapters_does_not_train_a_whole_model(name):
    with pytest.raises(ConfigError, match=r"rates for .*, but [\d,]+ of [\d,]+ parameters train \(100%\)"):
        Engine(tiny_llama(), method=MeZO.preset(name))
    with Engine(tiny_llama(), method=MeZO.preset(name), trainable="model.norm"):
        pass
    with Engine(tiny_llama(), method=MeZO.preset(name, tunes=None)):
        pass


def test_a_preset_of_whole_models_warns_where_a_small_part_trains():
    with (
        pytest.warns(UserWarning, match="rates for whole models, but"),
        Engine(tiny_llama(), method=MeZO.preset("opt"), trainable="model.norm"),
    ):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Engine(tiny_llama(), method=MeZO.preset("opt")):
            pass
