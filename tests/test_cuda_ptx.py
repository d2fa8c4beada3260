"""What the CUDA compiler made of the kernels, run on this CPU as C, has the bits of the CPU library.

Runs where nvcc or NVRTC is installed; no GPU is used, so nothing here says that one was.
"""

from __future__ import annotations

import pytest
import torch
from cuda_simulated import SimulatedKernels, compilers, make_ptx
from ptx_to_c import Simulated, UnknownInstruction, translate

from zo_offload import native_cuda
from zo_offload.device_updates import UpdateTable
from zo_offload.formats import FORMATS, format_of, get_format
from zo_offload.fused import Perturbation, Update, fused_pass, fused_rows
from zo_offload.noise import NoiseSpec, noise

REASONS = compilers()
CUDA_FORMATS = [name for name, fmt in FORMATS.items() if fmt.code in native_cuda.KERNELS]
PASSES = [f"zo_pass_{name}_{kind}" for name in CUDA_FORMATS for kind in ("gaussian", "rademacher")]
NOISES = ["zo_noise_gaussian", "zo_noise_rademacher"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAR = (1 << 34) - 77


@pytest.fixture(scope="module", params=["nvcc", "nvrtc"])
def kernels(request, tmp_path_factory):
    if REASONS[request.param]:
        pytest.skip(REASONS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    names = PASSES + NOISES if request.param == "nvcc" or REASONS["nvcc"] else ["zo_pass_bf16_gaussian", *NOISES]
    simulated = Simulated(make_ptx(request.param, folder), names, folder)
    found = SimulatedKernels(simulated)
    found.names = names
    return found


def values(numel: int, fmt_name: str, seed: int = 0) -> torch.Tensor:
    """Stored bytes of weights of every size, some of them zero, infinite or NaN."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=g) * 2.0 ** torch.randint(-20, 8, (numel,), generator=g)
    special = torch.tensor([0.0, -0.0, 1e-38, -65504.0])
    at = torch.randint(0, numel, (8,), generator=g)
    x[at] = special.repeat(2)
    return get_format(fmt_name).encode(x, None)


def unaligned(nbytes: int, shift: int) -> torch.Tensor:
    """Memory whose address is `shift` past a multiple of 16."""
    memory = torch.empty(nbytes + 32, dtype=torch.uint8)
    start = -memory.data_ptr() % 16 + shift
    return memory[start : start + nbytes]


def out_like(numel: int, dtype: torch.dtype, shift: int = 0) -> torch.Tensor:
    return unaligned(numel * dtype.itemsize, shift).view(dtype).fill_(-3.0)


def device_updates(updates):
    table = UpdateTable(torch.device("cpu"))
    table.append([Update(99, 0.5), *updates])
    return table.since(1, True)


def both(
    kernels,
    name,
    numel,
    *,
    offset=0,
    updates=(),
    write_back=True,
    stochastic=False,
    spec,
    lanes,
    shift=0,
    dtypes=DTYPES,
):
    """(stored, outs) of the CPU library and of the translated kernel."""
    fmt = get_format(name)
    start = values(numel, name)
    results = []
    for simulate in (False, True):
        stored = unaligned(start.numel(), shift * fmt.nbytes(1) % 16)
        stored.copy_(start)
        outs = [out_like(numel, dtypes[j % len(dtypes)], shift * 4) for j in range(len(lanes))]
        if simulate:
            given = device_updates(updates)
            kernels.touch = [stored, given.records, *outs]
            kernels.run_pass(
                stored=stored.data_ptr(), rows=0, numel=numel, offset=offset, num_rows=0, total_rows=0, updates=given,
                format=fmt.code, param_id=7, noise=spec, write_back=write_back, stochastic=stochastic, stream=0,
                lanes=[
                    (p.seed, out.data_ptr(), p.scale, format_of(out.dtype).code)
                    for p, out in zip(lanes, outs, strict=True)
                ],
            )  # fmt: skip
        else:
            fused_pass(
                stored, fmt, param_id=7, numel=numel, offset=offset, updates=updates, write_back=write_back,
                rounding="stochastic" if stochastic else "nearest", noise=spec, perturbations=lanes, outs=outs,
            )  # fmt: skip
        results.append((stored, outs))
    return results


def assert_same(results) -> None:
    (stored, outs), (stored2, outs2) = results
    assert torch.equal(stored, stored2), f"{int((stored != stored2).sum())} of {stored.numel()} stored bytes differ"
    for j, (a, b) in enumerate(zip(outs, outs2, strict=True)):
        same = torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        assert same, f"lane {j} ({a.dtype}): {int((a != b).sum())} of {a.numel()} weights differ"


def need(kernels, name: str, kind: str) -> None:
    if f"zo_pass_{name}_{kind}" not in kernels.names:
        pytest.skip("with nvcc here too, NVRTC's PTX is compared for one format: it has the same source")


UPDATES = {
    "none": [],
    "one": [Update(3, 2.0**-9)],
    "decay, zero, fold later": [
        Update(3, 2.0**-9, 1 - 2.0**-8, fold=False),
        Update(4, 0.0, 0.5),
        Update(5, -(2.0**-7)),
    ],
    "trailing": [Update(3, 2.0**-9), Update(4, 2.0**-9, fold=False)],
}
EPS = 2.0**-10
LANES = [Perturbation(11, EPS), Perturbation(11, -EPS), Perturbation(12, EPS), Perturbation(0, 0.0)]


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("name", CUDA_FORMATS)
@pytest.mark.parametrize("which", UPDATES)
@pytest.mark.parametrize("stochastic", [False, True])
def test_the_pass_has_the_bits_of_the_cpu_library(kernels, name, kind, which, stochastic):
    need(kernels, name, kind)
    spec = NoiseSpec(kind, 7 if which == "one" else 10)
    offset = {"none": 0, "one": FAR, "decay, zero, fold later": 1 << 20, "trailing": 5}[which]
    assert_same(
        both(kernels, name, 5003, offset=offset, updates=UPDATES[which], stochastic=stochastic, spec=spec, lanes=LANES)
    )


@pytest.mark.parametrize(
    "numel, offset, shift", [(1, 0, 0), (7, 3, 1), (8, 8, 0), (1024, 0, 0), (4096, 1024, 1), (513, 511, 3)]
)
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_any_size_offset_and_address(kernels, kind, numel, offset, shift):
    need(kernels, "bf16", kind)
    results = both(
        kernels, "bf16", numel, offset=offset, updates=UPDATES["one"], spec=NoiseSpec(kind), lanes=LANES, shift=shift
    )
    assert_same(results)


def test_lanes_alone_leave_the_stored_bytes(kernels):
    results = both(kernels, "bf16", 3000, updates=UPDATES["one"], write_back=False, spec=NoiseSpec(), lanes=LANES[:2])
    assert_same(results)
    assert torch.equal(results[1][0], values(3000, "bf16"))


@pytest.mark.parametrize("updates", ["one", "trailing"])
def test_more_lanes_than_a_launch_takes(kernels, updates):
    lanes = [Perturbation(20 + j // 2, EPS if j % 2 else -EPS) for j in range(37)]
    kernels.launches = 0
    assert_same(both(kernels, "bf16", 1500, updates=UPDATES[updates], spec=NoiseSpec(), lanes=lanes))
    assert kernels.launches == 3


def test_infinities_and_nan_round_as_on_the_cpu(kernels):
    fmt, odd = (
        get_format("bf16"),
        torch.tensor([float("inf"), float("-inf"), float("nan"), 3.3e38, -3.3e38, 0.0, -0.0, 1e-45]),
    )
    start = fmt.encode(odd.repeat(64), None)
    lanes, results = [Perturbation(1, 0.0), Perturbation(2, EPS)] * 3, []
    for simulate in (False, True):
        stored = start.clone()
        outs = [out_like(512, DTYPES[j // 2]) for j in range(6)]
        if simulate:
            kernels.touch = [stored, *outs]
            kernels.run_pass(
                stored=stored.data_ptr(), rows=0, numel=512, offset=0, num_rows=0, total_rows=0, updates=None,
                format=fmt.code, param_id=1, noise=NoiseSpec(), write_back=False, stochastic=False, stream=0,
                lanes=[
                    (p.seed, o.data_ptr(), p.scale, format_of(o.dtype).code) for p, o in zip(lanes, outs, strict=True)
                ],
            )  # fmt: skip
        else:
            fused_pass(stored, fmt, param_id=1, numel=512, noise=NoiseSpec(), perturbations=lanes, outs=outs)
        results.append((stored, outs))
    assert_same(results)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("width", [24, 768, 1024, 61])
def test_gathered_rows(kernels, kind, width):
    need(kernels, "bf16", kind)
    fmt, count = get_format("bf16"), 9
    stored = values(count * width, "bf16")
    rows = torch.tensor([8, 0, 3, 3, 7])
    lanes, updates = LANES[:3], UPDATES["trailing"]
    expected = [torch.zeros(5, width, dtype=d) for d in DTYPES]
    fused_rows(
        stored,
        fmt,
        param_id=7,
        row_numel=width,
        rows=rows,
        updates=updates,
        noise=NoiseSpec(kind),
        perturbations=lanes,
        outs=expected,
    )
    asked = torch.cat([rows, torch.tensor([count, -1])])
    found = [out_like(7 * width, d).view(7, width) for d in DTYPES]
    given = device_updates(updates)
    kernels.touch = [stored, given.records, asked, *found]
    kernels.run_pass(
        stored=stored.data_ptr(), rows=asked.data_ptr(), numel=width, offset=0, num_rows=7, total_rows=count,
        updates=given, format=fmt.code, param_id=7, noise=NoiseSpec(kind), write_back=False, stochastic=False, stream=0,
        lanes=[(p.seed, o.data_ptr(), p.scale, format_of(o.dtype).code) for p, o in zip(lanes, found, strict=True)],
    )  # fmt: skip
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.view(torch.uint8), b[:5].view(torch.uint8))
        assert b[5:].isnan().all(), "a row that does not exist must be loud, and its neighbours' memory left alone"


@pytest.mark.parametrize("rounds", [7, 10])
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("numel, offset", [(5000, FAR), (1, 0), (129, 127)])
def test_noise(kernels, kind, rounds, numel, offset):
    z = torch.full((numel,), float("nan"))
    kernels.touch = [z]
    kernels.noise(z.data_ptr(), kind, rounds, 0x0123456789ABCDEF, 0xDEADBEEF, numel, offset, 0)
    expected = noise(NoiseSpec(kind, rounds), 0x0123456789ABCDEF, 0xDEADBEEF, numel, offset)
    assert torch.equal(z.view(torch.int32), expected.view(torch.int32))


def test_a_wrong_coefficient_is_seen(kernels):
    """The comparison can fail: the same pass with one bit of one coefficient changed."""
    fmt, start = get_format("bf16"), values(2048, "bf16")
    changed = []
    for coeff in (2.0**-9, 2.0**-9 * (1 + 2.0**-20)):
        stored, given = start.clone(), device_updates([Update(3, coeff, fold=False)])
        out = out_like(2048, torch.float32)
        kernels.touch = [stored, given.records, out]
        kernels.run_pass(
            stored=stored.data_ptr(), rows=0, numel=2048, offset=0, num_rows=0, total_rows=0, updates=given,
            format=fmt.code, param_id=7, noise=NoiseSpec(), write_back=True, stochastic=False, stream=0,
            lanes=[(1, out.data_ptr(), 0.0, 0)],
        )  # fmt: skip
        changed.append(out)
    assert not torch.equal(*changed)


def test_an_instruction_we_do_not_know_is_named():
    ptx = ".entry k(\n.param .b8 k_param_0[8]\n)\n{\n.reg .f32 %f<2>;\nex2.approx.f32 %f0, %f1;\nret;\n}\n"
    with pytest.raises(UnknownInstruction, match=r"ex2\.approx"):
        translate(ptx, ["k"])
