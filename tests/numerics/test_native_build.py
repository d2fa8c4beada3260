"""Building the library: it comes out right, and one that came out wrong is not used."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from zo_offload.formats import FORMATS
from zo_offload.kernels import native
from zo_offload.kernels.distributions import gaussian_table, row
from zo_offload.numerics import reference
from zo_offload.numerics.noise import NoiseSpec

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(
    not (ROOT / "setup.py").exists() or shutil.which("g++") is None, reason="needs the source tree and g++"
)


def build(folder: Path, **environment: str) -> tuple[Path, str]:
    """Runs setup.py into `folder`; where the library would be, and what was said."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "tmp")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"ZO_CUDA": "0"} | environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return folder / "zo_offload" / "_zo_cpu.so", done.stdout + done.stderr


def python(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


class ReferenceLibrary:
    """The reference behind the interface of native.Library, to make the fingerprint from."""

    def noise(self, out, distribution, rounds, seed, param_id, numel, offset, threads):
        row(distribution).into(self._floats(out, numel), rounds, seed, param_id, offset)

    def gaussian_table(self, out):
        self._floats(out, 1 << 16)[:] = gaussian_table()

    def run_pass(self, *, stored, numel, offset, num_updates, num_lanes, format, tail, **options):
        by_code = {fmt.code: fmt for fmt in FORMATS.values()}
        updates, lanes, outs = [], [], []
        for k in range(num_updates):
            seed, coeff, decay, fold, _ = struct.unpack_from("<QffII", tail, 24 * k)
            updates.append(SimpleNamespace(seed=seed, coeff=coeff, decay=decay, fold=bool(fold), begins=True))
        for k in range(num_updates, num_updates + num_lanes):
            seed, address, scale, code = struct.unpack_from("<QQfI", tail, 24 * k)
            lanes.append(SimpleNamespace(seed=seed, scale=scale, terms=None))
            fmt = by_code[code]
            outs.append(self._bytes(address, fmt.nbytes(numel)).view(fmt.torch_dtype))
        reference.fused_pass(
            self._bytes(stored, by_code[format].nbytes(numel)), by_code[format], param_id=options["param_id"],
            numel=numel, offset=offset, updates=updates, write_back=options["write_back"],
            stochastic=options["stochastic"], perturbations=lanes, outs=outs,
            noise=NoiseSpec(options["distribution"], options["rounds"]),
        )  # fmt: skip

    @staticmethod
    def _bytes(address, size):
        return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)

    @staticmethod
    def _floats(address, count):
        return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))


def test_the_fingerprint_is_the_references():
    assert native.fingerprint(ReferenceLibrary()) == native.FINGERPRINT


@needs_compiler
def test_a_plain_build_loads_in_every_variant(tmp_path):
    path, said = build(tmp_path)
    assert path.exists(), said
    for isa in native.Library(path).isas:
        assert native.Library(path, isa).isa == isa


@needs_compiler
def test_fast_math_does_not_compile(tmp_path):
    path, said = build(tmp_path, CXXFLAGS="-Ofast")
    assert not path.exists()
    assert "must not be built with -ffast-math" in said
    assert "native kernels not built" in said


@needs_compiler
def test_a_fast_math_library_is_refused_when_loaded(tmp_path):
    """In a process of its own: loading code linked with -Ofast changes the float mode of its thread for good."""
    path, said = build(tmp_path, CXXFLAGS="-Ofast -DZO_TEST_FAST_MATH")
    assert path.exists(), said
    code = f"""
from pathlib import Path
from zo_offload.kernels import native
for isa in {native.ISAS!r}:
    try:
        native.Library(Path({str(path)!r}), isa)
    except native.NativeError as error:
        print(isa, "refused:", error)
    else:
        print(isa, "accepted")
"""
    lines = python(code).splitlines()
    assert len(lines) == len(native.ISAS)
    # an instruction set this machine lacks is refused for that instead
    assert all("does not reproduce the known noise" in line or "instruction set" in line for line in lines), lines
    assert "does not reproduce the known noise" in lines[0]


def test_without_a_compiler_the_build_succeeds_and_says_so(tmp_path):
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree")
    earlier = [tmp_path / "zo_offload" / name for name in ("_zo_cpu.so", "_zo_cuda.fatbin")]
    earlier[0].parent.mkdir()
    for file in earlier:
        file.write_bytes(b"of an earlier build, of other sources")
    path, said = build(tmp_path, CXX=str(tmp_path / "no-such-compiler"))
    assert path in earlier and not any(file.exists() for file in earlier)
    assert "native kernels not built" in said
    assert "no-such-compiler" in said


def test_one_wheel_serves_every_python_3(tmp_path):
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree")
    tree = tmp_path / "tree"
    leave = shutil.ignore_patterns("*.so", "*.fatbin", "__pycache__")
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "LICENSE"):
        tree.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree)
    for name in ("csrc", "zo_offload"):
        shutil.copytree(ROOT / name, tree / name, ignore=leave)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path / "dist")]
    environment = os.environ | {"ZO_CUDA": "0", "CXX": "false"}  # what is packed is looked at, not what is compiled
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    assert "zo_offload/engine.py" in names and "zo_offload/py.typed" in names
    assert any(name.endswith("csrc/cuda.cu") for name in names) and not any(name.endswith(".so") for name in names)


def test_the_library_can_be_switched_off():
    said = python(
        "from zo_offload.kernels import native; from zo_offload.numerics.noise import *; "
        "print(native.library(), native.describe(), noise(NoiseSpec(), 1, 2, 3).tolist())",
        ZO_NATIVE="0",
    )
    assert said.startswith("None")
    assert "ZO_NATIVE=0" in said


@pytest.mark.skipif(not native.LIBRARY.exists(), reason="the native library is not built")
def test_a_variant_can_be_forced_and_a_wrong_name_is_an_error():
    assert "_zo_cpu.so, scalar" in python(
        "from zo_offload.kernels import native; print(native.describe())", ZO_ISA="scalar"
    )
    code = "from zo_offload.kernels import native\ntry: native.library()\nexcept ValueError as e: print(e)"
    assert "choose one of" in python(code, ZO_ISA="sse9")


def test_a_missing_or_foreign_library_is_named(tmp_path):
    with pytest.raises(native.NativeError, match=r"gone\.so cannot be loaded.*build_ext"):
        native.Library(tmp_path / "gone.so")
    libc = ctypes.util.find_library("c")
    if libc:
        with pytest.raises(native.NativeError, match="cannot be loaded"):
            native.Library(Path(libc))
