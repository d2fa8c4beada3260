"""GPUs, links and drives by name, with their public rates (`hardware.json`, which says where each is from)."""

from __future__ import annotations

import functools
import json
from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import BudgetError, ConfigError
from ..system.units import show_bytes

CONTEXT_BYTES = 500_000_000
"""Device memory of a CUDA context and the matrix libraries' workspaces, where there is no GPU to ask."""
AUTOMATIC_SHARE = 0.8  # of the free memory, as `devices.cuda` takes where no budget is given


@functools.cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(__file__).with_name("hardware.json").read_text())
    return found


@dataclass(frozen=True)
class Link:
    """Between host and GPU. gb_per_s: each way, of page-locked memory; flush_cost: the share of its own time that a
    flush costs the fetches beside it (both ways at once are not the sum)."""

    name: str
    gb_per_s: float
    flush_cost: float


@dataclass(frozen=True)
class Drive:
    """Gigabytes a second; written_tb: rated terabytes written, for each terabyte of its capacity."""

    name: str
    read_gb_per_s: float
    burst_gb_per_s: float
    write_gb_per_s: float
    written_tb: float


@dataclass(frozen=True)
class Gpu:
    """Public peaks of one GPU. tensor_tflops: 16-bit products with float32 accumulation, dense."""

    name: str
    memory_gb: float
    memory_gb_per_s: float
    tensor_tflops: float
    instructions_per_ns: float
    """Thread instructions a nanosecond, at full issue."""
    bf16: bool
    capability: str
    link: Link


@dataclass(frozen=True)
class AbsentGpu:
    """A GPU that is not here, as a plan sees it: of its memory nothing is known but what `device_memory` says, or its
    data sheet."""

    memory_bytes: int | None
    automatic: bool = False
    """Without device_memory, plan for what a run there would take: four fifths of the free memory."""

    @property
    def kind(self) -> str:
        return "cuda"

    @property
    def own_memory(self) -> bool:
        return True

    def default_compute(self, own: torch.dtype) -> torch.dtype:
        return own

    def free_bytes(self) -> int:
        """What blocks could take; 0 if nothing was said, so that "auto" plans to stream."""
        return max(0, (self.memory_bytes or 0) - CONTEXT_BYTES)

    def budget(self, asked: int | None, *, chosen: bool = False) -> int | None:
        if asked is not None and asked <= CONTEXT_BYTES:
            raise BudgetError(
                f"device_memory={show_bytes(asked)} is too small: the CUDA context and libraries take about "
                f"{show_bytes(CONTEXT_BYTES)}"
            )
        if asked is None:
            return int(AUTOMATIC_SHARE * self.free_bytes()) if self.automatic and not chosen else None
        return asked - CONTEXT_BYTES


def gpu_names() -> list[str]:
    return list(_table()["gpus"])


def drive_names() -> list[str]:
    return list(_table()["drives"])


def find_gpu(name: str) -> Gpu:
    """By its name, upper or lower case, with or without "NVIDIA GeForce". ConfigError lists what there is."""
    plain = name.lower().replace("nvidia", "").replace("geforce", "").strip(" -").replace(" ", "-")
    table = _table()["gpus"]
    if plain not in table:
        raise ConfigError(f"--gpu {name}: known are {', '.join(table)}. Another: its memory as --device-memory, --link")
    row = table[plain]
    return Gpu(
        plain, row["memory_gb"], row["memory_gb_per_s"], row["tensor_tflops"], row["instructions_per_ns"], row["bf16"],
        row["capability"], find_link(row["link"]),
    )  # fmt: skip


def find_link(text: str, other: Link | None = None) -> Link:
    """ "pcie4-x8", or gigabytes a second each way; of a number the flushes' cost is `other`'s."""
    table = _table()["links"]
    if text.lower() in table:
        rate, cost, _ = table[text.lower()]
        return Link(text.lower(), rate, cost)
    rate = _number(text)
    if rate is None:
        raise ConfigError(f"--link {text}: give gigabytes a second, or one of {', '.join(table)}")
    return Link(f"{rate:g} GB/s", rate, 0.5 if other is None else other.flush_cost)


def find_drive(text: str) -> Drive:
    """ "nvme-gen4", or gigabytes a second of reading; of a number, writing is taken to be a quarter of it."""
    table = _table()["drives"]
    if text.lower() in table:
        return Drive(text.lower(), *table[text.lower()][:4])
    rate = _number(text)
    if rate is None:
        raise ConfigError(f"--disk {text}: give gigabytes a second of reading, or one of {', '.join(table)}")
    usual = Drive(f"{rate:g} GB/s", *table["nvme-gen4"][:4])
    return replace(usual, read_gb_per_s=rate, burst_gb_per_s=rate, write_gb_per_s=rate / 4)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < 1e6 else None


def backprop_gb(kind: str, billions: float) -> float:
    """GPU memory that "qlora" or "lora" with backprop takes for a model of so many parameters, on short rows."""
    points = _table()[f"{kind}_gb"]
    at = bisect_left([x for x, _ in points], billions)
    if at == 0:
        return float(points[0][1] * max(0.5, billions / points[0][0]))
    if at == len(points):
        return float(points[-1][1] * billions / points[-1][0])
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    return float(y0 + (y1 - y0) * (billions - x0) / (x1 - x0))
