"""Devices: memory, streams and events behind one small interface. The CPU is a real one, not a mock.

A device gives
    alloc(nbytes)         a uint8 tensor of exactly nbytes in the memory where blocks are computed with
    stream(name, ...)     an ordered queue; `submit(fn, after, event)` runs fn once the events in `after` are done
    Event                 done or not; waiting on it raises what its op raised
    mark()                an event behind all that was computed so far
    later(values)         scalars for the host to read when it wants to
    wrap(tier)            the tier as the device's streams need it
On the CPU streams are worker threads; on CUDA they are CUDA streams with a worker each that enqueues (`cuda.py`).
"""

from .cpu import CpuDevice, Event, Later, Stream
from .cuda import cuda_device

__all__ = ["CpuDevice", "Event", "Later", "Stream", "make_device"]


def make_device(name: str) -> CpuDevice:
    """The device of `EngineConfig.device`: "cpu", "cuda" or "cuda:1". ConfigError if it is not there."""
    if name == "cpu":
        return CpuDevice()
    return cuda_device(name)
