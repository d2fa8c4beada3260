"""Runs one of ZO2's own scripts, unmodified, with first weights that are quick to make: python zo2_run.py SCRIPT ...

ZO2's speed and memory protocols start from a model with random weights, drawn one by one on one core: minutes for 13 B,
twice over. Their values change no time and no byte, so large tensors on the CPU get a repeated tile of the same
distribution instead. Nothing of ZO2 is touched: its noise is drawn by `torch.normal`, on the GPU.

Knows nothing of our package: it runs with ZO2's own packages.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch

LARGE = 1 << 20
_normal, _uniform = torch.Tensor.normal_, torch.Tensor.uniform_


def fill(out: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    flat = out.detach().view(-1)
    for start in range(0, flat.numel(), tile.numel()):
        part = flat[start : start + tile.numel()]
        part.copy_(tile[: part.numel()])
    return out


def quick(original, out, *arguments, **named):
    if out.device.type != "cpu" or out.numel() <= LARGE or not out.is_contiguous():
        return original(out, *arguments, **named)
    tile = torch.empty(LARGE, dtype=torch.float32)
    return fill(out, original(tile, *arguments, **named).to(out.dtype))


def main() -> None:
    torch.Tensor.normal_ = lambda *a, **named: quick(_normal, *a, **named)
    torch.Tensor.uniform_ = lambda *a, **named: quick(_uniform, *a, **named)
    script = Path(sys.argv[1]).resolve()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.parent)  # as if it had been started itself: it imports its neighbour
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
