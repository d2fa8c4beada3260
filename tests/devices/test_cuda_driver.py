"""Calls of the CUDA driver: against a library with the real one's names and types, as NVIDIA's cuda.h declares them."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from support.cuda_simulated import parts_of
from zo_offload.devices import nvml as nvml_module
from zo_offload.devices.backend import TorchCuda
from zo_offload.devices.cuda import USUAL_CONTEXT_BYTES, context_bytes
from zo_offload.devices.nvml import DriverMemory
from zo_offload.formats import get_format
from zo_offload.formats.codec import planes
from zo_offload.kernels import driver as driver_module
from zo_offload.kernels.device_updates import UpdateTable
from zo_offload.kernels.driver import CudaError, Driver
from zo_offload.kernels.records import Perturbation, Update, Updates
from zo_offload.numerics import cuda_args, cuda_kernels
from zo_offload.numerics.calls import Mark
from zo_offload.numerics.fused import ready_pass
from zo_offload.numerics.noise import NoiseSpec
from zo_offload.numerics.on_gpu import OnGpu

SUPPORT = Path(__file__).resolve().parents[1] / "support"


def cuda_include() -> Path | None:
    nvcc = shutil.which("nvcc")
    places = ([Path(nvcc).resolve().parent.parent / "include"] if nvcc else []) + [Path("/usr/local/cuda/include")]
    return next((place for place in places if (place / "cuda.h").exists()), None)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    include = cuda_include()
    if include is None or shutil.which("gcc") is None:
        pytest.skip("no cuda.h or no gcc on this machine")
    out = tmp_path_factory.mktemp("libcuda") / "libcuda.so"
    d = driver_module
    numbers = {
        "ZO_PORTABLE": d.HOST_REGISTER_PORTABLE, "ZO_SM_COUNT": d.ATTRIBUTE_SM_COUNT, "ZO_MAJOR": d.ATTRIBUTE_MAJOR,
        "ZO_MINOR": d.ATTRIBUTE_MINOR, "ZO_ENGINES": d.ATTRIBUTE_ASYNC_ENGINES,
        "ZO_IMAGE_ERRORS": ",".join(map(str, d.ERRORS_OF_IMAGES)),
    }  # fmt: skip
    defined = [f"-D{name}={value}" for name, value in numbers.items()]
    source = str(SUPPORT / "fake_libcuda.c")
    command = [
        "gcc",
        "-std=c11",
        "-Wall",
        "-Werror",
        "-shared",
        "-fPIC",
        f"-I{include}",
        *defined,
        source,
        "-o",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = ctypes.CDLL(str(out))
    found.fake_log.restype = ctypes.c_char_p
    found.fake_last_params.restype = ctypes.c_void_p
    return found


@pytest.fixture
def calls(library):
    library.fake_clear()
    return lambda: library.fake_log().decode().splitlines()


def test_what_means_an_image_that_cannot_be_used(library):
    assert all(library.fake_is_image_error(code) for code in driver_module.ERRORS_OF_IMAGES)


def test_a_gpu_is_asked_for_by_its_uuid_not_by_its_number(library, monkeypatch):
    """CUDA puts the fastest first, NVML the lowest on the bus: number 0 of one is not number 0 of the other."""
    monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNvml())
    monkeypatch.setattr(nvml_module, "driver", lambda: Driver(library))
    for shown in (None, "1,0", "GPU-8a,GPU-9b"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown) if shown else monkeypatch.delenv(
            "CUDA_VISIBLE_DEVICES", False
        )
        assert DriverMemory(1)._handle == "name GPU-10111213-1415-1617-1819-1a1b1c1d1e1f"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    assert DriverMemory(1)._handle == "name MIG-2"


def test_page_locking_goes_to_torchs_context_and_leaves_the_threads_own(library, calls):
    """A pin worker has no context; a caller may be on another GPU, and stays there."""
    driver = Driver(library)
    backend = TorchCuda.__new__(TorchCuda)
    backend._driver, backend._context = driver, driver.primary_context(1)
    memory = torch.empty(4096, dtype=torch.uint8)
    driver.call("cuCtxSetCurrent", ctypes.c_void_p(0x123))
    library.fake_clear()
    backend.lock(memory)
    backend.unlock(memory.data_ptr())
    at, context = hex(memory.data_ptr()), hex(0x700000000001)
    assert calls() == [f"register {at} 4096 flags 1 context {context}", f"unregister {at} context {context}"]
    now = ctypes.c_void_p()
    driver.call("cuCtxGetCurrent", ctypes.byref(now))
    assert now.value == 0x123
    library.fake_answer(2)
    with pytest.raises(CudaError, match=r"cuMemHostRegister.*CUDA_ERROR_OUT_OF_MEMORY \(out of memory\)") as caught:
        backend.lock(memory)
    assert caught.value.code == 2


@pytest.fixture
def kernels(library, monkeypatch):
    monkeypatch.setattr(cuda_kernels.CudaKernels, "_abi", lambda self: cuda_args.ABI)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return cuda_kernels.CudaKernels(Driver(library), 0, b"\x7fELF and so on", "a test")


def test_a_context_that_is_there_is_seen(library):
    """Its size is measured by what the device has more of once it is made, so it has to be known whether it is."""
    driver = Driver(library)
    assert not driver.has_context(5)
    driver.primary_context(5)
    assert driver.has_context(5) and not driver.has_context(4)


def test_an_image_is_loaded_in_a_process_in_which_torch_has_not_used_the_gpu_yet(library, monkeypatch, calls):
    """torch leaves a thread without a context until its first tensor: the module goes to its context all the same."""
    monkeypatch.setattr(cuda_kernels.CudaKernels, "_abi", lambda self: cuda_args.ABI)
    loaded, now = [], ctypes.c_void_p(1)

    def load():
        driver = Driver(library)
        loaded.append(cuda_kernels.CudaKernels(driver, 0, b"\x7fELF", "a test"))
        driver.call("cuCtxGetCurrent", ctypes.byref(now))

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    assert loaded and "load \x7fELF" in calls()
    assert now.value is None


def test_a_launch_has_the_struct_the_grid_and_the_stream(library, kernels, calls):
    library.fake_clear()
    library.fake_params(cuda_args.ARGS_BYTES)
    stored, outs = torch.zeros(2 << 20, dtype=torch.uint8), [torch.zeros(1 << 20, dtype=torch.bfloat16)] * 2
    lanes = [(p.seed, out.data_ptr(), p.scale, 1) for p, out in zip([Perturbation(5, 0.5)] * 2, outs, strict=True)]
    call = dict(
        stored=stored.data_ptr(), rows=0, numel=1 << 20, offset=512, format=1, param_id=9, write_back=True,
        stochastic=False,
    )  # fmt: skip
    kernels.run_pass(updates=None, lanes=lanes, noise=NoiseSpec("gaussian"), stream=0x7000_1234_5678, **call)
    lines = [line for line in calls() if not line.startswith("set current")]
    assert lines[0] == "function zo_pass_bf16_gaussian of 0x710000000000"
    # 2048 warps of 512 elements, eight warps a block
    assert lines[1].startswith("launch 0x720000000000 256,1,1 x 256,1,1 shared 0 stream 0x700012345678 extra (nil)")
    part = cuda_args.pack_part(
        num_lanes=2, first_lane=0, first_block=0, end_block=256, last_fold=-1, total_rows=0, updates=0, num_updates=0,
        num_rows=0,
        distribution="gaussian", rounds=10, target_scales=False, **call,
    )  # fmt: skip
    expected = cuda_args.pack_args([part], lanes)
    assert ctypes.string_at(library.fake_last_params(), cuda_args.ARGS_BYTES) == expected


def test_an_owners_parameters_are_one_launch_whose_bytes_follow_the_visits(library, kernels, calls, monkeypatch):
    """Weight, bias and a frozen parameter of another format, visited four times: one launch a format, in order, on the
    stream, and each struct is that of the same passes packed anew. Nothing is made on the device."""
    monkeypatch.setattr(kernels, "stream", lambda: 0x7000_0000_0001)
    library.fake_params(cuda_args.ARGS_BYTES)
    table, sizes = UpdateTable(torch.device("cpu")), [(1 << 20, "bf16", 2), (2048, "bf16", 2), (512, "int8", 1)]
    passes = []
    for i, (numel, name, count) in enumerate(sizes):
        fmt, outs = get_format(name), [torch.zeros(numel, dtype=torch.bfloat16) for _ in range(count)]
        passes.append(
            ready_pass(
                torch.zeros(fmt.nbytes(numel), dtype=torch.uint8), fmt, param_id=i, numel=numel, offset=0,
                rounding="nearest", noise=NoiseSpec(), outs=outs,
                residual=None, target="values", mask=None, threads=None,
            )
        )  # fmt: skip
    ready = OnGpu(kernels).ready(passes)
    for visit in range(4):
        table.append([Update(visit, 2.0**-7, 0.5, fold=visit == 2)])
        lanes, folds = [Perturbation(100 + visit, 0.5), Perturbation(100 + visit, -0.5)], visit >= 2
        pending = [table.since(0, True), table.since(0, False), Updates()]
        library.fake_clear()
        ready.run([(u, lanes[:n], folds, False) for u, (_, _, n) in zip(pending, sizes, strict=True)], Mark())
        lines = [line for line in calls() if line.startswith("launch")]
        assert [line.split(" ")[2] for line in lines] == ["257,1,1", "1,1,1"]
        assert all("stream 0x700000000001 " in line for line in lines)
        told = ctypes.string_at(library.fake_last_params(), cuda_args.ARGS_BYTES)  # of the second launch
        assert parts_of(told)[0][1] == [(100 + visit, passes[2].outs[0].data_ptr(), 0.5, 1)]
        parts = [
            cuda_args.pack_part(
                **planes(call.stored, None, call.fmt, call.numel), rows=0, num_rows=0, numel=call.numel, offset=0,
                updates=updates.address, num_updates=visit + 1, last_fold=2 if folds else -1, num_lanes=2, total_rows=0,
                first_lane=2 * i, first_block=(0, 256)[i], end_block=(256, 257)[i], param_id=i,
                distribution="gaussian", rounds=10, write_back=folds, stochastic=False,
            )
            for i, (call, updates) in enumerate(zip(passes[:2], pending[:2], strict=True))
        ]  # fmt: skip
        pairs = [pair for call in passes[:2] for pair in zip(lanes, call.outs, strict=True)]
        listed = [(p.seed, out.data_ptr(), p.scale, 1) for p, out in pairs]
        assert bytes(ready._launches[0].params.args) == cuda_args.pack_args(parts, listed)
    functions = [line for line in calls() if line.startswith("function")]
    assert functions == []  # found once, at the first visit


def test_a_grid_has_a_limit_and_default_stream_is_null(library, kernels, calls):
    library.fake_clear()
    library.fake_params(cuda_args.NOISE_BYTES)
    kernels.noise(0x1000, "rademacher", 7, 1, 2, 1 << 40, 0, 0)
    assert calls()[-1].startswith(
        f"launch 0x720000000000 {132 * cuda_kernels._WAVES},1,1 x 256,1,1 shared 0 stream (nil)"
    )


def test_a_thread_without_a_context_gets_torchs(library, kernels, calls):
    library.fake_params(cuda_args.NOISE_BYTES)
    library.fake_clear()

    def work():
        for _ in range(2):
            kernels.noise(0x1000, "gaussian", 10, 1, 2, 8, 0, 0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    lines = calls()
    assert lines.count("set current 0x700000000000") == 1
    assert all(line.endswith("context 0x700000000000") for line in lines if line.startswith("launch"))


def test_a_kernel_is_launched_on_its_own_gpu(library, kernels, monkeypatch):
    library.fake_params(cuda_args.NOISE_BYTES)
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda index: entered.append(index) or contextlib.nullcontext())
    kernels.noise(0x1000, "gaussian", 10, 1, 2, 8, 0, 0)
    assert entered == [0]


def test_an_image_of_other_sources_is_refused(library, monkeypatch):
    monkeypatch.setattr(cuda_kernels.CudaKernels, "_abi", lambda self: 7)
    with pytest.raises(CudaError, match=r"a test was built from other sources \(interface 0x7.*build_ext") as caught:
        cuda_kernels.CudaKernels(Driver(library), 0, b"\x7fELF", "a test")
    assert caught.value.code == 0


def images(arch, only=None, say=None):
    """NVRTC's, a part at a time."""
    return b"\x7fELF", f"compiled for {arch}"


def test_a_stale_image_leaves_nvrtc(library, monkeypatch, tmp_path, caplog):
    """The package was updated and not rebuilt: NVRTC can compile the sources that are there."""
    image = tmp_path / "image.fatbin"
    image.write_bytes(b"P\xed\x55\xba")
    monkeypatch.delenv("ZO_CUDA", raising=False)
    monkeypatch.setattr(cuda_kernels, "IMAGE", image)
    monkeypatch.setattr(cuda_kernels, "driver", lambda: Driver(library))
    monkeypatch.setattr(cuda_kernels.nvrtc, "compiled", images)
    monkeypatch.setattr(
        cuda_kernels.CudaKernels, "_abi", lambda self: 7 if self.source == image.name else cuda_args.ABI
    )
    assert cuda_kernels._open(0).source == "compiled for sm_99"
    assert "was built from other sources" in caplog.text and "NVRTC compiles" in caplog.text

    def absent(self):
        if self.source == image.name:
            raise CudaError("kernel zo_cuda_abi: the CUDA driver says CUDA_ERROR_NOT_FOUND", 500)
        return cuda_args.ABI

    monkeypatch.setattr(cuda_kernels.CudaKernels, "_abi", absent)
    assert cuda_kernels._open(0).source == "compiled for sm_99"


def test_nvrtc_compiles_a_format_when_it_is_first_used(library, monkeypatch, tmp_path, calls):
    asked = []
    monkeypatch.delenv("ZO_CUDA", raising=False)
    monkeypatch.setattr(cuda_kernels, "IMAGE", tmp_path / "none")
    monkeypatch.setattr(cuda_kernels, "driver", lambda: Driver(library))
    monkeypatch.setattr(
        cuda_kernels.nvrtc, "compiled", lambda arch, only=None, say=None: asked.append(only) or images(arch)
    )
    monkeypatch.setattr(cuda_kernels.CudaKernels, "_abi", lambda self: cuda_args.ABI)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    found = cuda_kernels._open(0)
    assert set(asked) == {"", "fp32", "bf16", "fp16"}
    for _ in range(2):
        found._function("zo_pass_int8_gaussian"), found._function("zo_scales_int8_gaussian")
    assert asked.count("int8") == 1 and "function zo_scales_int8_gaussian of 0x710000000000" in calls()


@pytest.mark.parametrize("code, falls_back", [(209, True), (222, True), (200, True), (2, False)])
def test_an_image_that_the_driver_does_not_take_leaves_nvrtc(library, monkeypatch, tmp_path, code, falls_back):
    image = tmp_path / "image.fatbin"
    image.write_bytes(b"P\xed\x55\xba")
    monkeypatch.delenv("ZO_CUDA", raising=False)
    monkeypatch.setattr(cuda_kernels, "IMAGE", image)
    monkeypatch.setattr(cuda_kernels, "driver", lambda: Driver(library))
    monkeypatch.setattr(cuda_kernels.nvrtc, "compiled", images)
    monkeypatch.setattr(cuda_kernels.CudaKernels, "_abi", lambda self: cuda_args.ABI)
    library.fake_answer(code)
    if falls_back:
        assert cuda_kernels._open(0).source == "compiled for sm_99"
    else:
        with pytest.raises(CudaError, match="OUT_OF_MEMORY"):
            cuda_kernels._open(0)


class Told(DriverMemory):
    """NVML that tells these two numbers."""

    def __init__(self, device, process):
        self.device_used, self.process_used = lambda: device, lambda: process


@pytest.mark.parametrize("device, process, before, expected", [
    (9000, 700, 100, 600),  # of the process itself, less torch's tensors
    (9000, None, 8000, 900),  # processes are not told apart: what the device has more of
    (9000, None, None, USUAL_CONTEXT_BYTES),  # the context was there before: nothing to compare with
    (None, None, None, USUAL_CONTEXT_BYTES),  # no NVML
])  # fmt: skip
def test_where_the_contexts_size_comes_from(device, process, before, expected):
    assert context_bytes(Told(device, process), before, 100) == expected


class FakeNvml:
    """pynvml, in a container that tells no processes and refuses MIG."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByIndex(self, index):
        return f"index {index}"

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return f"name {uuid}"

    def nvmlDeviceGetMemoryInfo(self, handle):
        return type("Info", (), {"used": 5 << 30})

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        raise self.NVMLError("Not Supported")

    nvmlDeviceGetMigMode = nvmlDeviceGetCurrPcieLinkGeneration = nvmlDeviceGetComputeRunningProcesses

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle):
        return 16


@pytest.mark.parametrize("shown, handle", [
    (None, "index 0"), ("3,1", "index 3"), ("GPU-8a,GPU-9b", "name GPU-8a"), ("MIG-7c", "name MIG-7c"),
])  # fmt: skip
def test_nvml_that_tells_half(monkeypatch, shown, handle):
    monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown) if shown else monkeypatch.delenv("CUDA_VISIBLE_DEVICES", False)
    memory = DriverMemory(0)
    assert memory._handle == handle
    assert memory.device_used() == 5 << 30 and memory.process_used() is None
    assert "Not Supported" in memory.reason
    told = memory.describe()
    assert told["pcie_width"] == 16 and told["mig"] is None and told["pids_seen"] is None
