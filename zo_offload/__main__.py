"""The doctor: `python -m zo_offload` shows what was found here and runs one tiny step. Exit status 0 if all is well."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import tempfile
import time
from typing import Any


def main() -> int:
    """Print versions, the native library, memory, copy bandwidth, and the result of one step streamed from disk."""
    import torch

    from . import __version__, native, native_cuda
    from .memory import available_bytes

    print(f"zo_offload   {__version__}   python {platform.python_version()}   {platform.machine()}")
    for name in ("torch", "transformers", "safetensors", "accelerate", "greenlet"):
        print(f"{name:<12} {_version(name)}")
    print(f"native       {native.describe()}")
    print(f"cuda         {native_cuda.describe()}")
    print(f"memory       {available_bytes() / 1e9:.1f} GB available, {torch.get_num_threads()} threads")
    print(f"copy         {_copy_gb_per_s():.1f} GB/s (read + write, one thread)")
    problem = _one_step()
    print(f"one step     {problem or 'ok: streamed from disk == in memory, bit for bit'}")
    return 1 if problem else 0


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _copy_gb_per_s() -> float:
    import torch

    source = torch.ones(1 << 26, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() / best / 1e9


def _one_step() -> str:
    """Two steps of a tiny model, resident and from disk: "" if their losses are equal, else what is wrong."""
    import torch
    from torch import nn

    from . import Engine, MeZO

    def losses(**settings: Any) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
        rows = [{"x": x} for x in torch.randn(8, 64)]
        with Engine(
            model, method=MeZO(lr=1e-3, batch_size=8), objective=lambda m, b: m(b["x"]).square().mean(), **settings
        ) as engine:  # fmt: skip
            return engine.fit(rows, steps=2).losses

    with tempfile.TemporaryDirectory() as folder:
        resident, disk = losses(offload="none"), losses(offload="disk", run_dir=f"{folder}/run")
    return "" if resident == disk else f"losses differ: {resident} resident, {disk} from disk"


if __name__ == "__main__":
    sys.exit(main())
