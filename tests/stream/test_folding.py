"""Folding: updates stay pending in float32 until a fixed step; nobody who reads the weights can tell."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.compare import assert_same
from support.training import METHOD, batches, in_words, placed, resident, stored_weights, train
from support.zoo.small import tiny_llama, tiny_opt
from zo_offload import ConfigError, Engine, JournalError, MeZO
from zo_offload.kernels.records import Update
from zo_offload.numerics.updates import UpdateLog, with_folds

STEPS = 10  # folds at 8 with K = 4 and 8: two steps are still pending at the end
WAYS = [
    dict(offload="host"),
    dict(offload="host", num_slots=2, prefetch=0),
    dict(offload="host", num_slots=5, io_threads=3),
    dict(offload="host", overlap=False, num_slots=1),
    dict(offload="disk"),
    dict(offload="disk", order="block", num_slots=2),
    dict(offload="disk", device_memory=400_000, order="block"),  # some blocks pinned, some streamed
]


def test_folds_are_set_by_the_step_and_only_on_its_last_update():
    updates = [Update(1, 0.5), Update(2, 0.5)]
    flags = [[u.fold for u in with_folds(updates, step, 3)] for step in range(6)]
    assert flags == [[False, False], [False, False], [False, True]] * 2
    assert with_folds((), 2, 3) == ()


def test_the_log_brings_blocks_to_the_last_fold():
    log = UpdateLog()
    folded = []
    for step in range(8):
        log.append(() if step == 3 else with_folds([Update(step, 0.5)], step, 4))  # step 3 is skipped: no fold there
        folded.append(log.folded)
    assert folded == [0] * 7 + [8]
    assert [u.seed for u in log.since(5, True)] == [5, 6, 7]


@pytest.mark.parametrize("make", [tiny_opt, tiny_llama])  # tied embeddings, and not
@pytest.mark.parametrize("cases", [[("fp32", 4), ("bf16", 8)], [("fp16", 4), ("bf16", 1)]], ids=["4, 8", "4, 1"])
@pytest.mark.parametrize("way", WAYS, ids=in_words)
def test_every_tier_and_window_folds_alike(make, cases, way, tmp_path):
    storage, fold_every = cases[(WAYS.index(way) + (make is tiny_opt)) % 2]  # in turns
    settings = dict(storage=storage, fold_every=fold_every)
    assert_same(train(make(), STEPS, **settings, **placed(way, tmp_path)), resident(make, STEPS, **settings))


def test_in_float32_no_fold_is_seen_at_all():
    every = [train(tiny_opt(), STEPS, offload="host", storage="fp32", fold_every=k) for k in (1, 3, 8)]
    for other in every[1:]:
        assert_same(every[0], other)


def test_in_16_bits_folding_keeps_more_of_small_updates():
    """Which is what it is for; also shows that the setting reaches the numbers."""
    method = MeZO(lr=3e-6, batch_size=4)
    exact = train(tiny_opt(), 16, method=method)[1]
    base = {n: p.detach() for n, p in tiny_opt().named_parameters()}

    def kept(fold_every):
        weights = train(tiny_opt(), 16, method=method, storage="bf16", fold_every=fold_every)[1]
        name = "model.decoder.layers.1.fc1.weight"
        moved, wanted = weights[name].float() - base[name].bfloat16().float(), exact[name] - base[name]
        return float((moved * wanted).sum() / wanted.square().sum())

    assert kept(16) > 1.3 * kept(1) > 0


@pytest.mark.parametrize("offload", ["host", "disk"])
def test_flushes_drop_by_the_factor(offload, tmp_path):
    def flushed(fold_every):
        run_dir = tmp_path / f"{offload}{fold_every}"
        settings = dict(offload=offload, num_slots=3, run_dir=run_dir, fold_every=fold_every)
        with Engine(tiny_llama(), method=METHOD, **settings) as engine:
            result = engine.fit(batches(), steps=16)
            lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            assert lines[-1]["fetch_bytes"] <= result.fetch_bytes and lines[-1]["flush_bytes"] <= result.flush_bytes
            return result.flush_bytes, sum(sum(n for _, n in spans) for spans in engine.layout.spans)

    for fold_every in (2, 4, 16):
        got, one_flush = flushed(fold_every)
        assert got == 16 // fold_every * one_flush


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("offload", ["none", "disk"])
def test_looking_at_the_weights_in_between_changes_nothing(storage, offload, tmp_path):
    settings = dict(storage=storage, offload=offload, fold_every=4)
    want = train(tiny_opt(), STEPS, **settings, run_dir=tmp_path / "never")
    with Engine(tiny_opt(), method=METHOD, **settings, run_dir=tmp_path / "run") as engine:
        losses = []
        for stop in (1, 3, 6, STEPS):
            losses += engine.fit(batches(), steps=stop, eval_data=batches(2), eval_every=2).losses
            stored_weights(engine)
            engine.save_pretrained(tmp_path / f"out{stop}")
        assert_same(want, (losses, stored_weights(engine)))


@pytest.mark.parametrize("stop", [6, 8])
def test_evaluation_export_and_weights_agree_between_folds(stop, tmp_path):
    """In float32 bit for bit; step 6 of K = 4 has two updates pending, step 8 none."""
    tiny_llama().save_pretrained(tmp_path / "base")
    batch = batches(1)[0]
    with Engine(tmp_path / "base", method=METHOD, fold_every=4, offload="disk", run_dir=tmp_path / "run") as engine:
        engine.fit(batches(), steps=stop)
        want = engine.run(batch).logits
        weights = stored_weights(engine)
        engine.save_pretrained(tmp_path / "out")
        assert all(engine.active.streamer.window.tier.version(b) == stop // 4 * 4 for b in engine.layout.written)
    with Engine.resume(tmp_path / "run") as engine:
        assert torch.equal(engine.run(batch).logits, want)
        assert_same(weights, stored_weights(engine))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, want)


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_run_resumed_between_folds_is_one_never_stopped(storage, stop, tmp_path):
    settings = dict(storage=storage, fold_every=4)
    never = train(tiny_opt(), 10, **settings)
    run = tmp_path / "run"
    first = train(tiny_opt(), stop, **settings, offload="disk", run_dir=run)
    for offload in ("host", "disk"):  # from the base by replay, then from the blocks as they are
        with Engine.resume(run, tiny_opt(), offload=offload) as engine:
            assert_same(first[1], stored_weights(engine))
    with Engine.resume(run, tiny_opt()) as engine:
        rest = engine.fit(batches(), steps=10).losses
        assert_same(never, (first[0] + rest, stored_weights(engine)))


def test_a_skipped_step_that_should_fold_leaves_its_updates_pending():
    def method_at(skip):
        def objective(model, batch):
            loss = model(**batch).loss
            return loss * float("nan") if engine.log.version == skip else loss

        method = MeZO(lr=1e-3, batch_size=4, on_nonfinite="skip")
        with Engine(
            tiny_opt(), method=method, objective=objective, storage="bf16", offload="host", fold_every=4
        ) as engine:
            losses = engine.fit(batches(), steps=9).losses
            return losses, stored_weights(engine), engine.log.folded

    assert method_at(3)[2] == 8
    losses, _, folded = method_at(7)
    assert folded == 4 and [x != x for x in losses] == [step == 7 for step in range(9)]


def test_fold_every_belongs_to_the_run_where_folds_round(tmp_path):
    with pytest.raises(ConfigError, match="fold_every=0"):
        Engine(tiny_opt(), fold_every=0)
    train(tiny_opt(), 2, storage="bf16", fold_every=4, offload="disk", run_dir=tmp_path / "bf16")
    with (
        pytest.raises(JournalError, match="fold_every: the journal has 4, this engine 2"),
        Engine.resume(tmp_path / "bf16", tiny_opt(), fold_every=2) as engine,
    ):
        engine.evaluate(batches(1))
    never = train(tiny_opt(), 8)
    train(tiny_opt(), 3, fold_every=4, offload="disk", run_dir=tmp_path / "fp32")
    with Engine.resume(tmp_path / "fp32", tiny_opt(), fold_every=2) as engine:  # float32: the numbers are the same
        engine.fit(batches(), steps=8)
        assert_same(never[1], stored_weights(engine))


def test_the_default_folds_every_4_steps_or_8_with_cheap_noise():
    assert Engine(tiny_opt(), offload="host", num_slots=2).fold_every == 4
    assert Engine(tiny_opt(), offload="host", num_slots=2, method=MeZO(distribution="rademacher")).fold_every == 8
    assert Engine(tiny_opt(), offload="none").fold_every == 1
    assert Engine(tiny_opt(), offload="host").fold_every == 1  # on a CPU: where they lie, never flushed
    assert Engine(tiny_opt(), offload="host", storage="bf16").fold_every == 4
    assert Engine(tiny_opt(), offload="none", storage="bf16").fold_every == 4
