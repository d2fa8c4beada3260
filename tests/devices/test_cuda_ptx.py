"""What the CUDA compiler made of the kernels, run on this CPU as C, has the bits of the CPU library.

Runs where nvcc or NVRTC is installed; no GPU is used, so nothing here says that one was.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch

from support.codes import stored_as
from support.compare import assert_same
from support.cuda_simulated import SimulatedKernels, compilers, make_ptx
from support.ptx_to_c import Simulated, UnknownInstruction, translate
from zo_offload.formats import CENTRED, FORMATS, format_of, get_format
from zo_offload.formats.codec import encode_values, planes
from zo_offload.kernels import native
from zo_offload.kernels.device_updates import UpdateTable
from zo_offload.kernels.distributions import BOX_MULLER, all_kinds, gaussian_table
from zo_offload.kernels.records import STILL, Mask, Perturbation, Terms, Update, Updates
from zo_offload.numerics import cuda_args, cuda_kernels
from zo_offload.numerics.calls import Mark, PassCall
from zo_offload.numerics.fused import fused_pass, fused_rows
from zo_offload.numerics.fused_kernels import OnCpu
from zo_offload.numerics.noise import NoiseSpec, noise
from zo_offload.numerics.on_gpu import OnGpu

REASONS = compilers()
KINDS = tuple(kind.name for kind in all_kinds())
TRAINED = [name for name, fmt in FORMATS.items() if fmt.trains]
# Compiling what each kernel became takes seconds, so by default these; ZO_ALL_KERNELS=1 takes all of them.
ALL = os.environ.get("ZO_ALL_KERNELS") == "1"
FEW = [
    ("bf16", "gaussian"),
    ("bf16", "rademacher"),
    ("fp16", "gaussian"),
    ("fp8_e5m2", "rademacher"),
    ("nf4", "gaussian"),
    ("bf16", "boxmuller"),
]
FEW += [("int8+8", "gaussian"), ("bf16+8", "rademacher")]
KEEPING = ("int4f_g32", "int8f", "fp8f", "mxfp4", "nvfp4", "fp4", "int8_g16", "mxfp4_across_24", "nvfp4_two",
           "int8_127_g32")  # fmt: skip
KEEPING = [(name, "rademacher") for name in KEEPING]
FEW += [KEEPING[0], KEEPING[3], *KEEPING[6:9]]
PAIRS = [(n, k) for n in FORMATS for k in KINDS] + KEEPING if ALL else FEW
WITH_SCALES = [name for name, fmt in (FORMATS | CENTRED).items() if fmt.trains_scales]
SCALES = [(n, k) for n in WITH_SCALES for k in KINDS] if ALL else [("int4", "gaussian"), ("int4c", "gaussian")]


def kernel_of(name: str, kind: str, what: str = "pass") -> str:
    return cuda_args.pass_kernel(get_format(name).code, kind, what == "scales")


def spec_of(kind: str, rounds=10) -> NoiseSpec:
    """The noise that kernels of that name make."""
    return NoiseSpec("gaussian", rounds, 1) if kind == BOX_MULLER.name else NoiseSpec(kind, rounds)


PASSES = [kernel_of(*pair) for pair in PAIRS] + [kernel_of(*pair, "scales") for pair in SCALES]
NOISES = [*(cuda_args.noise_kernel(kind) for kind in KINDS), "zo_gaussian_table"]
FINGERPRINTED = [
    f"zo_pass_{name}_gaussian" for name in ("fp32", "bf16", "fp16")
]  # what `native.fingerprint` asks of a library
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAR = (1 << 34) - 77


@pytest.fixture(scope="module", params=["nvcc", "nvrtc"])
def kernels(request, tmp_path_factory):
    if REASONS[request.param]:
        pytest.skip(REASONS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    few = ["zo_pass_bf16_gaussian", *NOISES]
    all_of_them = [*PASSES, *NOISES, *FINGERPRINTED, "zo_cuda_abi"]
    names = all_of_them if request.param == "nvcc" or REASONS["nvcc"] else few
    names = list(dict.fromkeys(names))
    simulated = Simulated(make_ptx(request.param, folder), names, folder)
    found = SimulatedKernels(simulated)
    found.names = names
    return found


def values(numel: int, fmt_name: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stored parts of weights of every size, some of them zero."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=g) * 2.0 ** torch.randint(-20, 8, (numel,), generator=g)
    special = torch.tensor([0.0, -0.0, 1e-38, -65504.0])
    at = torch.randint(0, numel, (8,), generator=g)
    x[at] = special.repeat(2)
    fmt = get_format(fmt_name)
    return encode_values(x, fmt) if fmt_name in FORMATS | CENTRED else stored_as(fmt, x)


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


def run_simulated(
    kernels, stored, residual, fmt, numel, updates, lanes, outs, *, kind="gaussian", rounds=10, **options
):
    """`kernels.run_pass` as `OnGpu` would call it, allowed to touch nothing else."""
    given = device_updates(updates)
    rows = options.pop("rows", None)
    listed = None if options.get("mask") is None else options["mask"].elements
    kernels.touch = [t for t in (stored, residual, rows, given.records, listed, *outs) if t is not None]
    kernels.run_pass(
        **planes(stored, residual, fmt, options.pop("plane_numel", numel)), numel=numel, updates=given, param_id=7,
        noise=spec_of(kind, rounds), stream=0, rows=0 if rows is None else rows.data_ptr(),
        num_rows=0 if rows is None else rows.numel(),
        lanes=[(p.seed, o.data_ptr(), p.scale, format_of(o.dtype).code) for p, o in zip(lanes, outs, strict=True)],
        **{"stochastic": False, **options},
    )  # fmt: skip


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
    target="values",
    mask=None,
):
    """(stored, residual, outs) of the CPU library and of the translated kernel."""
    fmt = get_format(name)
    offset = offset // fmt.group * fmt.group if fmt.group else offset
    first, second = values(numel, name)
    folds = any(u.fold for u in updates) and target == "values"
    results = []
    for simulate in (False, True):
        stored = unaligned(first.numel(), 0 if fmt.group else shift * max(1, fmt.value_bits // 8) % 16)
        stored.copy_(first)
        residual = None if second is None or not folds else second.clone()
        outs = [out_like(numel, DTYPES[j % len(DTYPES)], shift * 4) for j in range(len(lanes))]
        if simulate:
            run_simulated(
                kernels, stored, residual, fmt, numel, updates, lanes, outs, kind=spec.kind.name,
                rounds=spec.rounds, offset=offset, write_back=write_back, stochastic=stochastic,
                target_scales=target == "scales", mask=mask,
            )  # fmt: skip
        else:
            fused_pass(
                stored, fmt, param_id=7, numel=numel, offset=offset, updates=updates, write_back=write_back,
                rounding="stochastic" if stochastic else "nearest", noise=spec, perturbations=lanes, outs=outs,
                residual=residual, target=target, mask=mask,
            )  # fmt: skip
        results.append((stored, [residual] if residual is not None else [], outs))
    return results


def assert_equal(results) -> None:
    """What the CPU library and the CUDA kernel left: the same bytes, NaN's payloads included."""
    ours, theirs = (
        [part.view(torch.uint8) for part in (stored, *residual, *outs)] for stored, residual, outs in results
    )
    assert_same(ours, theirs)


def need(kernels, name: str, kind: str, what: str = "pass") -> None:
    if kernel_of(name, kind, what) not in kernels.names:
        pytest.skip("not compiled to C here: ZO_ALL_KERNELS=1 takes all (NVRTC's PTX is compared for bf16 alone)")


def updates_for(name: str, which: str):
    """Formats whose values never change have updates that do not fold."""
    return [replace(u, fold=u.fold and get_format(name).trains) for u in UPDATES[which]]


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


@pytest.mark.parametrize("name, kind", PAIRS)
@pytest.mark.parametrize("which", UPDATES)
@pytest.mark.parametrize("stochastic", [False, True])
def test_the_pass_has_the_bits_of_the_cpu_library(kernels, name, kind, which, stochastic):
    need(kernels, name, kind)
    spec = spec_of(kind, 7 if which == "one" else 10)
    offset = {"none": 0, "one": (1 << 34) - 128, "decay, zero, fold later": 1 << 20, "trailing": 640}[which]
    if which == "one" and not get_format(name).group:
        offset = FAR
    assert_equal(
        both(
            kernels,
            name,
            3003,
            offset=offset,
            updates=updates_for(name, which),
            stochastic=stochastic,
            spec=spec,
            lanes=LANES,
        )
    )


LIST = torch.randperm(3003, generator=torch.Generator().manual_seed(1))[:900].sort().values + 640
MASKS = {
    "small": Mask.smallest(2.0**-5), "by chance": Mask.random(0.3, (1 << 63) + 5), "listed": Mask.listed(LIST, 3643)
}  # fmt: skip


@pytest.mark.parametrize("name, kind", PAIRS)
@pytest.mark.parametrize("which", MASKS)
def test_masks(kernels, name, kind, which):
    """The mask is read at the first and the third update, and for the lanes."""
    need(kernels, name, kind)
    trains = get_format(name).trains
    updates = [
        Update(3, 2.0**-9, 1 - 2.0**-8, fold=False), Update(4, 2.0**-8, fold=trains, begins=False),
        Update(5, 2.0**-7, 0.5, fold=trains), Update(6, 2.0**-9, fold=False),
    ]  # fmt: skip
    options = dict(offset=640, updates=updates, spec=spec_of(kind), lanes=LANES)
    masked = both(kernels, name, 3003, mask=MASKS[which], stochastic=which == "small", **options)
    assert_equal(masked)
    moved = float((masked[1][2][0] != masked[1][2][3]).float().mean())
    assert not get_format(name).encodes or 0.05 < moved < 0.9, "some of the lanes' elements are perturbed, others not"


@pytest.mark.parametrize("name, kind", SCALES)
@pytest.mark.parametrize("which", ["none", "trailing", "decay, zero, fold later"])
def test_scales_that_train(kernels, name, kind, which):
    need(kernels, name, kind, "scales")
    results = both(
        kernels, name, 3003, offset=640, updates=UPDATES[which], spec=spec_of(kind), lanes=LANES, target="scales"
    )
    assert_equal(results)


@pytest.mark.parametrize(
    "numel, offset, shift", [(1, 0, 0), (7, 3, 1), (8, 8, 0), (1024, 0, 0), (4096, 1024, 1), (513, 511, 3)]
)
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_any_size_offset_and_address(kernels, kind, numel, offset, shift):
    need(kernels, "bf16", kind)
    results = both(
        kernels, "bf16", numel, offset=offset, updates=UPDATES["one"], spec=spec_of(kind), lanes=LANES, shift=shift
    )
    assert_equal(results)


def test_lanes_alone_leave_the_stored_bytes(kernels):
    results = both(kernels, "bf16", 3000, updates=UPDATES["one"], write_back=False, spec=NoiseSpec(), lanes=LANES[:2])
    assert_equal(results)
    assert torch.equal(results[1][0], values(3000, "bf16")[0])


@pytest.mark.parametrize("updates", ["one", "trailing"])
def test_more_lanes_than_a_launch_takes(kernels, updates):
    lanes = [Perturbation(20 + j // 2, EPS if j % 2 else -EPS) for j in range(37)]
    kernels.launches = 0
    assert_equal(both(kernels, "bf16", 1500, updates=UPDATES[updates], spec=NoiseSpec(), lanes=lanes))
    assert kernels.launches == 2


def test_infinities_and_nan_round_as_on_the_cpu(kernels):
    fmt = get_format("bf16")
    odd = torch.tensor([math.inf, -math.inf, math.nan, 3.3e38, -3.3e38, 0.0, -0.0, 1e-45])
    start = fmt.encode(odd.repeat(64), None)
    lanes, results = [Perturbation(1, 0.0), Perturbation(2, EPS)] * 3, []
    for simulate in (False, True):
        stored, outs = start.clone(), [out_like(512, DTYPES[j // 2]) for j in range(6)]
        if simulate:
            run_simulated(kernels, stored, None, fmt, 512, (), lanes, outs)
        else:
            fused_pass(stored, fmt, param_id=7, numel=512, noise=NoiseSpec(), perturbations=lanes, outs=outs)
        results.append((stored, [], outs))
    assert_equal(results)


@pytest.mark.parametrize("name, kind", [(n, k) for n, k in PAIRS if get_format(n).group and get_format(n).trains])
def test_a_group_that_is_not_finite_becomes_nan(kernels, name, kind):
    need(kernels, name, kind)
    fmt = get_format(name)
    first, second = values(512, name)
    results = []
    for simulate in (False, True):
        stored, residual = first.clone(), None if second is None else second.clone()
        out = out_like(512, torch.float32)
        updates, far = [Update(3, 2.0**127)], Perturbation(5, 2.0**127)
        if simulate:
            run_simulated(kernels, stored, residual, fmt, 512, updates, [far], [out], kind=kind, write_back=True)
        else:
            fused_pass(
                stored, fmt, param_id=7, numel=512, updates=updates, noise=spec_of(kind), residual=residual,
                perturbations=[far], outs=[out],
            )  # fmt: skip
        results.append((stored, [] if residual is None else [residual], [out]))
    assert_equal(results)


@pytest.mark.parametrize("name, kind", PAIRS)
@pytest.mark.parametrize("width", [24, 1024, 61])
def test_gathered_rows(kernels, name, kind, width):
    need(kernels, name, kind)
    if width != 61 and name not in ("bf16", "int8", "nf4"):
        pytest.skip("one width for the others")
    fmt, count, mask = get_format(name), 9, {24: None, 1024: MASKS["small"], 61: MASKS["by chance"]}[width]
    stored, second = values(count * width, name)
    rows, lanes, updates = torch.tensor([8, 0, 3, 3, 7]), LANES[:3], updates_for(name, "trailing")
    folds = any(u.fold for u in updates)
    expected = [torch.zeros(5, width, dtype=d) for d in DTYPES]
    fused_rows(
        stored, fmt, param_id=7, row_numel=width, numel=count * width, rows=rows, updates=updates,
        noise=spec_of(kind), perturbations=lanes, outs=expected, residual=second if folds else None, mask=mask,
    )  # fmt: skip
    asked = torch.cat([rows, torch.tensor([count, -1])])
    found = [out_like(7 * width, d).view(7, width) for d in DTYPES]
    run_simulated(
        kernels, stored, second if folds else None, fmt, width, updates, lanes, found, kind=kind, rows=asked,
        total_rows=count, total=count * width, plane_numel=count * width, mask=mask,
    )  # fmt: skip
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.view(torch.uint8), b[:5].view(torch.uint8))
        assert b[5:].isnan().all(), "a row that does not exist must be loud, and its neighbours' memory left alone"


@pytest.mark.parametrize("name, kind", PAIRS)
@pytest.mark.parametrize("width", [24, 61])
def test_gathered_rows_of_a_piece(kernels, name, kind, width):
    """Rows before and behind the piece are passed over; a row that no piece has is NaN from each of them."""
    need(kernels, name, kind)
    fmt, first, count, total = get_format(name), 128, 64, 300
    if fmt.group and first * width % fmt.group:  # as many rows have no whole number of bands
        width = 48
    stored, second = values(count * width, name)
    rows, lanes, updates = torch.tensor([191, 0, 128, 299, 127, 192, 130]), LANES[:3], updates_for(name, "trailing")
    folds = any(u.fold for u in updates)
    expected = [torch.full((7, width), -3.0, dtype=d) for d in DTYPES]
    fused_rows(
        stored, fmt, param_id=7, row_numel=width, numel=count * width, rows=rows, first_row=first, total_rows=total,
        updates=updates, noise=spec_of(kind), perturbations=lanes, outs=expected, residual=second if folds else None,
    )  # fmt: skip
    assert [bool((row == -3.0).all()) for row in expected[0]] == [False, True, False, True, True, True, False]
    asked = torch.cat([rows, torch.tensor([total, -1])])
    found = [out_like(9 * width, d).view(9, width) for d in DTYPES]
    run_simulated(
        kernels, stored, second if folds else None, fmt, width, updates, lanes, found, kind=kind, rows=asked,
        offset=first * width, total_rows=total, total=count * width, plane_numel=count * width,
    )  # fmt: skip
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.view(torch.uint8), b[:7].view(torch.uint8))
        assert b[7:].isnan().all()


@pytest.mark.parametrize("rounds", [7, 10])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numel, offset", [(5000, FAR), (1, 0), (129, 127)])
def test_noise(kernels, kind, rounds, numel, offset):
    z = torch.full((numel,), float("nan"))
    kernels.touch = [z]
    kernels.noise(z.data_ptr(), kind, rounds, 0x0123456789ABCDEF, 0xDEADBEEF, numel, offset, 0)
    expected = noise(spec_of(kind, rounds), 0x0123456789ABCDEF, 0xDEADBEEF, numel, offset)
    assert torch.equal(z.view(torch.int32), expected.view(torch.int32))


def test_the_gaussian_of_every_half_word(kernels):
    z = torch.full((1 << 16,), float("nan"))
    kernels.touch = [z]
    kernels.gaussian_table(z.data_ptr(), 0)
    assert z.numpy().tobytes() == gaussian_table().tobytes()  # whose hash test_noise.py has


def test_the_kernels_are_asked_who_they_are_as_on_a_gpu(kernels, monkeypatch):
    """The check before first use, word for word but for the memory: interface, then bits."""
    if "zo_cuda_abi" not in kernels.names:
        pytest.skip("only compiled for the first compiler")
    monkeypatch.setattr(kernels, "touch", None)
    assert kernels._abi() == cuda_args.ABI
    assert native.fingerprint(cuda_kernels._OnDevice(kernels)) == native.FINGERPRINT


def along_sums(kernels, name, kind, target="values", mask=None, records=None):
    """(stored, residual, outs) of the CPU library and of the kernel, with lanes along sums among others."""
    fmt, results, numel = get_format(name), [], 3003
    offset = 640 // fmt.group * fmt.group if fmt.group else 640
    one = Terms((21, 22, 23), (2.0**-1, 0.0, -(2.0**-2)), records)
    two = Terms((22, 11), (1.5, 2.0**-3), records, first=3)
    lanes = [
        Perturbation(11, EPS), Perturbation.along(one, EPS), Perturbation.along(one, -EPS), Perturbation(11, -EPS),
        Perturbation.along(two, EPS), Perturbation.along(one, 0.0), Perturbation.along(one, EPS),
    ]  # fmt: skip
    updates = updates_for(name, "trailing") if target == "values" else UPDATES["trailing"]
    for simulate in (False, True):
        stored, residual = (None if part is None else part.clone() for part in values(numel, name))
        residual = residual if any(update.fold for update in updates) and target == "values" else None
        outs = [out_like(numel, DTYPES[j % 3]) for j in range(len(lanes))]
        call = PassCall(
            stored=stored, residual=residual, fmt=fmt, numel=numel, offset=offset, param_id=7, updates=updates,
            write_back=True, stochastic=False, noise=spec_of(kind), perturbations=lanes, outs=outs,
            target_scales=target == "scales", threads=1, mask=mask,
        )  # fmt: skip
        kernels.touch = None
        (OnGpu(kernels) if simulate else OnCpu(native.library())).run_pass(call, Mark())
        results.append((stored, [] if residual is None else [residual], outs))
    return results


@pytest.mark.parametrize("name, kind", PAIRS)
def test_lanes_along_sums_of_noises(kernels, name, kind):
    """Made once for two lanes or again, of terms that count or do not, under a mask, from memory that has more."""
    need(kernels, name, kind)
    results = along_sums(kernels, name, kind, mask=Mask.smallest(2.0**-5))
    assert_equal(results)
    still, moved = results[1][2][5], results[1][2][2]
    share = float((still.float() != moved.float()).float().mean())
    assert not get_format(name).encodes or 0.05 < share < 0.9
    known = [
        Update(seed, coeff) for seed, coeff in [(21, 2.0**-1), (22, 0.0), (23, -(2.0**-2)), (22, 1.5), (11, 0.125)]
    ]
    records = torch.frombuffer(bytearray(b"".join(u.packed for u in known)), dtype=torch.uint8).view(-1, 24)
    plain = along_sums(kernels, name, kind)
    assert_equal(plain)
    assert_equal([plain[1], along_sums(kernels, name, kind, records=records)[1]])


@pytest.mark.parametrize("name, kind", SCALES)
def test_scales_that_train_along_sums_of_noises(kernels, name, kind):
    need(kernels, name, kind, "scales")
    assert_equal(along_sums(kernels, name, kind, "scales"))


# of each parameter: its elements, index of the first, format of its outputs; weights that do not train have no noise
OWNER = [(3003, 640, 2), (61, 0, 2), (4096, 1 << 20, 2), (1, 0, 1), (515, 128, 2)]


def owner_calls(names, kind, mask):
    """The passes of an owner with these parameters' formats, in memory of their own: the same each time."""
    calls = []
    for i, (name, (numel, offset, outs)) in enumerate(zip(names, OWNER, strict=False)):
        stored, residual = (None if part is None else part.clone() for part in values(numel, name, i))
        calls.append(
            PassCall(
                stored=stored, residual=residual, fmt=get_format(name), numel=numel, offset=offset, param_id=7 + i,
                updates=(), write_back=False, stochastic=i == 2, noise=spec_of(kind), perturbations=(),
                outs=[out_like(numel, DTYPES[(i + j) % 3]) for j in range(outs)], target_scales=False, threads=1,
                mask=mask if i == 2 else None,
            )
        )  # fmt: skip
    return calls


def owner_told(names, visit, lanes):
    """What changes from visit to visit: updates, whether they fold, seeds; one parameter has another gain, one none."""
    told = []
    for i, (name, (_, _, outs)) in enumerate(zip(names, OWNER, strict=False)):
        trains = get_format(name).trains
        updates = [Update(31 + visit, 2.0**-8, 1 - 2.0**-8, fold=trains and visit != 1)] if outs > 1 else []
        updates += [Update(51, 2.0**-7, fold=False)] if visit == 2 and i != 1 else []
        own = [Perturbation(p.seed, 2 * p.scale, p.terms) for p in lanes] if i == 2 else lanes
        folds = any(u.fold for u in updates)
        told.append((Updates(updates), own[:outs] if outs > 1 else [STILL], folds and visit == 0, folds))
    return told


@pytest.mark.parametrize("names, kind, launches", [
    (["bf16"] * 5, "gaussian", 1), (["bf16", "int8+8", "bf16", "bf16", "int8+8"], "gaussian", 2),
    (["fp8_e5m2"] * 5, "rademacher", 1), (["bf16", "bf16+8", "bf16+8"], "rademacher", 2),
    (["bf16"] * 2, "boxmuller", 1),
])  # fmt: skip
def test_an_owner_is_one_launch_a_format_with_the_bits_of_one_launch_a_parameter(kernels, names, kind, launches):
    """Of the CPU library and of the kernels alone, at three visits; through five blocks, two of which are shared."""
    for name in names:
        need(kernels, name, kind)
    along = Terms((21, 22), (0.5, -0.25))
    lanes = [
        [Perturbation(11, EPS), Perturbation(11, -EPS)], [Perturbation(12, EPS), STILL],
        [Perturbation.along(along, EPS), Perturbation(13, EPS)],
    ]  # fmt: skip
    found, most = [], kernels.most_blocks
    for way in ("alone", "joined", "in few blocks", "on the CPU"):
        calls = owner_calls(names, kind, MASKS["small"])
        kernels.most_blocks, seen = 3 if way == "in few blocks" else 2112, []
        kernels.touch = None
        on = OnCpu(native.library()) if way == "on the CPU" else OnGpu(kernels)
        ready = None if way == "alone" else on.ready(calls)
        for visit, given in enumerate(lanes):
            told, before = owner_told(names, visit, given), kernels.launches
            if ready is not None:
                ready.run(told, Mark())
            else:
                for call, (updates, own, write_back, residual) in zip(calls, told, strict=True):
                    part = call.residual if residual else None
                    one = replace(call, updates=updates, perturbations=own, write_back=write_back, residual=part)
                    on.run_pass(one, Mark())
            if way in ("joined", "in few blocks"):
                assert kernels.launches - before == launches
            held = [t for call in calls for t in (call.stored, call.residual, *call.outs) if t is not None]
            seen += [t.clone().view(torch.uint8) for t in held]
        found.append(seen)
    kernels.most_blocks = most
    for other in found[1:]:
        assert_same(found[0], other)


def test_more_parameters_or_lanes_than_a_launch_takes_are_split(kernels):
    fmt, lanes = get_format("bf16"), [Perturbation(seed, EPS) for seed in range(9)]
    both_ways = []
    for on in (OnCpu(native.library()), OnGpu(kernels)):
        calls = owner_calls(["bf16"] * 5, "gaussian", None)
        for call in calls:
            call.outs = [out_like(call.numel, torch.bfloat16) for _ in lanes]
        kernels.touch, before = None, kernels.launches
        on.ready(calls).run([(Updates([Update(3, EPS)]), lanes, True, False)] * 5, Mark())
        launched = kernels.launches - before
        both_ways.append([t.view(torch.uint8) for call in calls for t in (call.stored, *call.outs)])
    assert launched == 2  # 27 lanes and 18
    assert_same(*both_ways)
    few = [replace(calls[3], outs=[out_like(1, torch.bfloat16)]) for _ in range(cuda_args.PARTS + 1)]
    before = kernels.launches
    OnGpu(kernels).ready(few).run([(Updates(), [STILL], False, False)] * len(few), Mark())
    assert kernels.launches - before == 2 and fmt.code == 1
    many = replace(calls[0], outs=[out_like(calls[0].numel, torch.bfloat16)] * (cuda_args.LANES + 1))
    assert OnGpu(kernels).ready([many]) is None  # a pass alone splits its lanes


@pytest.mark.parametrize("count", [3, 2 * cuda_args.LANES + 1])
def test_a_pass_with_the_hosts_updates(kernels, monkeypatch, count):
    """As `fused_pass` has it run for tensors on a GPU: updates go there first, lanes by the launch."""
    fmt, numel = get_format("bf16"), 3000
    updates = [Update(3, 2.0**-7, 1 - 2.0**-9), Update(4, 2.0**-8, fold=False)]
    lanes = [Perturbation(seed, 0.5) for seed in range(count)]
    stored, _ = values(numel, "bf16")
    pair = [(stored.clone(), [torch.zeros(numel) for _ in lanes]) for _ in range(2)]
    fused_pass(
        pair[0][0], fmt, param_id=7, numel=numel, updates=updates, noise=NoiseSpec(), perturbations=lanes,
        outs=pair[0][1],
    )  # fmt: skip
    monkeypatch.setattr(kernels, "touch", None)
    launches = kernels.launches
    call = PassCall(
        stored=pair[1][0], residual=None, fmt=fmt, numel=numel, offset=0, param_id=7, updates=updates, write_back=True,
        stochastic=False, noise=NoiseSpec(), perturbations=lanes, outs=pair[1][1], target_scales=False, threads=None,
    )  # fmt: skip
    OnGpu(kernels).run_pass(call, Mark())
    assert kernels.launches - launches == -(-count // cuda_args.LANES)
    assert torch.equal(pair[0][0], pair[1][0])
    assert all(torch.equal(a, b) for a, b in zip(pair[0][1], pair[1][1], strict=True))


def test_a_wrong_coefficient_is_seen(kernels):
    """The comparison can fail: the same pass with one bit of one coefficient changed."""
    changed = []
    for coeff in (2.0**-9, 2.0**-9 * (1 + 2.0**-20)):
        out = out_like(2048, torch.float32)
        stored, updates = values(2048, "bf16")[0], [Update(3, coeff, fold=False)]
        run_simulated(kernels, stored, None, get_format("bf16"), 2048, updates, [Perturbation(1, 0.0)], [out])
        changed.append(out)
    assert not torch.equal(*changed)


def test_an_instruction_we_do_not_know_is_named():
    ptx = ".entry k(\n.param .b8 k_param_0[8]\n)\n{\n.reg .f32 %f<2>;\nex2.approx.f32 %f0, %f1;\nret;\n}\n"
    with pytest.raises(UnknownInstruction, match=r"ex2\.approx"):
        translate(ptx, ["k"])
