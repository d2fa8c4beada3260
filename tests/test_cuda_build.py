"""The CUDA build: what ptxas reported, what is told where there is nothing to build with, NVRTC and its cache."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.cuda_simulated import compilers
from zo_offload.config import EngineConfig
from zo_offload.devices import make_device
from zo_offload.errors import ConfigError
from zo_offload.kernels import nvrtc
from zo_offload.kernels.driver import CudaError
from zo_offload.numerics import cuda_kernels

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "zo_offload" / "_zo_cuda.txt"


def newer_than_sources(path: Path) -> bool:
    return path.exists() and all(
        path.stat().st_mtime > (ROOT / "csrc" / name).stat().st_mtime for name in nvrtc.SOURCES
    )


@pytest.mark.skipif(compilers()["nvcc"] != "", reason=compilers()["nvcc"] or "nvcc is here")
def test_no_kernel_spills_on_any_gpu():
    """ptxas' report of the build: every kernel for every GPU, two blocks a multiprocessor, nothing in local memory."""
    if not newer_than_sources(REPORT):
        pytest.skip(
            "the checkout was not built with nvcc since the sources changed: python setup.py build_ext --inplace"
        )
    text = REPORT.read_text()
    found = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill "
                       r"stores, (\d+) bytes spill loads.*?Used (\d+) registers", text, re.S)  # fmt: skip
    names = cuda_kernels.kernel_names()
    archs = {arch for _, arch, *_ in found}
    assert archs and {(name, arch) for name, arch, *_ in found} == {(n, a) for n in names for a in archs}
    for name, arch, stack, stores, loads, registers in found:
        assert (stack, stores, loads) == ("0", "0", "0"), f"{name} for {arch} uses local memory"
        assert int(registers) <= 128, f"{name} for {arch}: {registers} registers leave one block a multiprocessor"


def test_the_sources_have_a_kernel_for_every_format_and_distribution():
    """By what csrc/formats.h and csrc/cuda_kernels.h list: where no compiler is, too."""
    rows = re.findall(r"^  ROW\((\w+), \w+, (\d+), .*, ([01])\)", (ROOT / "csrc" / "formats.h").read_text(), re.M)
    assert {int(code): name for name, code, _ in rows} == cuda_kernels.KERNELS
    text = (ROOT / "csrc" / "cuda_kernels.h").read_text()
    kinds = set(re.findall(r"ZO_KERNEL zo_pass_##NAME##_(\w+)\(", text))
    names = {f"zo_pass_{name}_{kind}" for name, *_ in rows for kind in kinds}
    names |= {f"zo_scales_{name}_{kind}" for name, _, scales in rows if scales == "1" for kind in kinds}
    assert names | set(re.findall(r"ZO_KERNEL (zo_\w+)\(", text)) == cuda_kernels.kernel_names()


def build(into, **settings):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(into), "--build-temp", str(into / "t")]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"CXX": str(into / "no-cxx"), **settings}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def test_without_nvcc_the_build_succeeds_and_says_so(tmp_path):
    done = build(tmp_path, NVCC=str(tmp_path / "no-nvcc"))
    assert done.returncode == 0, done.stderr
    assert "no nvcc" in done.stdout
    assert not (tmp_path / "zo_offload" / "_zo_cuda.fatbin").exists()
    assert {p.name for p in (tmp_path / "zo_offload" / "csrc").iterdir()} == set(nvrtc.SOURCES)


def test_nvcc_is_found_where_its_toolkit_is_though_not_on_the_path(tmp_path):
    """Told by its own failure: nothing here compiles for minutes."""
    compiler = tmp_path / "toolkit" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text("#!/bin/sh\necho 'the one of the toolkit' >&2\nexit 1\n")
    compiler.chmod(0o755)
    folders = [str(tmp_path / "path")] + [
        p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists()
    ]
    environment = {"CUDA_HOME": str(tmp_path / "toolkit"), "PATH": os.pathsep.join(folders), "ZO_CUDA": "1"}
    done = build(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "the one of the toolkit" in done.stderr


def test_nvcc_that_fails_does_not_stop_the_build(tmp_path):
    bad = tmp_path / "bad-nvcc"
    bad.write_text("#!/bin/sh\necho 'unsupported gpu architecture' >&2\nexit 1\n")
    bad.chmod(0o755)
    done = build(tmp_path, NVCC=str(bad), ZO_CUDA="1")
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels not built" in done.stderr and "unsupported gpu architecture" in done.stderr


@pytest.mark.skipif(compilers()["nvrtc"] != "", reason=compilers()["nvrtc"] or "NVRTC is here")
def test_nvrtc_compiles_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "read_sources", lambda: {"a.cu": 'extern "C" __global__ void k(int* p) { *p = 1; }'})
    first, where = nvrtc.compiled("sm_90")
    assert first[:4] == b"\x7fELF" and "cached in" in where
    monkeypatch.setattr(nvrtc.Nvrtc, "compile", lambda *a: pytest.fail("compiled again"))
    assert nvrtc.compiled("sm_90")[0] == first


@pytest.mark.skipif(compilers()["nvrtc"] != "", reason=compilers()["nvrtc"] or "NVRTC is here")
def test_nvrtc_shows_what_it_could_not_compile():
    path = nvrtc.find_library()
    assert path is not None
    with pytest.raises(CudaError, match=r"(?s)a\.cu for sm_90.*undefined_thing"):
        nvrtc.Nvrtc(path).compile({"a.cu": "int x = undefined_thing;"}, "sm_90")


def test_no_nvrtc_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr(nvrtc, "find_library", lambda: None)
    with pytest.raises(CudaError, match=r"no NVRTC found.*nvidia-cuda-nvrtc.*build_ext"):
        nvrtc.compiled("sm_90")


def test_the_structs_are_as_the_kernels_read_them():
    lane = (2**64 - 1, 0x1000, -0.5, 2)
    args = cuda_kernels.pack_args(
        lanes=[lane] * 16, last_fold=-1, total_rows=7, lane_scales=0x2000, stored=1, rows=0, updates=3, numel=4,
        offset=5, num_rows=0, num_updates=1, format=1, param_id=6, distribution="gaussian", rounds=10, write_back=True,
        stochastic=False,
    )  # fmt: skip
    assert len(args) == cuda_kernels.ARGS_BYTES == cuda_kernels.ABI & 0xFFF


def test_a_device_that_is_not_there_is_named():
    import torch

    if torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch finds"):
            make_device("cuda:99")
    else:
        with pytest.raises(ConfigError, match=r"device='cuda'.*python -m zo_offload"):
            make_device("cuda")
        assert cuda_kernels.describe().startswith("none: torch")
    with pytest.raises(ConfigError, match="expected 'cpu', 'cuda' or 'cuda:N'"):
        EngineConfig(device="gpu")
    with pytest.raises(ConfigError, match="matrix units"):
        EngineConfig(compute="tf32")
