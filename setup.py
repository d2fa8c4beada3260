"""Builds the native kernels as a plain shared library, zo_offload/_zo_cpu.so: no torch, no Python headers.

Everything else is in pyproject.toml. Without a working C++ compiler the package installs all the same and runs its
slow reference. CXX chooses the compiler, CXXFLAGS is added to ours (a build whose floating point differs is refused
when it is loaded).
"""

import os
import platform
import shlex
import subprocess
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Results must not depend on the compiler's mood: no contraction of a * b + c, no reordering. The other flags only
# drop promises about errno and floating point traps.
FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math".split()
# gcc 12 takes the deliberately undefined registers in its own AVX-512 header for a mistake
FLAGS += ["-Wno-maybe-uninitialized"]
LINK_FLAGS = "-shared -s -pthread -static-libstdc++ -static-libgcc".split()
SOURCES = {"csrc/cpu.cpp": [], "csrc/cpu_scalar.cpp": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    # one unit an instruction set, chosen at run time: only these files may use what their flags allow
    SOURCES["csrc/cpu_avx2.cpp"] = "-mavx2 -mfma -mf16c".split()
    SOURCES["csrc/cpu_avx512.cpp"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c".split()
HEADERS = ["noise.h", "formats.h", "api.h", "fused.h", "cpu_work.h", "cpu_tile.h", "cpu_threads.h"]


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # loaded by ctypes, so no Python version in the name

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        temporary = Path(self.build_temp)
        for folder in (target.parent, temporary):
            folder.mkdir(parents=True, exist_ok=True)
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        objects, running = [], []
        try:
            for source, flags in SOURCES.items():  # side by side: each takes some seconds
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
            warnings.warn(f"native kernels not built, the slow reference will run instead: {error}", stacklevel=1)


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "zo_offload._zo_cpu",
                sources=list(SOURCES),
                depends=[f"csrc/{header}" for header in HEADERS],
                optional=True,
            )
        ],
        cmdclass={"build_ext": BuildNative},
    )
