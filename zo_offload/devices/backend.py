"""The functions of CUDA that are used (`Backend`), and their implementation. `cuda.py` and `staging.py` use no others,
so that the tests can run them with a backend that delays, reorders and checks (tests/support/fake_cuda.py)."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.driver import driver


class Backend(Protocol):
    """The functions of CUDA that are used. stream None: the calling thread's current one, where the model computes."""

    @property
    def device(self) -> torch.device:
        """The device on which torch computes."""

    def entered(self) -> contextlib.AbstractContextManager[Any]: ...
    def make_stream(self) -> Any: ...
    def make_event(self) -> Any: ...
    def record(self, event: Any, stream: Any) -> None: ...
    def wait(self, stream: Any, event: Any) -> None: ...
    def done(self, event: Any) -> bool: ...
    def synchronize(self, event: Any) -> None: ...
    def drain(self, stream: Any) -> None: ...
    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]: ...
    def copy(self, to: Tensor, source: Tensor) -> None: ...
    def is_device(self, tensor: Tensor) -> bool: ...
    def empty(self, nbytes: int) -> Tensor: ...
    def staging(self, nbytes: int) -> Tensor: ...
    def lock(self, memory: Tensor) -> None: ...
    def unlock(self, address: int) -> None: ...
    def memory(self) -> tuple[int, int]: ...
    def has_bf16(self) -> bool: ...
    def trim(self) -> None: ...


class TorchCuda:
    """torch.cuda, and the driver for functions that torch does not offer."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        torch.zeros(1, device=self.device)  # makes the context
        self._driver = driver()
        self._context = self._driver.primary_context(index)

    def entered(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.device(self.device)

    def make_stream(self) -> Any:
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def make_event(self) -> Any:
        # blocking: a waiting host thread sleeps, instead of taking a core from threads that copy
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def record(self, event: Any, stream: Any) -> None:
        event.record(stream if stream is not None else torch.cuda.current_stream(self.device))

    def wait(self, stream: Any, event: Any) -> None:
        (stream if stream is not None else torch.cuda.current_stream(self.device)).wait_event(event)

    def done(self, event: Any) -> bool:
        return bool(event.query())

    def synchronize(self, event: Any) -> None:
        event.synchronize()

    def drain(self, stream: Any) -> None:
        # by an event, with which the thread sleeps: synchronising a stream spins on a core
        event = self.make_event()
        self.record(event, stream)
        event.synchronize()

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        if stream is None:
            return contextlib.nullcontext()
        return torch.cuda.stream(stream)

    def copy(self, to: Tensor, source: Tensor) -> None:
        # cudaMemcpyAsync on the current stream, for any host memory (ATen/native/cuda/Copy.cu): the driver knows which
        # memory is page-locked. For other memory, it returns once the bytes are staged.
        to.copy_(source, non_blocking=True)

    def is_device(self, tensor: Tensor) -> bool:
        return tensor.is_cuda

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def staging(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def lock(self, memory: Tensor) -> None:
        with self._driver.current(self._context):
            self._driver.lock_host(memory.data_ptr(), memory.numel())

    def unlock(self, address: int) -> None:
        with self._driver.current(self._context):
            self._driver.unlock_host(address)

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device, by the driver's count."""
        free, total = torch.cuda.mem_get_info(self.device)
        return int(free), int(total)

    def has_bf16(self) -> bool:
        """Whether its matrix units take bfloat16: from compute capability 8 on."""
        return torch.cuda.get_device_capability(self.device)[0] >= 8

    def trim(self) -> None:
        torch.cuda.empty_cache()
        # torch's cache of page-locked memory; its only name in torch 2.9 to 2.13
        getattr(torch._C, "_host_emptyCache", lambda: None)()
