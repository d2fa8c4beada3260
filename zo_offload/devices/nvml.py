"""Device memory as the driver counts it, context and all: NVML through nvidia-ml-py, where that is installed.

torch's allocator counts its own tensors; the CUDA context, kernels and libraries' workspaces come on top (half a
gigabyte is usual). A budget that a user checks with nvidia-smi is about this number.
"""

from __future__ import annotations

import os
from typing import Any


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
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(_physical(index))
            self._nvml = pynvml
        except pynvml.NVMLError as error:
            self.reason = f"NVML: {error}"

    def device_used(self) -> int | None:
        """Bytes in use on the device by everyone."""
        if self._nvml is None:
            return None
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def process_used(self) -> int | None:
        """Bytes in use by this process. Containers and virtual machines often do not tell processes apart."""
        if self._nvml is None:
            return None
        for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
        return None


def _physical(index: int) -> int:
    """NVML counts all GPUs of the machine, CUDA those it was shown."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in shown.split(",") if name.strip()]
    return int(names[index]) if index < len(names) and names[index].isdigit() else index
