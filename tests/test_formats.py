"""Storage formats: exhaustive over 16-bit codes, dense over float32, equal to torch where torch defines it."""

from __future__ import annotations

import math

import pytest
import torch
from native_variants import each_variant, using

from zo_offload.errors import ConfigError
from zo_offload.formats import FORMATS, Format, format_of, get_format
from zo_offload.fused import Perturbation, Update, fused_pass
from zo_offload.noise import NoiseSpec

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


def test_formats_are_found_by_name_and_dtype():
    for name, fmt in FORMATS.items():
        assert get_format(name) is fmt is format_of(fmt.torch_dtype)
        assert fmt.nbytes(7) == 7 * fmt.torch_dtype.itemsize
    with pytest.raises(ConfigError, match="'fp9'.*bf16"):
        get_format("fp9")
    with pytest.raises(ConfigError, match=r"float64.*bfloat16"):
        format_of(torch.float64)
