"""The fused pass: every variant equals the reference bit for bit, and the reference says what the contract says."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from support.codes import stored_as
from support.compare import assert_same
from support.native_variants import ISAS, each_isa, each_variant, using
from zo_offload.errors import ConfigError
from zo_offload.formats import CENTRED, FORMATS, get_format
from zo_offload.formats.grouped import cut
from zo_offload.kernels import native
from zo_offload.kernels.distributions import DISTRIBUTIONS, Distribution
from zo_offload.kernels.records import Mask, Perturbation, Terms, Update, Updates
from zo_offload.numerics.calls import Mark
from zo_offload.numerics.fused import fused_pass, fused_rows, ready_pass, ready_passes
from zo_offload.numerics.fused_kernels import OnCpu, kernels_for
from zo_offload.numerics.noise import NoiseSpec, noise

BF16, FP16, FP32 = FORMATS["bf16"], FORMATS["fp16"], FORMATS["fp32"]
KEEPING = ("int4f_g32", "int8f", "fp8f", "mxfp4", "nvfp4", "fp4", "int8_g16", "mxfp4_across_24", "nvfp4_two",
           "int8_127_g64")  # fmt: skip
ALL = [*FORMATS.values(), *CENTRED.values(), *(get_format(name) for name in KEEPING)]  # each code
SMALL = [fmt for fmt in ALL if fmt not in (BF16, FP16, FP32)]
TRAINED = [fmt for fmt in FORMATS.values() if fmt.trains]
WITH_SCALES = [fmt for fmt in ALL if fmt.trains_scales]
TARGETS = [(fmt, "values") for fmt in ALL] + [(fmt, "scales") for fmt in WITH_SCALES]
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPEC = NoiseSpec()


def target_id(part):
    return part if isinstance(part, str) else part.name


def f32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()


def ordinary(n, seed=0):
    """n ordinary weights with a few special ones among them; in a format with groups two groups get a NaN scale."""
    w = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.02
    special = torch.tensor([0.0, -0.0, 1e-40, -6e-8, 3e-5, 65504.0, float("inf"), float("-inf"), float("nan")])
    at = torch.arange(min(n, special.numel()) if n > 64 else 0)
    w[at * 7 + n // 3 if n > 300 else at * 7] = special[at]
    return w


def weights(fmt, n, seed=0):
    """The streamed part of `ordinary` weights."""
    return stored_as(fmt, ordinary(n, seed))[0]


def bits(x):
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16 if x.element_size() == 2 else torch.uint8)


def copied(x, shift):
    """A copy whose address is `shift` past a good one."""
    memory = torch.zeros(x.numel() + shift, dtype=torch.uint8)[shift:]
    return memory.copy_(x)


def run(variant, stored, fmt, perturbations=(), dtypes=(), numel=None, residual=None, shift=0, **kwargs):
    """fused_pass on copies; returns the bytes after it (residual part too, if given) and the lanes, as integers."""
    stored, residual = copied(stored, shift), None if residual is None else copied(residual, shift)
    n = stored.numel() // fmt.nbytes(1) if numel is None else numel
    outs = [torch.full((n,), 7.0, dtype=d) for d in dtypes]
    with using(variant):
        fused_pass(stored, fmt, numel=n, perturbations=perturbations, outs=outs, residual=residual,
                   **{"param_id": 5, "noise": SPEC} | kwargs)  # fmt: skip
    return [stored] + ([] if residual is None else [residual]) + [bits(out) for out in outs]


def random_case(chance: random.Random, fmt=None, target="values"):
    fmt = fmt or chance.choice([BF16, FP16, FP32])
    n = chance.choice([0, 1, 3, 64, 127, 128, 129, 1000, 1024, 1025, 2048, 3333, chance.randrange(5000)])
    folds = 0.7 if fmt.trains or target == "scales" else 0.0
    updates = [
        Update(
            chance.randrange(1 << 64),
            chance.choice([0.0, f32(1e-6), f32(-3e-4), f32(0.25)]),
            chance.choice([1.0, f32(0.999), f32(1 - 1e-6)]),
            chance.random() < folds,
            chance.random() < 0.7,
        )
        for _ in range(chance.choice([0, 0, 1, 1, 2, 5]))
    ]
    seeds = [chance.randrange(1 << 64) for _ in range(2)]
    sums = [sum_of(chance, seeds) for _ in range(2)]
    lanes = [
        Perturbation(*chance.choice([(seed, scale) for seed in seeds] + [(0, scale, terms) for terms in sums]))
        for scale in chance.choices([f32(1e-3), f32(-1e-3), 0.0, 100.0], k=chance.choice([0, 1, 2, 2, 5]))
    ]
    offset = chance.choice([0, 0, 1, 100, 128, 1023, 1024 * 7, (1 << 34) - 500, (1 << 40) + 3])
    values = ordinary(n, chance.randrange(99))
    if chance.random() < 0.5:
        values = torch.where(values.isfinite(), values, 0.0)
    stored, residual = stored_as(fmt, values)
    return (stored, fmt), dict(
        updates=updates,
        perturbations=lanes,
        numel=n,
        residual=residual,
        target=target,
        dtypes=[chance.choice(OUT_DTYPES) for _ in lanes],
        offset=offset // fmt.group * fmt.group if fmt.group else offset,
        write_back=chance.random() < 0.8,
        rounding=chance.choice(["nearest", "stochastic"]),
        shift=chance.choice([0, 0, 1, 3]),
        noise=plain_noise(chance) if target == "scales" or chance.random() < 0.6 else low_rank(chance),
        param_id=chance.randrange(1 << 32),
        mask=None if target == "scales" else chance.choice([None, *masks(chance), *near(chance, offset, n, fmt)]),
    )


def plain_noise(chance):
    return NoiseSpec(chance.choice(["gaussian", "rademacher"]), chance.choice([7, 10]))


def low_rank(chance):
    """Rows that end with a vector of elements, within one, and many in one."""
    columns = chance.choice([2, 5, 61, 384, 400, 768, 3000])
    return NoiseSpec(rounds=chance.choice([7, 10]), rank=chance.choice([1, 2, 2, 3, 4, 16]), columns=columns)


def near(chance, offset, numel, fmt):
    """A list for elements that are not too far from the first: it has a number for each 1024 before them."""
    offset = offset // fmt.group * fmt.group if fmt.group else offset
    return [listed(chance, offset, numel)] * 2 if offset < 1 << 20 else []


def sum_of(chance, seeds):
    """One noise, several, one twice, none that counts."""
    terms = chance.choices(seeds + [0, 7], k=chance.choice([1, 1, 2, 5]))
    return Terms(tuple(terms), tuple(chance.choices([0.0, 1.0, f32(-0.3), f32(1e-20), 7e3], k=len(terms))))


def masks(chance):
    """By magnitude: a few of `ordinary` weights, most, those that are 0; by chance: few, most, all."""
    thresholds = [0.0, f32(0.003), f32(0.03)]
    shares = [(1e-3, 1), (0.75, 1 << 63), (1.0, 5)]
    return [*map(Mask.smallest, thresholds), *(Mask.random(*share) for share in shares)]


def listed(chance, offset, numel):
    """Some elements of a parameter, a slice of which passes: none of the slice, a few, all; and some beside it."""
    few = [chance.randrange(numel) for _ in range(chance.choice([0, 1, 3, 200]))] if numel else []
    inside = sorted({offset + at for at in (range(numel) if chance.random() < 0.2 else few)})
    beside = [at for at in (offset - 1, offset - 1030) if at >= 0] or [offset + numel]
    return Mask.listed(torch.tensor(sorted({*inside, *beside, offset + numel + 5})), offset + numel + 6)


@each_isa
@pytest.mark.parametrize("part", range(4))
def test_native_equals_the_reference(isa, part):
    """Random cases over formats, noises, roundings, folds, lanes, odd sizes and far offsets; special values inside."""
    chance = random.Random(part)
    for number in range(40):
        arguments, options = random_case(chance)
        assert_same(
            run(isa, *arguments, **options), run("reference", *arguments, **options), f"case {number} {options}"
        )


@each_isa
def test_passes_that_are_ready_equal_one_by_one_however_often_they_run(isa):
    """Several parameters, formats and targets in one call, run twice with other updates and lanes."""
    chance = random.Random(11)
    for trial in range(40):
        calls, told, alone = [], [], []
        for fmt, target in chance.choices(TARGETS, k=3):
            (stored, _), options = random_case(chance, fmt, target)
            stored, residual = (None if t is None else copied(t, 0) for t in (stored, options.pop("residual")))
            outs = [torch.zeros(options["numel"], dtype=d) for d in options.pop("dtypes")]
            updates, writes = Updates(options.pop("updates")), options.pop("write_back")
            lanes, _ = options.pop("perturbations"), options.pop("shift")
            fixed = options | {"threads": 1}
            calls.append((stored, fmt, fixed | dict(outs=outs, residual=residual)))
            needs = updates.folds and residual is not None and target == "values"
            told.append([(updates, lanes, writes, needs), (Updates(updates[:1]), lanes[::-1], writes, needs)])
            again = stored.clone(), None if residual is None else residual.clone(), [out.clone() for out in outs]
            alone.append((*again, fmt, fixed))
        with using(isa):
            ready = ready_passes([ready_pass(stored, fmt, **options) for stored, fmt, options in calls])
            for turn in range(2):
                told_now, mark = [part[turn] for part in told], Mark()
                ready.run([(u, lanes, w, need and u.folds) for u, lanes, w, need in told_now], mark)
                assert mark.is_done
                for (stored, residual, outs, fmt, fixed), (updates, lanes, writes, _) in zip(
                    alone, told_now, strict=True
                ):
                    fused_pass(stored, fmt, updates=updates, perturbations=lanes, write_back=writes,
                               residual=residual, outs=outs, **fixed)  # fmt: skip
                for (stored, residual, outs, *_), (got, fmt, options) in zip(alone, calls, strict=True):
                    assert torch.equal(stored, got), (trial, fmt.name)
                    assert residual is None or torch.equal(residual, options["residual"]), (trial, fmt.name)
                    assert [*map(torch.equal, map(bits, outs), map(bits, options["outs"]))].count(False) == 0, (
                        trial,
                        fmt.name,
                    )


def test_a_fold_of_what_was_not_made_ready_for_it_is_refused_and_nothing_is_run():
    """Of a split format without its residual part, and of values that never train."""
    stored, _ = FORMATS["bf16+16"].split(ordinary(64))
    with using(ISAS[-1]):
        for bytes_, fmt in ((stored, FORMATS["bf16+16"]), (weights(FORMATS["int4"], 64), FORMATS["int4"])):
            good = BF16.encode(ordinary(64))
            fixed = dict(param_id=1, numel=64, offset=0, rounding="nearest", noise=SPEC, outs=[], residual=None)
            fixed |= dict(target="values", mask=None, threads=1)
            ready = ready_passes([ready_pass(data, f, **fixed) for data, f in ((good, BF16), (bytes_, fmt))])
            before, fold = [good.clone(), bytes_.clone()], Updates([Update(1, 0.5)])
            with pytest.raises(ConfigError, match="not made ready"):
                ready.run([(fold, [], True, False)] * 2, Mark())
            assert torch.equal(before[0], good) and torch.equal(before[1], bytes_)


@each_isa
def test_directions_of_low_rank_are_the_same_in_slices_rows_and_threads(isa):
    """A matrix at once; in pieces that begin inside of rows; by gathered rows; V shared by some updates and not by
    others, more of them than have a place for their U."""
    rows, columns = 300, 330
    n, spec = rows * columns, NoiseSpec(rank=3, columns=columns)
    stored = BF16.encode(torch.randn(n, generator=torch.Generator().manual_seed(1)) * 0.02)
    updates = [Update((k // 4) << 32 | k, f32(1e-2), fold=False) for k in range(9)]
    lanes = [Perturbation(5 << 32 | 77, f32(s)) for s in (1e-3, -1e-3)]

    def passed(start, stop, threads=1):
        outs = [torch.empty(stop - start) for _ in lanes]
        fused_pass(stored[2 * start : 2 * stop].clone(), BF16, param_id=5, numel=stop - start, offset=start, noise=spec,
                   updates=updates, perturbations=lanes, outs=outs, threads=threads)  # fmt: skip
        return outs

    want = run("reference", stored, BF16, lanes, [torch.float32] * 2, noise=spec, updates=updates)[1:]
    with using(isa):
        assert_same(want, [bits(out) for out in passed(0, n, threads=3)])
        cuts = [0, 1, 4000, 4001, 33_333, n]
        pieces = zip(*(passed(*pair) for pair in itertools.pairwise(cuts)), strict=True)
        assert_same(want, [bits(torch.cat(piece)) for piece in pieces])
        chosen = torch.tensor([299, 0, 7, 7, 150])
        outs = [torch.empty(len(chosen), columns) for _ in lanes]
        fused_rows(stored, BF16, param_id=5, row_numel=columns, rows=chosen, updates=updates, noise=spec,
                   perturbations=lanes, outs=outs)  # fmt: skip
        assert_same([lane.view(rows, columns)[chosen] for lane in want], [bits(out) for out in outs])


@each_isa
@pytest.mark.parametrize("fmt", SMALL, ids=lambda f: f.name)
def test_native_equals_the_reference_in_formats_with_planes(isa, fmt):
    """The same cases where a parameter has scales, minima or a residual part."""
    chance = random.Random(fmt.name)
    for number in range(30):
        arguments, options = random_case(chance, fmt)
        assert_same(
            run(isa, *arguments, **options), run("reference", *arguments, **options), f"case {number} {options}"
        )


@each_isa
@pytest.mark.parametrize("fmt", WITH_SCALES, ids=lambda f: f.name)
def test_native_equals_the_reference_when_scales_train(isa, fmt):
    chance = random.Random(fmt.name)
    for number in range(25):
        arguments, options = random_case(chance, fmt, "scales")
        options["residual"] = None
        assert_same(
            run(isa, *arguments, **options), run("reference", *arguments, **options), f"case {number} {options}"
        )


@each_isa
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("fmt", [BF16, FP16], ids=lambda f: f.name)
def test_every_code_times_anything_is_encoded_as_by_the_reference(isa, fmt, rounding):
    """All 2**16 stored values, scaled into normal, subnormal and overflowing results with full mantissas."""
    stored = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.uint8)
    for decay in (f32(0.999), f32(3.14159), f32(1.7e-3), f32(-5e-8), 60000.0):
        options = dict(updates=[Update(1, 0.0, decay)], rounding=rounding)
        assert_same(run(isa, stored, fmt, **options), run("reference", stored, fmt, **options), f"decay {decay}")


@each_variant
@pytest.mark.parametrize("mask", [None, Mask.smallest(f32(0.015)), Mask.random(0.3, 8)], ids=["all", "small", "some"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("fmt", TRAINED, ids=lambda f: f.name)
def test_pending_updates_in_one_call_equal_one_call_each(variant, fmt, rounding, mask):
    """Large updates, so that scales move between them; every other one waits for the next to fold."""
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0)) * 0.02
    parts = fmt.split(values) if fmt.residual_bytes else [fmt.encode(values)]
    updates = [Update(seed, f32(3e-2), f32(1 - 1e-3), fold=seed % 2 == 1) for seed in range(8)]
    options = dict(rounding=rounding, offset=1280, numel=3000, mask=mask)
    lanes = dict(perturbations=[Perturbation(9, f32(1e-3))], dtypes=[torch.float32])

    def once(parts, updates, **more):
        return run(variant, parts[0], fmt, residual=(*parts, None)[1], updates=updates, **options, **more)

    together = once(parts, updates, **lanes)
    for k in (0, 2, 4):
        parts = once(parts, updates[k : k + 2])
    assert_same(together, once(parts, updates[6:], **lanes))


@each_variant
def test_a_mask_by_magnitude_is_read_anew_at_each_step_and_not_within_one(variant):
    """Two steps of two noises each, in float64 but for the roundings that the pass states."""
    n, threshold = 2000, f32(0.02)
    values = torch.randn(n, generator=torch.Generator().manual_seed(3)) * 0.02
    steps = [[Update(1, f32(0.01), f32(0.5), False), Update(2, f32(0.01), 1.0, False, False)],
             [Update(3, f32(0.02), 1.0, False), Update(4, f32(0.01), 1.0, False, False)]]  # fmt: skip
    lane = Perturbation(9, f32(1e-2))
    w = values
    for step in steps:
        kept = w.abs() <= threshold
        for update in step:
            z = noise(SPEC, update.seed, 5, n).double()
            moved = ((w * update.decay).double() - update.coeff * z).float()
            w = torch.where(kept, moved, w)
    want = torch.where(w.abs() <= threshold, (w.double() + lane.scale * noise(SPEC, 9, 5, n).double()).float(), w)
    updates = [update for step in steps for update in step]
    outs = run(variant, values.view(torch.uint8), FP32, [lane], [torch.float32], updates=updates,
               mask=Mask.smallest(threshold))[1:]  # fmt: skip
    assert_same([bits(want)], outs)
    assert 0.2 < float((want != values).float().mean()) < 0.9


@each_variant
def test_a_mask_by_chance_is_a_function_of_seed_parameter_and_element(variant):
    """The share that was asked for, the same in every update, lane and slice; all others untouched."""
    n, mask = 20_000, Mask.random(0.25, 77)
    stored = torch.full((n,), 0.5).view(torch.uint8)

    def touched(lanes, updates, start=0, stop=n, seed=77, **more):
        part = stored[4 * start : 4 * stop]
        outs = run(variant, part, FP32, lanes, [torch.float32] * len(lanes), updates=updates, offset=start,
                   mask=Mask.random(0.25, seed), **more)  # fmt: skip
        return [out.view(torch.float32) != 0.5 for out in ([outs[0].view(torch.float32)] if updates else outs[1:])]

    first, second = touched([Perturbation(1, 1.0), Perturbation(2, -1.0)], [])
    assert torch.equal(first, second) and mask.limit == 16384
    assert abs(float(first.float().mean()) - 0.25) < 0.01
    assert torch.equal(touched([], [Update(3, 1.0, 0.5)])[0], first)
    assert torch.equal(touched([Perturbation(1, 1.0)], [], 1024, 5000)[0], first[1024:5000])
    for other in (touched([Perturbation(1, 1.0)], [], seed=78), touched([Perturbation(1, 1.0)], [], param_id=6)):
        assert float((other[0] & first).float().mean()) < 0.08  # two independent quarters: a sixteenth


def test_masks_that_are_none_are_refused():
    for wrong in (lambda: Mask("magnitude", -1), lambda: Mask("random", 65537), lambda: Mask("other", 1),
                  lambda: Mask.random(0.0, 1), lambda: Mask.random(1.5, 1), lambda: Mask.smallest(float("inf")),
                  lambda: Mask.smallest(-1.0), lambda: Mask.random(0.5, 1 << 64)):  # fmt: skip
        with pytest.raises(ConfigError):
            wrong()
    with pytest.raises(ConfigError, match="a mask is of values"):
        run("reference", FORMATS["int4"].encode(torch.zeros(128)), FORMATS["int4"], numel=128, target="scales",
            mask=Mask.random(0.5, 1))  # fmt: skip


@each_variant
@pytest.mark.parametrize("fmt", WITH_SCALES, ids=lambda f: f.name)
def test_pending_updates_of_scales_equal_one_call_each(variant, fmt):
    stored = fmt.encode(torch.randn(3000, generator=torch.Generator().manual_seed(0)) * 0.02)
    updates = [Update(seed, f32(3e-4), fold=seed == 3) for seed in range(4)]
    options = dict(numel=3000, target="scales", offset=640)
    lanes = dict(perturbations=[Perturbation(9, f32(1e-3))], dtypes=[torch.float32])
    together = run(variant, stored, fmt, updates=updates, **options, **lanes)
    for update in updates:
        stored = run(variant, stored, fmt, updates=[Update(update.seed, update.coeff)], **options)[0]
    assert_same(together, run(variant, stored, fmt, **options, **lanes))


@each_variant
@pytest.mark.parametrize("fmt", WITH_SCALES, ids=lambda f: f.name)
def test_a_scale_moves_and_stays_positive(variant, fmt):
    """Spelled out: the scale is a weight of its own, the codes stay, a step across zero ends at 1e-7."""
    n, group = 1000, fmt.group
    stored = fmt.encode(torch.randn(n, generator=torch.Generator().manual_seed(0)) * 0.02)
    (start, size), count = fmt.scales_span(n), fmt.num_groups(n)
    before = stored[start : start + size].clone().view(torch.float32)
    coeff = f32(before.mean().item())
    got, lane = run(variant, stored, fmt, numel=n, target="scales", updates=[Update(1, coeff)], offset=group * 7,
                    perturbations=[Perturbation(2, f32(1e-3))], dtypes=[torch.float32])  # fmt: skip
    after = got[start : start + size].clone().view(torch.float32)
    z = noise(SPEC, 1, 5, count, offset=7)
    want = (before.double() - coeff * z.double()).float().clamp(min=f32(1e-7))
    assert torch.equal(after, want)
    assert int((after == f32(1e-7)).sum()) > 0, "no scale was driven below zero: the test is too tame"
    rest = torch.ones(stored.numel(), dtype=torch.bool)
    rest[start : start + size] = False
    assert torch.equal(got[rest], stored[rest])
    moved = (after.double() + f32(1e-3) * noise(SPEC, 2, 5, count, offset=7).double()).float()
    again = got.clone()
    again[start : start + size] = moved.view(torch.uint8)
    assert torch.equal(lane.view(torch.float32), fmt.decode(again, n))


@each_variant
@pytest.mark.parametrize("fmt", [f for f in TRAINED if f.residual_bytes], ids=lambda f: f.name)
def test_a_split_master_is_updated_as_itself_and_seen_coarse(variant, fmt):
    """Updates below the coarse step reach the master whole; lanes see decode(coarse); others need no residual."""
    n = 2000
    values = torch.randn(n, generator=torch.Generator().manual_seed(0))
    stored, residual = fmt.split(values)
    master = fmt.join(stored, residual)
    update, lane = Update(1, f32(1e-3)), dict(perturbations=[Perturbation(0, 0.0)], dtypes=[torch.float32])
    after, rest, seen = run(variant, stored, fmt, numel=n, residual=residual, updates=[update], **lane)
    exact = master.double() - f32(1e-3) * noise(SPEC, 1, 5, n).double()
    want = fmt.split(exact.float(), like=stored)  # a product of 24 x 24 bits is exact in float64
    assert torch.equal(after, want[0])
    assert torch.equal(rest, want[1])
    assert torch.equal(seen, bits(fmt.decode(after, n)))
    pending = Update(1, f32(1e-3), fold=False)
    got = run(variant, stored, fmt, numel=n, updates=[pending], **lane)
    kept = run(variant, stored, fmt, numel=n, residual=residual, updates=[pending], **lane)
    assert torch.equal(got[0], stored)
    assert torch.equal(kept[1], residual)
    assert torch.equal(got[1], kept[2])
    coarse = fmt.decode(stored, n).double() - f32(1e-3) * noise(SPEC, 1, 5, n).double()
    assert torch.equal(got[1].view(torch.float32), coarse.float())


@each_variant
def test_200_updates_of_a_split_master_are_those_of_float32(variant):
    """bf16+16 folded every 1, 4 or 16 updates ends on the weights of a float32 run, bit for bit."""
    n, fmt = 700, FORMATS["bf16+16"]
    values = torch.randn(n, generator=torch.Generator().manual_seed(0)) * 0.02
    updates = [Update(seed, f32(1e-6), f32(1 - 1e-7)) for seed in range(200)]
    spec = NoiseSpec("rademacher")
    want = run(variant, values.view(torch.uint8), FP32, updates=updates, noise=spec)[0]
    for every in (1, 4, 16):
        stored, residual = fmt.split(values)
        for k in range(0, 200, every):
            group = updates[k : k + every]
            group = [Update(u.seed, u.coeff, u.decay, fold=i == len(group) - 1) for i, u in enumerate(group)]
            stored, residual = run(variant, stored, fmt, residual=residual, updates=group, noise=spec)
        assert torch.equal(fmt.join(stored, residual).view(torch.uint8), want), every


@each_variant
def test_unfolded_updates_reach_the_lanes_but_not_the_store(variant):
    n = 2000
    stored = weights(BF16, n)
    folded, pending = Update(1, f32(1e-2)), Update(2, f32(1e-4), fold=False)
    after = run(variant, stored, BF16, updates=[folded])[0]
    got, lane = run(variant, stored, BF16, updates=[folded, pending], perturbations=[Perturbation(0, 0.0)],
                    dtypes=[torch.float32])  # fmt: skip
    assert torch.equal(got, after)
    w = after.view(torch.bfloat16).float().double() - f32(1e-4) * noise(SPEC, 2, 5, n).double()
    real = w.isfinite()
    assert torch.equal(lane.view(torch.float32)[real], w.float()[real])  # a product of 24 x 24 bits is exact in float64
    assert not torch.equal(lane, bits(after.view(torch.bfloat16).float()))


@each_variant
def test_sums_kept_in_float32_survive_where_folding_loses_them(variant):
    """Ten updates far below half a bf16 step: folded each time nothing changes, folded once they add up."""
    n = 512
    stored = torch.ones(n, dtype=torch.bfloat16).view(torch.uint8)
    spec = NoiseSpec("rademacher")
    sign = noise(spec, 1, 5, n)
    small = [Update(1, 2.0**-11, fold=k == 9) for k in range(10)]
    each = run(variant, stored, BF16, updates=[Update(1, 2.0**-11)] * 10, noise=spec)[0].view(torch.bfloat16)
    once = run(variant, stored, BF16, updates=small, noise=spec)[0].view(torch.bfloat16)
    assert (each[sign > 0] == 1).all()
    assert torch.equal(once, (1 - 10 * 2.0**-11 * sign).bfloat16())
    assert (once != 1).all()


@each_variant
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_lanes_see_the_value_as_stored(variant, rounding):
    """A lane is made from decode(encode(w)), written back or not, not from the float32 w before rounding."""
    stored = weights(BF16, 1500)
    options = dict(updates=[Update(1, f32(1e-2))], rounding=rounding)
    lane = dict(perturbations=[Perturbation(0, 0.0), Perturbation(3, f32(1e-3))], dtypes=[torch.float32] * 2)
    after, plain, noisy = run(variant, stored, BF16, **options, **lane)
    assert_same([plain, noisy], run(variant, after, BF16, **lane)[1:])
    kept, *others = run(variant, stored, BF16, write_back=False, **options, **lane)
    assert torch.equal(kept, stored)
    assert_same(others, [plain, noisy])


@each_variant
def test_no_noise_keeps_every_bit(variant):
    """scale 0 and coeff 0 leave a negative zero negative."""
    stored = torch.full((200,), -0.0, dtype=torch.bfloat16).view(torch.uint8)
    after, lane = run(variant, stored, BF16, updates=[Update(1, 0.0)], perturbations=[Perturbation(1, 0.0)],
                      dtypes=[torch.float32])  # fmt: skip
    assert torch.equal(after, stored)
    assert (lane == -(1 << 31)).all()


@each_variant
def test_lanes_do_not_depend_on_their_neighbours(variant):
    """Seeds a, b, a, a, none, a: each lane equals the same lane run alone, whatever its neighbours shared."""
    stored = weights(BF16, 1300)
    lanes = [Perturbation(s, f32(c)) for s, c in ((1, 1e-3), (2, 1e-3), (1, -1e-3), (1, 2e-3), (3, 0.0), (1, 5e-4))]
    dtypes = [OUT_DTYPES[k % 3] for k in range(6)]
    together = run(variant, stored, BF16, perturbations=lanes, dtypes=dtypes, offset=77)
    for k in range(6):
        alone = run(variant, stored, BF16, perturbations=[lanes[k]], dtypes=[dtypes[k]], offset=77)
        assert torch.equal(together[k + 1], alone[1]), k


@each_isa
def test_what_the_library_does_not_know_the_reference_runs(isa, monkeypatch):
    """A format or a distribution that is written in Python alone trains, slowly, with the library in use."""

    class Own(type(BF16)):
        name, code = "own", 99

    def uniform(w):
        return ((w >> 8).astype("f4") - 2.0**23).reshape(-1) * np.float32(2.0**-23)

    monkeypatch.setitem(DISTRIBUTIONS, "uniform", Distribution("uniform", 17, 4, uniform, 1.0, fold_every=4))
    given = dict(updates=[Update(3, 2.0**-4)], perturbations=[Perturbation(5, 0.5)], dtypes=[torch.float32])
    stored = weights(BF16, 1000)
    assert_same(run(isa, stored, Own(), **given), run("reference", stored, BF16, **given))
    spec = NoiseSpec("uniform")
    assert_same(run(isa, stored, BF16, noise=spec, **given), run("reference", stored, BF16, noise=spec, **given))
    with using(isa):
        z = noise(spec, 3, 5, 1000)
        assert torch.equal(noise(spec, 3, 5, 77, offset=101), z[101:178])
        assert isinstance(kernels_for(stored, BF16, SPEC), OnCpu)
    assert 0.9 < z.abs().max() <= 1 and len(set(z.tolist())) > 990
    with pytest.raises(ConfigError, match="stored is on meta"):
        fused_pass(stored.to("meta"), BF16, param_id=0, numel=1000, noise=SPEC)


@each_variant
@pytest.mark.parametrize("fmt", [BF16, FP32], ids=lambda f: f.name)
@pytest.mark.parametrize("distribution", list(DISTRIBUTIONS))
def test_pieces_equal_the_whole(variant, fmt, distribution):
    """Cut anywhere, at odd addresses, in any order: a slice with its offset is that slice of the parameter."""
    n, size = 5000, fmt.nbytes(1)
    options = dict(updates=[Update(1, f32(1e-2))], rounding="stochastic", noise=NoiseSpec(distribution))
    lane = dict(perturbations=[Perturbation(2, f32(1e-3))], dtypes=[torch.float32])
    stored = weights(fmt, n)
    options["mask"] = Mask.smallest(f32(0.01)) if distribution == "gaussian" else Mask.random(0.5, 3)
    whole = run(variant, stored, fmt, **options, **lane)
    odd = torch.zeros(n * size + 1, dtype=torch.uint8)[1:]  # an address no vector likes
    odd.copy_(stored)
    cuts = [0, 1, 2, 130, 1023, 1024, 1151, 3000, 4999, n]
    for start, end in random.Random(0).sample(list(itertools.pairwise(cuts)), len(cuts) - 1):
        piece = odd[start * size : end * size]
        out = torch.empty(end - start)
        with using(variant):
            fused_pass(piece, fmt, param_id=5, numel=end - start, offset=start, outs=[out],
                       perturbations=lane["perturbations"], **options)  # fmt: skip
        assert torch.equal(bits(out), whole[1][start:end]), (start, end)
    assert torch.equal(odd, whole[0])


@each_variant
@pytest.mark.parametrize("fmt, target", [case for case in TARGETS if case[0].group], ids=target_id)
def test_pieces_of_whole_groups_equal_the_whole(variant, fmt, target):
    n, folds = max(5000, 24 * fmt.group), fmt.trains or target == "scales"
    values = torch.randn(n, generator=torch.Generator().manual_seed(0))
    stored, residual = stored_as(fmt, values)
    options = dict(updates=[Update(1, f32(1e-2), fold=folds)], rounding="stochastic", target=target,
                   perturbations=[Perturbation(2, f32(1e-3))], dtypes=[torch.float32])  # fmt: skip
    whole = run(variant, stored, fmt, numel=n, residual=residual, **options)
    for start, end in itertools.pairwise([0, fmt.group, 8 * fmt.group, 23 * fmt.group, n]):
        rest = None if residual is None else residual[start:end]
        piece = run(variant, cut(fmt, stored, n, start, end), fmt, numel=end - start, offset=start, residual=rest,
                    **options)  # fmt: skip
        assert torch.equal(piece[0], cut(fmt, whole[0], n, start, end)), (start, end)
        assert residual is None or torch.equal(piece[1], whole[1][start:end])
        assert torch.equal(piece[-1], whole[-1][start:end])


@each_variant
@pytest.mark.parametrize("name", ["bf16", "int8+8", "fp8_e4m3"])
def test_thread_count_does_not_matter(variant, name):
    fmt, n = FORMATS[name], 200_001
    stored, residual = stored_as(fmt, ordinary(n))
    options = dict(updates=[Update(1, f32(1e-2))], rounding="stochastic", offset=1000 // (fmt.group or 1) * 128,
                   perturbations=[Perturbation(2, f32(1e-3))] * 2, dtypes=[torch.float32, torch.bfloat16],
                   numel=n, residual=residual)  # fmt: skip
    want = run(variant, stored, fmt, threads=1, **options)
    for threads in (2, 5, 64):
        assert_same(run(variant, stored, fmt, threads=threads, **options), want, f"{threads} threads")


@each_isa
def test_lanes_too_large_for_a_cache_are_the_same(isa):
    """Above 32 MiB of lanes the stores go around the cache; pieces of the same pass do not."""
    n, piece = 6_000_129, 1_000_003  # odd, so that most pieces start inside a tile and off a cache line
    stored = weights(BF16, n)
    lanes = [Perturbation(2, f32(1e-3))] * 3
    spec = NoiseSpec("rademacher")
    for shift in (0, 1):  # outputs on and off a cache line: only the former can go around the cache
        outs = [torch.zeros(n + shift, dtype=dtype)[shift:] for dtype in OUT_DTYPES]
        with using(isa):
            fused_pass(stored, BF16, param_id=5, numel=n, noise=spec, perturbations=lanes, outs=outs, threads=2)
        for start in range(0, n, piece):
            end = min(start + piece, n)
            part = run(isa, stored[2 * start : 2 * end], BF16, perturbations=lanes, dtypes=OUT_DTYPES, offset=start,
                       noise=spec)  # fmt: skip
            assert_same(part[1:], [bits(out[start:end]) for out in outs], f"elements {start} to {end}")


@each_variant
@pytest.mark.parametrize("fmt, target", TARGETS, ids=target_id)
@pytest.mark.parametrize("row_numel", [1, 48, 127, 768, 1030])
def test_rows_equal_the_rows_of_the_whole(variant, row_numel, fmt, target):
    """Rows that start and end inside groups are those of a pass over everything, folds included; nothing is written."""
    num_rows = 40
    n = num_rows * row_numel
    stored, residual = stored_as(fmt, ordinary(n))
    rows = torch.tensor([3, 0, 39, 3, 17])
    folds = fmt.trains or target == "scales"
    options = dict(updates=[Update(1, f32(1e-2), fold=folds), Update(2, f32(1e-4), fold=False)], rounding="stochastic",
                   target=target)  # fmt: skip
    lanes = [Perturbation(2, f32(1e-3)), Perturbation(2, f32(-1e-3))]
    *_, one, two = run(variant, stored, fmt, numel=n, residual=residual, perturbations=lanes,
                       dtypes=[torch.float32] * 2, **options)  # fmt: skip
    whole = [one, two]
    outs = [torch.empty(len(rows), row_numel) for _ in lanes]
    before = stored.clone()
    with using(variant):
        fused_rows(stored, fmt, param_id=5, row_numel=row_numel, rows=rows, numel=n, noise=SPEC, perturbations=lanes,
                   outs=outs, residual=residual, threads=3, **options)  # fmt: skip
    for out, full in zip(outs, whole, strict=True):
        assert torch.equal(bits(out), full.view(num_rows, row_numel)[rows])
    assert torch.equal(stored, before)


@each_variant
@pytest.mark.parametrize("fmt, target", TARGETS, ids=target_id)
@pytest.mark.parametrize("row_numel", [48, 128, 1030])
def test_rows_of_a_piece_are_those_of_the_whole_and_others_are_left_alone(variant, row_numel, fmt, target):
    """A piece begins where a group does. Rows of other pieces, before it and behind it, keep what was there."""
    num_rows, first, stop = 192, 64, 128
    if fmt.group and first * row_numel % fmt.group:  # as many rows have no whole number of bands
        row_numel = 1536
    n, start, end = num_rows * row_numel, first * row_numel, stop * row_numel
    stored, residual = stored_as(fmt, ordinary(n))
    rows = torch.tensor([127, 0, 64, 191, 64, 63, 128, 100])
    folds = fmt.trains or target == "scales"
    options = dict(updates=[Update(1, f32(1e-2), fold=folds), Update(2, f32(1e-4), fold=False)], rounding="stochastic",
                   target=target)  # fmt: skip
    lanes = [Perturbation(2, f32(1e-3)), Perturbation(2, f32(-1e-3))]
    *_, one, two = run(variant, stored, fmt, numel=n, residual=residual, perturbations=lanes,
                       dtypes=[torch.float32] * 2, **options)  # fmt: skip
    piece, second = cut(fmt, stored, n, start, end), residual
    if residual is not None:
        second = residual[fmt.residual_bytes * start : fmt.residual_bytes * end].clone()
    outs = [torch.full((len(rows), row_numel), -3.0) for _ in lanes]
    with using(variant):
        fused_rows(piece, fmt, param_id=5, row_numel=row_numel, rows=rows, numel=end - start, first_row=first,
                   total_rows=num_rows, noise=SPEC, perturbations=lanes, outs=outs, residual=second, threads=3,
                   **options)  # fmt: skip
    inside = (rows >= first) & (rows < stop)
    for out, full in zip(outs, (one, two), strict=True):
        assert torch.equal(bits(out[inside]), full.view(num_rows, row_numel)[rows[inside]])
        assert bool((out[~inside] == -3.0).all())


def test_the_pass_is_its_formula():
    """One folded update and one lane, spelled out with float64 standing in for the exact sums."""
    n = 4000
    w = torch.randn(n, generator=torch.Generator().manual_seed(1))
    stored, out = w.clone().view(torch.uint8), torch.empty(n)
    fused_pass(stored, FP32, param_id=8, numel=n, updates=[Update(1, f32(1e-2), f32(0.99))],
               noise=SPEC, perturbations=[Perturbation(2, f32(1e-3))], outs=[out])  # fmt: skip
    decayed = w * f32(0.99)
    after = (decayed.double() - f32(1e-2) * noise(SPEC, 1, 8, n).double()).float()
    assert torch.equal(stored.view(torch.float32), after)
    assert torch.equal(out, (after.double() + f32(1e-3) * noise(SPEC, 2, 8, n).double()).float())


@each_isa
def test_callers_float_mode_does_not_leak_in(isa):
    """torch.set_flush_denormal(True) in the caller changes neither subnormal weights nor the mode afterwards."""
    stored = weights(BF16, 1000)
    tiny = torch.full((1000,), 1e-39).bfloat16().view(torch.uint8)
    options = dict(updates=[Update(1, f32(1e-39), 0.5)])
    want = [run(isa, s, BF16, **options) for s in (stored, tiny)]
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        got = [run(isa, s, BF16, **options) for s in (stored, tiny)]
        assert (torch.tensor([1e-39]) * 1.0).item() == 0.0, "the caller's mode was not restored"
    finally:
        torch.set_flush_denormal(False)
    for a, b in zip(got, want, strict=True):
        assert_same(a, b)


@pytest.mark.skipif(not ISAS, reason="the native library is not built")
def test_calls_from_many_python_threads_do_not_mix():
    """More callers than the pool has room for, each with its own weights."""
    n = 300_000
    stored = [weights(BF16, n, seed) for seed in range(4)]
    options = dict(updates=[Update(1, f32(1e-2))], perturbations=[Perturbation(2, f32(1e-3))], dtypes=[torch.float32])
    want = [run(ISAS[-1], s, BF16, threads=1, **options) for s in stored]
    got: dict[tuple[int, int], list[torch.Tensor]] = {}

    def caller(k: int) -> None:
        for turn in range(25):
            after, out = stored[k].clone(), torch.empty(n)
            fused_pass(after, BF16, param_id=5, numel=n, updates=options["updates"], noise=SPEC, threads=2,
                       perturbations=options["perturbations"], outs=[out])  # fmt: skip
            got[k, turn] = [after, bits(out)]

    threads = [threading.Thread(target=caller, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 100
    for (k, turn), result in got.items():
        assert_same(result, want[k], f"caller {k}, turn {turn}")


@pytest.mark.skipif(not ISAS or not hasattr(os, "fork"), reason="needs the native library and fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_working_threads():
    """The child has none of the parent's workers, asleep by now: it must not wait for them, and start its own."""
    z = noise(SPEC, 1, 2, 300_000, threads=2).numpy().tobytes()
    time.sleep(0.05)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a hang ends the child, not the test run
        # no torch arithmetic here: torch's own OpenMP threads do not survive a fork
        same = all(noise(SPEC, 1, 2, 300_000, threads=2).numpy().tobytes() == z for _ in range(20))
        tasks = Path("/proc/self/task")
        os._exit(0 if same and (not tasks.exists() or len(list(tasks.iterdir())) == 2) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_does_not_fit_is_refused_by_name():
    good = dict(param_id=0, numel=8, noise=SPEC)
    stored, out = torch.zeros(16, dtype=torch.uint8), torch.zeros(8)
    one = [Perturbation(1, 0.5)]
    cases = [
        (r"8 bf16 elements are 16 bytes", dict(stored=stored[:15])),
        (r"torch.float32", dict(stored=torch.zeros(16))),
        (r"strides", dict(stored=torch.zeros(32, dtype=torch.uint8)[::2])),
        (r"1 perturbations but 0 outputs", dict(perturbations=one)),
        (r"shape \(7,\) cannot hold the 8", dict(perturbations=one, outs=[out[:7]])),
        (r"torch.float64", dict(perturbations=one, outs=[out.double()])),
        (r"must be contiguous", dict(perturbations=one, outs=[torch.zeros(16)[::2]])),
        (r"on meta", dict(perturbations=one, outs=[torch.zeros(8, device="meta")])),
        (r"rounding='up'", dict(rounding="up")),
        (r"param_id=4294967296", dict(param_id=1 << 32)),
        (r"offset", dict(offset=-1)),
        (r"target='bits'", dict(target="bits")),
        (r"bf16 has no float32 scales", dict(target="scales")),
    ]
    for message, change in cases:
        options = {"stored": stored, **good, **change}
        with pytest.raises(ConfigError, match=message):
            fused_pass(options.pop("stored"), BF16, **options)
    rows = dict(param_id=0, row_numel=4, noise=SPEC, perturbations=one, outs=[torch.zeros(1, 4)])
    for message, bad in ((r"rows 2..2 asked of a parameter with 2", [2]), (r"rows -1..-1", [-1])):
        with pytest.raises(ConfigError, match=message):
            fused_rows(stored, BF16, rows=torch.tensor(bad), **rows)
    with pytest.raises(ConfigError, match=r"rows 3..4 are stored of a parameter with 4 rows"):
        fused_rows(stored, BF16, rows=torch.tensor([0]), first_row=3, total_rows=4, **rows)
    with pytest.raises(ConfigError, match=r"first_row=3: int8 has groups of 128"):
        fused_rows(torch.zeros(FORMATS["int8"].nbytes(128), dtype=torch.uint8), FORMATS["int8"], numel=128, first_row=3,
                   total_rows=64, rows=torch.tensor([4]), **rows)  # fmt: skip
    with pytest.raises(ConfigError, match="int64"):
        fused_rows(stored, BF16, rows=torch.tensor([0], dtype=torch.int32), **rows)
    with pytest.raises(ConfigError, match="not a whole number"):
        fused_rows(stored, BF16, rows=torch.tensor([0]), **rows | {"row_numel": 3})


def test_what_a_format_cannot_do_is_refused_by_name():
    def attempt(name, numel=256, **options):
        fmt = FORMATS[name]
        stored = torch.zeros(fmt.nbytes(numel), dtype=torch.uint8)
        fused_pass(stored, fmt, param_id=0, numel=numel, noise=SPEC, **options)

    fold, pending = Update(1, 0.5), Update(1, 0.5, fold=False)
    attempt("bf16+16", updates=[pending])
    attempt("int4", updates=[pending])
    attempt("int4", updates=[fold], target="scales")
    cases = [
        (r"give its residual too", "bf16+16", dict(updates=[fold])),
        (r"256 bf16\+8 elements have 256 bytes", "bf16+8", dict(residual=torch.zeros(512, dtype=torch.uint8))),
        (r"int4 values are never rewritten", "int4", dict(updates=[fold])),
        (r"nf4 values are never rewritten", "nf4", dict(updates=[fold])),
        (r"offset=100: int8 has groups of 128", "int8", dict(offset=100)),
        (r"fp8_e4m3 has no float32 scales", "fp8_e4m3", dict(target="scales")),
    ]
    for message, name, options in cases:
        with pytest.raises(ConfigError, match=message):
            attempt(name, **options)
    with pytest.raises(ConfigError, match="give numel"):
        fused_rows(torch.zeros(260, dtype=torch.uint8), FORMATS["int8"], param_id=0, row_numel=4,
                   rows=torch.tensor([0]), noise=SPEC, perturbations=[], outs=[])  # fmt: skip


@pytest.mark.parametrize("value", [0.1, float("nan"), float("inf"), 1e300])
def test_scalars_must_be_float32(value):
    """A coefficient is the same number in the journal, in Python and in the kernel, or it is refused."""
    for make in (lambda: Update(1, value), lambda: Update(1, 0.5, value), lambda: Perturbation(1, value)):
        with pytest.raises(ConfigError, match="exactly a float32"):
            make()
    with pytest.raises(ConfigError, match="seed=-1"):
        Update(-1, 0.5)


def test_own_threads_and_torchs_do_the_same():
    """Both pools in one process, from several Python threads at once, and in a child after a fork."""
    program = """
import ctypes, os, sys, threading
import torch
from zo_offload.kernels import native
from zo_offload.numerics import noise

library = native.library()
lib = ctypes.CDLL(str(library.path))
torch.set_num_threads(2)
make = lambda: noise.noise(noise.NoiseSpec("gaussian"), 5, 6, 300_001, 77, threads=2)
assert library.threads == "torch's" or not torch.backends.openmp.is_available() or sys.platform != "linux"
want = noise.noise(noise.NoiseSpec("gaussian"), 5, 6, 300_001, 77, threads=1)
assert torch.equal(make(), want)
wrong = []
callers = [threading.Thread(target=lambda: wrong.append(not torch.equal(make(), want))) for _ in range(4)]
[t.start() for t in callers], [t.join() for t in callers]
assert wrong == [False] * 4
child = os.fork()
if child == 0:  # torch's threads are not there (its own ops would hang): ours start anew
    os._exit(0 if make().numpy().tobytes() == want.numpy().tobytes() else 1)
assert os.waitpid(child, 0)[1] == 0
lib.zo_cpu_share_threads(None, None)
assert torch.equal(make(), want)
"""
    if native.library() is None:
        pytest.skip("no native library: there are no threads of its own")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
