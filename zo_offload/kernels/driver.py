"""NVIDIA's driver library through ctypes: modules, launches and page-locking, in torch's context.

Only functions that torch does not offer. They are called by their versioned names (the same in cuda.h 12 and 13), so
their structs cannot change. ctypes releases the GIL during a call: page-locking gigabytes does not stop other threads.
"""

from __future__ import annotations

import ctypes
import functools
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import ZOError

# an image that this GPU or this driver cannot use: invalid image or source, no binary, PTX that is invalid, newer than
# the driver, or cannot be compiled here
ERRORS_OF_IMAGES = (200, 209, 218, 221, 222, 223, 300)
ERROR_NOT_FOUND = 500  # no such kernel in the image
HOST_REGISTER_PORTABLE = 1  # locked for every context of the process, like torch's own pinned memory
ATTRIBUTE_SM_COUNT, ATTRIBUTE_ASYNC_ENGINES, ATTRIBUTE_MAJOR, ATTRIBUTE_MINOR = 16, 40, 75, 76


class CudaError(ZOError):
    """A CUDA call failed, or there is no CUDA: names the call, the driver's answer, and what to do."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class Params:
    """A kernel's only parameter, a struct, as `Driver.launch` takes it; its bytes may be rewritten between launches."""

    __slots__ = ("_data", "args", "pointers")

    def __init__(self, args: bytes | bytearray) -> None:
        self.args = args if isinstance(args, bytearray) else bytearray(args)
        self._data = (ctypes.c_char * len(self.args)).from_buffer(self.args)  # the bytes stay where they are
        self.pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._data))


class Driver:
    """libcuda.so.1, initialised. Methods return plain integers (handles) and raise CudaError."""

    def __init__(self, library: Any) -> None:
        self._lib = library
        for name in ("cuGetErrorName", "cuGetErrorString"):
            getattr(library, name).argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
        self._launch = library.cuLaunchKernel
        self._launch.argtypes = [ctypes.c_void_p] + [ctypes.c_uint] * 7 + [ctypes.c_void_p] * 3
        self.call("cuInit", ctypes.c_uint(0))

    def check(self, code: int, what: str) -> None:
        if code:
            name, text = ctypes.c_char_p(), ctypes.c_char_p()
            self._lib.cuGetErrorName(code, ctypes.byref(name))
            self._lib.cuGetErrorString(code, ctypes.byref(text))
            said = f"{(name.value or b'?').decode()} ({(text.value or b'no description').decode()})"
            raise CudaError(f"{what}: the CUDA driver says {said}", code)

    def call(self, name: str, *arguments: Any) -> None:
        self.check(getattr(self._lib, name)(*arguments), name)

    def version(self) -> tuple[int, int]:
        """(13, 0) for a driver that speaks CUDA 13.0."""
        value = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(value))
        return value.value // 1000, value.value % 1000 // 10

    def primary_context(self, device: int) -> int:
        """The context of torch (and of any user of the CUDA runtime) on a device; never released."""
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(device))
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        return int(context.value or 0)

    def has_context(self, device: int) -> bool:
        """Whether that context exists; does not create it. torch reports itself initialised earlier."""
        handle, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(device))
        self.call("cuDevicePrimaryCtxGetState", handle, ctypes.byref(flags), ctypes.byref(active))
        return bool(active.value)

    @contextmanager
    def current(self, context: int) -> Iterator[None]:
        """The context is current for the calling thread inside, and the former one afterwards, so torch's record of the
        thread's device stays right. A thread that torch has not used has no context."""
        self.call("cuCtxPushCurrent_v2", ctypes.c_void_p(context))
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def ensure_current(self, context: int) -> None:
        """Make the context current, for good, if the calling thread has none."""
        found = ctypes.c_void_p()
        self.call("cuCtxGetCurrent", ctypes.byref(found))
        if not found.value:
            self.call("cuCtxSetCurrent", ctypes.c_void_p(context))

    def attribute(self, device: int, attribute: int) -> int:
        handle, value = ctypes.c_int(), ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(device))
        self.call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), handle)
        return value.value

    def uuid(self, device: int) -> str:
        """The device's UUID, without "GPU-" or "MIG-": the same in CUDA, NVML and nvidia-smi, which number devices in
        different orders."""
        handle, data = ctypes.c_int(), ctypes.create_string_buffer(16)
        self.call("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(device))
        self.call("cuDeviceGetUuid_v2", data, handle)
        return str(uuid.UUID(bytes=data.raw))

    def load_module(self, image: bytes) -> int:
        """Load a fatbin, CUBIN or PTX image into the current context."""
        module = ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image))
        return int(module.value or 0)

    def function(self, module: int, name: str) -> int:
        function = ctypes.c_void_p()
        code = self._lib.cuModuleGetFunction(ctypes.byref(function), ctypes.c_void_p(module), name.encode())
        self.check(code, f"kernel {name}")
        return int(function.value or 0)

    def launch(self, function: int, blocks: int, threads: int, stream: int, params: Params) -> None:
        """Enqueue a kernel whose only parameter is a struct, which is copied before this returns."""
        code = self._launch(function, blocks, 1, 1, threads, 1, 1, 0, stream, params.pointers, None)
        if code:
            self.check(code, f"launch of {blocks} x {threads} threads")

    def lock_host(self, address: int, nbytes: int) -> None:
        """Page-lock host memory, so that copies from and to it run asynchronously."""
        self.check(
            self._lib.cuMemHostRegister_v2(
                ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_uint(HOST_REGISTER_PORTABLE)
            ),
            "cuMemHostRegister",
        )

    def unlock_host(self, address: int) -> None:
        self.call("cuMemHostUnregister", ctypes.c_void_p(address))


@functools.cache
def driver() -> Driver:
    """The machine's driver; CudaError if there is none or it finds no GPU."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"no NVIDIA driver on this machine ({error})") from None
    return Driver(library)
