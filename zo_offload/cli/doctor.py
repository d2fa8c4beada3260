"""The doctor: lists what is installed, and checks that a tiny step streamed from disk equals one in memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from typing import Any


def examine() -> int:
    """Print versions, the native library, memory, copy bandwidth, and a streamed step's result. Returns 0 if sound."""
    import torch

    from .. import __version__
    from ..kernels import native
    from ..numerics import cuda_kernels
    from ..system.host_memory import available_bytes

    print(f"zo_offload   {__version__}   python {platform.python_version()}   {platform.machine()}")
    for name in ("torch", "transformers", "safetensors", "accelerate", "greenlet"):
        print(f"{name:<12} {_version(name)}")
    print(f"native       {native.describe()}")
    print(f"cuda         {cuda_kernels.describe()}")
    print(f"memory       {available_bytes() / 1e9:.1f} GB available, {torch.get_num_threads()} threads")
    print(f"bf16         {_bf16()}")
    print(f"copy         {_copy_gb_per_s():.1f} GB/s (read + write, one thread)")
    if torch.cuda.is_available():
        print(f"gpu          {_gpu()}")
        print(f"gpu memory   {allocator(torch.cuda.mem_get_info()[1], os.environ)}")
    problem = _one_step()
    print(f"one step     {problem or 'ok: streamed from disk == in memory, bit for bit'}")
    return 1 if problem else 0


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _bf16() -> str:
    """What compute="auto" would take on this CPU, and why."""
    import torch

    from ..config import EngineConfig
    from ..devices import make_device
    from ..ranks.alone import Alone
    from ..run.compute import decide_compute

    config = EngineConfig(compute="auto")
    return decide_compute(config, make_device("cpu"), torch.float32, Alone())[1][0]


def _copy_gb_per_s() -> float:
    import torch

    source = torch.ones(1 << 26, dtype=torch.uint8, device="cpu")
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() / best / 1e9


def _gpu() -> str:
    """The link to the GPU, and two steps of a tiny model there: resident and streamed from host memory."""
    import torch

    from ..devices.link import measure_link
    from ..errors import ZOError

    try:
        link = measure_link(torch.device("cuda", torch.cuda.current_device()))
        resident, host = (_losses(device="cuda", offload=offload, num_slots=2) for offload in ("none", "host"))
    except (ZOError, RuntimeError) as error:
        return f"cannot be used: {error}"
    same = "streamed from host == resident, bit for bit" if resident == host else f"LOSSES DIFFER: {resident}, {host}"
    return (
        f"fetch {link.fetch_gbs:.1f} GB/s, flush {link.flush_gbs:.1f}, both at once {link.both_fetch_gbs:.1f} + "
        f"{link.both_flush_gbs:.1f}; {same}"
    )


def allocator(total_bytes: int, environment: Mapping[str, str]) -> str:
    """The setting of torch's allocator, with a hint where the GPU is so small that fragments matter."""
    set_to = next((environment[name] for name in _ALLOCATOR if environment.get(name)), "")
    if "expandable_segments:true" in set_to.lower():
        return f"expandable segments ({set_to})"
    if total_bytes > _ROOMY_BYTES:
        return f"torch's allocator as it is{f' ({set_to})' if set_to else ''}"
    return (
        f"set {_ALLOCATOR[0]}=expandable_segments:True before Python starts ({_ALLOCATOR[1]} before torch 2.9): "
        "activations of rows of many lengths fragment the memory of a small GPU"
    )


_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_ROOMY_BYTES = 17_500_000_000  # a 16 GB GPU counts as small


def _losses(**settings: Any) -> list[float]:
    """The losses of two steps of a tiny model."""
    import torch
    from torch import nn

    from .. import Engine, MeZO

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    rows = [{"x": x} for x in torch.randn(8, 64, device="cpu")]
    with Engine(
        model, method=MeZO(lr=1e-3, batch_size=8), objective=lambda m, b: m(b["x"]).square().mean(), **settings
    ) as engine:  # fmt: skip
        return engine.fit(rows, steps=2).losses


def _one_step() -> str:
    """Two steps of a tiny model, resident and from disk: "" if their losses are equal, else what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        resident, disk = _losses(offload="none"), _losses(offload="disk", run_dir=f"{folder}/run")
    return "" if resident == disk else f"losses differ: {resident} resident, {disk} from disk"
