"""Tensors that say they are on a GPU, on a machine without one: `fake_cuda.py` has the streams, here is the memory.

A `GpuTensor` has a real storage in host memory, so addresses, views and `Parameter.data =` work as on a GPU, but its
device is cuda:0 and every op on it comes through Python. There
    an op on tensors of both sides raises, as on a GPU (`MixedDevices`)
    an op that would stop the host until the GPU has caught up is noted in `Gpu.waits`, with the line that asked for it
    memory comes with rubbish in it
The numbers are those of the CPU's kernels: a run here must equal the same run on the CPU bit for bit.

What waits was looked up in torch's sources: a copy that is not non_blocking, or whose host side is not pinned
(ATen/native/cuda/Copy.cu); what reads a value or has a shape that depends on values (item, nonzero, unique, masks as
indices); indices that are on the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .cuda_simulated import CpuKernels
from .fake_cuda import FakeBackend, FakeCudaDevice

# torch notes at its first `with torch.device(...)` which functions make tensors. If that is while the stand-in's are in
# their places, the real ones are not known to it for the rest of the process, and models meant for meta become real.
_device_constructors()


DEVICE = torch.device("cuda", 0)
ELSEWHERE = 1 << 62  # added to addresses of device memory: a host's read or write there fails at once
aten, prim = torch.ops.aten, torch.ops.prim

# besides copies: what gives the host a value, or a shape that it has to know
WAITS = frozenset(
    "_local_scalar_dense equal nonzero masked_select is_nonzero _unique _unique2 unique_dim unique_consecutive "
    "repeat_interleave bincount".split()
)
COPIES = frozenset({"copy_", "_to_copy", "_copy_from"})
FREE_OF_DEVICES = frozenset(
    {"set_data", "_has_compatible_shallow_copy_type", "is_pinned", "_pin_memory", "result_type"}
)


class MixedDevices(RuntimeError):
    """An op was given tensors of the host and of the GPU."""


class GpuTensor(torch.Tensor):
    """A tensor in "device" memory; `wrap` makes one, `unwrap` gives the host's view of the same bytes."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def data_ptr(self) -> int:
        return ELSEWHERE + super().data_ptr()

    # torch's own refuse subclasses, or ask a device for a list as index
    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __format__(self, spec: str) -> str:
        return format(self.cpu(), spec)

    def __repr__(self, **_: Any) -> str:
        return repr(self.cpu())

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple):
            index = tuple(torch.tensor(i) if isinstance(i, list) else i for i in index)
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _current().run(func, args, kwargs or {})


def wrap(tensor: Tensor) -> GpuTensor:
    return Tensor._make_subclass(  # type: ignore[attr-defined,no-any-return]
        GpuTensor, tensor, False, dispatch_device=True, device_for_backend_keys=DEVICE
    )


def unwrap(value: Any) -> Any:
    """The same memory as a plain tensor. Not from the storage's own tensor: `.data =` moves a Parameter about."""
    if not isinstance(value, GpuTensor):
        return value
    plain = torch.empty(0, dtype=value.dtype)
    return plain.set_(value.untyped_storage(), value.storage_offset(), value.size(), value.stride())


@functools.cache
def reason() -> str:
    """Why none of this can be had here; "" if it can.

    torch makes a tensor's device the current one around some calls, and where there is no GPU it has nobody who could
    do that for cuda tensors. The one that does nothing, for meta tensors, takes that place in its table.
    """
    table = "_ZN3c104impl26device_guard_impl_registryE"  # c10/core/impl/DeviceGuardImplInterface.h
    try:
        guards = (ctypes.c_void_p * 16).in_dll(ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so")), table)
    except (OSError, ValueError) as error:
        return f"torch {torch.__version__} has no table of device guards to add to ({error})"
    if guards[_META] is None:
        return f"torch {torch.__version__} has no guard for meta tensors"
    if not torch.cuda.is_available():
        guards[_CUDA] = guards[_META]
    return ""


_CUDA, _META = 1, 14  # c10/core/DeviceType.h
_gpu: Gpu | None = None


def _current() -> Gpu:
    assert _gpu is not None, "a GpuTensor outlived its Gpu"
    return _gpu


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


class Gpu(TorchDispatchMode):  # type: ignore[misc]
    """The device's memory. While it is entered, tensors can be made on "cuda" in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.ops = 0
        self.on_wait: Callable[[], None] = lambda: None
        """Told of each wait."""
        self._pinned: weakref.WeakSet[Any] = weakref.WeakSet()
        self._quiet = threading.local()

    def __enter__(self) -> Gpu:
        global _gpu
        assert _gpu is None and not reason(), reason()
        _gpu = self
        # asked by torch before it makes a tensor on cuda
        stand_ins = {
            (torch.cuda, "_lazy_init"): lambda: None,
            (torch.cuda, "get_device_capability"): lambda device=None: (9, 0),
            (torch, "tensor"): self._tensor,
        }
        self._replaced: dict[Any, Any] = {(module, name): getattr(module, name) for module, name in stand_ins}
        for (module, name), stand_in in stand_ins.items():
            setattr(module, name, stand_in)
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *exc: Any) -> None:
        global _gpu
        super().__exit__(*exc)
        for (module, name), original in self._replaced.items():
            setattr(module, name, original)
        _gpu = None

    def _tensor(self, data: Any, *, device: Any = None, **options: Any) -> Tensor:
        """torch.tensor, whose last copy no mode sees."""
        made: Tensor = self._replaced[torch, "tensor"](data, **options)
        return made if device is None else made.to(device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """What runs inside (on this thread) is no op of the program's: a stand-in for the driver's own work."""
        self._quiet.on = True
        try:
            yield
        finally:
            self._quiet.on = False

    def pinned(self, tensor: Tensor) -> Tensor:
        """Say that a host tensor's memory is page-locked."""
        self._pinned.add(tensor.untyped_storage())
        return tensor

    # ---- one op --------------------------------------------------------------------------------------------------

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is prim.device.default:
            return DEVICE
        self.ops += 1
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        there = [t for t in tensors if isinstance(t, GpuTensor)]
        if name == "is_pinned":
            return args[0].untyped_storage() in self._pinned
        if name in ("_use_cudnn_ctc_loss", "_use_miopen_ctc_loss"):
            return False
        if name == "_pin_memory":
            return self.pinned(args[0].clone())
        to_gpu, kwargs, pin = self._place(name, there, args, kwargs)
        if not there and not to_gpu:
            out = func(*args, **kwargs)
            return self.pinned(out) if pin else out
        self._check(func, name, tensors, there, args, kwargs, to_gpu)
        if name == "histc" and not args[0].is_floating_point():  # a GPU counts integers, the CPU does not
            return wrap(unwrap(func(args[0].float(), *args[1:], **kwargs)).to(args[0].dtype))
        plain = func(*tree_map_only(Tensor, unwrap, args), **tree_map_only(Tensor, unwrap, kwargs))
        if func._schema.is_mutable and isinstance(plain, Tensor):  # in place, or into out=: the tensor that was given
            return args[0] if name[-1] == "_" else kwargs.get("out", args[0])
        if not to_gpu:
            return plain
        if name == "_to_copy" and plain.untyped_storage()._cdata in {t.untyped_storage()._cdata for t in tensors}:
            plain = plain.clone()  # from the host's memory to "device" memory is another memory
        return tree_map_only(Tensor, wrap, plain)

    def _place(
        self, name: str, there: list[Any], args: Any, kwargs: dict[str, Any]
    ) -> tuple[bool, dict[str, Any], bool]:
        """(whether the result is on the GPU, arguments for the host's op, whether it is to be pinned)."""
        device, pin = kwargs.get("device"), bool(kwargs.get("pin_memory"))
        if pin:
            kwargs = {**kwargs, "pin_memory": False}
        if device is None:
            to_gpu = isinstance(args[0], GpuTensor) if name == "copy_" else bool(there)
        else:
            to_gpu = torch.device(device).type == "cuda"
            kwargs = {**kwargs, "device": torch.device("cpu")} if to_gpu else kwargs
        if device is not None and torch.device(device).type == "meta":
            to_gpu = False
        return to_gpu, kwargs, pin

    def _check(self, func: Any, name: str, tensors: Any, there: Any, args: Any, kwargs: Any, to_gpu: bool) -> None:
        if getattr(self._quiet, "on", False) or name in FREE_OF_DEVICES:
            return
        here = [t for t in tensors if not isinstance(t, GpuTensor)]
        if name in COPIES:
            host = (here or [None])[0]
            crosses = bool(here) if name == "copy_" else to_gpu != bool(there)
            if crosses and not self._is_asynchronous(name, host, args, kwargs):
                self._wait(func)
            return
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                self._wait(func)
            if any(not isinstance(i, GpuTensor) for i in indices) and there:
                self._wait(func)
            here = [t for t in here if not any(t is i for i in indices)]
        if name == "_grouped_mm" and there and there[0].dtype is not torch.bfloat16:
            self._wait(func)  # torch's fallback copies the offsets to the host
        if name in WAITS and not (name == "repeat_interleave" and kwargs.get("output_size") is not None):
            self._wait(func)
        if there and any(t.dim() > 0 for t in here):
            shapes = [f"{tuple(t.shape)} on {t.device}" for t in tensors]
            raise MixedDevices(f"{func}: expected all tensors on one device, got {', '.join(shapes)}")

    def _is_asynchronous(self, name: str, host: Tensor | None, args: Any, kwargs: Any) -> bool:
        if host is not None and host.numel() == 0:
            return True
        asked = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if host is None:  # to the host: into memory that nobody has locked
            return False
        return bool(asked) and host.untyped_storage() in self._pinned

    def _wait(self, func: Any) -> None:
        self.on_wait()
        frame, seen = sys._getframe(2), []
        while frame is not None and len(seen) < 3:
            path = frame.f_code.co_filename
            if "/torch/" not in path and not path.endswith("fake_gpu.py"):
                seen.append(f"{path.rpartition('site-packages/')[2]}:{frame.f_lineno}")
            frame = frame.f_back  # type: ignore[assignment]
        self.waits.append(f"{func} at {' < '.join(seen)}")


class _InThread(TorchDispatchMode):  # type: ignore[misc]
    """The `Gpu` for a thread that works beside the one that entered it."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._gpu.run(func, args, kwargs or {})


class GpuBackend(FakeBackend):
    """`FakeBackend` whose device memory is that of a `Gpu`."""

    device = DEVICE

    def __init__(self, gpu: Gpu, **options: Any) -> None:
        super().__init__(**options)
        self.gpu = gpu
        gpu.on_wait = self.host_waited
        self.foreign: list[str] = []
        """Device memory that was asked for on a stream that does not compute: it would come back to that stream."""

    @contextlib.contextmanager
    def on(self, stream: Any) -> Any:
        with super().on(stream), contextlib.nullcontext() if _is_main() else _InThread(self.gpu):
            yield

    def _move(self, to: Tensor, source: Tensor) -> None:
        with self.gpu.quiet():
            super()._move(unwrap(to), unwrap(source))

    def is_device(self, tensor: Tensor) -> bool:
        return isinstance(tensor, GpuTensor)

    def empty(self, nbytes: int) -> Tensor:
        if self._on(None) is not None:
            self.foreign.append(f"{nbytes} bytes")
        return wrap(super().empty(nbytes))

    def staging(self, nbytes: int) -> Tensor:
        return self.gpu.pinned(super().staging(nbytes))


class FakeGpu(FakeCudaDevice):
    """The real `CudaDevice`, device tensors and all, but for streams, the driver and the kernels."""

    def __init__(self, gpu: Gpu, **options: Any) -> None:
        super().__init__(GpuBackend(gpu, **options))


class HostKernels(CpuKernels):
    """The CPU's kernels for passes over device memory."""

    where, elsewhere = "cuda:0", ELSEWHERE

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu
