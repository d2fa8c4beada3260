"""The CPU library built for aarch64 and run under an emulator: has NEON the bits of x86-64, and how many instructions.

    python -m benchmarks.aarch64 [--cases 24] [--counts]

Needs a cross compiler and an emulator: `apt-get install g++-aarch64-linux-gnu qemu-user` on Debian and Ubuntu. Builds
the library with setup.py for that CPU, links kernel_digests.cpp with it, and with the library that is here, and runs
both. Each of its cases (noise of every kind, encoding, passes and trained scales of every format) must give the same
digest with every instruction set of both. One JSON line, with the cases that differ; the exit status is 1 if one does.

--counts: instructions an element, which the emulator counts one by one: of the Gaussian (10 rounds) as float32, and of
a pass over bf16 with one update, stochastic rounding and two bf16 lanes along one noise. The difference of two sizes,
so that only elements count. An emulator has no time: nothing here says how fast a CPU is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import ROOT, about, emit
from zo_offload.kernels import native

COMPILER, EMULATOR, LIBRARIES = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
INSTALL = "apt-get install g++-aarch64-linux-gnu qemu-user"
EMULATED = (EMULATOR, "-L", LIBRARIES)
SIZES = (4096, 8192)  # of which the instructions are counted; tens of microseconds of a CPU, seconds of the emulator
Digests = dict[tuple[str, str], str]


def missing() -> str:
    """Why this machine cannot run it, and what would help; empty if it can."""
    lacking = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    return f"{' and '.join(lacking)} not found: {INSTALL}" if lacking else ""


def build_library(folder: Path) -> Path:
    """The CPU library for aarch64, as setup.py makes it. RuntimeError with what was said if it does not."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "tmp")]
    environment = os.environ | {"CXX": COMPILER, "ZO_CUDA": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    library = folder / "zo_offload" / native.LIBRARY.name
    if not library.exists():
        raise RuntimeError(f"{COMPILER} did not build the library: {done.stdout}{done.stderr}")
    return library


def build_program(folder: Path, library: Path, compiler: str) -> Path:
    """kernel_digests.cpp, linked with that library."""
    program = folder / "kernel_digests"
    command = [compiler, "-O1", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Icsrc", "benchmarks/kernel_digests.cpp"]
    command += [str(library.resolve()), f"-Wl,-rpath,{library.resolve().parent}", "-o", str(program)]
    subprocess.run(command, cwd=ROOT, check=True)
    return program


def digests(program: Path, cases: int, emulator: Sequence[str] = ()) -> Digests:
    """By instruction set and case."""
    told = subprocess.run([*emulator, str(program), str(cases)], capture_output=True, text=True, check=True).stdout
    found: Digests = {}
    for line in told.splitlines():
        isa, what, name, number, digest = line.split()
        found[isa, f"{what} {name} {number}"] = digest
    return found


def differing(*builds: Digests) -> list[str]:
    """Instruction sets and cases whose digest is not that of the first build's scalar kernels, or is not there."""
    cases = {case for build in builds for _, case in build}
    return [
        f"{isa} {case}"
        for build in builds
        for isa in dict.fromkeys(isa for isa, _ in build)
        for case in sorted(cases)
        if build.get((isa, case), "none") != builds[0].get(("scalar", case))
    ]


def instructions(program: Path, isa: str, what: str) -> float:
    """An element's, of "noise" or a "pass"."""
    counts = []
    for numel in SIZES:
        command = [*EMULATED, "-singlestep", "-d", "exec,nochain", "-D", "/dev/stdout", str(program)]
        with subprocess.Popen([*command, "work", isa, what, str(numel)], stdout=subprocess.PIPE) as running:
            assert running.stdout is not None
            counts.append(sum(line.startswith(b"Trace") for line in running.stdout))
        if running.returncode:
            raise RuntimeError(f"{program.name} work {isa} {what}: exit status {running.returncode}")
    return (counts[1] - counts[0]) / (SIZES[1] - SIZES[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=24, help="of each format, and of each thing that is done with it")
    parser.add_argument("--counts", action="store_true", help="count instructions, too")
    args = parser.parse_args()
    if reason := missing():
        parser.error(reason)
    if not native.LIBRARY.exists():
        parser.error(f"{native.LIBRARY.name} was not built; build it: python setup.py build_ext --inplace")
    with tempfile.TemporaryDirectory() as folder:
        here, there = Path(folder, "here"), Path(folder, "there")
        here.mkdir()
        program = build_program(there, build_library(there), COMPILER)
        found = digests(program, args.cases, EMULATED)
        own = digests(build_program(here, native.LIBRARY, os.environ.get("CXX", "g++")), args.cases)
        wrong = differing(own, found)
        result: dict[str, object] = {
            "emulated": sorted({isa for isa, _ in found}),
            "here": sorted({isa for isa, _ in own}),
            "cases": len({case for _, case in found}),
            "differing": wrong,
        }
        if args.counts:
            result["instructions_per_element"] = {
                f"{isa} {what}": round(instructions(program, isa, what), 1)
                for what in ("noise", "pass")
                for isa in ("scalar", "neon")
            }
        emit(result, about("aarch64"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
