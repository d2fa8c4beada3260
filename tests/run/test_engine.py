"""The engine's contract: same numbers wherever the blocks live, however they move, and whenever the run was stopped."""

from __future__ import annotations

import builtins
import copy
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from support.compare import assert_same
from support.plain_mezo import run as plain_mezo
from support.training import METHOD, batches, in_words, placed, resident, stored_weights, train
from support.zoo.small import tiny_llama, tiny_opt
from zo_offload import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DataError,
    DivergenceError,
    Engine,
    JournalError,
    MeZO,
    PlanError,
    StorageError,
    ZOError,
)
from zo_offload.stream.streamer import Streamer
from zo_offload.tiers.disk import DATA

WAYS = [
    dict(offload="host"),
    dict(offload="host", num_slots=2),
    dict(offload="host", num_slots=2, prefetch=0),
    dict(offload="host", num_slots=5, prefetch=3, io_threads=3),
    dict(offload="host", overlap=False, num_slots=1),
    dict(offload="disk"),
    dict(offload="disk", num_slots=2, io_threads=2),
    dict(offload="disk", overlap=False),
    dict(offload="disk", order="block"),
    dict(offload="none", order="block"),
    dict(offload="none", threads=1),
    dict(offload="none", threads=3),
    dict(offload="disk", device_memory="100MB"),
    dict(offload="disk", device_memory=400_000, order="block"),
]


@pytest.mark.parametrize("make", [tiny_opt, tiny_llama])
@pytest.mark.parametrize("way", WAYS, ids=in_words)
def test_where_and_how_blocks_move_changes_nothing(make, way, tmp_path):
    """Ten steps: folds at 4 and 8, where steps fold every 4, and two steps pending. Ways take turns with formats."""
    storage = ("fp32", "bf16", "fp16")[(WAYS.index(way) + (make is tiny_opt)) % 3]
    want = resident(make, 10, storage=storage)
    assert_same(train(make(), 10, storage=storage, **placed(way, tmp_path)), want)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_rounding_and_noise_are_the_same_in_every_tier(rounding, distribution, tmp_path):
    method = MeZO(lr=1e-3, distribution=distribution, rounds=7, batch_size=4)
    settings = dict(method=method, storage="bf16", rounding=rounding, steps=8)
    resident = train(tiny_llama(), offload="none", **settings)
    assert_same(resident, train(tiny_llama(), offload="disk", run_dir=tmp_path / "run", **settings))


def test_stochastic_rounding_differs_from_nearest():
    nearest = train(tiny_llama(), steps=4, storage="bf16")[1]
    stochastic = train(tiny_llama(), steps=4, storage="bf16", rounding="stochastic")[1]
    assert any(not torch.equal(nearest[n], stochastic[n]) for n in nearest)


def test_micro_batches_are_lanes_of_the_same_step(tmp_path):
    data = batches(6, rows=8)
    whole = train(tiny_opt(), 6, data)
    parts = train(tiny_opt(), 6, data, micro_batches=4)
    again = train(tiny_opt(), 6, data, micro_batches=4, offload="disk", order="block", run_dir=tmp_path / "r")
    assert_same(parts, again)
    # the mean over parts is the mean over rows up to the rounding of float32 sums
    assert parts[0] == pytest.approx(whole[0], rel=2e-5)


def test_losses_of_parts_add_up_as_on_any_python(monkeypatch):
    """From Python 3.12 on, sum() of floats is compensated; a GPU, and Python 3.11, round at each addition. Losses of
    float32 add up exactly: these have all bits of a float64."""
    plain = builtins.sum

    def objective(model, batch):
        return model(**batch).loss.double() / 3

    def compensated(values, start=0):
        values = list(values)
        return math.fsum([start, *values]) if all(type(value) is float for value in values) else plain(values, start)

    data = batches(6, rows=8)
    found = train(tiny_opt(), 6, data, micro_batches=8, objective=objective)
    assert compensated([0.1] * 10) == 1.0
    monkeypatch.setattr(builtins, "sum", compensated)
    assert_same(found, train(tiny_opt(), 6, data, micro_batches=8, objective=objective))


@pytest.mark.parametrize("make", [tiny_opt, tiny_llama])
def test_a_step_is_mezo(make):
    """Against Algorithm 1 in float64: the projected gradient is off by what float32 losses are, the weights by that.

    How float32 losses round differs between CPUs, so a second float32 run would be no measure of it.
    """
    data = batches(5)
    settings = dict(lr=1e-3, eps=1e-3, weight_decay=0.1)
    exact = make().double()
    pairs = plain_mezo(exact, data, **settings)
    grads = []
    with Engine(make(), method=MeZO(batch_size=4, **settings)) as engine:
        losses = engine.fit(data, steps=5, callback=lambda record: grads.append(record.grad)).losses
        weights = stored_weights(engine)
    assert losses == pytest.approx([sum(pair) / 2 for pair in pairs], rel=1e-6)
    off = [abs(grad - (up - down) / 2e-3) for grad, (up, down) in zip(grads, pairs, strict=True)]
    ulp = 2.0**-21  # of a loss in [4, 8)
    assert max(losses) < 8 and max(off) < 16 * ulp / 2e-3
    start = {n: p.detach() for n, p in make().named_parameters()}
    error = max(float((weights[n] - p.detach()).abs().max()) for n, p in exact.named_parameters())
    moved = max(float((p.detach() - start[n]).abs().max()) for n, p in exact.named_parameters())
    assert error < sum(off) * 1e-3 * 6.6 + 5 * 2.0**-23  # |z| < 6.6; five steps of float32 weights around 1
    assert moved > 1000 * error


@pytest.mark.parametrize("offload", ["none", "host", "disk"])
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_stopped_and_resumed_is_never_stopped(offload, storage, tmp_path):
    make, settings = tiny_opt, dict(storage=storage, method=METHOD, offload=offload)
    never = train(make(), 12, **{**settings, "run_dir": tmp_path / "never"})
    with Engine(make(), run_dir=tmp_path / "run", **settings) as engine:
        first = engine.fit(batches(), steps=5).losses
    with Engine.resume(tmp_path / "run", make()) as engine:
        rest = engine.fit(batches(), steps=12).losses
        assert len(rest) == 7
        assert_same(never, (first + rest, stored_weights(engine)))
    other = "disk" if offload != "disk" else "host"  # the tier may change
    if other == "host":
        with Engine.resume(tmp_path / "run", make(), offload=other) as engine:
            assert_same((never[0], never[1]), (never[0], stored_weights(engine)))


def test_evaluation_in_between_changes_nothing(tmp_path):
    def run(every, **settings):
        with Engine(tiny_llama(), method=METHOD, storage="bf16", **settings) as engine:
            result = engine.fit(batches(), steps=9, eval_data=batches(2), eval_every=every)
            return result, stored_weights(engine)

    often, once = run(1, offload="none"), run(100, offload="disk", run_dir=tmp_path / "run")
    assert_same((often[0].losses, often[1]), (once[0].losses, once[1]))
    assert often[0].evals[-1] == once[0].evals[-1]
    assert [e["step"] for e in often[0].evals] == list(range(1, 10))


def test_evaluation_sees_the_last_update(tmp_path):
    """The deferred update of the last step is part of what evaluation, export and restore see."""
    data = batches(3)
    with Engine(tiny_opt(), method=METHOD) as engine:
        engine.fit(data, steps=3)
        value = engine.evaluate(data[:1])["loss"]
        engine.save_pretrained(tmp_path / "out")
        model = engine.restore()
    with torch.no_grad():
        assert value == float(model(**data[0]).loss)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for name, p in model.named_parameters():
        assert torch.equal(p, dict(exported.named_parameters())[name])


def test_a_module_in_memory_is_exported_with_its_tokenizer_and_again_when_asked(tmp_path):
    class Tokenizer:
        def save_pretrained(self, directory):
            (directory / "tokenizer.json").write_text("{}")

    with Engine(tiny_opt(), method=METHOD, tokenizer=Tokenizer()) as engine:
        engine.save_pretrained(tmp_path / "out")
        assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
        engine.fit(batches(1), steps=1)
        with pytest.raises(CheckpointError, match="not empty"):
            engine.save_pretrained(tmp_path / "out")
        engine.save_pretrained(tmp_path / "out", overwrite=True)
        model = engine.restore()
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    assert all(torch.equal(p, exported[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("storage", [None, "bf16"])
def test_export_gives_the_same_logits_in_plain_transformers(storage, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    batch = batches(1)[0]
    with Engine(tmp_path / "base", method=METHOD, storage=storage, offload="disk", run_dir=tmp_path / "run") as engine:
        engine.fit(batches(), steps=4)
        with torch.no_grad():
            want, again = engine.run(batch).logits, engine.run(batch).logits
        weights = stored_weights(engine)
        engine.save_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for name, p in plain.named_parameters():
        assert torch.equal(p.detach(), weights[name].float()), f"{name} was exported otherwise than it is read"
    with torch.no_grad():
        found, found_again = plain(**batch).logits, plain(**batch).logits
    assert torch.equal(want, again), "two runs of the engine differ"
    assert torch.equal(found, found_again), "two runs of the plain model differ"
    assert torch.equal(found, want), f"off by {(found - want).abs().max()} at {(found != want).nonzero()[:5].tolist()}"


def test_what_is_not_trainable_is_neither_perturbed_nor_written(tmp_path):
    base = {n: p.detach().clone() for n, p in tiny_opt().named_parameters()}
    with Engine(
        tiny_opt(), method=METHOD, trainable="layers.*.self_attn", offload="disk", run_dir=tmp_path / "run"
    ) as engine:
        losses = engine.fit(batches(), steps=6).losses
        weights = stored_weights(engine)
        flushed = engine.active.streamer.traffic.flush_bytes
    model = tiny_opt()
    pairs = plain_mezo(model, batches(6), lr=1e-3, eps=1e-3, weight_decay=0.1, trainable=lambda n: "self_attn." in n)
    assert losses == pytest.approx([sum(p) / 2 for p in pairs], rel=1e-4)
    for name in base:
        assert torch.equal(base[name], weights[name]) == ("self_attn." not in name), name
    trained = sum(p.numel() * 4 for n, p in base.items() if "self_attn." in n)
    assert flushed <= 6 * (trained + 64 * len(base)), "only the trained ranges go back"


def test_a_checkpoint_and_the_same_module_in_memory_train_alike(tmp_path):
    tiny_opt().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    from_path = train(str(tmp_path / "base"), 6, offload="disk", run_dir=tmp_path / "run")
    assert_same(from_path, train(tiny_opt(), 6))


def test_any_callable_is_an_objective():
    """A non-differentiable one: the share of wrong next tokens."""

    def wrong(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits
        return float((logits[:, :-1].argmax(-1) != batch["input_ids"][:, 1:]).float().mean())

    with Engine(tiny_opt(), method=METHOD, objective=wrong) as engine:
        losses = engine.fit(batches(), steps=3).losses
    assert all(0 <= loss <= 1 for loss in losses)


# ---- crashes and faults ----------------------------------------------------------------------------------------------

CRASHING = """
import sys, os, signal, torch
sys.path.insert(0, {tests!r})
from support.training import METHOD, batches
from support.zoo.small import tiny_opt
from zo_offload import Engine
engine = Engine(tiny_opt(), method=METHOD, storage="bf16", offload="disk", run_dir={run!r})
def kill(record):
    if record.step == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
engine.fit(batches(), steps=12, callback=kill)
"""


@pytest.mark.parametrize("at", [0, 4])
def test_a_killed_run_resumes_bit_for_bit(at, tmp_path):
    here = os.path.dirname(os.path.dirname(__file__))
    code = CRASHING.format(tests=here, run=str(tmp_path / "run"), at=at)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    never = train(tiny_opt(), 12, storage="bf16")
    with Engine.resume(tmp_path / "run", tiny_opt()) as engine:
        rest = engine.fit(batches(), steps=12).losses
        assert rest == never[0][at + 1 :]
        assert_same(never, (never[0], stored_weights(engine)))


def damage(path, offset, count=1):
    data = bytearray(path.read_bytes())
    for at in range(offset, offset + count):
        data[at] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("both", [False, True])
def test_a_damaged_block_is_brought_back_from_its_other_generation_or_the_base(both, tmp_path, caplog):
    settings = dict(offload="disk", run_dir=tmp_path / "run", snapshot_steps=1, fold_every=1)
    tiny_opt().save_pretrained(tmp_path / "base")
    with Engine(str(tmp_path / "base"), method=METHOD, **settings) as engine:
        engine.fit(batches(), steps=9)
        want = stored_weights(engine)
    path = tmp_path / "run" / "blocks" / "00002.zob"
    versions = [int.from_bytes(path.read_bytes()[page + 16 : page + 24], "little") for page in (0, 4096)]
    assert 0 < min(versions) < max(versions) == 9
    areas = [DATA + 100, path.stat().st_size - 100]  # of generations 0 and 1
    damage(path, areas[versions.index(9)])
    if both:
        damage(path, areas[1 - versions.index(9)])
    with Engine.resume(tmp_path / "run") as engine:
        assert_same(want, stored_weights(engine))
    assert "00002.zob: generation" in caplog.text and ("rebuilding block 2" in caplog.text) == both


def test_a_full_disk_stops_the_run_and_nothing_is_lost(tmp_path, monkeypatch):
    never = train(tiny_opt(), 8)
    real, count = os.pwritev, [0]

    def full(*args):
        count[0] += 1
        if count[0] > 90:
            raise OSError(28, "No space left on device")
        return real(*args)

    engine = Engine(tiny_opt(), method=METHOD, offload="disk", fold_every=1, run_dir=tmp_path / "run")
    engine.active.start()
    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(StorageError, match=r"writing .*zob: No space left on device.*free there.*then resume"):
        engine.fit(batches(), steps=8)
    with pytest.raises(StorageError, match="No space"):
        engine.close()
    monkeypatch.undo()
    with Engine.resume(tmp_path / "run", tiny_opt()) as engine:
        engine.active.start()
        assert 0 < engine.log.version < 8
        engine.fit(batches(), steps=8)
        assert_same(never, (never[0], stored_weights(engine)))


def test_an_exception_in_the_objective_leaves_the_engine_usable(tmp_path):
    calls = [0]

    def flaky(model, batch):
        calls[0] += 1
        loss = model(**batch).loss
        if calls[0] in range(6, 9):  # lanes run in lockstep: the count moves by two
            calls[0] = 100
            raise RuntimeError("user code failed")
        return loss

    never = train(tiny_opt(), 8)
    with Engine(tiny_opt(), method=METHOD, objective=flaky, offload="disk", run_dir=tmp_path / "run") as engine:
        with pytest.raises(RuntimeError, match="user code failed"):
            engine.fit(batches(), steps=8)
        engine.fit(batches(), steps=8)
        assert_same(never[1], stored_weights(engine))


class Slow:
    """A disk that takes its time: fetches and flushes end late and out of step with the compute."""

    def __init__(self, tier, fetch_s, flush_s):
        self.tier, self.fetch_s, self.flush_s = tier, fetch_s, flush_s

    def fetch(self, *args):
        time.sleep(self.fetch_s)
        self.tier.fetch(*args)

    def flush(self, *args):
        time.sleep(self.flush_s)
        self.tier.flush(*args)

    def __getattr__(self, name):
        return getattr(self.tier, name)


@pytest.mark.parametrize("delays", [(0.0, 0.01), (0.01, 0.0), (0.003, 0.006)])
def test_slow_copies_lose_no_race(delays, monkeypatch):
    """Wide shallow blocks, long copies, short compute; the schedule's waits are all that keeps it right."""
    want = train(tiny_opt(), 4)
    made = Streamer.__init__

    def slow(self, plan, layout, tier, *args, **kwargs):
        made(self, plan, layout, Slow(tier, *delays), *args, **kwargs)

    monkeypatch.setattr(Streamer, "__init__", slow)
    for settings in (dict(num_slots=2), dict(num_slots=3, io_threads=2, fold_every=1), dict(num_slots=4, prefetch=2)):
        assert_same(want, train(tiny_opt(), 4, offload="host", **settings))


# ---- what users get wrong ----------------------------------------------------------------------------------------


def test_a_diverging_run_stops_with_its_weights_intact(tmp_path):
    good = train(tiny_opt(), 3)

    def objective(model, batch):
        loss = model(**batch).loss
        return loss * math.nan if engine.log.version == 3 else loss

    with Engine(tiny_opt(), method=METHOD, objective=objective) as engine:
        with pytest.raises(DivergenceError, match="step 3: losses nan and nan"):
            engine.fit(batches(), steps=8)
        assert_same(good[1], stored_weights(engine))


def test_nonfinite_steps_can_be_skipped_and_are_recorded(tmp_path):
    method = MeZO(lr=1e-3, batch_size=4, on_nonfinite="skip")

    def objective(model, batch):
        loss = model(**batch).loss
        return loss * math.nan if engine.log.version == 1 else loss

    with Engine(tiny_opt(), method=method, objective=objective, run_dir=tmp_path / "run", offload="none") as engine:
        engine.fit(batches(), steps=3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [False, True, False]


def test_an_update_that_overflows_the_format_is_refused():
    method = MeZO(lr=1e12, batch_size=4)
    with Engine(tiny_opt(), method=method, storage="fp16") as engine, pytest.raises(DivergenceError, match="overflow"):
        engine.fit(batches(), steps=2)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (dict(offload="ram"), ConfigError, "choose one of auto, none, host, disk"),
        (dict(storage="int3"), ConfigError, "storage='int3': choose one of"),
        (dict(offload="disk"), ConfigError, "needs run_dir"),
        (dict(num_slots=1), ConfigError, "needs a slot to compute in and one to fetch into"),
        (dict(prefetch=3), ConfigError, "expected 0..2"),
        (dict(device="cuda:99"), ConfigError, "built without CUDA|finds no GPU|GPUs"),
        (dict(device_memory="lots"), ConfigError, "expected a number of bytes"),
        (dict(seed=-1), ConfigError, "seed=-1"),
        (dict(offload="host", device_memory=1000), BudgetError, "largest block 'model.decoder.layers"),
        (dict(offload="none", device_memory=1000), BudgetError, "Use offload='disk'"),
        (dict(trainable="no.such"), ZOError, "selects none"),
        (dict(method=dict(lr=0.0)), ConfigError, "lr=0.0"),
        (dict(method=dict(eps=math.nan)), ConfigError, "eps=nan"),
        (dict(method=dict(schedule="sinus")), ConfigError, "sinus"),
        (dict(method=dict(lr=2.0, weight_decay=1.0)), ConfigError, "erase the weights"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_made(settings, error, message, tmp_path):
    with pytest.raises(error, match=message):
        settings = dict(settings)
        method = MeZO(**settings.pop("method", {}))
        Engine(tiny_opt(), method=method, **settings)


def test_wrong_paths_and_used_run_dirs_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        Engine(tmp_path / "nowhere")
    with pytest.raises(JournalError, match="not a run directory"):
        Engine.resume(tmp_path)
    with Engine(tiny_opt(), method=METHOD, offload="disk", run_dir=tmp_path / "run") as engine:
        engine.fit(batches(), steps=1)
    journal = (tmp_path / "run" / "journal.zoj").read_bytes()
    with pytest.raises(ConfigError, match="holds a run. Continue it with"):
        Engine(tiny_opt(), method=METHOD, offload="disk", run_dir=tmp_path / "run")
    assert (tmp_path / "run" / "journal.zoj").read_bytes() == journal
    with pytest.raises(ConfigError, match="pass it again"):
        Engine.resume(tmp_path / "run")
    with pytest.raises(JournalError, match="; base: the journal has "):
        other = tiny_opt()
        other.model.decoder.layers[0].fc1.weight.data.add_(1)
        with Engine.resume(tmp_path / "run", other, offload="host") as engine:
            engine.evaluate(batches(1))
    with pytest.raises(JournalError, match="seed"), Engine.resume(tmp_path / "run", tiny_opt(), seed=3) as engine:
        engine.evaluate(batches(1))


@pytest.mark.parametrize("batch", [None, "text", (torch.ones(2, 3),), {"input_ids": torch.empty(2, 3, device="meta")}])
def test_what_is_no_batch_is_said_in_words(batch):
    with Engine(tiny_opt(), method=METHOD) as engine, pytest.raises(DataError, match="of the batch|a batch is a dict"):
        engine.step(batch)


@pytest.mark.parametrize("lr", ["1e-3", 10**400, float("nan"), [1e-3, 1e-3], None.__class__])
def test_a_rate_of_a_step_is_a_number(lr):
    with Engine(tiny_opt(), method=METHOD) as engine:
        with pytest.raises(ConfigError, match="lr="):
            engine.step(batches(1)[0], lr=lr)
        assert engine.step(batches(1)[0], lr=torch.tensor(0.5)).lr == 0.5


@pytest.mark.parametrize("objective", ["loss", 3, lambda: 0.0, lambda model: 0.0, lambda model, batch, more: 0.0])
def test_an_objective_that_cannot_be_called_is_told_at_once(objective):
    with pytest.raises(ConfigError, match=r"objective=.*expected a function \(model, batch\) -> loss"):
        Engine(tiny_opt(), method=METHOD, objective=objective)


def test_a_loss_that_no_float_holds_is_no_finite_loss():
    with (
        Engine(tiny_opt(), method=METHOD, objective=lambda model, batch: 10**400) as engine,
        pytest.raises(DivergenceError, match="losses inf and inf"),
    ):
        engine.step(batches(1)[0])


def test_a_lazy_module_is_to_be_called_first():
    with pytest.raises(PlanError, match=r"parameter 'weight' of LazyLinear has no shape yet.*one batch"):
        Engine(nn.LazyLinear(3), method=METHOD)


def test_weights_of_a_closed_engine_are_not_asked_for(tmp_path):
    engine = Engine(tiny_opt(), method=METHOD, offload="disk", run_dir=tmp_path / "run")
    engine.step(batches(1)[0])
    engine.close()
    with pytest.raises(ConfigError, match="this engine is closed"):
        engine.weights()


def test_nan_in_the_base_is_found_while_it_is_read():
    model = tiny_opt()
    model.model.decoder.layers[1].fc2.weight.data[3, 4] = math.nan
    with pytest.raises(CheckpointError, match=r"layers.1.fc2.weight.*1 of"):
        Engine(model).fit(batches(), steps=1)


def test_values_a_format_cannot_hold_are_refused():
    model = tiny_opt()
    model.model.decoder.layers[1].fc2.weight.data[3, 4] = 1e6
    with pytest.raises(CheckpointError, match="more than fp16 can hold"):
        Engine(model, storage="fp16").fit(batches(), steps=1)


def test_the_model_is_not_run_while_its_weights_are_away():
    model = tiny_opt()
    with Engine(model, method=METHOD) as engine:
        engine.fit(batches(), steps=1)
        with pytest.raises(ZOError):
            model(**batches(1)[0])
        engine.restore()
    assert torch.isfinite(model(**batches(1)[0]).loss)


def test_plain_modules_train_too(tmp_path):
    def make():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=g)
    data = [{"x": row, "y": row.sum(0, keepdim=True)} for row in x]
    objective = lambda m, b: (m(b["x"]) - b["y"]).square().mean()  # noqa: E731
    method = MeZO(lr=5e-3, eps=1e-3, batch_size=64)
    with Engine(copy.deepcopy(make()), method=method, objective=objective) as engine:
        losses = engine.fit(data, steps=200).losses
    assert losses[-1] < 0.5 * losses[0]
    with Engine(
        make(), method=method, objective=objective, offload="disk", run_dir=tmp_path / "run"
    ) as engine:  # fmt: skip
        assert engine.fit(data, steps=200).losses == losses


def test_a_model_that_reads_what_its_lanes_write_runs_one_lane_after_another(tmp_path):
    """Order "auto" falls back to lane order by itself; a given order is kept and refused with the way out."""

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)
            self.register_buffer("kept", torch.zeros(4, 4))

        def forward(self, x):
            self.kept.copy_(self.first(x))
            return self.second(torch.tanh(x)) * self.kept.mean()

    def losses(**settings):
        torch.manual_seed(0)
        with Engine(Keeps(), method=MeZO(lr=1e-2, batch_size=4), objective=objective, **settings) as engine:
            return engine.fit(rows, steps=5).losses

    rows = [{"x": x} for x in torch.randn(8, 4, generator=torch.Generator().manual_seed(2))]
    objective = lambda m, b: m(b["x"]).square().mean()  # noqa: E731
    assert losses() == losses(order="lane") == losses(offload="disk", run_dir=tmp_path / "run")
    with pytest.raises(ZOError, match="order='lane'"):
        losses(order="module")


def test_weights_read_one_by_one_may_be_interleaved_with_steps(tmp_path):
    """Reading uses the window's memory between passes; it must not hand a half-fetched block to the next step."""
    want = train(tiny_opt(), 6)
    with Engine(tiny_opt(), method=METHOD, offload="disk", run_dir=tmp_path / "run") as engine:
        reading = engine.weights()
        for batch in batches(6):
            engine.step(batch)
            next(reading)
        assert_same(want[1], stored_weights(engine))
