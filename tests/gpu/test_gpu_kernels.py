"""On a GPU: noise and fused passes have the bits of the CPU library, for every format, and every time."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

from zo_offload.formats import CENTRED, FORMATS
from zo_offload.formats.codec import encode_values
from zo_offload.kernels import native
from zo_offload.kernels.records import Perturbation, Update, Updates
from zo_offload.numerics import cuda_kernels
from zo_offload.numerics.calls import Mark
from zo_offload.numerics.fused import fused_pass, fused_rows, ready_pass, ready_passes
from zo_offload.numerics.noise import NoiseSpec, noise

EPS = 2.0**-10
LANES = [Perturbation(11, EPS), Perturbation(11, -EPS), Perturbation(12, EPS), Perturbation(0, 0.0)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_the_golden_hash_is_the_cpus():
    assert native.fingerprint(cuda_kernels._OnDevice(cuda_kernels.kernels(0))) == native.FINGERPRINT


@pytest.mark.parametrize("source", ["fatbin", "nvrtc"])
def test_both_images_are_right(source, monkeypatch):
    if source == "fatbin" and not cuda_kernels.IMAGE.exists():
        pytest.skip("no nvcc when this was built")
    monkeypatch.setenv("ZO_CUDA", "nvrtc" if source == "nvrtc" else "1")
    kernels = cuda_kernels._open(0)
    assert (source == "fatbin") == (kernels.source == cuda_kernels.IMAGE.name)
    assert native.fingerprint(cuda_kernels._OnDevice(kernels)) == native.FINGERPRINT


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("rounds", [7, 10])
@pytest.mark.parametrize("numel, offset", [(1, 0), (5003, (1 << 34) - 77), (1 << 22, 1 << 33)])
def test_noise(gpu, kind, rounds, numel, offset):
    z = torch.full((numel,), float("nan"), device=gpu)
    kernels = cuda_kernels.kernels(0)
    kernels.noise(z.data_ptr(), kind, rounds, 2**63 + 5, 0xDEADBEEF, numel, offset, kernels.stream())
    expected = noise(NoiseSpec(kind, rounds), 2**63 + 5, 0xDEADBEEF, numel, offset)
    assert torch.equal(z.cpu().view(torch.int32), expected.view(torch.int32))


def weights(numel, fmt):
    g = torch.Generator().manual_seed(numel)
    return encode_values(torch.randn(numel, generator=g) * 0.02, fmt)


def run(device, fmt, numel, updates, kind, rounding, target="values"):
    first, second = weights(numel, fmt)
    stored, residual = first.to(device), None if second is None else second.to(device)
    outs = [torch.full((numel,), -3.0, dtype=DTYPES[j % 3], device=device) for j in range(len(LANES))]
    fused_pass(
        stored, fmt, param_id=9, numel=numel, offset=1 << 20, updates=updates, noise=NoiseSpec(kind), rounding=rounding,
        perturbations=LANES, outs=outs, residual=residual, target=target,
    )  # fmt: skip
    return [t.cpu().view(torch.uint8) for t in (stored, residual, *outs) if t is not None]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("numel", [4097, 1 << 20])
def test_fused_pass(gpu, name, kind, rounding, count, numel):
    fmt = FORMATS[name]
    updates = [Update(i, (-1) ** i * 2.0**-9, 1 - 2.0**-10, fold=fmt.trains and i != 3) for i in range(count)]
    pair = [run(device, fmt, numel, updates, kind, rounding) for device in ("cpu", gpu)]
    for a, b in zip(*pair, strict=True):
        assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} bytes differ"


def visited(device, names, sizes):
    """An owner's parameters, made ready once and visited twice: with a fold that is written, and without one."""
    calls, held = [], []
    for i, (name, numel) in enumerate(zip(names, sizes, strict=True)):
        fmt = FORMATS[name]
        stored, residual = (None if part is None else part.to(device) for part in weights(numel, fmt))
        outs = [torch.full((numel,), -3.0, dtype=DTYPES[j % 3], device=device) for j in range(len(LANES))]
        held += [stored, *([] if residual is None else [residual]), *outs]
        calls.append(
            ready_pass(
                stored, fmt, param_id=i, numel=numel, offset=1 << 20, rounding="nearest", noise=NoiseSpec(), outs=outs,
                residual=residual, target="values", mask=None, threads=None,
            )
        )  # fmt: skip
    ready = ready_passes(calls)
    for fold in (True, False):
        updates = Updates([Update(5, 2.0**-9, 1 - 2.0**-10, fold=fold), Update(6, 2.0**-9, fold=False)])
        ready.run([(updates, LANES, fold, fold)] * len(calls), Mark())
    return [t.cpu().view(torch.uint8) for t in held]


@pytest.mark.parametrize("names", [["bf16"] * 3, ["bf16", "int8+8", "int8+8"], ["fp32"] * 9])
def test_an_owner_in_one_launch(gpu, names):
    sizes = [1 << 20, 4096 + 77, 130, *range(1, 7)][: len(names)]
    for a, b in zip(visited("cpu", names, sizes), visited(gpu, names, sizes), strict=True):
        assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} bytes differ"


@pytest.mark.parametrize("name", [n for n, fmt in (FORMATS | CENTRED).items() if fmt.trains_scales])
def test_scales_that_train(gpu, name):
    updates = [Update(i, 2.0**-12) for i in range(2)]
    pair = [
        run(d, (FORMATS | CENTRED)[name], 4096 + 77, updates, "gaussian", "nearest", "scales") for d in ("cpu", gpu)
    ]
    for a, b in zip(*pair, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", FORMATS)
def test_gathered_rows(gpu, name):
    fmt, width, count = FORMATS[name], 96, 50
    first, _ = weights(width * count, fmt)
    rows = torch.tensor([49, 0, 3, 3, 17])
    found = []
    for device in ("cpu", gpu):
        outs = [torch.zeros(5, width, dtype=d, device=device) for d in DTYPES]
        fused_rows(
            first.to(device), fmt, param_id=9, row_numel=width, numel=width * count, rows=rows.to(device),
            updates=[Update(1, 2.0**-9, fold=False)], noise=NoiseSpec(), perturbations=LANES[:3], outs=outs,
            residual=None,
        )  # fmt: skip
        found.append([o.cpu().view(torch.uint8) for o in outs])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", FORMATS)
def test_gathered_rows_of_a_piece(gpu, name):
    """The kernel passes over the rows of other pieces, and answers with NaN for those that no piece has."""
    fmt, width, first_row, count, total = FORMATS[name], 96, 128, 64, 300
    first, _ = weights(width * count, fmt)
    rows = torch.tensor([191, 0, 128, 299, 130])
    found = []
    for device in ("cpu", gpu):
        # only a GPU is asked for rows that are not there: on a CPU they are refused
        asked = torch.cat([rows, torch.tensor([total, -1])]).to(device) if device == "cuda" else rows
        outs = [torch.full((len(asked), width), -3.0, dtype=d, device=device) for d in DTYPES]
        fused_rows(
            first.to(device), fmt, param_id=9, row_numel=width, numel=width * count, rows=asked, first_row=first_row,
            total_rows=total, updates=[Update(1, 2.0**-9, fold=False)], noise=NoiseSpec(), perturbations=LANES[:3],
            outs=outs, residual=None,
        )  # fmt: skip
        found.append([o.cpu()[:5].view(torch.uint8) for o in outs])
    assert all(bool(o.cpu()[5:].isnan().all()) for o in outs)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_the_same_pass_twice_is_the_same(gpu):
    fmt, updates = FORMATS["bf16"], [Update(1, 2.0**-9)]
    a, b = (run(gpu, fmt, 1 << 22, updates, "gaussian", "stochastic") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_more_than_two_to_the_32_elements():
    free = torch.cuda.mem_get_info()[0]
    numel = (1 << 32) + 4096
    if free < 3 * numel:
        pytest.skip(f"needs {3 * numel >> 30} GiB of GPU memory, {free >> 30} are free")
    fmt = FORMATS["fp8_e4m3"]
    tail = 1 << 14
    first, _ = weights(tail, fmt)
    stored = torch.zeros(fmt.nbytes(numel), dtype=torch.uint8, device="cuda")
    start, (at, _) = numel - tail, fmt.scales_span(numel)
    stored[start:numel] = first[:tail].cuda()
    k = start // fmt.group
    span = fmt.scales_span(tail)
    stored[at + k : at + k + span[1]] = first[span[0] : sum(span)].cuda()
    fused_pass(stored, fmt, param_id=9, numel=numel, updates=[Update(3, 2.0**-6)], noise=NoiseSpec())
    expected = first.clone()
    fused_pass(expected, fmt, param_id=9, numel=tail, offset=start, updates=[Update(3, 2.0**-6)], noise=NoiseSpec())
    assert torch.equal(stored[start:numel].cpu(), expected[:tail])


def test_no_access_is_out_of_bounds_or_a_race(tmp_path):
    """compute-sanitizer over passes of awkward sizes, where it is installed."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer on this machine")
    script = tmp_path / "passes.py"
    script.write_text(
        "import torch\n"
        "from zo_offload.formats import FORMATS\n"
        "from zo_offload.formats.codec import encode_values\n"
        "from zo_offload.numerics.fused import Perturbation, Update, fused_pass\n"
        "from zo_offload.numerics.noise import NoiseSpec\n"
        "for fmt in FORMATS.values():\n"
        "    for kind in ('gaussian', 'rademacher'):\n"
        "        for n in (1, 513, 3003):\n"
        "            a, b = encode_values(torch.randn(n), fmt)\n"
        "            out = [torch.empty(n, device='cuda', dtype=torch.bfloat16)]\n"
        "            fused_pass(a.cuda(), fmt, param_id=1, numel=n, updates=[Update(1, 0.5, fold=fmt.trains)],\n"
        "                       noise=NoiseSpec(kind), perturbations=[Perturbation(2, 0.5)], outs=out,\n"
        "                       residual=None if b is None else b.cuda())\n"
        "torch.cuda.synchronize()\n"
    )
    # not API errors: torch asks the driver for things that are not there, and goes on
    options = ["--tool", "memcheck", "--error-exitcode", "99", "--report-api-errors", "no"]
    command = [sanitizer, *options, sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this device here")
    assert done.returncode == 0, done.stdout[-3000:]
