"""Device memory by the driver's count, context included: NVML through nvidia-ml-py, if that is installed.

torch's allocator counts only its own tensors, not the CUDA context, kernels and libraries' workspaces (usually half a
gigabyte). A user who checks a budget with nvidia-smi sees the driver's count.

NVML counts memory by process only if it has the same process ids as we: in containers it often has not, and virtual
machines may hide them. The nearest number is then the growth of the whole device's count, if nothing else uses the GPU
at that time.
"""

from __future__ import annotations

import os
from typing import Any

from ..kernels.driver import CudaError, driver


class DriverMemory:
    """Memory of one GPU. Every method returns None if NVML cannot tell; `reason` tells why."""

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
        """An NVML function's answer about the GPU, or None: some do not work with some drivers, containers and MIG."""
        if self._nvml is None:
            return None
        try:
            return getattr(self._nvml, question)(self._handle, *arguments)
        except self._nvml.NVMLError as error:
            self.reason = f"{question}: {error}"
            return None

    def device_used(self) -> int | None:
        """Bytes in use on the device by all processes and the driver."""
        info = self._ask("nvmlDeviceGetMemoryInfo")
        return None if info is None else int(info.used)

    def process_used(self) -> int | None:
        """Bytes in use by this process, if the driver lists it by the id that we know."""
        for process in self._ask("nvmlDeviceGetComputeRunningProcesses") or ():
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
        return None

    def describe(self) -> dict[str, Any]:
        """NVML's facts about the GPU and its processes; None for facts that it does not tell."""
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
    """NVML numbers all GPUs of the machine by their position on the bus; CUDA only those in CUDA_VISIBLE_DEVICES, the
    fastest first. So a GPU is found by its UUID, from the driver."""
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
