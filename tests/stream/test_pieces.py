"""Blocks of at most so many elements: what is cut, where, and that no number depends on it."""

from __future__ import annotations

import math
import resource
from dataclasses import replace

import pytest
import torch

from support.compare import assert_same
from support.lanes import plan_of
from support.training import ADAPTED, METHOD, batches, in_words, placed, resident, stored_weights, train
from support.zoo import archs
from support.zoo.archs import ARCH
from support.zoo.small import tiny_llama, tiny_opt, with_adapters
from zo_offload import QZO, BudgetError, Engine
from zo_offload.errors import JournalError
from zo_offload.formats import FORMATS
from zo_offload.kernels.records import Perturbation
from zo_offload.modules.recorder import Trace
from zo_offload.plan.blocks import ALIGN, ParamSpec, cut, whole
from zo_offload.plan.plan import make_plan, relift
from zo_offload.replay import replay
from zo_offload.run import prepare
from zo_offload.system import diskio

WHOLE = 1 << 40  # no parameter is cut, no layer split
STILL = Perturbation(0, 0.0)


@pytest.fixture(autouse=True)
def whole_products(monkeypatch):
    """Here no linear layer is computed piece by piece, which may give other bits (`test_tiles.py`)."""
    for name in ("is_plain_linear", "is_stack_of_experts", "computes_in_portions"):
        monkeypatch.setattr(f"zo_offload.lanes.attachment.{name}", lambda module: False)


def spec(*shape):
    return ParamSpec("w", (), 7, torch.Size(shape), torch.float32, True)


# ---- where a parameter is cut ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(96, 32), (1000, 384), (50272, 12288), (12288, 49152), (777, 5), (32, 6, 96), (16, 5120, 16384), (3, 128)],
)
@pytest.mark.parametrize("most", [1 << 10, 5000, 1 << 20, 64 << 20])
def test_pieces_are_whole_rows_of_about_one_size_on_the_grid_of_groups_and_noise(shape, most):
    made, row = cut(spec(*shape), most), math.prod(shape[1:])
    if len(shape) == 3 and row * ALIGN // math.gcd(ALIGN, row) > most:  # then rows are those of a matrix
        shape, row = (shape[0] * shape[1], shape[2]), shape[2]
    assert [p.start for p in made] == [0, *[p.stop for p in made[:-1]]] and made[-1].stop == math.prod(shape)
    assert [p.index for p in made] == list(range(len(made)))
    least = ALIGN // math.gcd(ALIGN, row)  # rows of whole groups and whole Philox blocks
    if least * row > most:
        assert len(made) == 1
        return
    assert max(p.numel for p in made) <= most
    assert all(p.start % row == 0 and p.start % ALIGN == 0 for p in made)
    unit = ALIGN if most // row >= ALIGN else least
    assert all(p.numel // row % unit == 0 for p in made[:-1])
    fewest = -(-shape[0] // (most // row // unit * unit))
    assert len(made) <= fewest and len({p.numel for p in made[:-1]}) <= 1


@pytest.mark.parametrize("shape, most", [((5000,), 64), ((), 1), ((40, 300), 256), ((9, 3), 300), ((5, 7, 3), 40)])
def test_what_cannot_be_cut_stays_whole(shape, most):
    """One dimension; rows larger than the limit; rows so odd that no run of them ends on the grid within the limit."""
    (piece,) = cut(spec(*shape), most)
    assert (piece.start, piece.numel) == (0, math.prod(shape))


# ---- blocks and visits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", "gpt_oss", "t5", "mamba", "bert", "DirectForward", "Lists"])
@pytest.mark.parametrize("block_numel", [256, 1500])
def test_every_element_is_in_one_block_and_blocks_keep_the_limit(name, block_numel):
    arch = ARCH[name]
    model = archs.build(arch)
    plan = make_plan(model, arch.batch(0), block_numel=block_numel)
    for name, parameter in model.named_parameters():
        pieces = plan.pieces_of(name)
        assert [p.start for p in pieces] == [0, *[p.stop for p in pieces[:-1]]] and pieces[-1].stop == parameter.numel()
    placed = [piece for block in plan.blocks for piece in block.pieces]
    assert len(placed) == len(set(placed)) and sum(piece.numel for piece in placed) == plan.numel
    for block in plan.blocks:
        assert block.numel <= block_numel or len(block.pieces) == 1, "only what cannot be cut is larger"
    assert sum(row.num_blocks for row in plan.describe()) == len(plan.blocks)
    large = make_plan(model, arch.batch(0), block_numel=WHOLE)
    assert [row.name for row in plan.describe()] == [block.name for block in large.blocks]
    for owner in plan.owners:
        blocks = [b.index for piece in plan.pieces_in(owner) for b in plan.blocks if piece in b.pieces]
        assert owner.spans == (len(set(blocks)) > 1) and owner.block == blocks[0]


def test_a_bias_is_there_before_the_first_piece_of_its_weight():
    plan = plan_of("opt", block_numel=700)
    cuts = 0
    for owner in plan.owners:
        pieces = plan.pieces_in(owner)
        several = [p for p in pieces if len(plan.pieces_of(p.name)) > 1]
        assert [*[p for p in pieces if p not in several], *several] == list(pieces)
        if several and len(pieces) > len(several):
            first = next(block for block in plan.blocks if several[0] in block.pieces)
            assert first.pieces.index(pieces[0]) < first.pieces.index(several[0]), "and it lies in the same block"
            cuts += 1
    assert cuts > 4


def test_a_tied_embedding_passes_by_twice_piece_by_piece():
    plan = plan_of("opt", block_numel=700)
    pieces = plan.pieces_of("model.decoder.embed_tokens.weight")
    tied = [block.index for piece in pieces for block in plan.blocks if piece in block.pieces]
    assert len(tied) > 1 and plan.visits[-len(tied) :] == tuple(tied)
    assert plan.visits[: len(tied)] == tuple(reversed(tied)), "the piece that the pass before ended with is there"


def test_a_huge_limit_changes_nothing_and_is_the_default_for_small_models():
    for name in ("llama", "opt"):
        plan = plan_of(name)
        assert plan.blocks == plan_of(name, block_numel=WHOLE).blocks
        assert all(len(plan.pieces_of(n)) == 1 for n in plan.params)


# ---- the same numbers ------------------------------------------------------------------------------------------------

WAYS = [
    dict(offload="none"),
    dict(offload="host"),
    dict(offload="host", order="block"),
    dict(offload="host", order="lane"),
    dict(offload="host", num_slots=5, io_threads=3),
    dict(offload="disk", num_slots=2, prefetch=0),
    dict(offload="disk", overlap=False, num_slots=1, order="block"),
    dict(offload="disk", device_memory=400_000, order="block"),
]


@pytest.mark.parametrize("make, block_numel", [(tiny_opt, 1 << 10), (tiny_opt, 5000), (tiny_llama, 700)])
@pytest.mark.parametrize("way", WAYS, ids=in_words)
def test_no_cut_tier_or_order_changes_a_bit(make, block_numel, way, tmp_path):
    found = train(make(), 5, block_numel=block_numel, fold_every=2, **placed(way, tmp_path))
    assert_same(found, resident(make, 5, block_numel=WHOLE, fold_every=2))


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("storage", sorted(FORMATS))
def test_no_cut_changes_a_bit_in_any_format(storage, distribution, tmp_path):
    method = METHOD if FORMATS[storage].trains else QZO(lr=1e-3, eps=1e-3, batch_size=4)
    method = type(method)(**{**method.__dict__, "distribution": distribution})
    settings = dict(storage=storage, fold_every=3, method=method, rounding="stochastic")
    want = train(tiny_opt(2), 4, block_numel=WHOLE, offload="none", **settings)
    assert len(set(want[0])) == 4
    for block_numel, way in ((1 << 10, dict(offload="host")), (900, dict(offload="disk", run_dir=tmp_path / "run"))):
        assert_same(want, train(tiny_opt(2), 4, block_numel=block_numel, **settings, **way))


# ---- one piece at a time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["fp32", "int8+8", "int4"])
def test_a_source_gives_a_piece_as_it_gives_the_whole(storage):
    lanes = [Perturbation(3, 2**-7), Perturbation(3, -(2**-7)), STILL]
    with Engine(tiny_opt(2), storage=storage, method=METHOD if storage != "int4" else QZO(), offload="host",
                block_numel=1 << 10) as engine:  # fmt: skip
        engine.fit(batches(), steps=2)
        streamer, plan = engine.active.streamer, engine.plan
        checked = 0
        for owner in plan.owners:
            several = [name for name in owner.params if len(plan.pieces_of(name)) > 1]
            if len(several) != 1 or owner.rows:
                continue
            whole = [[w.clone() for w in tensors] for tensors in _emitted(streamer, owner, lanes)]
            (cut_one,) = several
            at = owner.params.index(cut_one)
            beside = [piece for piece in plan.pieces_in(owner) if piece.name != cut_one]
            for piece in plan.pieces_of(cut_one):
                row = plan.params[cut_one].row_numel
                got = _emitted(streamer, owner, lanes, [piece] if piece.index else [*beside, piece])
                for tensors, all_of_it in zip(got, whole, strict=True):
                    want = all_of_it[at][piece.start // row : piece.stop // row]
                    if piece.index:
                        assert len(tensors) == 1 and torch.equal(tensors[0], want)
                    else:
                        expected = [want if name == cut_one else all_of_it[i] for i, name in enumerate(owner.params)]
                        assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
                checked += piece.index > 0
        assert checked > 10


def _emitted(streamer, owner, lanes, pieces=None):
    tensors = streamer.emit(owner, lanes, pieces=pieces)
    streamer.release(tensors)
    return tensors


def test_weights_are_read_whole_between_steps():
    want = train(tiny_llama(), 3, block_numel=WHOLE)
    with Engine(tiny_llama(), method=METHOD, offload="host", block_numel=800) as engine:
        for stop in (1, 2, 3):
            engine.fit(batches(), steps=stop)
            stored = stored_weights(engine)
    assert_same(want[1], stored)
    assert {name: value.shape for name, value in stored.items()} == {
        name: p.shape for name, p in tiny_llama().named_parameters()
    }


# ---- runs -----------------------------------------------------------------------------------------------------------


def digest_of(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.suffix == ".safetensors"}


@pytest.mark.parametrize("storage, offload", [("bf16+16", "disk"), ("int8+8", "host"), ("bf16", "none")])
def test_a_run_in_pieces_resumes_replays_and_exports_as_one_that_is_not_cut(storage, offload, tmp_path):
    tiny_opt(2).save_pretrained(tmp_path / "base")
    settings = dict(storage=storage, fold_every=2, method=METHOD)
    with Engine(tmp_path / "base", block_numel=WHOLE, offload="none", **settings) as engine:
        losses = engine.fit(batches(), steps=7).losses
        engine.save_pretrained(tmp_path / "want")
    run = dict(offload=offload, run_dir=tmp_path / "run", block_numel=900, snapshot_steps=2)
    with Engine(tmp_path / "base", **settings, **run) as engine:
        first = engine.fit(batches(), steps=3).losses
    with Engine.resume(tmp_path / "run", offload="host" if offload == "disk" else "disk", num_slots=2) as engine:
        assert engine.config.block_numel == 900 and len(engine.plan.blocks) > 30
        assert first + engine.fit(batches(), steps=7).losses == losses
        assert set(engine.evaluate(batches(2))) == {"loss"}
        engine.save_pretrained(tmp_path / "out")
    replay(tmp_path / "base", tmp_path / "run", tmp_path / "again")
    want = digest_of(tmp_path / "want")
    assert want and digest_of(tmp_path / "out") == want and digest_of(tmp_path / "again") == want


def test_where_a_parameter_is_cut_is_part_of_the_run(tmp_path):
    with Engine(tiny_opt(2), method=METHOD, run_dir=tmp_path / "run", block_numel=20_000) as engine:
        engine.fit(batches(), steps=2)
    with pytest.raises(JournalError, match="block_numel"):
        Engine.resume(tmp_path / "run", tiny_opt(2), block_numel=900).fit(batches(), steps=3)
    with Engine.resume(tmp_path / "run", tiny_opt(2), block_numel=WHOLE) as engine:  # nothing is cut in either
        engine.fit(batches(), steps=3)


def test_a_damaged_block_of_a_cut_parameter_is_brought_back(tmp_path):
    tiny_opt(2).save_pretrained(tmp_path / "base")
    settings = dict(method=METHOD, storage="bf16", fold_every=1)
    with Engine(tmp_path / "base", block_numel=WHOLE, offload="none", **settings) as engine:
        engine.fit(batches(), steps=4)
        want = stored_weights(engine)
    with Engine(tmp_path / "base", block_numel=900, offload="disk", run_dir=tmp_path / "run", **settings) as engine:
        engine.fit(batches(), steps=2)
        pieces = engine.plan.pieces_of("model.decoder.layers.0.fc1.weight")
    assert len(pieces) > 2
    for path in sorted((tmp_path / "run" / "blocks").glob("*.zob"))[5:12]:
        data = bytearray(path.read_bytes())
        data[8192:8200] = bytes(8)
        path.write_bytes(data)
    with Engine.resume(tmp_path / "run") as engine:
        engine.fit(batches(), steps=4)
        assert_same(want, stored_weights(engine))


def test_adapters_stay_whole_and_on_the_device():
    def run(**way):
        return train(with_adapters(tiny_llama()), 5, storage="int4", **ADAPTED, **way)

    want = run(block_numel=WHOLE, offload="none")
    with Engine(with_adapters(tiny_llama()), storage="int4", offload="host", block_numel=800, **ADAPTED) as engine:
        (resident,) = engine.plan.resident
        assert all(p == whole(engine.plan.params[p.name]) for p in engine.plan.blocks[resident].pieces)
        assert any(len(engine.plan.pieces_of(name)) > 1 for name in engine.plan.params)
    for way in (dict(offload="host"), dict(offload="host", order="block")):
        assert_same(want, run(block_numel=800, **way))


@pytest.mark.parametrize("storage", ["fp32", "int8+8"])
def test_a_layer_that_cannot_be_traced_is_lifted_over_several_blocks(storage, monkeypatch):
    """An owner that spans blocks is served to all lanes at once, in any order of service."""

    monkeypatch.setattr(prepare, "make_plan", lambda *args, **options: relift_whole(make_plan(*args, **options)))

    def run(block_numel, **way):
        plain = tiny_opt(2)
        engine = Engine(plain, method=METHOD, storage=storage, block_numel=block_numel, **way)
        layers = [owner for owner in engine.plan.owners if owner.name == "model.decoder.layers.1"]
        assert layers and layers[0].spans == (block_numel != WHOLE)
        with engine:
            return engine.fit(batches(), steps=4).losses, stored_weights(engine)

    want = run(WHOLE, offload="none")
    for order in ("module", "block", "lane"):
        assert_same(want, run(900, offload="host", order=order))


def relift_whole(plan):
    """The plan as it is when nothing was seen of the forward: every layer has all its parameters."""
    return relift(replace(plan, trace=Trace({}, (), False)), Trace({}, (), False))


@pytest.mark.parametrize("limits, raised", [((1 << 20, 1 << 20), None), ((200, 1 << 20), True), ((200, 300), False)])
def test_as_many_files_may_be_open_as_there_are_blocks(limits, raised, monkeypatch):
    given = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: given.append(new))
    if raised is False:
        with pytest.raises(BudgetError, match="1000 block files are held open .*, but this process may open only 300"):
            diskio.allow_open_files(1000, "block files")
    else:
        diskio.allow_open_files(1000, "block files")
    assert bool(given) == bool(raised) and all(soft > 1000 and hard == limits[1] for soft, hard in given)
