"""Blocks in two parts: the residual moves only where a fold lands, and a stale one is never used."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.compare import assert_same
from support.training import METHOD, batches, in_words, placed, resident, stored_weights, train
from support.zoo.small import tiny_llama, tiny_opt
from zo_offload import ConfigError, Engine, MeZO
from zo_offload.formats import FORMATS, get_format
from zo_offload.formats.codec import encode_values
from zo_offload.kernels.records import STILL, Update
from zo_offload.numerics.exact import exact_values
from zo_offload.numerics.fused import fused_pass, fused_rows
from zo_offload.numerics.noise import NoiseSpec
from zo_offload.numerics.updates import with_folds
from zo_offload.plan.blocks import BLOCK_NUMEL
from zo_offload.plan.layout import PARAM_ALIGN
from zo_offload.run.memory import step_bytes
from zo_offload.stream.window import BlockWindow
from zo_offload.tiers import HostTier

STEPS = 10
WAYS = [
    dict(offload="host"),
    dict(offload="host", num_slots=2, prefetch=0),
    dict(offload="host", num_slots=5, io_threads=3),
    dict(offload="disk"),
    dict(offload="disk", overlap=False, num_slots=1),
    dict(offload="disk", device_memory=400_000, order="block"),
]


@pytest.mark.parametrize(
    "make, storage, fold_every",  # tied embeddings, and not
    [(tiny_opt, "bf16+16", 4), (tiny_llama, "bf16+8", 3), (tiny_opt, "int8+8", 4), (tiny_llama, "fp8+8", 1)],
)
@pytest.mark.parametrize("way", WAYS, ids=in_words)
def test_every_tier_and_window_gives_the_same_masters(make, storage, fold_every, way, tmp_path):
    settings = dict(storage=storage, fold_every=fold_every)
    assert_same(train(make(), STEPS, **settings, **placed(way, tmp_path)), resident(make, STEPS, **settings))


def test_blocks_are_a_streamed_part_and_a_residual_part():
    with Engine(tiny_opt(), storage="bf16+8") as engine:
        layout, plan = engine.layout, engine.plan
    for block in plan.blocks:
        ends = []
        for piece in block.pieces:
            place, spec = layout.places[piece], plan.params[piece.name]
            split = len(spec.shape) > 1
            assert place.fmt.name == ("bf16+8" if split else "fp32")
            assert place.residual_nbytes == (spec.numel if split else 0)
            assert place.offset % PARAM_ALIGN == place.residual_offset % PARAM_ALIGN == 0
            assert place.offset + place.nbytes <= layout.stream_bytes[block.index]
            if split:
                assert place.residual_offset >= layout.stream_bytes[block.index]
                ends.append(place.residual_offset + place.residual_nbytes)
        end = max(ends, default=layout.stream_bytes[block.index])  # the last block is a norm only
        assert end <= layout.block_bytes[block.index] < end + 4096
        covered = torch.zeros(layout.block_bytes[block.index], dtype=torch.bool)
        for start, nbytes in layout.spans[block.index]:
            covered[start : start + nbytes] = True
        for piece in block.pieces:
            place = layout.places[piece]
            assert covered[place.offset : place.offset + place.nbytes].all()
            assert (
                not place.residual_nbytes
                or covered[place.residual_offset : place.residual_offset + place.residual_nbytes].all()
            )


class Counting(HostTier):
    def fetch(self, block, out, start=0):
        self.seen.append((block, start, out.numel()))
        super().fetch(block, out, start)


def counted(monkeypatch, steps, **settings):
    """Fetches of a run of `steps` steps, and the engine."""
    import zo_offload.run.session as session

    Counting.seen = []
    monkeypatch.setattr(session, "HostTier", Counting)
    engine = Engine(tiny_llama(), method=METHOD, offload="host", num_slots=3, **settings)
    with engine:
        result = engine.fit(batches(), steps=steps)
        seen = list(Counting.seen)  # less what the module's weights at the end are read by
    return seen, engine, result


@pytest.mark.parametrize("fold_every", [2, 4])
def test_residuals_are_fetched_only_for_folds_and_foretold(fold_every, monkeypatch):
    seen, engine, result = counted(monkeypatch, 9, storage="bf16+16", fold_every=fold_every)
    layout, visits = engine.layout, engine.plan.visits
    assert all(start == 0 for _, start, _ in seen), "no residual came late"
    whole = [block for block, _, nbytes in seen if nbytes == layout.block_bytes[block]]
    assert 8 // fold_every * len(visits) <= len(whole) < 8 // fold_every * len(visits) + 2 * engine.memory.window.ahead
    fetched, flushed = step_bytes(engine.plan, layout, frozenset(), fold_every)
    assert result.flush_bytes == flushed * fold_every * (9 // fold_every)
    assert result.fetch_bytes == pytest.approx(9 * fetched, rel=0.35)


def test_a_wrong_foretelling_costs_a_wait_and_nothing_else(monkeypatch):
    """Folds that come as a surprise: nobody foretells them."""
    want = train(tiny_opt(), STEPS, storage="bf16+16", fold_every=4)
    monkeypatch.setattr(BlockWindow, "_foretold", lambda self, op: 0)
    assert_same(want, train(tiny_opt(), STEPS, storage="bf16+16", fold_every=4, offload="host"))
    seen, engine, _ = counted(monkeypatch, STEPS, storage="bf16+16", fold_every=4)
    late = [block for block, start, _ in seen if start]
    assert len(late) >= 2 * len(set(engine.plan.visits)), "the test must have met the case"


@pytest.mark.parametrize("storage", ["bf16+16", "int8+8"])
def test_looking_at_the_weights_in_between_changes_nothing(storage, tmp_path):
    settings = dict(storage=storage, offload="disk", fold_every=4)
    want = train(tiny_opt(), STEPS, **settings, run_dir=tmp_path / "never")
    with Engine(tiny_opt(), method=METHOD, **settings, run_dir=tmp_path / "run") as engine:
        losses = []
        for stop in (1, 4, 7, STEPS):
            losses += engine.fit(batches(), steps=stop, eval_data=batches(2), eval_every=3).losses
            stored_weights(engine)
        assert_same(want, (losses, stored_weights(engine)))


@pytest.mark.parametrize("make", [tiny_opt, tiny_llama])
@pytest.mark.parametrize("stop", [4, 6])  # just folded, and two steps pending
def test_evaluation_sees_the_masters_that_are_exported(make, stop, tmp_path):
    make().save_pretrained(tmp_path / "base")
    batch = batches(1)[0]
    settings = dict(storage="bf16+16", fold_every=4, offload="disk", run_dir=tmp_path / "run")
    with Engine(tmp_path / "base", method=METHOD, **settings) as engine:
        engine.fit(batches(), steps=stop)
        want = engine.run(batch).logits
        weights = stored_weights(engine)
        engine.save_pretrained(tmp_path / "out")
    with Engine.resume(tmp_path / "run", offload="none") as engine:
        assert torch.equal(engine.run(batch).logits, want)
        assert_same(weights, stored_weights(engine))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, want)


def float32_run(model, plan, steps, noise):
    """The same updates on plain float32 weights: the reference that split masters have to equal."""
    weights = {}
    for name, parameter in model.named_parameters():
        value, spec = parameter.detach().clone().reshape(-1), plan.params[name]
        for updates in steps:
            fused_pass(
                value.view(torch.uint8), get_format("fp32"), param_id=spec.param_id, numel=spec.numel, updates=updates,
                noise=noise,
            )  # fmt: skip
        weights[name] = value.view(parameter.shape)
    return weights


@pytest.mark.parametrize("distribution, fold_every", [("gaussian", 1), ("gaussian", 4), ("rademacher", 16)])
def test_split_float32_masters_are_float32_bit_for_bit(distribution, fold_every):
    """60 steps: given the same updates, each folded at once, a run of float32 weights ends at the same bits."""
    method = MeZO(lr=1e-3, batch_size=4, distribution=distribution)
    steps = []
    settings = dict(storage="bf16+16", offload="host", fold_every=fold_every)
    with Engine(tiny_llama(layers=2), method=method, **settings) as engine:
        engine.fit(batches(), steps=60, callback=lambda record: steps.append(with_folds(record.updates, 0, 1)))
        assert_same(
            ([], float32_run(tiny_llama(layers=2), engine.plan, steps, method.noise)), ([], stored_weights(engine))
        )


@pytest.mark.parametrize(
    "make, limit", [(tiny_llama, BLOCK_NUMEL), (tiny_llama, 900), (tiny_opt, 1000), (tiny_opt, 4000)]
)
def test_reading_all_weights_fetches_each_block_once(make, limit, monkeypatch, tmp_path):
    import zo_offload.run.session as session

    Counting.seen = []
    monkeypatch.setattr(session, "HostTier", Counting)
    with Engine(make(), method=METHOD, offload="host", storage="bf16+16", block_numel=limit) as engine:
        engine.fit(batches(), steps=4)
        for look in (stored_weights, lambda e: e.save_pretrained(tmp_path / "out")):
            Counting.seen = []
            look(engine)
            assert len(Counting.seen) <= len(engine.plan.blocks)


def test_blocks_in_host_memory_are_used_where_they_lie(tmp_path):
    """On a CPU nothing is copied, unless a window is asked for; with one, without, and in memory: the same bits."""
    found = {}
    asked = dict(window=dict(num_slots=2), budget=dict(device_memory="1GB"), apart=dict(overlap=False))
    for name, settings in (asked | dict(host={}, none=dict(offload="none"))).items():
        settings = dict(offload="host", storage="bf16+16", fold_every=2, run_dir=tmp_path / name) | settings
        with Engine(tiny_llama(), method=METHOD, **settings) as engine:
            result = engine.fit(batches(), steps=5)
            assert (result.fetch_bytes > 0) == (name in asked), name
            found[name] = {key: tensor.clone() for key, tensor in engine.weights()}
            assert (engine.memory.terms["window"] > 0) == (name in ("window", "apart")), name
    for name in (*asked, "host"):
        assert_same(found["none"], found[name])
    with Engine.resume(tmp_path / "host", tiny_llama(), num_slots=2) as engine:
        assert_same(found["none"], dict(engine.weights()))


@pytest.mark.parametrize("name", ["bf16+16", "bf16+8", "int8+8", "fp8+8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_over_both_planes_is_the_exact_values(name, dtype):
    """`exact_values` is the slow, clear one: planes joined, pending updates applied, rounded once."""
    fmt, numel, row = FORMATS[name], 64 * 40, 64
    torch.manual_seed(3)
    stored, residual = encode_values(torch.randn(numel) * 0.02, fmt)
    pending, noise = (Update(5, 2.0**-9, 0.5, False), Update(6, -(2.0**-10), 1.0, False)), NoiseSpec()
    want, found = torch.empty(numel, dtype=dtype), torch.empty(numel, dtype=dtype)
    common = dict(param_id=7, numel=numel)
    exact_values(stored, residual, fmt, want, **common, offset=6400, pending=pending, noise=noise)
    fused_pass(
        stored, fmt, **common, offset=6400, updates=pending, write_back=False, noise=noise, perturbations=[STILL],
        outs=[found], residual=residual, master=True,
    )  # fmt: skip
    assert torch.equal(want, found)
    rows = torch.tensor([103, 100, 2, 139, 103])  # of a parameter of which rows 100 .. 139 are here
    some = torch.zeros(5, row, dtype=dtype)
    fused_rows(
        stored, fmt, **common, row_numel=row, rows=rows, first_row=100, total_rows=200, updates=pending, noise=noise,
        perturbations=[STILL], outs=[some], residual=residual, master=True,
    )  # fmt: skip
    whole = want.view(-1, row)
    assert torch.equal(some[[0, 1, 3, 4]], whole[[3, 0, 39, 3]]) and not some[2].any()
    with pytest.raises(ConfigError, match="decodes both parts"):
        fused_pass(stored, fmt, **common, noise=noise, perturbations=[STILL], outs=[found], master=True)
