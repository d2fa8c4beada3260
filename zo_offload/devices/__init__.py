"""Devices: memory, streams and events behind one small interface. The CPU is a real one, not a mock.

A device gives
    alloc(nbytes)         a uint8 tensor of exactly nbytes in the memory where blocks are computed with
    stream(name, ...)     an ordered queue; `submit(fn, after, event)` runs fn once the events in `after` are done
    Event                 done or not; waiting on it raises what its op raised
On the CPU streams are worker threads; on CUDA they are CUDA streams (not built yet, see the README's status table).
"""

from .cpu import CpuDevice, Event, Stream

__all__ = ["CpuDevice", "Event", "Stream"]
