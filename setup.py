"""Builds the native kernels: zo_offload/_zo_cpu.so, a plain shared library, and zo_offload/_zo_cuda.fatbin, the CUDA
kernels' machine code. No torch, no Python headers.

Everything else is in pyproject.toml. Without a working C++ compiler the package installs all the same and runs its
slow reference. CXX chooses the compiler, and with it the CPU; CXXFLAGS is added to ours (a build whose floating point
differs is refused when it is loaded). Without nvcc the CUDA kernels are compiled on first use by the NVRTC that torch
brings. NVCC chooses another nvcc, ZO_CUDA_ARCHS=90 builds for these GPUs alone, ZO_CUDA=0 does without.
"""

import os
import shlex
import shutil
import subprocess
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

# Results must not depend on the compiler's mood: no contraction of a * b + c, no reordering. The other flags only
# drop promises about errno and floating point traps.
FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math".split()
# gcc 12 takes the deliberately undefined registers in its own AVX-512 header for a mistake
FLAGS += ["-Wno-maybe-uninitialized"]
LINK_FLAGS = "-shared -s -pthread -static-libstdc++ -static-libgcc".split()
SOURCES = {"csrc/cpu.cpp": [], "csrc/cpu_scalar.cpp": [], "csrc/cpu_checksum.cpp": [], "csrc/cpu_io.cpp": []}
# one unit an instruction set, chosen at run time: only these files may use what their flags allow
X86_SOURCES = {
    "csrc/cpu_avx2.cpp": "-mavx2 -mfma -mf16c".split(),
    "csrc/cpu_avx512.cpp": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c".split(),
}
ARM_SOURCES: dict[str, list[str]] = {"csrc/cpu_neon.cpp": []}
HEADERS = [
    "noise.h",
    "formats.h",
    "api.h",
    "fused.h",
    "cpu_work.h",
    "cpu_formats.h",
    "cpu_tile.h",
    "cpu_ahead.h",
    "cpu_threads.h",
]

CUDA_SOURCES = ["cuda.cu", "cuda_kernels.h", "cuda_formats.h", "fused.h", "api.h", "formats.h", "noise.h"]
# A100; RTX 30; RTX 40 and L40; H100 and H200; and PTX, which the driver compiles for what comes later
CUDA_ARCHS = "80,86,89,90"


def cuda_archs() -> list[str]:
    """ZO_CUDA_ARCHS, or the usual GPUs and those of this machine (a T4 is 75, an RTX 50 is 120), the newest last."""
    if "ZO_CUDA_ARCHS" in os.environ:
        return os.environ["ZO_CUDA_ARCHS"].split(",")
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        told = ""  # no GPU here
    here = {line.strip().replace(".", "") for line in told.splitlines()}
    return sorted({*CUDA_ARCHS.split(","), *(arch for arch in here if arch.isdigit())}, key=int)


def nvcc() -> str | None:
    """The CUDA compiler, or None if there is none or it is not wanted. A toolkit's folder is often not on the path."""
    if os.environ.get("ZO_CUDA") == "0":
        return None
    if "NVCC" in os.environ:
        return shutil.which(os.environ["NVCC"])
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = ["nvcc", *(str(Path(toolkit, "bin", "nvcc")) for toolkit in toolkits if toolkit)]
    return next(filter(None, map(shutil.which, places)), None)


def nvcc_command(compiler: str, target: Path, *extra: str) -> list[str]:
    archs = cuda_archs()
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    flags = ["-std=c++17", "-O3", "--threads=0", "-fatbin"]
    return [compiler, *flags, *codes, *extra, "csrc/cuda.cu", "-o", str(target)]


def cpu_sources(compiler: list[str]) -> dict[str, list[str]]:
    """The sources for the CPU that this compiler builds for, each with the flags that it alone gets."""
    told = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    machine = told.strip().split("-")[0].lower()
    of_machine = {"x86_64": X86_SOURCES, "amd64": X86_SOURCES, "aarch64": ARM_SOURCES, "arm64": ARM_SOURCES}
    return SOURCES | of_machine.get(machine, {})


class AnyPython3(bdist_wheel):
    """A wheel's tag: native code, but no Python's own interface, so one wheel a platform serves every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # loaded by ctypes or the CUDA driver, so no Python version in the name
        return fullname.replace(".", os.sep) + (".fatbin" if fullname.endswith("_zo_cuda") else ".so")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        report = Path(self.build_lib, "zo_offload", "_zo_cuda.txt")
        if report.exists():
            shutil.copy(report, "zo_offload")

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        if ext.name.endswith("_zo_cuda"):
            return self.build_cuda(target)
        self.build_cpu(target)

    def build_cuda(self, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        sources = [Path("csrc", name) for name in CUDA_SOURCES]
        if not self.inplace:  # for NVRTC; a checkout has them beside the package
            (target.parent / "csrc").mkdir(exist_ok=True)
            for source in sources:
                shutil.copy(source, target.parent / "csrc")
        compiler = nvcc()
        if compiler is None:
            print("no nvcc (or ZO_CUDA=0): the CUDA kernels are compiled on first use, by NVRTC")
            if not self.inplace:  # what an earlier build left would be packed, whatever source it was made from
                target.unlink(missing_ok=True)
                target.with_suffix(".txt").unlink(missing_ok=True)
            return
        if target.exists() and all(target.stat().st_mtime > source.stat().st_mtime for source in sources):
            return
        command = nvcc_command(compiler, target, "-Xptxas=-v")
        try:
            done = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
            target.with_suffix(".txt").write_text(done.stderr)  # registers and spills, which a test looks at
        except (OSError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)
            said = str(getattr(error, "stderr", None) or "")[-2000:]
            warnings.warn(f"CUDA kernels not built, NVRTC compiles them on first use: {error} {said}", stacklevel=1)

    def build_cpu(self, target: Path) -> None:
        temporary = Path(self.build_temp)
        for folder in (target.parent, temporary):
            folder.mkdir(parents=True, exist_ok=True)
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        objects, running = [], []
        try:
            for source, flags in cpu_sources(compiler).items():  # side by side: each takes some seconds
                objects.append(str(temporary / (Path(source).stem + ".o")))
                command = [*compiler, *FLAGS, *extra, *flags, "-c", source, "-o", objects[-1]]
                running.append((command, subprocess.Popen(command)))
            failed = [command for command, process in running if process.wait() != 0]
            if failed:
                raise OSError(f"this command failed: {shlex.join(failed[0])}")
            # a fresh file: a process may have the old one mapped
            target.unlink(missing_ok=True)
            subprocess.run([*compiler, *LINK_FLAGS, "-o", str(target), *objects], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)  # an earlier build's is of other sources, perhaps
            warnings.warn(f"native kernels not built, the slow reference will run instead: {error}", stacklevel=1)


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "zo_offload._zo_cpu",
                sources=list(SOURCES | X86_SOURCES | ARM_SOURCES),
                depends=[f"csrc/{header}" for header in HEADERS],
                optional=True,
            ),
            Extension(
                "zo_offload._zo_cuda",
                sources=["csrc/cuda.cu"],
                depends=[f"csrc/{name}" for name in CUDA_SOURCES],
                optional=True,
            ),
        ],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython3},
    )
