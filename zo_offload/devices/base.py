"""What a device has to answer. `CpuDevice` and `CudaDevice` do; a third one is a class with these methods, and a name
in `make_device`.

A device is memory, streams and events. It says where blocks are computed with and what that memory takes, it gives
ordered queues for fetches and flushes, and it says when something is done. Kernels are chosen by where the stored bytes
are (`fused.kernels_for`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..tiers import Tier
from .link import Link
from .streams import Event, Later, Stream


class PlannedDevice(Protocol):
    """What a plan asks of a device; one that is not there can answer it (`report.py`)."""

    @property
    def kind(self) -> str:
        """Its name in settings and to torch: "cpu", "cuda"."""

    @property
    def own_memory(self) -> bool:
        """Blocks are computed with in memory of its own, beside the host's, where blocks can live too."""

    def default_compute(self, own: torch.dtype) -> torch.dtype:
        """The dtype of forwards where none is asked for, of a checkpoint in `own`."""

    def free_bytes(self) -> int:
        """What can still be allocated on it."""

    def budget(self, asked: int | None, *, chosen: bool = False) -> int | None:
        """What blocks, scratch and activations may take of `device_memory`; None: as little as works.

        chosen: the caller has chosen the window, so that nothing is to be decided for it.
        """


class Device(PlannedDevice, Protocol):
    """What a run asks of a device."""

    @property
    def torch_device(self) -> torch.device:
        """Where the model computes."""

    @property
    def late(self) -> bool:
        """Losses stay on the device and the host reads them a step late."""

    @property
    def context_bytes(self) -> int:
        """Device memory of this process beside torch's tensors."""

    def alloc(self, nbytes: int) -> Tensor:
        """A uint8 tensor of exactly nbytes, not initialised, where blocks are computed with."""

    def host_alloc(self, nbytes: int) -> Tensor:
        """Memory for blocks that live on the host."""

    def wrap(self, tier: Tier, offload: str, block_bytes: Sequence[int], streamed: Sequence[int], pin: str) -> Tier:
        """The tier as this device's streams need it. streamed: blocks that come and go at every step, in the order of
        their visits; the others are in the window for good. pin: `EngineConfig.host_memory`."""

    def stream(self, name: str, threads: int) -> Stream:
        """An ordered queue: `submit(fn, after, event)` runs fn once the events in `after` are done."""

    def event(self) -> Event:
        """One that whoever runs its op will set; waiting on it raises what the op raised."""

    def mark(self) -> Event:
        """Done once all that was computed so far is."""

    def later(self, values: Tensor) -> Later:
        """values (float64) for the host to read when it wants to."""

    def upload(self, tensor: Tensor) -> Tensor:
        """A host tensor where the model computes, enqueued behind what was computed so far."""

    def synchronize(self) -> None:
        """Wait until all that was computed so far is done."""

    def trim(self) -> None:
        """Give back memory that an allocator keeps though nothing uses it."""

    def measure_link(self) -> Link | None:
        """How fast blocks come and go, where they do over a link of the device's own."""
