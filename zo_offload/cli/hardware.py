"""GPUs, links and drives by name, with their public rates (`hardware.json` names the sources)."""

from __future__ import annotations

import functools
import json
import re
from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import BudgetError, ConfigError
from ..system.units import show_bytes

CONTEXT_BYTES = 500_000_000
"""Device memory of a CUDA context and the matrix libraries' workspaces, used if there is no GPU to measure."""
AUTOMATIC_SHARE = 0.8  # of the free memory; `devices.cuda` takes it if no budget is given


@functools.cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(__file__).with_name("hardware.json").read_text())
    return found


@dataclass(frozen=True)
class Link:
    """A link between host and GPU. gb_per_s: each way, with page-locked memory; flush_cost: the share of a flush's time
    by which it delays concurrent fetches (both directions at once do not reach the sum)."""

    name: str
    gb_per_s: float
    flush_cost: float


@dataclass(frozen=True)
class Drive:
    """A drive, in gigabytes per second; written_tb: rated terabytes written, per terabyte of capacity."""

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
    """Thread instructions per nanosecond, at full issue."""
    bf16: bool
    capability: str
    link: Link


@dataclass(frozen=True)
class AbsentGpu:
    """A GPU that is not present, for planning: its memory is known only from `device_memory` or its data sheet."""

    memory_bytes: int | None
    automatic: bool = False
    """Without device_memory, plan for the memory that a run would take: four fifths of the free memory."""

    @property
    def kind(self) -> str:
        return "cuda"

    @property
    def own_memory(self) -> bool:
        return True

    def default_compute(self, own: torch.dtype) -> torch.dtype:
        return own

    def free_bytes(self) -> int:
        """The bytes that blocks could take; 0 if unknown, so that "auto" plans to stream."""
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
    """A GPU by its name, in any spelling of it ("RTX 4090", "4090"), or by torch's ("NVIDIA A100-SXM4-80GB").
    ConfigError lists the known ones."""
    table = _table()["gpus"]
    spelled = {_letters(text): known for known, row in table.items() for text in (known, row["torch_name"])}
    found = spelled.get(_letters(name)) or spelled.get("rtx" + _letters(name))
    if found is None:
        raise ConfigError(
            f"--gpu {name}: known are {', '.join(table)}. For another, plan with --device cuda, its memory as "
            "--device-memory 24GB, and its --link"
        )
    row = table[found]
    return Gpu(
        found, row["memory_gb"], row["memory_gb_per_s"], row["tensor_tflops"], row["instructions_per_ns"], row["bf16"],
        row["capability"], find_link(row["link"]),
    )  # fmt: skip


def _letters(name: str) -> str:
    """The letters and digits of a GPU's name, without its maker's."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())


def find_link(text: str, other: Link | None = None) -> Link:
    """A link by name ("pcie4-x8"), or by gigabytes per second each way; a number has the flush cost of `other`."""
    table = _table()["links"]
    if text.lower() in table:
        rate, cost, _ = table[text.lower()]
        return Link(text.lower(), rate, cost)
    rate = _number(text)
    if rate is None:
        raise ConfigError(f"--link {text}: give gigabytes per second, or one of {', '.join(table)}")
    return Link(f"{rate:g} GB/s", rate, 0.5 if other is None else other.flush_cost)


def find_drive(text: str) -> Drive:
    """A drive by name ("nvme-gen4"), or by gigabytes read per second; a number implies a quarter of it for writing."""
    table = _table()["drives"]
    if text.lower() in table:
        return Drive(text.lower(), *table[text.lower()][:4])
    rate = _number(text)
    if rate is None:
        raise ConfigError(f"--disk {text}: give gigabytes read per second, or one of {', '.join(table)}")
    usual = Drive(f"{rate:g} GB/s", *table["nvme-gen4"][:4])
    return replace(usual, read_gb_per_s=rate, burst_gb_per_s=rate, write_gb_per_s=rate / 4)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < 1e6 else None


def backprop_gb(kind: str, billions: float) -> float:
    """GPU memory of "qlora" or "lora" with backprop, for a model of `billions` parameters on short rows."""
    points = _table()[f"{kind}_gb"]
    at = bisect_left([x for x, _ in points], billions)
    if at == 0:
        return float(points[0][1] * max(0.5, billions / points[0][0]))
    if at == len(points):
        return float(points[-1][1] * billions / points[-1][0])
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    return float(y0 + (y1 - y0) * (billions - x0) / (x1 - x0))
