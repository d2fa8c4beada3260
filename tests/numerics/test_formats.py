"""Storage formats: exhaustive over 16-bit codes, dense over float32, equal to torch where torch defines it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from support.codes import stored_as
from support.native_variants import each_isa, each_variant, using
from zo_offload.errors import CheckpointError, ConfigError
from zo_offload.formats import CENTRED, FORMATS, KEPT, Format, decode_values, encode_values, format_of, get_format
from zo_offload.formats.four_bits import NF4_VALUES
from zo_offload.kernels import native
from zo_offload.kernels.records import Perturbation, Update
from zo_offload.numerics.fused import fused_pass
from zo_offload.numerics.noise import NoiseSpec

HALVES = [FORMATS["bf16"], FORMATS["fp16"]]
each_half = pytest.mark.parametrize("fmt", HALVES, ids=lambda f: f.name)
CODES = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)  # all of them, wrapped


def through_lane(values: torch.Tensor, fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """decode by `fmt` and round to `dtype`, by the kernel in use."""
    out = torch.empty(values.numel(), dtype=dtype)
    fused_pass(values.view(torch.uint8), fmt, param_id=0, numel=values.numel(), noise=NoiseSpec(),
               perturbations=[Perturbation(0, 0.0)], outs=[out])  # fmt: skip
    return out


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


def dense_float32() -> torch.Tensor:
    """Every exponent and sign, with mantissas at and beside each rounding border of either half format."""
    low = torch.tensor(
        [0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x17FFF, 0x18000, 0x7FFFFF]
    )
    some = torch.randint(0, 1 << 23, (51,), generator=torch.Generator().manual_seed(0))
    mantissa = torch.cat([low, 0x7FFFFF - low, some])
    words = (torch.arange(512).view(-1, 1) << 23 | mantissa).reshape(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).view(torch.float32)


@each_variant
@each_half
def test_every_code_decodes_as_in_torch(variant, fmt):
    stored = CODES.view(fmt.torch_dtype)
    want = stored.float()
    with using(variant):
        got = through_lane(stored, fmt, torch.float32)
    assert torch.equal(got.isnan(), want.isnan())
    real = ~want.isnan()
    assert torch.equal(bits(got)[real], bits(want)[real])
    assert torch.equal(bits(fmt.decode(stored.view(torch.uint8)))[real], bits(want)[real])


@each_variant
@each_half
def test_nearest_is_torchs_cast(variant, fmt):
    values = dense_float32()
    want = values.to(fmt.torch_dtype)
    with using(variant):
        got = through_lane(values, FORMATS["fp32"], fmt.torch_dtype)
    real = ~values.isnan()
    assert torch.equal(bits(got)[real], bits(want)[real])
    assert got[~real].isnan().all()
    assert bits(got)[~real].unique().numel() == 1, "every NaN is stored as one NaN"


@each_variant
@each_half
def test_what_fits_exactly_is_kept_by_either_rounding(variant, fmt):
    """A fold that changes nothing changes no code: subnormals, zeros of both signs, infinities; NaN stays NaN."""
    stored = CODES.view(fmt.torch_dtype)
    for rounding in ("nearest", "stochastic"):
        copy = stored.clone()
        with using(variant):
            fused_pass(copy.view(torch.uint8), fmt, param_id=1, numel=1 << 16, updates=[Update(3, 0.0)],
                       rounding=rounding, noise=NoiseSpec())  # fmt: skip
        real = ~stored.isnan()
        assert torch.equal(bits(copy)[real], bits(stored)[real]), rounding
        assert copy[~real].isnan().all(), rounding


@each_half
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_stochastic_goes_up_exactly_as_often_as_the_part_dropped(fmt, sign):
    """All 65536 random values: the count of round-ups is the dropped fraction, normal and subnormal."""
    one_step = {"bf16": 2.0**-7, "fp16": 2.0**-10}[fmt.name]
    least = {"bf16": 2.0**-133, "fp16": 2.0**-24}[fmt.name]
    random_bits = torch.arange(1 << 16, dtype=torch.int32)
    cases = [(1.0, one_step, k / 64) for k in (0, 1, 31, 32, 63)]  # 1 + a fraction of a step
    cases += [(n * least, least, k / 32) for n in (0, 1, 37, 126) for k in (0, 1, 15, 31)]
    for base, step, fraction in cases:
        value = sign * (base + fraction * step)
        got = fmt.decode(fmt.encode(torch.full((1 << 16,), value), random_bits)).double()
        up = got == sign * (base + step)
        assert ((got == sign * base) | up).all(), value
        assert int(up.sum()) == fraction * 65536, value


@each_half
def test_stochastic_keeps_the_special_values(fmt):
    """Largest finite, infinite and NaN inputs under the smallest and the largest random bits."""
    largest = torch.finfo(fmt.torch_dtype).max
    values = torch.tensor([largest, -largest, math.inf, -math.inf, math.nan, 0.0, -0.0, 3e38])
    for r in (0, 65535):
        got = fmt.decode(fmt.encode(values, torch.full((8,), r, dtype=torch.int32)))
        assert got[:4].tolist() == values[:4].tolist()
        assert math.isnan(got[4])
        assert [math.copysign(1, x) for x in got[5:7].tolist()] == [1, -1]
        assert got[7] == math.inf or (fmt.name == "bf16" and got[7] < 3.01e38)


@each_variant
def test_float32_is_stored_as_it_is(variant):
    values = dense_float32()
    with using(variant):
        got = through_lane(values, FORMATS["fp32"], torch.float32)
    real = ~values.isnan()
    assert torch.equal(bits(got)[real], bits(values)[real])
    assert got[~real].isnan().all()


FP8 = [FORMATS["fp8_e4m3"], FORMATS["fp8_e5m2"]]
TORCH_FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
each_fp8 = pytest.mark.parametrize("fmt", FP8, ids=lambda f: f.name)
BF16_SPLITS = [FORMATS["bf16+16"], FORMATS["bf16+8"]]


def words(seed: int, n: int) -> torch.Tensor:
    """n float32 with random bits, finite and normal or subnormal."""
    w = torch.randint(-(1 << 31), 1 << 31, (n,), generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    values = w.view(torch.float32)
    return torch.where(values.isfinite(), values, 1.0)


@each_fp8
def test_fp8_codes_decode_as_in_torch_times_the_scale(fmt):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    want = codes.view(TORCH_FP8[fmt.name]).float()
    for exponent in (1, 100, 127, 140, 246):
        stored = torch.cat([codes, torch.full((2,), exponent, dtype=torch.uint8)])
        got = fmt.decode(stored, 256)
        exact = (want.double() * 2.0 ** (exponent - 127)).float()
        assert torch.equal(got.isnan(), exact.isnan())
        assert torch.equal(bits(got)[~exact.isnan()], bits(exact)[~exact.isnan()])


@each_fp8
@pytest.mark.parametrize("power", [-140, -60, -3, 0, 5, 100])
def test_fp8_nearest_is_torchs_cast_of_the_scaled_value(fmt, power):
    """Dense over the eight-bit float's whole range and far below it; the group's scale puts its largest at the top."""
    largest = torch.finfo(TORCH_FP8[fmt.name]).max
    inside = dense_float32()
    inside = inside[inside.abs() <= largest]
    inside = torch.cat([inside, torch.zeros(-inside.numel() % 127)]).view(-1, 127)
    inside = torch.cat([torch.full((len(inside), 1), largest), inside], 1).reshape(-1)
    values = torch.ldexp(inside, torch.tensor(power))
    exact = torch.ldexp(values.double(), torch.tensor(-power)).float()  # subnormal inputs lost bits
    stored = fmt.encode(values, None)
    if power >= -120:
        start, size = fmt.scales_span(values.numel())
        assert (stored[start : start + size] == 127 + power).all()
        want = exact.to(TORCH_FP8[fmt.name]).view(torch.uint8)
        assert torch.equal(stored[: values.numel()], want)
    again = fmt.encode(fmt.decode(stored, values.numel()), None)
    assert torch.equal(again, stored), "what is stored is stored again as it is"


@each_fp8
def test_fp8_scale_is_the_least_that_clips_nothing(fmt):
    largest = torch.finfo(TORCH_FP8[fmt.name]).max
    for value, want in ((largest, 127), (math.nextafter(largest, 1e9) * (1 + 2e-7), 128), (largest / 2, 126), (0.0, 1)):
        stored = fmt.encode(torch.tensor([value, 0.0, -value / 3]), None)
        start, _ = fmt.scales_span(3)
        assert int(stored[start]) == want, value
    got = fmt.decode(fmt.encode(torch.tensor([1.0] * 128 + [math.nan, 1.0] + [0.0] * 126 + [math.inf, 1, 2])), 259)
    assert got[:128].tolist() == [1.0] * 128
    assert got[128:].isnan().all()


@each_fp8
def test_fp8_stochastic_goes_up_exactly_as_often_as_the_part_dropped(fmt):
    """All 65536 random values for normal and subnormal codes; the values between two codes are multiples of 1/64."""
    largest = torch.finfo(TORCH_FP8[fmt.name]).max
    codes = torch.tensor([0, 1, 3, 5, 0x30, 0x41], dtype=torch.uint8)
    low, high = (c.view(TORCH_FP8[fmt.name]).float() for c in (codes, codes + 1))
    random_bits = torch.arange(1 << 16, dtype=torch.int32)
    for a, b in zip(low.tolist(), high.tolist(), strict=True):
        for k in (0, 1, 31, 63):
            values = torch.full((1 << 16,), a + (b - a) * k / 64)
            values[::128] = largest  # keeps the scale at 1
            got = fmt.decode(fmt.encode(values, random_bits), 1 << 16)
            rest = torch.arange(1 << 16) % 128 != 0
            assert ((got == a) | (got == b))[rest].all()
            # of random values r, those count with r >= (64 - k) / 64; every 128th is taken by the group's largest
            want = ((random_bits >= 65536 - 1024 * k) & rest).sum()
            assert int((got == b)[rest].sum()) == int(want) if b != a else True


@pytest.mark.parametrize("fmt", BF16_SPLITS, ids=lambda f: f.name)
def test_bf16_splits_keep_their_master(fmt):
    """bf16+16: every float32. bf16+8: float32 rounded to 24 bits; the coarse half is the nearest bf16 of the master."""
    values = torch.cat([dense_float32(), words(1, 200_000)])
    values = torch.cat([values, -values])
    stored, residual = fmt.split(values)
    master = fmt.join(stored, residual)
    real = ~values.isnan()
    if fmt.name == "bf16+16":
        assert torch.equal(bits(master)[real], bits(values)[real])
    else:
        step = 2.0 ** (torch.frexp(values.double())[1].clamp(min=-125).double() - 16)  # of 16 significand bits
        finite = real & master.isfinite()
        assert ((master.double() - values.double()).abs() <= step / 2)[finite].all()
        assert torch.equal(master.isinf(), real & (bits(values) & 0x7FFFFFFF >= 0x7F7FFF80))
    assert master[~real].isnan().all()
    assert torch.equal(torch.cat(fmt.split(master)), torch.cat([stored, residual])), "splitting again changes nothing"
    coarse = fmt.decode(stored)
    want = master.bfloat16().float()
    tie = bits(master) & 0xFFFF == 0x8000  # both neighbours are nearest: half away from zero here, even in torch
    assert torch.equal(bits(coarse)[real & ~tie], bits(want)[real & ~tie])
    up = real & tie & master.isfinite()
    assert (coarse.abs() > master.abs())[up].all()


# rms error of normal weights, relative; of the master where the format is split
RMS_ERROR = {
    "fp32": 0, "bf16": 0.0017, "fp16": 0.00021, "fp8_e4m3": 0.0266, "fp8_e5m2": 0.0529, "int8": 0.0066, "int4": 0.101,
    "int4_g64": 0.0904, "int4c": 0.101, "int4c_g64": 0.0904, "nf4": 0.093,
    "bf16+16": 0, "bf16+8": 6.6e-6, "int8+8": 2.6e-5, "fp8+8": 1.05e-4,
}  # fmt: skip
each_format = pytest.mark.parametrize("fmt", [*FORMATS.values(), *CENTRED.values()], ids=lambda f: f.name)


@each_format
@pytest.mark.parametrize("numel", [1, 63, 129, 40_001])
def test_values_are_encoded_within_the_stated_error(fmt, numel):
    values = torch.randn(numel, generator=torch.Generator().manual_seed(3)) * 0.02
    stored, residual = encode_values(values, fmt)
    assert stored.numel() == fmt.nbytes(numel)
    assert (residual is None) == (fmt.residual_nbytes(numel) == 0)
    coarse = decode_values(stored, None, fmt, numel)
    master = decode_values(stored, residual, fmt, numel)
    assert bits(coarse).tolist() == bits(fmt.decode(stored, numel)).tolist()
    if numel > 1000:
        error = (master - values).norm() / values.norm()
        assert RMS_ERROR[fmt.name] * 0.95 <= error <= RMS_ERROR[fmt.name]
        assert fmt.nbytes(numel) < numel * fmt.value_bits / 8 * (1.2 if fmt.group else 1) + 1
    else:
        assert ((master - values).abs() <= values.abs().max() * 0.16).all()


WITH_SCALES = [f for f in (*FORMATS.values(), *CENTRED.values(), *KEPT.values()) if f.code_rms]


@pytest.mark.parametrize("fmt", WITH_SCALES, ids=lambda f: f.name)
def test_code_rms_is_how_much_normal_weights_change_with_their_scales(fmt):
    """And where the codes are centred, or signed, the change has next to no mean: a group is scaled, not shifted."""
    n = 1 << 20
    stored = fmt.encode(torch.randn(n, generator=torch.Generator().manual_seed(5)) * 0.02)
    start, size = fmt.scales_span(n)
    moved = stored.clone()
    moved[start : start + size] = (stored[start : start + size].view(torch.float32) + 2.0**-10).view(torch.uint8)
    change = (fmt.decode(moved, n) - fmt.decode(stored, n)).double() * 2.0**10
    shift = change.view(-1, fmt.group).mean(1).pow(2).mean().sqrt()
    if fmt.minimum_bytes and not fmt.centred:
        assert shift > 2 * fmt.code_rms
        return
    assert change.pow(2).mean().sqrt() == pytest.approx(fmt.code_rms, rel=0.01)
    assert shift < 0.35 * fmt.code_rms


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.trains], ids=lambda f: f.name)
@pytest.mark.parametrize("random", [None, 0, 65535], ids=["nearest", "lowest", "highest"])
def test_values_on_the_grid_stay_there(fmt, random):
    """Encoding what was decoded, onto its own grid, changes no value under any random bits, and no bit but scales'."""
    values = torch.randn(5000, generator=torch.Generator().manual_seed(4)) * 3
    stored, residual = encode_values(values, fmt)
    master = decode_values(stored, residual, fmt, 5000)
    sr_bits = None if random is None else torch.full((5000,), random, dtype=torch.int32)
    if residual is None:
        again, rest = fmt.encode(master, sr_bits, like=stored), None
    else:
        again, rest = fmt.split(master, sr_bits, like=stored)
    assert torch.equal(bits(decode_values(again, rest, fmt, 5000)), bits(master))
    if fmt not in FP8:
        assert torch.equal(again, stored)
        assert rest is None or torch.equal(rest, residual)


@each_isa
@each_format
def test_native_encoding_is_the_references(isa, fmt):
    """Values of all sizes and signs, odd lengths, each input dtype, groups of zeros; both parts, decoded both ways."""
    for numel in (1, 63, 64, 127, 129, 1023, 1025, 3000, 70_001):
        values = torch.cat([torch.randn(numel) * 0.02, words(numel, numel), torch.zeros(300)])
        values = values[torch.arange(numel) * 2 % values.numel()]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            given = values.to(dtype)
            given = torch.where(given.isfinite() & (given.abs() < 6e4), given, -1.0)
            with using("reference"):
                want = encode_values(given, fmt)
                coarse, master = (decode_values(want[0], rest, fmt, numel) for rest in (None, want[1]))
            with using(isa):
                got = encode_values(given, fmt, threads=3)
                assert torch.equal(got[0], want[0]), (numel, dtype)
                assert (got[1] is None and want[1] is None) or torch.equal(got[1], want[1]), (numel, dtype)
                assert torch.equal(bits(decode_values(want[0], None, fmt, numel)), bits(coarse))
                assert torch.equal(bits(decode_values(want[0], want[1], fmt, numel)), bits(master))


def kept_values(fmt: Format, stored: torch.Tensor, n: int) -> np.ndarray:
    """What a checkpoint's codes mean, by the formulas of the schemes."""
    raw = stored.numpy()
    codes = raw[: fmt.values_nbytes(n)]
    if fmt.value_bits == 4:
        codes = np.stack([codes & 15, codes >> 4], 1).reshape(-1)[:n]
    (start, size), (low, least) = fmt.scales_span(n), fmt.minima_span(n)
    plane, minima = raw[start : start + size], raw[low : low + least].view("<f4")
    scale = plane.view("<f4") if fmt.scale_bytes == 4 else np.where(plane < 255, np.exp2(plane - 127.0), np.nan)
    if fmt.kernel == "nvfp4_two":
        bytes_, wholes = torch.from_numpy(plane.copy()).view(torch.float8_e4m3fn).float().numpy(), minima.repeat(64)
        scale, least = np.where(wholes < 0, bytes_ / -wholes, bytes_ * wholes), 0
    if fmt.kernel == "mxfp4_across":
        scale = scale.reshape(-1, 1, fmt.across).repeat(32, 1).reshape(-1)[:n].astype(np.float64)
    else:
        scale = scale.astype(np.float64).repeat(fmt.kernel_group)[:n]
    twelfths = np.float32([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4])
    number = {
        "int4f": codes, "int8f": codes, "int8": codes.view(np.int8), "nf4": np.float32(NF4_VALUES)[codes & 15],
        "fp8f": torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).double().numpy(),
        "fp4": np.concatenate([twelfths, -twelfths])[codes & 15],
        "mxfp4": np.float64([0, 0.5, 1, 1.5, 2, 3, 4, 6] + [0, -0.5, -1, -1.5, -2, -3, -4, -6])[codes & 15],
    }  # fmt: skip
    minimum = minima.astype(np.float64).repeat(fmt.group)[:n] if least else 0.0
    if fmt.kernel == "int8_127":
        return (codes.view(np.int8) * scale).astype(np.float32) * np.float32(1 / 127)
    number["nvfp4"] = number["nvfp4_two"] = number["mxfp4_across"] = number["mxfp4"]
    return (number[fmt.kernel].astype(np.float64) * scale + minimum).astype(np.float32)


ALL_KEPT = [*KEPT.values(), get_format("mxfp4_across_24")]


@each_variant
@pytest.mark.parametrize("fmt", ALL_KEPT, ids=lambda f: f.name)
def test_kept_codes_are_what_their_schemes_say(variant, fmt):
    """A product of code and scale is exact in float64, and so is rounded once."""
    for n in (1, 63, 129, 5000):
        stored, _ = stored_as(fmt, torch.randn(n) * 0.02)
        with using(variant):
            found = decode_values(stored, None, fmt, n).numpy()
        assert np.array_equal(found, kept_values(fmt, stored, n), equal_nan=True), n
    if not fmt.encodes:
        with using(variant), pytest.raises(ConfigError, match=f"{fmt.name} holds a checkpoint's own codes"):
            encode_values(torch.ones(64), fmt)
    if fmt.kernel_group == fmt.group:
        with pytest.raises(ConfigError, match="groups of 96"):
            type(fmt)(96)


@each_variant
def test_values_that_cannot_be_stored_are_refused(variant):
    values = torch.ones(300)
    values[7], values[200] = math.nan, math.inf
    for fmt in FORMATS.values():
        with using(variant), pytest.raises(CheckpointError, match=r"layer.weight: 2 of 300 values are NaN or infinite"):
            encode_values(values, fmt, what="layer.weight")
    with using(variant), pytest.raises(CheckpointError, match=r"up to 70000, more than fp16 can hold"):
        encode_values(torch.tensor([1.0, 7e4]), FORMATS["fp16"])
    with pytest.raises(ConfigError, match="int64"):
        encode_values(torch.arange(4), FORMATS["bf16"])
    with pytest.raises(ConfigError, match="100 fp8_e4m3 elements are 129 bytes"):
        decode_values(torch.zeros(100, dtype=torch.uint8), None, FORMATS["fp8_e4m3"], 100)
    with pytest.raises(ConfigError, match="give numel"):
        FORMATS["fp8_e4m3"].decode(torch.zeros(129, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="not a split format"):
        FORMATS["bf16"].split(values)


def test_the_kernels_take_each_format_to_be_what_its_class_says():
    """csrc/formats.h writes the same facts down for the compiler: asked of the built library, for every code."""
    library = native.library()
    if library is None:
        pytest.skip(native.describe())
    listed = [*FORMATS.values(), *CENTRED.values(), *ALL_KEPT]
    for fmt in listed:
        facts = native.FormatFacts(*(getattr(fmt, name) for name in native.FormatFacts._fields))
        assert library.format(fmt.code) == facts, fmt.name
    assert library.formats == {fmt.code for fmt in listed}
    assert library.format(max(library.formats) + 1) is None


def test_formats_are_found_by_name_and_dtype():
    for name, fmt in FORMATS.items():
        assert get_format(name) is fmt
    for name in ("fp32", "bf16", "fp16"):
        fmt = FORMATS[name]
        assert format_of(fmt.torch_dtype) is fmt
        assert fmt.nbytes(7) == 7 * fmt.torch_dtype.itemsize
    assert len({(fmt.code, fmt.group) for fmt in FORMATS.values()}) == len(FORMATS)
    assert get_format("int4c_g64") is CENTRED["int4c_g64"] and FORMATS["nf4"].about_centre is FORMATS["nf4"]
    assert FORMATS["int4_g64"].about_centre.name == "int4c_g64"
    with pytest.raises(ConfigError, match="int4 with groups of 96"):
        type(FORMATS["int4"])(96)
    assert get_format("mxfp4_across_24") is get_format("mxfp4_across_24") is not get_format("mxfp4_across_32")
    with pytest.raises(ConfigError, match="rows of 36 elements: a multiple of 8"):
        get_format("mxfp4_across_36")
    with pytest.raises(ConfigError, match="'fp9'.*bf16"):
        get_format("fp9")
    with pytest.raises(ConfigError, match=r"float64.*bfloat16"):
        format_of(torch.float64)
