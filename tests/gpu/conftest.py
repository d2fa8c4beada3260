"""These tests need a GPU. Without one each is skipped with the reason, and none of them has been run on one yet.

ZO_GPU_TESTS_ON=cpu rehearses them: the same test code, with the CPU's kernels and a device whose streams are delayed
threads (`fake_cuda.py`) where the GPU would be. It finds mistakes in the tests, and says nothing about a GPU.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

REHEARSAL = os.environ.get("ZO_GPU_TESTS_ON") == "cpu"


def reason() -> str:
    """Why the GPU tests cannot run here; "" if they can."""
    if REHEARSAL:
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return ""


def pytest_collection_modifyitems(items):
    why = reason()
    for item in items:
        if "/gpu/" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            if why:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def gpu() -> str:
    """Where the tensors of these tests are."""
    return "cpu" if REHEARSAL else "cuda"


@pytest.fixture(autouse=True)
def rehearsal(monkeypatch):
    """Puts stand-ins in the place of what is on a GPU."""
    if not REHEARSAL:
        return
    from support.cuda_simulated import CpuKernels
    from support.fake_cuda import FakeBackend, FakeCudaDevice
    from zo_offload.devices import CpuDevice
    from zo_offload.numerics import cuda_kernels

    def make_device(name):
        return CpuDevice() if name == "cpu" else FakeCudaDevice(FakeBackend(longest_s=2e-4))

    if importlib.util.find_spec("greenlet"):  # tests of kernels do without
        import zo_offload.run.opening

        monkeypatch.setattr(zo_offload.run.opening, "make_device", make_device)
    monkeypatch.setattr(cuda_kernels, "kernels", lambda device: CpuKernels())
    monkeypatch.setattr(cuda_kernels, "_open", lambda device: CpuKernels())
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
