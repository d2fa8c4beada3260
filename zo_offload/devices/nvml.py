"""Device memory as the driver counts it, context and all: NVML through nvidia-ml-py, where that is installed.

torch's allocator counts its own tensors; the CUDA context, kernels and libraries' workspaces come on top (half a
gigabyte is usual). A budget that a user checks with nvidia-smi is about this number.

NVML counts a device's memory by process only where process ids mean the same to it and to us: in containers they
often do not, in virtual machines they may be hidden. Then what the whole device has more of than before is the nearest
there is; nothing else may use the GPU at the time.
"""

from __future__ import annotations

import os
from typing import Any

from ..kernels.driver import CudaError, driver


class DriverMemory:
    """Memory of one GPU. Every method gives None where NVML cannot say; `reason` tells why."""

    def __init__(self, index: int) -> None:
        self.reason = ""
        self._nvml: Any = None
        try:
            import pynvml
        except ImportError:
            self.reason = "nvidia-ml-py is not installed"
            return
        try:
            pynvml.nvmlInit()
            self._handle = _handle(pynvml, index)
            self._nvml = pynvml
        except pynvml.NVMLError as error:
            self.reason = f"NVML: {error}"

    def _ask(self, question: str, *arguments: Any) -> Any:
        """An NVML function's answer about the GPU, or None: which of them work depends on driver, container and MIG."""
        if self._nvml is None:
            return None
        try:
            return getattr(self._nvml, question)(self._handle, *arguments)
        except self._nvml.NVMLError as error:
            self.reason = f"{question}: {error}"
            return None

    def device_used(self) -> int | None:
        """Bytes in use on the device by everyone, the driver's own included."""
        info = self._ask("nvmlDeviceGetMemoryInfo")
        return None if info is None else int(info.used)

    def process_used(self) -> int | None:
        """Bytes in use by this process, where the driver tells processes apart by ids that are ours."""
        for process in self._ask("nvmlDeviceGetComputeRunningProcesses") or ():
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
        return None

    def describe(self) -> dict[str, Any]:
        """What NVML tells of the GPU and of who uses it; None for what it does not."""
        running = self._ask("nvmlDeviceGetComputeRunningProcesses")
        mig = self._ask("nvmlDeviceGetMigMode")
        return {
            "nvml": self.reason if self._nvml is None else "works",
            "device_used": self.device_used(),
            "process_used": self.process_used(),
            "pid": os.getpid(),
            "pids_seen": None if running is None else [process.pid for process in running],
            "mig": None if mig is None else bool(mig[0]),
            "pcie_generation": self._ask("nvmlDeviceGetCurrPcieLinkGeneration"),
            "pcie_width": self._ask("nvmlDeviceGetCurrPcieLinkWidth"),
        }


def _handle(nvml: Any, index: int) -> Any:
    """NVML counts all GPUs of the machine by their place on the bus; CUDA those that CUDA_VISIBLE_DEVICES shows, and
    the fastest first. So a GPU is asked for by its UUID, which the driver tells."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in shown.split(",") if name.strip()]
    if index < len(names) and names[index].startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(names[index])
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{driver().uuid(index)}")
    except (CudaError, AttributeError):  # a driver before 11.4 has no such call
        pass
    name = names[index] if index < len(names) else str(index)
    return nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
