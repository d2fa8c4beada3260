"""Devices: memory, streams and events behind one interface, `base.Device`. The CPU is a real device, not a mock.

On the CPU streams are worker threads; on CUDA they are CUDA streams with a worker each that enqueues (`cuda.py`).
"""

from .base import Device, PlannedDevice
from .cpu import CpuDevice
from .cuda import cuda_device
from .streams import Event, Later, Stream

__all__ = ["CpuDevice", "Device", "Event", "Later", "PlannedDevice", "Stream", "make_device"]


def make_device(name: str) -> Device:
    """The device of `EngineConfig.device`: "cpu", "cuda" or "cuda:1". ConfigError if it does not exist."""
    return CpuDevice() if name == "cpu" else cuda_device(name)
