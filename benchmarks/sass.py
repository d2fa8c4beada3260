"""Instructions an element of the CUDA kernels, counted in their machine code, and the limits that follow for GPUs.

    python -m benchmarks.sass [--archs 80 89 90 120] [--formats bf16 int8] [--tools FOLDER] [--out FILE.md]

No GPU is needed: nvcc (with ptxas), gcc, and nvdisasm, which comes with the CUDA toolkit, or by
`pip install --no-deps --target FOLDER nvidia-cuda-nvdisasm`.

How it counts. nvcc makes PTX, ptxas machine code (SASS) that says of each instruction from which line of the PTX it is.
The PTX, translated to C (tests/support/ptx_to_c.py), runs on this CPU over whole, aligned tiles and counts how often
threads come to each line. The instructions between two jumps run as often as the median of their lines: the compiler
moves some across jumps. Their sum over the number of elements is the count. What it cannot know is how often the
compiler has repeated a short loop, so a few of a tile's instructions may be counted twice.

A fused pass of a format and a noise, one pending update that folds and is written back, two lanes of one seed in
bfloat16: `decode, output` is everything but noise and fold; then the lanes' noise, one update, and its fold. Billions
of elements a second: `of issue`, if every cycle issues an instruction, by `instructions_per_ns` of
zo_offload/cli/hardware.json (multiprocessors x 128 x clock); real kernels reach some 65 %. `of memory`: at its peak,
which copies reach by some 80 %. `of the link`: the link's usual rate over the bytes that are fetched.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import ROOT, commit
from zo_offload.cli.hardware import find_gpu, gpu_names
from zo_offload.formats import get_format
from zo_offload.formats.codec import planes
from zo_offload.kernels.device_updates import UpdateTable
from zo_offload.kernels.records import Update
from zo_offload.numerics import cuda_args

sys.path.append(str(ROOT / "tests"))
from support.ptx_to_c import Simulated  # type: ignore[import-not-found]

NOISES = ("gaussian", "rademacher", "boxmuller")
JUMPS = re.compile(r"^(BRA|BRX|JMP|EXIT|RET|CALL|BSYNC|BREAK|WARPSYNC|YIELD)\b")
TILES = 64  # of 1024 elements


def missing(tools: Path | None) -> tuple[dict[str, str], list[str]]:
    """(name -> path of each program, what to do about those that are not here)."""
    found, absent = {}, []
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    near = [Path(nvcc).resolve().parent] if nvcc else []
    for name in ("nvcc", "ptxas", "nvdisasm", "gcc"):
        places = [*(str(p) for p in (tools.rglob(name) if tools else ())), name, *(str(p / name) for p in near)]
        path = nvcc if name == "nvcc" else next(filter(None, map(shutil.which, places)), None)
        if path is None and name == "ptxas" and nvcc:  # nvcc may be a script that starts the real one
            told = subprocess.run([nvcc, "-dryrun", "x.cu"], capture_output=True, text=True).stderr
            folders = re.findall(r"(?:PATH=|:)(/[^:\n]+)", told)
            path = next((str(Path(p, name)) for p in folders if Path(p, name).exists()), None)
        if path is None:
            absent.append(
                "nvdisasm: pip install --no-deps --target FOLDER nvidia-cuda-nvdisasm, then --tools FOLDER"
                if name == "nvdisasm" else f"{name}: install the CUDA toolkit's compiler (nvidia-cuda-nvcc), or gcc"
            )  # fmt: skip
        else:
            found[name] = path
    return found, absent


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return done.stdout


def with_lines(ptx: str) -> str:
    """PTX whose every line says which line it is; without the source's own."""
    out = []
    for number, line in enumerate(ptx.split("\n")):
        line = "" if line.lstrip().startswith((".loc", ".file")) else line
        is_code = re.match(r"\s+(@!?%p\d+\s+)?[a-z]", line) and line.rstrip().endswith(";")
        out.append(f".loc 1 {number + 1} 0\n{line}" if is_code else line)
    return "\n".join(out) + '\n.file 1 "kernels.ptx"\n'


@dataclass(frozen=True)
class Block:
    """Instructions between two jumps: of each the line of the PTX that it is from."""

    lines: tuple[int, ...]

    def instructions(self, times: Sequence[int]) -> float:
        """How many are run by how many threads, if threads came to the PTX's lines so often."""
        known = [times[line - 1] for line in self.lines if line]
        return len(self.lines) * statistics.median_low(known) if known else 0.0


def blocks_of(sass: str, kernel: str) -> list[Block]:
    """The blocks of a kernel in nvdisasm's output with line information."""
    text = re.search(rf"\.text\.{kernel}:\n(.*?)(?=\n//-+ \.|\Z)", sass, re.S)
    if text is None:
        raise SystemExit(f"nvdisasm shows no {kernel}")
    found, now, line = list[Block](), list[int](), 0
    for row in text[1].split("\n"):
        if at := re.search(r'//## File ".*", line (\d+)', row):
            line = int(at[1])
        elif re.match(r"\.L_", row):
            found.append(Block(tuple(now)))
            now = []
        elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", row):
            if code[1] == "NOP":
                continue
            now.append(line)
            if JUMPS.match(code[1]):
                found.append(Block(tuple(now)))
                now = []
    return [block for block in [*found, Block(tuple(now))] if block.lines]


def launch(simulated: Simulated, kernel: str, name: str, noise: str, updates: list[Update], scale: float) -> int:
    """Run a pass over whole tiles; the number of its elements."""
    fmt, numel = get_format(name), 1024 * TILES
    table = UpdateTable(torch.device("cpu"))
    table.append(updates)
    given = table.since(0, True)

    def aligned(nbytes: int) -> torch.Tensor:
        memory = torch.zeros(nbytes + 16, dtype=torch.uint8)
        start = -memory.data_ptr() % 16
        return memory[start : start + nbytes]

    stored = aligned(fmt.nbytes(numel))
    residual = aligned(fmt.residual_nbytes(numel)) if fmt.residual_nbytes(numel) else None
    outs = [aligned(2 * numel) for _ in range(2)]
    folds = any(update.fold for update in updates)
    part = cuda_args.pack_part(
        **planes(stored, residual if folds else None, fmt, numel), rows=0, num_rows=0, numel=numel, offset=0,
        updates=given.address, num_updates=len(updates), last_fold=given.last_fold, num_lanes=2, total_rows=0,
        first_lane=0, first_block=0, end_block=1, param_id=0, distribution=noise, rounds=10, write_back=folds,
        stochastic=False,
    )  # fmt: skip
    lanes = [(1, out.data_ptr(), s, 1) for out, s in zip(outs, (scale, -scale), strict=True)]
    held = [stored, given.records, *outs, *([] if residual is None else [residual])]
    ranges = [(t.data_ptr(), t.numel()) for t in held]
    simulated.launch(kernel, cuda_args.pack_args([part], lanes), ranges, threads=cuda_args.THREADS, grid=1)
    return numel


@dataclass(frozen=True)
class Count:
    """Instructions an element of one kernel on one architecture. base: without noise and update; lanes: their noise;
    update, fold: of one update, and if it folds."""

    arch: str
    name: str
    noise: str
    base: float
    lanes: float
    update: float
    fold: float

    @property
    def total(self) -> float:
        return self.base + self.lanes + self.update + self.fold


def counts(arch: str, name: str, tools: dict[str, str], folder: Path) -> Iterator[Count]:
    """The kernels of a format."""
    fmt, ptx_file, cubin = get_format(name), folder / "kernels.ptx", folder / "kernels.cubin"
    run(
        tools["nvcc"], "-std=c++17", "-O3", "-ptx", f"-arch=compute_{arch}", "-DZO_ONE_FORMAT",
        f"-DZO_WANT_{fmt.kernel}=1", str(ROOT / "csrc" / "cuda.cu"), "-o", str(ptx_file),
    )  # fmt: skip
    ptx = ptx_file.read_text()
    ptx_file.write_text(with_lines(ptx))
    run(tools["ptxas"], f"-arch=sm_{arch}", "-O3", "-lineinfo", str(ptx_file), "-o", str(cubin))
    sass = run(tools["nvdisasm"], "-g", "-c", str(cubin))
    for noise in NOISES:
        kernel = cuda_args.pass_kernel(fmt.code, noise)
        simulated, blocks, seen = Simulated(ptx, [kernel], folder, counts=True), blocks_of(sass, kernel), list[float]()
        before = simulated.times(kernel)
        cases = [([], 0.0), ([], 0.5), ([Update(3, 0.5, fold=False)], 0.5)]
        cases += [([Update(3, 0.5)], 0.5)] if fmt.trains else []
        for updates, scale in cases:
            numel = launch(simulated, kernel, name, noise, updates, scale)
            after = simulated.times(kernel)
            times = [b - a for a, b in zip(before, after, strict=True)]
            seen.append(sum(block.instructions(times) for block in blocks) / numel)
            before = after
        base, lanes, update, fold = [*seen, seen[-1]][:4]
        yield Count(arch, name, noise, base, lanes - base, update - lanes, fold - update)


def tables(found: list[Count]) -> Iterator[str]:
    """The page's lines."""
    yield "| sm | format | noise | decode, output | the lanes' noise | an update | its fold | the pass |"
    yield "|---|---|---|---|---|---|---|---|"
    for c in found:
        parts = " | ".join(f"{x:.1f}" for x in (c.base, c.lanes, c.update, c.fold))
        yield f"| {c.arch} | {c.name} | {c.noise} | {parts} | **{c.total:.1f}** |"
    yield ""
    yield "| GPU (sm) | format | noise | of issue | of memory | of the link |"
    yield "|---|---|---|---|---|---|"
    for gpu in map(find_gpu, gpu_names()):
        for c in found:
            if gpu.capability.replace(".", "") != c.arch:
                continue
            fmt, many = get_format(c.name), 1 << 20
            streamed = fmt.nbytes(many) / many
            moved = 2 * (streamed + fmt.residual_nbytes(many) / many) + 4 if fmt.trains else streamed + 4
            limits = (gpu.instructions_per_ns / c.total, gpu.memory_gb_per_s / moved, gpu.link.gb_per_s / streamed)
            yield f"| {gpu.name} ({c.arch}) | {c.name} | {c.noise} | {' | '.join(f'{x:.1f}' for x in limits)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=["80", "89", "90", "120"])
    parser.add_argument("--formats", nargs="+", default=["bf16", "int8"])
    parser.add_argument("--tools", type=Path, help="a folder with nvdisasm somewhere in it")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tools, absent = missing(options.tools)
    if absent:
        raise SystemExit("not here: " + "; ".join(absent))
    version = run(tools["nvcc"], "--version").split("release ")[1].split(",")[0]
    found = list[Count]()
    for arch in options.archs:
        for name in options.formats:
            with tempfile.TemporaryDirectory() as folder:
                for count in counts(arch, name, tools, Path(folder)):
                    found.append(count)
                    print(count, file=sys.stderr, flush=True)
    command = f"`python -m benchmarks.sass --archs {' '.join(options.archs)} --formats {' '.join(options.formats)}`"
    head = [
        "# Instructions an element of the CUDA kernels",
        "",
        f"{command}, nvcc {version}, {commit()}. No GPU was used.",
        "",
    ]
    text = "\n".join([*head, *tables(found)]) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
