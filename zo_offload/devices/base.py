"""The interface of devices, implemented by `CpuDevice` and `CudaDevice`; a third one needs these methods and a name in
`make_device`.

A device is memory, streams and events. It provides the memory in which blocks are computed, ordered queues for fetches
and flushes, and events for completion. Kernels are chosen by the device of the stored bytes (`fused.kernels_for`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from ..tiers import Tier
from .link import Link
from .streams import Event, Later, Stream


class PlannedDevice(Protocol):
    """The part of the interface that plans use; a device that is not present can provide it (`cli/hardware.py`)."""

    @property
    def kind(self) -> str:
        """Its name in settings and to torch: "cpu", "cuda"."""

    @property
    def own_memory(self) -> bool:
        """Whether the device computes in its own memory, separate from the host's, where blocks can live too."""

    def default_compute(self, own: torch.dtype) -> torch.dtype:
        """The default dtype of forwards, for a checkpoint in `own`."""

    def free_bytes(self) -> int:
        """Bytes that can still be allocated on it."""

    def budget(self, asked: int | None, *, chosen: bool = False) -> int | None:
        """The part of `device_memory` for blocks, scratch and activations; None: as little as works.

        chosen: the caller has chosen the window, so no default is decided.
        """


class Device(PlannedDevice, Protocol):
    """The part of the interface that runs use."""

    @property
    def torch_device(self) -> torch.device:
        """The torch device of the model's computation."""

    @property
    def late(self) -> bool:
        """Losses stay on the device and the host reads them a step late."""

    @property
    def context_bytes(self) -> int:
        """Device memory of this process besides torch's tensors."""

    def alloc(self, nbytes: int) -> Tensor:
        """A uint8 tensor of exactly nbytes, not initialised, in the memory in which blocks are computed."""

    def host_alloc(self, nbytes: int) -> Tensor:
        """Memory for blocks that live on the host."""

    def wrap(self, tier: Tier, offload: str, block_bytes: Sequence[int], streamed: Sequence[int], pin: str) -> Tier:
        """The tier, adapted to this device's streams. streamed: blocks that are fetched at every step, in the order of
        their visits; the others stay in the window. pin: `EngineConfig.host_memory`."""

    def stream(self, name: str, threads: int) -> Stream:
        """An ordered queue: `submit(fn, after, event)` runs fn once the events in `after` are done."""

    def event(self) -> Event:
        """An event that the runner of its op will set; waiting on it raises the op's error."""

    def mark(self) -> Event:
        """An event that is done once all computation so far is done."""

    def later(self, values: Tensor) -> Later:
        """values (float64), for the host to read later."""

    def upload(self, tensor: Tensor) -> Tensor:
        """Copy a host tensor to the compute device, enqueued after all computation so far."""

    def entered(self) -> AbstractContextManager[object]:
        """Inside, it is torch's current device in the calling thread: launches then need no switch of their own."""

    def synchronize(self) -> None:
        """Wait until all computation so far is done."""

    def trim(self) -> None:
        """Release unused memory that an allocator keeps."""

    def tidy(self, streams: bool) -> None:
        """`trim`, if what an allocator keeps has grown beyond what a plan leaves room for. After each visit where
        blocks stream from files, else after each pass."""

    def measure_link(self) -> Link | None:
        """Measure the speed of fetches and flushes, if the device has a link of its own."""
