"""The CUDA build: what ptxas reported, what is told where there is nothing to build with, NVRTC and its cache."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from support.cuda_simulated import compilers
from zo_offload.config import EngineConfig
from zo_offload.devices import make_device
from zo_offload.errors import ConfigError
from zo_offload.kernels import native, nvrtc
from zo_offload.kernels.driver import CudaError
from zo_offload.numerics import cuda_args, cuda_kernels

ROOT = Path(__file__).resolve().parents[2]
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
    names = cuda_args.kernel_names()
    archs = {arch for _, arch, *_ in found}
    assert archs and {(name, arch) for name, arch, *_ in found} == {(n, a) for n in names for a in archs}
    for name, arch, stack, stores, loads, registers in found:
        assert (stack, stores, loads) == ("0", "0", "0"), f"{name} for {arch} uses local memory"
        assert int(registers) <= 128, f"{name} for {arch}: {registers} registers leave one block a multiprocessor"


def test_the_sources_have_a_kernel_for_every_format_and_distribution():
    """By what csrc/formats.h and csrc/cuda_kernels.h list: where no compiler is, too."""
    rows = re.findall(r"^  ROW\((\w+), \w+, (\d+), .*, ([01])\)", (ROOT / "csrc" / "formats.h").read_text(), re.M)
    assert {int(code): name for name, code, _ in rows} == cuda_args.KERNELS
    text = (ROOT / "csrc" / "cuda_kernels.h").read_text()
    kinds = set(re.findall(r"ZO_KERNEL.* zo_pass_##NAME##_(\w+)\(", text))
    names = {f"zo_pass_{name}_{kind}" for name, *_ in rows for kind in kinds}
    names |= {f"zo_scales_{name}_{kind}" for name, _, scales in rows if scales == "1" for kind in kinds}
    assert names | set(re.findall(r"ZO_KERNEL (zo_\w+)\(", text)) == cuda_args.kernel_names()


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
    part = cuda_args.pack_part(
        num_lanes=4, first_lane=4, first_block=5, end_block=9, last_fold=-1, total_rows=7, stored=1, rows=0, updates=3,
        terms=11, numel=4, offset=5, num_rows=0, num_updates=1, format=1, param_id=6, distribution="gaussian",
        rounds=10, write_back=True, stochastic=False,
    )  # fmt: skip
    assert part[native.UPDATES_AT :][:16] == struct.pack("<2Q", 3, 11) and len(part) == cuda_args.PART_BYTES
    args = cuda_args.pack_args([part] * cuda_args.PARTS, [lane] * cuda_args.LANES)
    assert len(args) == cuda_args.ARGS_BYTES == cuda_args.ABI & 0xFFF


def test_every_part_of_a_launch_has_blocks_and_no_launch_too_many():
    """Eight warps a block; above the most, shares of it, and one at least."""
    assert cuda_args.blocks_of([1, 8, 9, 80], 100) == [1, 2, 4, 14]
    assert cuda_args.blocks_of([8 * 900, 1, 8 * 99], 100) == [90, 91, 100]
    assert cuda_args.blocks_of([0], 100) == [1]
    with pytest.raises(ConfigError, match=r"2147483648 tiles of 1024 elements.*pieces"):
        cuda_args.tiles("rademacher", 1 << 41, 0)


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


def test_a_user_without_a_home_runs_all_the_same(monkeypatch):
    """Containers run under uids that have no entry and no HOME: pathlib raises RuntimeError there."""

    def nowhere(cls):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(nowhere))
    monkeypatch.setattr(nvrtc, "find_library", lambda: Path("libnvrtc.so.13"))
    monkeypatch.setattr(nvrtc, "Nvrtc", FakeNvrtc)
    image, where = nvrtc.compiled("sm_89")
    assert image == b"image for sm_89" and "no home directory" in where


class FakeNvrtc:
    version = (13, 0)
    compiled: ClassVar[list[str]] = []

    def __init__(self, path):
        self.path = path

    def compile(self, sources, arch, more=()):
        self.compiled.append(" ".join([arch, *more]))
        return f"image for {arch}".encode()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "find_library", lambda: Path("libnvrtc.so.13"))
    monkeypatch.setattr(nvrtc, "Nvrtc", FakeNvrtc)
    monkeypatch.setattr(FakeNvrtc, "compiled", [])
    return tmp_path / "zo_offload"


def test_a_cached_image_is_whole_and_the_users_own(cache):
    """Who can write there has the GPU, and the process, run their code; half a file is no image either."""
    first, _ = nvrtc.compiled("sm_89")
    (path,) = cache.iterdir()
    assert nvrtc.compiled("sm_89")[0] == first and len(FakeNvrtc.compiled) == 1
    good = path.read_bytes()
    for bad in (good[:-1], good[:10], b"", good[:40] + bytes([good[40] ^ 1]) + good[41:]):
        path.write_bytes(bad)
        before = len(FakeNvrtc.compiled)
        assert nvrtc.compiled("sm_89")[0] == first and len(FakeNvrtc.compiled) == before + 1
    path.chmod(0o666)
    before = len(FakeNvrtc.compiled)
    assert nvrtc.compiled("sm_89")[0] == first and len(FakeNvrtc.compiled) == before + 1
    elsewhere = cache / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert nvrtc.compiled("sm_89")[0] == first and len(FakeNvrtc.compiled) == before + 2


def test_an_image_of_another_user_is_not_taken(cache, monkeypatch):
    nvrtc.compiled("sm_89")
    monkeypatch.setattr(nvrtc.os, "getuid", lambda: 4711)
    nvrtc.compiled("sm_89")
    assert len(FakeNvrtc.compiled) == 2


def test_what_compiles_says_so_and_a_format_is_compiled_alone(cache):
    said = []
    nvrtc.compiled("sm_75", "bf16", said.append)
    nvrtc.compiled("sm_75", "bf16", said.append)
    assert said == ["compiling the CUDA kernels of bf16 for sm_75 with NVRTC 13.0: some seconds, once"]
    assert FakeNvrtc.compiled == ["sm_75 --define-macro=ZO_ONE_FORMAT --define-macro=ZO_WANT_bf16=1"]


@pytest.mark.parametrize("root", ["CONDA_PREFIX", "CUDA_HOME"])
def test_nvrtc_of_conda_and_of_a_toolkit_is_found(tmp_path, monkeypatch, root):
    """conda-forge's torch, and NVIDIA's containers, bring it in no wheel."""
    library = tmp_path / "lib" / "libnvrtc.so.12"
    library.parent.mkdir()
    library.touch()
    monkeypatch.delenv("ZO_NVRTC", raising=False)
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv(root, str(tmp_path))
    assert nvrtc.find_library() == library


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc on this machine")
def test_nvrtc_of_the_systems_loader_is_found(tmp_path, monkeypatch):
    """Installed by a distribution: on the loader's path, and nowhere that can be guessed."""
    source = tmp_path / "fake.c"
    source.write_text("int nvrtcVersion(int* a, int* b) { *a = 12, *b = 4; return 0; }")
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "libnvrtc.so.12")], check=True)
    code = "from zo_offload.kernels import nvrtc; nvrtc._places = lambda: iter(()); print(nvrtc.find_library())"
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("ZO_NVRTC", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(tmp_path / "libnvrtc.so.12"), done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
def test_one_formats_kernels_are_compiled_alone(tmp_path):
    """By nvcc, whose preprocessor is NVRTC's: those of the format, and what belongs to none."""
    out = tmp_path / "one.ii"
    command = ["nvcc", "-std=c++17", "-E", "-DZO_ONE_FORMAT", "-DZO_WANT_fp8_e5m2=1"]
    done = subprocess.run([*command, str(ROOT / "csrc" / "cuda.cu"), "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = set(
        re.findall(r"void [^;{]*?\b(zo_(?:pass|scales|noise|gaussian_table|cuda_abi)\w*)\s*\(const", out.read_text())
    )
    assert names == {n for n in cuda_args.kernel_names() if cuda_args.part_of(n) in ("", "fp8_e5m2")}
    assert {cuda_args.part_of(n) for n in cuda_args.kernel_names()} == {"", *cuda_args.KERNELS.values()}


def test_this_machines_gpus_are_built_for(tmp_path, monkeypatch):
    """A T4 or an RTX 50 is not among the usual ones: they compiled at first use, without a word."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 7.5\necho 12.0\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("ZO_CUDA_ARCHS", raising=False)
    spec = importlib.util.spec_from_file_location("zo_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.cuda_archs() == ["75", "80", "86", "89", "90", "120"]
    command = module.nvcc_command("nvcc", Path("x"))
    assert command.count("-gencode=arch=compute_120,code=compute_120") == 1
    monkeypatch.setenv("ZO_CUDA_ARCHS", "90")
    assert module.cuda_archs() == ["90"]
