"""The CUDA kernels on this CPU: the compiler's PTX as C, behind the interface of `cuda_kernels.CudaKernels`."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path

import torch

from zo_offload.kernels import native, nvrtc
from zo_offload.kernels.distributions import all_kinds
from zo_offload.kernels.driver import CudaError, Params
from zo_offload.kernels.records import LANE, MASKS, UPDATE
from zo_offload.numerics import cuda_args, cuda_kernels

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

    where = "cpu"

    def __init__(self, simulated: Simulated, *, grid: int = 3) -> None:
        self.device, self.source, self.most_blocks = 0, "PTX as C", grid
        self._simulated = simulated
        self.touch: list[torch.Tensor] | None = []
        self.launches = 0

    def stream(self) -> int:
        return 0

    def launch(self, name: str, params: Params, blocks: int, stream: int) -> None:
        self.launches += 1
        ranges = [(0, 1 << 63)]
        if self.touch is not None:
            ranges = [(t.data_ptr(), t.numel() * t.element_size()) for t in self.touch]
        self._simulated.launch(name, bytes(params.args), ranges, threads=cuda_args.THREADS, grid=blocks)


class CpuKernels(cuda_kernels.CudaKernels):
    """The kernels' launches, read byte by byte from their structs and computed by the CPU library.

    `launches`: the name of each. A struct that does not describe itself rightly is an AssertionError.
    """

    device, where, most_blocks = 0, "cpu", 2112
    elsewhere = 0
    """Added to all addresses."""

    def __init__(self) -> None:
        self.launches: list[str] = []

    @property
    def source(self) -> str:  # type: ignore[override]
        return cuda_kernels.IMAGE.name if os.environ.get("ZO_CUDA") != "nvrtc" else "NVRTC"

    def stream(self) -> int:
        return 0

    def launch(self, name: str, params: Params, blocks: int, stream: int) -> None:
        self.launches.append(name)
        assert len(params.args) == cuda_args.ARGS_BYTES, f"{name} is no fused pass: the CPU's library is asked directly"
        first = 0
        for part, lanes in parts_of(bytes(params.args)):
            assert part["first_block"] == first < part["end_block"] <= blocks and part["format"] in cuda_args.KERNELS
            first = part["end_block"]
            kind = next(kind.name for kind in all_kinds() if kind.code == part["distribution"])
            assert name == cuda_args.pass_kernel(part["format"], kind, bool(part["flags"] & _TARGET_SCALES))
            self._compute(part, lanes)
        assert first == blocks

    def _compute(self, part: dict[str, int], lanes: list[tuple[int, int, float, int]]) -> None:
        """One part of a launch."""
        library = native.library()
        assert library is not None
        here = dict(part)
        for field in ("stored", "scales", "minima", "residual", "rows", "updates", "terms"):
            here[field] -= self.elsewhere if here[field] else 0
        if here["mask"] == MASKS["listed"]:
            here["mask_seed"] -= self.elsewhere
        updates = UPDATE.iter_unpack(_bytes_at(here["updates"], UPDATE.size * here["num_updates"]))
        assert here["last_fold"] == max((k for k, (*_, flags, _) in enumerate(updates) if flags & 1), default=-1)
        listed = b"".join(LANE.pack(seed, out - self.elsewhere, scale, code) for seed, out, scale, code in lanes)
        held = ctypes.create_string_buffer(listed, max(1, len(listed)))
        here["lanes"] = ctypes.addressof(held)
        packed = struct.pack(_PASS, *(here[field] for field in PASS_FIELDS))
        assert library._pass(packed, library._isa_code, 1) == 0

    def noise(self, out, distribution, rounds, seed, param_id, numel, offset, stream) -> None:
        library = native.library()
        assert library is not None
        library.noise(out, distribution, rounds, seed, param_id, numel, offset, 1)

    def gaussian_table(self, out, stream) -> None:
        library = native.library()
        assert library is not None
        library.gaussian_table(out)


_PASS = "<13Q14I"
PASS_FIELDS = (
    "stored scales minima residual rows updates terms lanes numel offset num_rows total mask_seed num_updates "
    "num_lanes format group param_id distribution rounds flags mask mask_limit num_terms across rank columns"
).split()
"""struct zo_pass of csrc/api.h."""
_TAIL_FIELDS = ["total_rows", "last_fold", "first_lane", "first_block", "end_block"]
_TARGET_SCALES = 4


def parts_of(args: bytes) -> list[tuple[dict[str, int], list[tuple[int, int, float, int]]]]:
    """The parts of a launch, and the lanes of each, from the bytes of struct zo_cuda_args."""
    lanes = list(LANE.iter_unpack(args[cuda_args.LANES_AT :]))
    found = []
    for values in struct.iter_unpack(f"{_PASS}QiIII", args[: cuda_args.LANES_AT]):
        part = dict(zip([*PASS_FIELDS, *_TAIL_FIELDS], values, strict=True))
        if part["end_block"] == 0xFFFFFFFF:
            break
        assert part["lanes"] == 0
        found.append((part, lanes[part["first_lane"] : part["first_lane"] + part["num_lanes"]]))
    return found


def _bytes_at(address: int, nbytes: int) -> bytes:
    return ctypes.string_at(address, nbytes) if nbytes else b""
