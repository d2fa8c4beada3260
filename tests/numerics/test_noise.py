"""The noise: known answers, one set of bits everywhere, and the statistics of what it claims to be."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import noise as benchmark
from support.native_variants import each_variant, using
from zo_offload.errors import ConfigError
from zo_offload.kernels import float32, native, philox
from zo_offload.kernels.distributions import DISTRIBUTIONS, GAUSSIAN_ROWS, gaussian_table
from zo_offload.numerics import noise
from zo_offload.numerics.noise import NoiseSpec, assign_param_ids, param_id, step_seed

SPECS = [
    NoiseSpec(d, r, layout)
    for (d, layout), r in itertools.product((("gaussian", 2), ("rademacher", 2), ("gaussian", 1)), (7, 10))
]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind.name}{s.rounds}")

# counter, key -> words; Random123 1.14, tests/kat_vectors
KNOWN = {
    (7, (0, 0, 0, 0), (0, 0)): (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
    (7, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2): (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
    (7, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)): (
        0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A,
    ),
    (10, (0, 0, 0, 0), (0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    (10, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    (10, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)): (
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
    ),
}  # fmt: skip

# SHA-256 of 100,003 values of seed 2**63 + 12345, parameter 7, from element 2**34 - 50,001. Never to change without
# a new LAYOUT_VERSION: every journal written so far replays through these bits.
GOLDEN = {
    ("gaussian", 7): "42620bc0acddc444d6e0dc0fb7c64e0934d1e5ebf17b1a4088b9ac844140b1f9",
    ("gaussian", 10): "b45d0c92bd3e644d2b105e7fd88cd1109dfff77f5f1569bde0e13e1cf277345f",
    ("boxmuller", 7): "afb9c4037d4263d3aa09dfbeb89de445a46c5acff55bc35ad4d79772b3ddfdce",
    ("boxmuller", 10): "c75ab2e51289f90c35f1f310e0c2c51bbec98d5d4cf22a6bbfb122552933e00c",
    ("rademacher", 7): "5da9a7d6644cb6d55856efaa19c861fcea7872fb022b28334f0cc6909cacf82d",
    ("rademacher", 10): "8361fbc429815d82eabdaf2e531bde7a6d26161c87720254ea9ebb01e1cc6c5f",
}
# SHA-256 of the Gaussian of all 65,536 half-words: nothing else goes into layout 2
GOLDEN_TABLE = "20e5098bc71d692d819c32864c655f4c624a8500defc522b0e26f9f788f363df"


@pytest.mark.parametrize(("rounds", "counter", "key"), KNOWN, ids=str)
def test_philox_known_answers(rounds, counter, key):
    want = KNOWN[rounds, counter, key]
    seed, block = key[0] | key[1] << 32, counter[0] | counter[1] << 32
    assert philox.philox_block(seed, block, counter[2], counter[3], rounds) == want
    words = philox.words(seed, counter[2], counter[3], rounds, block, 1)
    assert tuple(int(w) for w in words[0]) == want
    library = native.library()
    if library is not None:
        assert library.philox(counter, key, rounds) == want


@each_variant
@each_spec
def test_z_has_its_golden_hash(variant, spec):
    with using(variant):
        z = noise.noise(spec, (1 << 63) + 12345, 7, 100_003, (1 << 34) - 50_001)
    assert hashlib.sha256(z.numpy().tobytes()).hexdigest() == GOLDEN[spec.kind.name, spec.rounds]


@each_variant
def test_the_gaussian_of_every_half_word_has_its_golden_hash(variant):
    with using(variant):
        library = native.library()
        table = np.empty(1 << 16, np.float32)
        if library is None:
            table[:] = gaussian_table()
        else:
            library.gaussian_table(table.ctypes.data)
    assert hashlib.sha256(table.tobytes()).hexdigest() == GOLDEN_TABLE


def test_the_rows_are_those_of_the_kernels():
    text = (Path(__file__).resolve().parents[2] / "csrc" / "noise.h").read_text()
    rows = re.findall(r"ROW\((0x\w+), (0x\w+), (0x\w+), (0x\w+)\)", text)
    assert tuple(tuple(int(word, 16) for word in row) for row in rows) == GAUSSIAN_ROWS


@each_variant
@each_spec
@pytest.mark.parametrize("base", [0, (1 << 34) - 2000, (1 << 39) - 2000, (1 << 61) + 12])
def test_any_slice_is_the_slice_of_the_whole(variant, spec, base):
    """Cuts inside Philox blocks, tiles and vectors, and across the 2**32-th block of either distribution."""
    with using(variant):
        whole = noise.noise(spec, 99, 3, 4097, base)
        chance = random.Random(base)
        for start, n in [(0, 0), (1, 1), (2, 3), (127, 130), (1023, 2), (1999, 700), (1, 4096)] + [
            (chance.randrange(3000), chance.randrange(1097)) for _ in range(20)
        ]:
            assert torch.equal(noise.noise(spec, 99, 3, n, base + start), whole[start : start + n]), (start, n)


@each_variant
@each_spec
def test_thread_count_does_not_matter(variant, spec):
    with using(variant):
        one = noise.noise(spec, 5, 6, 300_001, 77, threads=1)
        for threads in (0, 2, 3, 7):
            assert torch.equal(noise.noise(spec, 5, 6, 300_001, 77, threads=threads), one), threads


def test_fma_rounds_once():
    """Against exact rational arithmetic: ties, cancellation, subnormals, overflow."""
    chance = np.random.default_rng(0)
    bits = chance.integers(0, 1 << 32, (3, 4000), dtype=np.uint32)
    a, b, c = bits.view(np.float32)
    # sums near a tie or near cancellation, where rounding twice goes wrong
    with np.errstate(all="ignore"):
        c[:1500] = -(a[:1500] * b[:1500]) * np.float32(1 + 2.0**-23)
        a[2500:3000] *= np.float32(2.0**-100)
    a[1500:2500], b[1500:2500] = np.float32(1 + 2.0**-12), (1 + chance.integers(0, 99, 1000) * 2.0**-12).astype("f4")
    c[1500:2500] = (2.0 ** chance.integers(20, 60, 1000) * chance.choice([-1, 1], 1000)).astype("f4")
    # a product that float64 cannot tell from the tie it lies beside: rounding twice ends on the other side
    k = chance.integers(15, 23, 1000)
    a[3000:], b[3000:] = (1 + 2.0**-k).astype("f4"), ((1 - 2.0**-k) * chance.choice([-1, 1], 1000)).astype("f4")
    c[3000:] = ((1 << 24) + 2 * chance.integers(0, 9, 1000)) * chance.choice([-1, 1], 1000)
    keep = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    a, b, c = a[keep], b[keep], c[keep]
    assert len(a) > 3000
    got = float32.fma(a, b, c)
    for x, y, w, z in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(w)
        assert z == _round_float32(exact), (x, y, w)


def _round_float32(exact: Fraction) -> float:
    if exact == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(exact.numerator)) - math.log2(exact.denominator))
    exponent += (abs(exact) >= Fraction(2) ** (exponent + 1)) - (abs(exact) < Fraction(2) ** exponent)
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(exact / unit) * unit  # Fraction rounds half to even
    return float(rounded) if abs(rounded) < Fraction(2) ** 128 else math.copysign(math.inf, rounded)


def test_the_gaussian_of_layout_1_is_box_muller():
    """The float32 transform against float64 on words from everywhere, corners included."""
    chance = np.random.default_rng(1)
    a = np.concatenate([chance.integers(0, 1 << 32, 200_000), np.arange(64), (1 << 32) - 1 - np.arange(64),
                        (1 << 31) + np.arange(-64, 64)]).astype(np.uint32)  # fmt: skip
    b = chance.permutation(a)
    z0, z1 = philox.gaussian_pair(a, b)
    u = np.abs((a | np.uint32(0x80000001)).view(np.int32).astype(np.float32).astype(np.float64)) / 2**31
    r = np.sqrt(-2 * np.log(u))
    angle = (((b >> np.uint32(9)).astype(np.float64) / 2**22) - 1) * np.pi / 2
    sign = 1 - 2 * (b & np.uint32(1)).astype(np.float64)
    assert np.abs(z0 - sign * r * np.cos(angle)).max() < 6e-6
    assert np.abs(z1 - r * np.sin(angle)).max() < 6e-6
    assert max(np.abs(z0).max(), np.abs(z1).max()) <= 6.5556


@each_spec
def test_moments_and_independence(spec):
    """Five sigma on the first moments, and no correlation with the neighbours in any argument."""
    n = 1 << 19
    z = noise.noise(spec, 42, 7, n).double()
    fourth = 3.0 if spec.distribution == "gaussian" else 1.0
    assert abs(z.mean()) < 5 / n**0.5
    assert abs((z**2).mean() - 1) <= 5 * ((fourth - 1) / n) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((z**4).mean() - fourth) <= 5 * (96 / n) ** 0.5
    others = {
        "seed": noise.noise(spec, 43, 7, n), "seed, upper word": noise.noise(spec, 42 + (1 << 32), 7, n),
        "parameter": noise.noise(spec, 42, 8, n), "element": noise.noise(spec, 42, 7, n, 1),
        "block": noise.noise(spec, 42, 7, n, 128), "block, upper word": noise.noise(spec, 42, 7, n, 1 << 39),
    }  # fmt: skip
    for what, other in others.items():
        assert abs((z * other).mean()) < 5 / n**0.5, what


def test_the_law_of_the_gaussian():
    """By all of its 65,536 inputs. An estimate by perturbations has its mean from the second moment and its spread from
    the fourth; the rest says how far from a normal the tails are, which no estimate asks for."""
    (law,) = benchmark.exact(True)
    assert law["symmetric"] and law["distinct"] == law["inputs"] == 1 << 16
    assert abs(law["moments"]["2"] - 1) < 2e-8
    assert abs(law["moments"]["4"] - 3) < 2e-7
    assert abs(law["moments"]["6"] - 15) < 0.003
    assert abs(law["moments"]["8"] - 105) < 0.2
    assert 0 < law["least"] < 3e-5 and 4.4 < law["largest"] <= DISTRIBUTIONS["gaussian"].largest
    assert law["quantile_error_below_2"] < 3e-4 and law["kolmogorov"] < 1e-4
    for found, normal in law["tails"].values():
        assert abs(found / normal - 1) < 0.04


def test_no_distribution_passes_its_bound():
    """Where every value is seen: 65,536, or two."""
    assert float(np.abs(gaussian_table()).max()) <= DISTRIBUTIONS["gaussian"].largest
    assert float(noise.noise(NoiseSpec("rademacher"), 1, 2, 999).abs().max()) == DISTRIBUTIONS["rademacher"].largest
    assert {NoiseSpec(d, layout=1).kind.largest for d in DISTRIBUTIONS} == {6.6}  # what such runs were held to


@each_spec
def test_samples_lags_seeds_and_parameters(spec):
    """Six standard errors, of a few dozen numbers from fixed seeds."""
    moments, worst = benchmark.deviations(spec, 1 << 20)
    count, largest = benchmark.correlations(spec, 1 << 17)
    assert len(moments) == 8 and worst < 6
    assert count >= 22 and largest < 6


@pytest.mark.parametrize("rounds", [7, 10])
def test_the_half_words_are_even(rounds):
    assert all(abs(z) < 6 for z in benchmark.bits(rounds, 1 << 19).values())


def test_an_estimate_on_a_quadratic():
    """E (z'g)^2 = |g|^2, and z'Hz has the trace of H as its mean: within six standard errors of 2000 draws."""
    for found in benchmark.quadratic(True):
        assert abs(found["slope_squared"] - 1) < 6 * found["slope_squared_error"], found
        error = max(found["curvature_deviation"], 1e-6) / found["draws"] ** 0.5
        assert abs(found["curvature"] - found["trace"]) < 6 * error + 1e-6 * found["trace"], found
        assert 0.7 < found["bias_squared_over_expected"] < 1.3, found


def test_param_ids_are_what_they_were():
    assert param_id("model.layers.0.self_attn.q_proj.weight") == int.from_bytes(
        hashlib.blake2b(b"model.layers.0.self_attn.q_proj.weight", digest_size=4).digest(), "little"
    )
    assert assign_param_ids(["a", "b"]) == {"a": param_id("a"), "b": param_id("b")}


def test_colliding_names_get_distinct_ids_whatever_their_order(monkeypatch):
    """With ids squeezed into three bits most names collide; the outcome is a function of the set."""
    real = noise.param_id
    monkeypatch.setattr(noise, "param_id", lambda name: real(name) & 7)
    names = [f"p{i}" for i in range(8)]
    first = assign_param_ids(names)
    assert len(set(first.values())) == len(names)
    for order in (names[::-1], random.Random(3).sample(names, 8)):
        assert assign_param_ids(order) == first
    # whoever is first by name keeps the plain id
    assert all(first[min(n for n in names if real(n) & 7 == k)] == k for k in {real(n) & 7 for n in names})


def test_repeated_names_are_refused():
    with pytest.raises(ConfigError, match="'a'"):
        assign_param_ids(["a", "b", "a"])


def test_step_seeds():
    assert step_seed(1, 2, 3) == 14450723149797477655  # a recorded run depends on it
    seeds = {step_seed(r, s, i) for r, s, i in itertools.product((0, 1, 1 << 40), (0, 1, 1 << 33), (0, 1, 9))}
    assert len(seeds) == 27
    assert all(0 <= s < 1 << 64 for s in seeds)


@pytest.mark.parametrize("bad", [(-1, 0, 0), (1 << 64, 0, 0), (0, -1, 0), (0, 0, 1 << 32)])
def test_step_seed_names_the_bad_argument(bad):
    with pytest.raises(ConfigError, match="must be >= 0"):
        step_seed(*bad)


def test_bad_specs_and_ranges_are_refused():
    for kwargs in ({"distribution": "normal"}, {"distribution": "boxmuller"}, {"rounds": 8}, {"layout": 3}):
        with pytest.raises(ConfigError, match=str(next(iter(kwargs.values())))):
            NoiseSpec(**kwargs)
    for seed, n, offset in ((-1, 1, 0), (1 << 64, 1, 0), (0, -1, 0), (0, 1, -1), (0, 1, 1 << 62)):
        with pytest.raises(ConfigError):
            noise.noise(NoiseSpec(), seed, 0, n, offset)
