"""What the host does between two modules on a GPU's path, without a GPU: one launch an owner beside one a parameter.

    python -m benchmarks.host_gpu [--repeats 20] [--layers 24]

The model of `benchmarks.host`, all of it in memory. Everything is as on a GPU but for the GPU: losses and coefficients
stay in tensors, updates are records in memory, the kernels' structs are packed, and the driver's launch is a function
of the C library that does nothing. So no weights are made, and the lanes' numbers mean nothing. Two engines take blocks
of steps in turns: one launches an owner's parameters together, the other one by one, by the code that gathered rows
take (`OnGpu.run_pass`).

`visit_us` is the host's CPU time to make an owner's weights, from its request to the last launch; `turn_us` that of
everything between two modules, as in `benchmarks.host`. A launch by NVIDIA's driver costs 2 to 5 us more, which is not
in here and goes with `launches`.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import zo_offload.run.opening
from benchmarks.common import about, emit, quantile
from benchmarks.host import STEPS, cpu_seconds, narrow_opt, turns
from zo_offload import Engine, MeZO
from zo_offload.devices import Later
from zo_offload.devices.cpu import CpuDevice
from zo_offload.kernels.driver import Driver, Params
from zo_offload.numerics import cuda_kernels, fused
from zo_offload.numerics.on_gpu import OnGpu
from zo_offload.stream.emitter import Emitter


class NoGpu(CpuDevice):
    """A CPU whose losses are read a step late, as a GPU's."""

    late = True

    def later(self, values: Tensor) -> Later:
        return Later(values.reshape(-1).clone())


class NoDriver:
    """libcuda.so.1 where there is none: every call succeeds and does nothing."""

    def __getattr__(self, name: str) -> Any:
        # the C library's llabs, which does not look at the other arguments: 0 for a kernel's handle that is 0
        function = ctypes.CDLL(None)["llabs"]
        setattr(self, name, function)
        return function


class NoKernels(cuda_kernels.CudaKernels):
    """Launches of kernels that do not exist."""

    def __init__(self) -> None:
        self.device, self.source, self.most_blocks = 0, "none", 2112
        self._driver, self.launches = Driver(NoDriver()), 0

    def stream(self) -> int:
        return 0

    def launch(self, name: str, params: Params, blocks: int, stream: int) -> None:
        self.launches += 1
        self._driver.launch(0, blocks, 256, stream, params)


class OneByOne(OnGpu):
    """A launch a parameter."""

    def ready(self, calls: Any) -> None:
        return None


class Visits:
    """CPU seconds of the host inside `Emitter.emit`."""

    def __init__(self) -> None:
        self.seconds, self.count, self._emit = 0.0, 0, Emitter.emit

    def emit(self, emitter: Emitter, *args: Any) -> None:
        start = time.thread_time()
        self._emit(emitter, *args)
        self.seconds += time.thread_time() - start
        self.count += 1


def measured(layers: int, repeats: int) -> list[dict[str, Any]]:
    """A line for each way."""
    ids = torch.randint(5, 100, (1, 16), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    plain, found = narrow_opt(layers), list[dict[str, Any]]()
    kernels = NoKernels()
    ways = {"one an owner": OnGpu(kernels), "one a parameter": OneByOne(kernels)}
    steps: dict[str, list[float]] = {way: [] for way in ways}
    visit: dict[str, list[float]] = {way: [] for way in ways}
    with patch.object(zo_offload.run.opening, "make_device", lambda name: NoGpu()), torch.no_grad():
        engines = {way: Engine(narrow_opt(layers), method=MeZO(lr=1e-6), offload="none") for way in ways}
        forwards = [2 * t for t in cpu_seconds(lambda: plain(**batch), repeats)]
        for turn in range(1 + repeats):
            for way, engine in engines.items():
                visits = Visits()
                with (
                    patch.object(fused, "kernels_for", lambda *_, way=way: ways[way]),
                    patch.object(Emitter, "emit", lambda *args, visits=visits: visits.emit(*args)),
                ):
                    kernels.launches = 0
                    seconds = cpu_seconds(partial(engine.step, batch), 1)[0]
                    launches = kernels.launches / STEPS
                if not turn:  # watched, traced, prepared
                    continue
                steps[way].append(seconds)
                visit[way].append(visits.seconds / visits.count)
                if turn == repeats:
                    found.append({"launches": way, "launches_a_step": launches})
        owners = len(engines["one an owner"].plan.calls)
        for engine in engines.values():
            engine.close()
    for line in found:
        way = line["launches"]
        line |= {
            "layers": layers, "owners": owners, "lanes": 2, "repeats": repeats,
            "visit_us": round(1e6 * quantile(visit[way], 0.5), 1), "visit_us_quickest": round(1e6 * min(visit[way]), 1),
            **turns(steps[way], forwards, owners),
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--layers", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    common = about("host_gpu")
    for line in measured(options.layers, options.repeats):
        emit(line, common)


if __name__ == "__main__":
    main()
