"""Finds or compiles, checks and launches the CUDA kernels.

`_zo_cuda.fatbin` is next to this file if setup.py found nvcc (machine code for sm_80, 86, 89 and 90, and PTX for later
GPUs). If it is missing, has no code for this GPU, or was made from other sources, NVRTC compiles the kernels
(`nvrtc.py`), one storage format at a time when it is first used. Either image is loaded by the driver into torch's own
context and launched on torch's current stream: there is no second CUDA runtime that could disagree with torch's, and no
torch header to compile against.

Before its first use an image must reproduce the CPU's known bits (`native.FINGERPRINT`): noise of each kind, and
weights and lanes of a few passes. Otherwise it is refused.

Environment: ZO_CUDA=0 disables CUDA; ZO_CUDA=nvrtc compiles even if the fatbin exists; ZO_NVRTC=path to libnvrtc.

**Not run on a GPU yet.** Checks without one: tests/devices/test_cuda_ptx.py and tests/devices/test_cuda_build.py.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..formats import PLAIN
from ..kernels import native, nvrtc
from ..kernels.device_updates import RECORD_BYTES, DeviceUpdates
from ..kernels.driver import (
    ATTRIBUTE_MAJOR,
    ATTRIBUTE_MINOR,
    ATTRIBUTE_SM_COUNT,
    ERROR_NOT_FOUND,
    ERRORS_OF_IMAGES,
    CudaError,
    Driver,
    Params,
    driver,
)
from ..kernels.records import LANE, UPDATE
from .cuda_args import (
    ABI,
    LANES,
    THREADS,
    blocks_of,
    noise_kernel,
    pack_args,
    pack_noise,
    pack_part,
    part_of,
    pass_kernel,
    tiles,
)
from .noise import NoiseSpec

_log = logging.getLogger(__name__)

IMAGE = Path(__file__).parent.with_name("_zo_cuda.fatbin")
_WAVES = 16  # at most so many blocks per multiprocessor; each computes a share of the tiles


class StaleImage(CudaError):
    """An image that was made from other sources than this package's."""


class CudaKernels:
    """The kernels on one device. Launches go to torch's current stream and return at once."""

    def __init__(self, library: Driver, device: int, image: bytes | Callable[[str], bytes], source: str) -> None:
        """Loads into torch's context; CudaError if the image is not for this GPU, StaleImage if it has other sources.

        image: of all kernels; or a function that returns the image of a format by name, and of the other kernels by "".
        """
        self.device, self.source = device, source
        self._driver = library
        self._image = image  # kernels are loaded from it at their first use
        self._context = library.primary_context(device)
        self._threads = threading.local()
        self._modules: dict[str, int] = {}
        self._module("")
        self._functions: dict[str, int] = {}
        self.most_blocks = _WAVES * library.attribute(device, ATTRIBUTE_SM_COUNT)
        found = self._abi()
        if found != ABI:
            raise StaleImage(
                f"{source} was built from other sources (interface {found:#x}, this package needs {ABI:#x}); "
                "rebuild it: python setup.py build_ext --inplace"
            )

    def _module(self, part: str) -> int:
        """The loaded module of a format's kernels; "": of the others."""
        if isinstance(self._image, bytes):
            part = ""
        if part not in self._modules:
            image = self._image if isinstance(self._image, bytes) else self._image(part)
            with self._driver.current(self._context):  # torch makes its own current only when it first uses the device
                self._modules[part] = self._driver.load_module(image)
        return self._modules[part]

    def _abi(self) -> int:
        """The image's interface number, from its own kernel."""
        told = torch.zeros(1, dtype=torch.int32, device=self.where)
        self._launch_noise("zo_cuda_abi", pack_noise(told.data_ptr(), 1, 0, 0, 0, 0), 1, self.stream())
        return int(told.item()) & 0xFFFFFFFF

    @property
    def where(self) -> str:
        """torch's name of the kernels' device."""
        return f"cuda:{self.device}"

    def stream(self) -> int:
        """The driver's handle of torch's current stream on the device."""
        return int(torch._C._cuda_getCurrentRawStream(self.device))  # as current_stream, but makes no object

    def launch(self, name: str, params: Params, blocks: int, stream: int) -> None:
        """Enqueue a kernel. params: its struct, which is copied before this returns."""
        if not hasattr(self._threads, "ready"):  # a thread in which torch has not used the device has no context
            self._driver.ensure_current(self._context)
            self._threads.ready = True
        if torch.cuda.current_device() == self.device:
            self._driver.launch(self._function(name), blocks, THREADS, stream, params)
        else:
            with torch.cuda.device(self.device):  # a kernel must be launched in its own context
                self._driver.launch(self._function(name), blocks, THREADS, stream, params)

    def _launch_noise(self, name: str, args: bytes, warps: int, stream: int) -> None:
        self.launch(name, Params(args), blocks_of([warps], self.most_blocks)[0], stream)

    def _function(self, name: str) -> int:
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = self._driver.function(self._module(part_of(name)), name)
        return function

    def run_pass(
        self,
        *,
        updates: DeviceUpdates | None,
        lanes: Sequence[tuple[int, int, float, int]],
        noise: NoiseSpec,
        stream: int,
        format: int,
        numel: int,
        terms: Tensor | None = None,
        offset: int = 0,
        num_rows: int = 0,
        total_rows: int = 0,
        write_back: bool = False,
        target_scales: bool = False,
        **fields: Any,
    ) -> None:
        """One fused pass, alone: of gathered rows, or what `on_gpu.py` has not prepared. More lanes than a launch
        takes are split over several launches; the first writes back.

        terms: struct zo_update of the sums' terms in device memory, [terms, 24 bytes]. fields: the other fields of
        `native.pack_pass`, with device addresses.
        """
        kind = noise.kind.name
        name = pass_kernel(format, kind, target_scales)
        (blocks,) = blocks_of([tiles(kind, numel, offset, num_rows)], self.most_blocks)
        first = True
        while first or lanes:
            count = 0 if updates is None else len(updates)
            last_fold = -1 if updates is None else updates.last_fold
            part = pack_part(
                updates=updates.address if count and updates is not None else 0,
                terms=0 if terms is None else terms.data_ptr(), num_terms=0 if terms is None else len(terms),
                numel=numel, offset=offset, num_rows=num_rows, total_rows=total_rows, num_updates=count,
                last_fold=last_fold, format=format, distribution=kind, rounds=noise.rounds, write_back=write_back,
                target_scales=target_scales, num_lanes=len(lanes[:LANES]), first_lane=0, first_block=0,
                end_block=blocks, **fields,
            )  # fmt: skip
            self.launch(name, Params(pack_args([part], lanes[:LANES])), blocks, stream)
            if write_back and updates is not None:
                updates = updates.after(last_fold + 1)  # folded updates are in the stored bytes now
            first, lanes = False, lanes[LANES:]

    def noise(
        self, out: int, distribution: str, rounds: int, seed: int, param_id: int, numel: int, offset: int, stream: int
    ) -> None:
        """Write z to `numel` floats at device address `out`."""
        args = pack_noise(out, numel, offset, seed, param_id, rounds)
        self._launch_noise(noise_kernel(distribution), args, tiles(distribution, numel, offset), stream)

    def gaussian_table(self, out: int, stream: int) -> None:
        """Write the Gaussian of every half-word to 65,536 floats at device address `out`."""
        self._launch_noise("zo_gaussian_table", pack_noise(out, 1 << 16, 0, 0, 0, 0), 1 << 11, stream)


class _OnDevice:
    """The kernels behind the interface of `native.Library`, host memory in and out: for the fingerprint."""

    def __init__(self, kernels: CudaKernels) -> None:
        self.kernels = kernels

    def noise(
        self, out: int, distribution: str, rounds: int, seed: int, param_id: int, numel: int, offset: int, threads: int
    ) -> None:
        z = torch.full((numel,), float("nan"), device=self.kernels.where)
        stream = self.kernels.stream()
        self.kernels.noise(z.data_ptr(), distribution, rounds, seed, param_id, numel, offset, stream)
        copy_out(out, z)

    def gaussian_table(self, out: int) -> None:
        z = torch.full((1 << 16,), float("nan"), device=self.kernels.where)
        self.kernels.gaussian_table(z.data_ptr(), self.kernels.stream())
        copy_out(out, z)

    def run_pass(self, **call: Any) -> None:
        run_on_device(self.kernels, **call)


def copy_out(address: int, tensor: Tensor) -> None:
    """Copy a device tensor's bytes to a host address."""
    data = tensor.cpu()  # in a variable: its memory must live until it is copied
    ctypes.memmove(address, data.data_ptr(), data.numel() * data.element_size())


def run_on_device(
    kernels: CudaKernels,
    *,
    stored: int,
    numel: int,
    offset: int,
    num_updates: int,
    num_lanes: int,
    format: int,
    param_id: int,
    distribution: str,
    rounds: int,
    write_back: bool,
    stochastic: bool,
    tail: bytes,
    **_: Any,  # the fingerprint's passes have no rows and only the values plane
) -> None:
    """`native.Library.run_pass` through the GPU: host addresses are copied in and back."""
    device = kernels.where
    size = {fmt.code: fmt.nbytes(1) for fmt in PLAIN.values()}

    def take(address: int, nbytes: int) -> Tensor:
        return torch.frombuffer(bytearray(ctypes.string_at(address, nbytes)), dtype=torch.uint8).to(device)

    weights = take(stored, size[format] * numel)
    records = torch.frombuffer(bytearray(tail[: RECORD_BYTES * num_updates]), dtype=torch.uint8).to(device)
    folds = tuple(bool(UPDATE.unpack_from(tail, RECORD_BYTES * k)[3] & 1) for k in range(num_updates))
    lanes = [LANE.unpack_from(tail, RECORD_BYTES * (num_updates + j)) for j in range(num_lanes)]
    outs = [torch.full((size[code] * numel,), 255, dtype=torch.uint8, device=device) for *_, code in lanes]
    kernels.run_pass(
        stored=weights.data_ptr(), rows=0, numel=numel, offset=offset,
        updates=DeviceUpdates(records.view(-1, RECORD_BYTES), 0, folds), format=format, param_id=param_id,
        noise=NoiseSpec(distribution, rounds),  # type: ignore[arg-type]
        write_back=write_back, stochastic=stochastic, stream=kernels.stream(),
        lanes=[(seed, out.data_ptr(), scale, code) for (seed, _, scale, code), out in zip(lanes, outs, strict=True)],
    )  # fmt: skip
    for address, data in [(stored, weights), *zip((lane[1] for lane in lanes), outs, strict=True)]:
        copy_out(address, data)


def _open(device: int) -> CudaKernels:
    """The built image if it has code for this GPU and was made from these sources, else NVRTC's. CudaError tells what
    was tried."""
    library = driver()
    choice, tried = os.environ.get("ZO_CUDA", "1"), []
    if choice == "0":
        raise CudaError("switched off by ZO_CUDA=0")
    if choice != "nvrtc" and IMAGE.exists():
        try:
            return CudaKernels(library, device, IMAGE.read_bytes(), IMAGE.name)
        except StaleImage as error:
            tried.append(str(error))
        except CudaError as error:
            if error.code == ERROR_NOT_FOUND:
                tried.append(f"{IMAGE.name} was built from sources before there was zo_cuda_abi: rebuild it")
            elif error.code in ERRORS_OF_IMAGES:
                tried.append(f"{IMAGE.name} has nothing that this GPU and its driver take ({error})")
            else:
                raise
    elif choice != "nvrtc":
        tried.append(f"{IMAGE.name} was not built (no nvcc at build time)")
    arch = f"sm_{library.attribute(device, ATTRIBUTE_MAJOR)}{library.attribute(device, ATTRIBUTE_MINOR)}"
    for line in tried[:1]:
        _log.warning("%s; NVRTC compiles the kernels", line)
    try:
        images, source = _first_images(arch)
    except CudaError as error:
        raise CudaError("; ".join([*tried, str(error)])) from None

    def image_of(part: str) -> bytes:
        return images[part] if part in images else nvrtc.compiled(arch, part, _log.warning)[0]

    return CudaKernels(library, device, image_of, source)


def _first_images(arch: str) -> tuple[dict[str, bytes], str]:
    """The images that `kernels` checks, compiled in parallel: all kernels take a minute, one format's some seconds."""
    parts = ["", *(fmt.kernel for fmt in PLAIN.values())]
    with ThreadPoolExecutor(len(parts)) as pool:
        made = list(pool.map(lambda part: nvrtc.compiled(arch, part, _log.warning), parts))
    return {part: image for part, (image, _) in zip(parts, made, strict=True)}, made[0][1]


@functools.cache
def kernels(device: int) -> CudaKernels:
    """The checked kernels of a device; CudaError tells why there are none."""
    with torch.cuda.device(device):
        found = _open(device)
        same = native.fingerprint(_OnDevice(found)) == native.FINGERPRINT
    if not same:
        raise CudaError(
            f"{found.source} on this GPU does not reproduce the CPU's noise and weights, so a run would not mean the "
            "same model. Please report this, with the output of python -m zo_offload"
        )
    return found


def describe() -> str:
    """One line for `doctor`: the kernels in use, or why there are none."""
    built = f"{IMAGE.name} is built" if IMAGE.exists() else f"{IMAGE.name} is not built"
    if torch.version.cuda is None:
        return f"none: torch {torch.__version__} has no CUDA; {built}"
    if not torch.cuda.is_available():
        return f"none: torch finds no GPU; {built}"
    try:
        device = torch.cuda.current_device()
        torch.zeros(1, device=f"cuda:{device}")  # makes the context
        return f"{torch.cuda.get_device_name(device)}: {kernels(device).source}, bits checked"
    except CudaError as error:
        return f"none: {error}"
