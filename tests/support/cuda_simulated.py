"""The CUDA kernels on this CPU: the compiler's PTX as C, behind the interface of `cuda_kernels.CudaKernels`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import torch

from zo_offload.kernels import native, nvrtc
from zo_offload.kernels.driver import CudaError
from zo_offload.kernels.records import LANE, UPDATE
from zo_offload.numerics import cuda_kernels

from .ptx_to_c import Simulated

ROOT = Path(__file__).resolve().parent.parent.parent


def compilers() -> dict[str, str]:
    """Name -> why it cannot be used here ("" if it can)."""
    library = nvrtc.find_library()
    if library is None:
        reason = "no NVRTC on this machine (torch's CUDA wheels bring it, or set ZO_NVRTC)"
    else:
        try:
            nvrtc.Nvrtc(library)
            reason = ""
        except CudaError as error:
            reason = str(error)
    nvcc = "" if shutil.which("nvcc") else "no nvcc on this machine"
    if shutil.which("gcc") is None:
        return dict.fromkeys(("nvcc", "nvrtc"), "no gcc on this machine")
    return {"nvcc": nvcc, "nvrtc": reason}


def make_ptx(compiler: str, folder: Path, arch: str = "compute_90") -> str:
    """PTX of csrc/cuda.cu."""
    if compiler == "nvrtc":
        path = nvrtc.find_library()
        assert path is not None
        return nvrtc.Nvrtc(path).compile(nvrtc.read_sources(), arch).rstrip(b"\0").decode()
    out = folder / "cuda.ptx"
    command = ["nvcc", "-std=c++17", "-ptx", f"-arch={arch}", str(ROOT / "csrc" / "cuda.cu"), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return out.read_text()


class SimulatedKernels(cuda_kernels.CudaKernels):
    """Launches run at once, on host memory. `touch` names the memory a launch may access; None: any."""

    def __init__(self, simulated: Simulated, *, grid: int = 3) -> None:
        self.device, self.source = 0, "PTX as C"
        self._simulated, self._grid = simulated, grid
        self.touch: list[torch.Tensor] | None = []
        self.launches = 0

    where = "cpu"

    def stream(self) -> int:
        return 0

    def _launch(self, name: str, args: bytes, warps: int, stream: int) -> None:
        self.launches += 1
        ranges = [(0, 1 << 63)]
        if self.touch is not None:
            ranges = [(t.data_ptr(), t.numel() * t.element_size()) for t in self.touch]
        self._simulated.launch(name, args, ranges, threads=cuda_kernels.THREADS, grid=min(self._grid, warps))


class CpuKernels:
    """What tests ask of `CudaKernels`, answered by the CPU library: to rehearse tests that need a GPU."""

    device, where = 0, "cpu"

    @property
    def source(self) -> str:
        return cuda_kernels.IMAGE.name if os.environ.get("ZO_CUDA") != "nvrtc" else "NVRTC"

    def stream(self) -> int:
        return 0

    def noise(self, out, distribution, rounds, seed, param_id, numel, offset, stream) -> None:
        library = native.library()
        assert library is not None
        library.noise(out, distribution, rounds, seed, param_id, numel, offset, 1)

    def gaussian_table(self, out, stream) -> None:
        library = native.library()
        assert library is not None
        library.gaussian_table(out)

    def run_pass(self, *, updates, lanes, noise, stream, terms=None, **call) -> None:
        library = native.library()
        assert library is not None
        listed = [] if updates is None else updates.read()
        sums = b"" if terms is None else terms.numpy().tobytes()
        tail = [u.packed for u in listed] + [sums] + [LANE.pack(*lane) for lane in lanes]
        library.run_pass(
            num_updates=len(listed), num_terms=len(sums) // UPDATE.size, num_lanes=len(lanes),
            distribution=noise.kind.name, rounds=noise.rounds,
            tail=b"".join(tail), threads=1, num_rows=0, **call,
        )  # fmt: skip
