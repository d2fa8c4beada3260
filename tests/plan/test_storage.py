"""Which parameter is stored how, and training what a low-bit base leaves to train: scales, adapters, norms."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from dataclasses import replace

import pytest
import torch
from torch import nn

from support.compare import assert_same
from support.training import ADAPTED, METHOD, batches, stored_weights, train
from support.zoo.small import tiny_llama, tiny_opt, with_adapters
from zo_offload import QZO, BudgetError, ConfigError, Engine, MeZO, PlanError, QZOShift, ZOError
from zo_offload.formats import FORMATS, decode_values, encode_values, get_format
from zo_offload.journal.journal import pack_header, pack_step, read_journal
from zo_offload.kernels.records import Perturbation
from zo_offload.methods import method_from
from zo_offload.numerics.fused import fused_pass
from zo_offload.numerics.updates import with_folds
from zo_offload.replay import replayed
from zo_offload.run.auto import compare, rates

TRAINED = [name for name, fmt in FORMATS.items() if fmt.trains]
FROZEN = [name for name, fmt in FORMATS.items() if not fmt.trains]
QZO_METHOD = QZO(lr=1e-6, batch_size=4)


def f32(x):
    return torch.tensor(x, dtype=torch.float32).item()


@pytest.mark.parametrize("storage", TRAINED)
def test_every_format_that_trains_trains(storage):
    with Engine(tiny_llama(), method=METHOD, storage=storage, offload="host") as engine:
        base = stored_weights(engine)
        losses = engine.fit(batches(), steps=5).losses
        assert len(set(losses)) == 5
        weights = stored_weights(engine)
        assert all(not torch.equal(base[name], weights[name]) for name in base if base[name].dim() > 1)
        for name, fmt in engine.layout.formats.items():
            plain = storage in ("fp32", "bf16", "fp16")
            assert fmt.name == (storage if plain or base[name].dim() > 1 else "fp32"), name


@pytest.mark.parametrize("storage", ["int4", "int8", "fp8_e4m3", "int8+8"])
def test_the_base_is_encoded_as_the_codec_says(storage):
    model, fmt = tiny_llama(), get_format(storage)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    shift = QZOShift(batch_size=4)  # int4 as it is: QZO keeps centres
    with Engine(model, storage=storage, method=shift if storage == "int4" else METHOD) as engine:
        for name, value in engine.weights():
            if value.dim() > 1:
                parts = encode_values(base[name], fmt)
                want = decode_values(*parts, fmt, base[name].numel()).to(fmt.torch_dtype)
                assert torch.equal(value.reshape(-1), want), name
            else:
                assert torch.equal(value, base[name]), name


def test_what_keep_names_stays_as_it_was():
    with Engine(tiny_llama(dtype=torch.bfloat16), storage="int8+8", keep=["embed_tokens", "lm_head"]) as engine:
        kept = {name: fmt.name for name, fmt in engine.layout.formats.items()}
    assert kept["model.embed_tokens.weight"] == kept["lm_head.weight"] == kept["model.norm.weight"] == "fp32"
    assert kept["model.layers.0.mlp.up_proj.weight"] == "int8+8"
    with pytest.raises(PlanError, match="keep='nowhere' selects none"):
        Engine(tiny_llama(), storage="int8+8", keep="nowhere")


# ---- scales ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [QZO_METHOD, QZOShift(lr=1e-6, batch_size=4)], ids=lambda method: method.name)
@pytest.mark.parametrize("storage", ["int4", "nf4", "int8"])
def test_scales_train_and_codes_do_not(storage, method, tmp_path):
    """The journal's updates, applied to the base's scales one by one, give the weights; codes are the base's."""
    fmt, steps = get_format(storage), []
    fmt, gain = (fmt.about_centre, f32(1 / fmt.code_rms)) if method.name == "qzo" else (fmt, 1.0)
    base = {name: p.detach().clone() for name, p in tiny_llama().named_parameters()}
    with Engine(tiny_llama(), method=method, storage=storage, offload="host", fold_every=4) as engine:
        result = engine.fit(batches(), steps=10, callback=lambda record: steps.append(record.updates))
        weights, plan = stored_weights(engine), engine.plan
    assert len(set(result.losses)) == 10
    moved = 0
    for name, value in base.items():
        if value.dim() < 2:
            assert not plan.params[name].trainable and torch.equal(weights[name], value), name
            continue
        stored, _ = encode_values(value, fmt)
        start, nbytes = fmt.scales_span(value.numel())
        before = stored.clone()
        out = torch.empty(value.numel(), dtype=fmt.torch_dtype)
        for updates in steps:  # one call a step; that the engine's last two are still pending makes no difference
            fused_pass(
                stored, fmt, param_id=plan.params[name].param_id, numel=value.numel(),
                updates=with_folds([replace(u, coeff=f32(f32(u.coeff) * gain)) for u in updates], 0, 1),
                noise=method.noise, target="scales",
                perturbations=[Perturbation(0, 0.0)], outs=[out],
            )  # fmt: skip
        changed = (stored != before).nonzero().reshape(-1)
        assert len(changed) and changed.min() >= start and changed.max() < start + nbytes
        assert torch.equal(weights[name].reshape(-1), out), name
        moved += 1
    assert moved > 10


def test_scales_are_the_same_in_every_tier_and_after_a_resume(tmp_path):
    settings = dict(method=QZO_METHOD, storage="int4", fold_every=3)
    resident = train(tiny_opt(), 8, offload="none", **settings)
    ways = [dict(offload="host"), dict(offload="disk", num_slots=2), dict(offload="disk", order="block")]
    for i, way in enumerate(ways):
        run_dir = tmp_path / str(i)
        assert_same(resident, train(tiny_opt(), 8, run_dir=run_dir, **settings, **way))
    never = train(tiny_opt(), 12, **settings)
    with Engine.resume(run_dir, tiny_opt()) as engine:
        assert isinstance(engine.method, QZO)
        rest = engine.fit(batches(), steps=12).losses
        assert_same(never, (resident[0] + rest, stored_weights(engine)))


def test_eps_and_lr_of_qzo_are_in_units_of_weights_in_every_format():
    """Perturbed weights differ from each other by eps on average, with no mean; a step moves them by lr * grad."""
    found = {}
    for storage in ("int4", "int4_g64", "nf4", "int8"):
        seen = []
        model = Recording(torch.randn(512, 256, generator=torch.Generator().manual_seed(0)) * 0.02, seen)
        with Engine(model, method=QZO(lr=1e-3, eps=1e-3), storage=storage, objective=lambda m, b: m(b["x"])) as engine:
            before = dict(engine.weights())["w"].float()
            seen.clear()
            record = engine.step({"x": torch.ones(1)})
            after = dict(engine.weights())["w"].float()
        direction = (seen[0] - seen[1]).double() / 2
        assert direction.square().mean().sqrt() == pytest.approx(1e-3, rel=0.15), storage
        assert direction.view(-1, get_format(storage).group).mean(1).square().mean().sqrt() < 4e-4, storage
        moved = (after - before).double().square().mean().sqrt()
        found[storage] = float(moved) / (1e-3 * abs(record.grad))
    assert all(0.7 < ratio < 1.3 for ratio in found.values()), found


class Recording(nn.Module):
    """A weight, and what each lane sees of it, told outside of the module: what lanes leave in one is put back."""

    def __init__(self, w, seen):
        super().__init__()
        self.w, self.record = nn.Parameter(w), lambda value: seen.append(value)

    def forward(self, x):
        self.record(self.w.detach().clone())
        return (self.w.double() * torch.linspace(-1, 1, self.w.numel()).view(self.w.shape)).sum() * x.sum()


@pytest.mark.parametrize("storage", ["int4", "nf4"])
def test_a_qzo_run_of_before_goes_on_as_the_group_shifts_that_it_was(storage, tmp_path):
    """Its record has no units: continued and replayed it is bit-equal to QZOShift, never the QZO of today."""
    shift, run_dir = QZOShift(lr=1e-6, batch_size=4), tmp_path / "run"
    never = train(tiny_opt(), 6, method=shift, storage=storage)
    train(tiny_opt(), 4, method=shift, storage=storage, run_dir=run_dir, offload="disk")
    as_before(run_dir)
    with Engine.resume(run_dir, tiny_opt()) as engine:
        assert engine.method == shift
        rest = engine.fit(batches(), steps=6).losses
        assert_same(never, (never[0][:4] + rest, stored_weights(engine)))
    with replayed(tiny_opt(), run_dir) as engine:
        assert_same(never[1], stored_weights(engine))
    assert train(tiny_opt(), 6, method=QZO(lr=1e-6, batch_size=4), storage=storage)[0] != never[0]


def as_before(run_dir):
    """Write a run's records as they were when QZOShift was named qzo, and headers had no gains."""
    config = json.loads((run_dir / "config.json").read_text())
    config["method"]["name"] = "qzo"
    del config["method"]["tunes"]
    (run_dir / "config.json").write_text(json.dumps(config))
    contents = read_journal((run_dir / "journal.zoj").read_bytes())
    header = dict(contents.header)
    header["method"] = {**header["method"], "name": "qzo"}
    del header["gains"]
    data, chain = pack_header(header), None
    chain = zlib.crc32(data[:-4])
    for record in contents.steps:
        packed, chain = pack_step(record, chain)
        data += packed
    (run_dir / "journal.zoj").write_bytes(data)
    shutil.rmtree(run_dir / "blocks")  # their checksums name the journal as it was


def test_a_method_in_units_that_are_not_known_is_refused():
    assert method_from({"name": "qzo", "units": "weights", "lr": 1e-4}) == QZO(lr=1e-4, noise_layout=1)
    with pytest.raises(ConfigError, match="units of 'furlongs'"):
        method_from({"name": "qzo", "units": "furlongs"})


def test_only_scales_are_flushed():
    with Engine(tiny_opt(), method=QZO_METHOD, storage="int4", offload="host", fold_every=1) as engine:
        result = engine.fit(batches(), steps=8)
        layout = engine.layout
    assert 0 < result.flush_bytes <= 8 * 0.08 * layout.total_bytes


def test_the_projected_gradient_is_clipped():
    losses = (5.0, 1.0)  # (5 - 1) / 2e-3 = 2000
    method = QZO(lr=1e-5, eps=1e-3, clip=100.0)
    step = method.update(0, 0, losses, method.lr)
    assert step.grad == 100.0 and step.updates[0].coeff == pytest.approx(1e-3)
    assert method.update(0, 0, losses[::-1], method.lr).grad == -100.0
    assert MeZO(eps=1e-3).update(0, 0, losses, 1e-5).grad == pytest.approx(2000, rel=1e-5)
    with pytest.raises(ConfigError, match="clip=0"):
        QZO(clip=0)


# ---- a small trained part --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [None, "bf16", "int8", "int4", "nf4"])
def test_adapters_train_on_a_frozen_base_of_any_format(storage, tmp_path):
    def run(**way):
        return train(with_adapters(tiny_llama()), 9, storage=storage, **ADAPTED, **way)

    resident = run(offload="none")
    assert len(set(resident[0])) == 9
    base = dict(with_adapters(tiny_llama()).named_parameters())
    for name, value in resident[1].items():
        adapter = name.endswith((".a", ".b"))
        assert value.dtype == torch.float32 or not adapter
        if adapter:
            assert not torch.equal(value, base[name]), name
    ways = [dict(offload="host"), dict(offload="disk", num_slots=2, order="block"), dict(offload="disk")]
    for i, way in enumerate(ways):
        assert_same(resident, run(run_dir=tmp_path / f"run{i}", **way))


def test_nothing_is_flushed_while_adapters_train(tmp_path):
    with Engine(with_adapters(tiny_llama()), storage="int4", offload="host", **ADAPTED) as engine:
        for batch in batches(9):
            engine.step(batch)
        streamer = engine.active.streamer
        (resident,) = engine.plan.resident
        assert streamer.traffic.flush_bytes == 0
        assert set(engine.plan.blocks[resident].params) == {n for n, s in engine.plan.params.items() if s.trainable}
        assert resident in engine.memory.window.pinned and resident not in engine.plan.visits


def test_adapters_match_plain_mezo_on_the_same_frozen_weights():
    """In float32 with a float32 base the engine is MeZO on the adapters alone, whatever block they are in."""
    small = train(with_adapters(tiny_llama()), 6, **ADAPTED, offload="host")
    everywhere = dict(with_adapters(tiny_llama()).named_parameters())
    changed = [name for name, value in small[1].items() if not torch.equal(value, everywhere[name])]
    assert sorted(changed) == sorted(n for n in everywhere if n.endswith((".a", ".b")))


def test_a_run_with_adapters_resumes(tmp_path):
    settings = dict(storage="int4", **ADAPTED)
    never = train(with_adapters(tiny_llama()), 11, **settings)
    first = train(with_adapters(tiny_llama()), 6, offload="disk", run_dir=tmp_path / "run", **settings)
    with Engine.resume(tmp_path / "run", with_adapters(tiny_llama())) as engine:
        rest = engine.fit(batches(), steps=11).losses
        assert_same(never, (first[0] + rest, stored_weights(engine)))


def test_norms_train_on_a_frozen_base():
    method = MeZO(lr=1e-3, batch_size=4)
    with Engine(tiny_llama(), method=method, storage="int4", trainable="*norm*", offload="host") as engine:
        base = stored_weights(engine)
        engine.fit(batches(), steps=5)
        for name, value in engine.weights():
            assert torch.equal(value, base[name]) == ("norm" not in name), name


def test_peft_adapters_train_through_the_engine():
    peft = pytest.importorskip("peft", reason="pip install peft: only a plain LoRA was tested")

    def make():
        torch.manual_seed(7)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
        return peft.get_peft_model(tiny_llama(), config).eval()

    def run(**way):
        return train(make(), 6, storage="int4", **ADAPTED, **way)

    resident, streamed = run(offload="none"), run(offload="host")
    assert_same(resident, streamed)
    base = dict(make().named_parameters())
    moved = {name for name, value in resident[1].items() if "lora_" in name and not torch.equal(value, base[name])}
    assert moved == {name for name in base if "lora_" in name}


# ---- what cannot work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(storage="int3"), "storage='int3': choose one of"),
        (dict(storage="int4"), "never rewritten, but .* are to train.*QZO.*int8\\+8"),
        (dict(storage="nf4", trainable="layers.*.mlp"), "never rewritten"),
        (dict(storage="bf16", method=QZO_METHOD), "storage='bf16' has none"),
        (dict(method=QZO_METHOD), "own dtype has none"),
        (dict(storage="int4", method=QZO_METHOD, trainable="norm"), "no scales to train"),
    ],
)
def test_formats_that_cannot_train_what_is_asked_are_refused(settings, message):
    with pytest.raises(ZOError, match=message):
        Engine(tiny_llama(), **{"method": METHOD, **settings})


@pytest.mark.parametrize("storage", ["bf16+16", "int8+8", "fp8_e4m3"])
def test_a_base_with_nan_is_named(storage):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = math.inf
    with pytest.raises(ZOError, match=r"layers.1.mlp.up_proj.weight.*1 of"), Engine(model, storage=storage) as engine:
        engine.evaluate(batches(1))


# ---- auto ------------------------------------------------------------------------------------------------------------


def test_auto_takes_float32_where_nothing_moves_and_int8_masters_where_it_streams(tmp_path):
    with Engine(tiny_llama(), method=METHOD, storage="auto", offload="none") as engine:
        assert engine.config.storage == "fp32" and "nothing has to move" in engine.decided[0]
    run = tmp_path / "run"
    with Engine(tiny_llama(), method=METHOD, storage="auto", offload="disk", run_dir=run) as engine:
        assert engine.config.storage == "int8+8" and "moves the least" in engine.decided[0]
        engine.fit(batches(), steps=2)
        weights = stored_weights(engine)
    with Engine.resume(run, tiny_llama(), offload="none") as engine:  # what was decided once holds for the run
        assert engine.config.storage == "int8+8"
        assert_same(weights, stored_weights(engine))


def test_auto_says_what_would_fit_a_host_that_is_too_small(monkeypatch):
    import zo_offload.run.auto as auto

    monkeypatch.setattr(auto, "available_bytes", lambda: 30_000)
    with pytest.raises(BudgetError, match=r"int8\+8, takes .*30.0 kB is free.*offload='disk'.*int4.*QZO"):
        Engine(tiny_llama(), storage="auto", offload="host")


def test_formats_compare_by_the_bytes_they_move():
    with Engine(tiny_llama(layers=8)) as engine:
        plan, base = engine.plan, engine.base
    found = compare(plan, base.dtype_of, fold_every=4, link_seconds=lambda fetched, flushed: (fetched + flushed) / 1e6)
    choices = {choice.name: choice for choice in found}
    assert set(choices) == set(FORMATS)
    bf16, int8, int4 = choices["bf16"], choices["int8+8"], choices["int4"]
    assert int8.fetch_bytes < bf16.fetch_bytes and int4.flush_bytes < 0.1 * bf16.flush_bytes
    assert bf16.seconds == pytest.approx(bf16.wire_bytes / 1e6)
    order = [choice.wire_bytes for choice in choices.values()]
    assert order == sorted(order, reverse=True)


def test_the_plan_for_a_gpu_counts_both_ways_of_its_link_at_once():
    link = rates("cuda", 10.0)  # given, so nothing is measured, there or not
    assert link.link_seconds(20e9, 5e9) == pytest.approx(2.0) and "10.0 + 10.0 GB/s both at once (given)" in link.note
    disk = rates("cpu", 10.0)
    assert disk.link_seconds(20e9, 5e9) == pytest.approx(2.5) and "10.0 GB/s (given" in disk.note


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and is measured")
def test_the_plan_for_a_gpu_that_is_not_here_says_what_it_takes_its_link_to_be():
    link = rates("cuda")
    assert link.pass_seconds is None
    assert "25.0 GB/s in" in link.note and "no GPU here to measure" in link.note and "not counted" in link.note
