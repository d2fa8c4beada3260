"""Memory of this host: what is available, and what this process uses."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

import psutil
import torch

from .units import parse_bytes

_RUNTIME_BYTES = 50_000_000  # thread stacks, library workspaces, page rounding: the same at every model size


def process_bytes() -> int:
    """Resident bytes of this process now, plus those that every run adds (libraries load lazily)."""
    with torch.no_grad():
        x = torch.ones(64, 64, device="cpu")
        torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(x, x), torch.zeros(64, dtype=torch.int64, device="cpu")
        )
    return resident_bytes() + _RUNTIME_BYTES


def resident_bytes() -> int:
    """Resident bytes of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most resident bytes that this process had at once, since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # Linux counts in kibibytes


def private_bytes() -> int:
    """Those of them that are no file's pages, which the system takes back by itself."""
    used = psutil.Process().memory_info()
    return int(used.rss - getattr(used, "shared", 0))


def available_bytes() -> int:
    """Available memory of this host. A control group's limit counts; files that it caches do not.

    ZO_HOST_MEMORY ("120GB") is for machines that show less memory than they have, such as virtual machines that grow on
    demand: the larger of the two is used.
    """
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError):  # no such control group: use the host's own figure
        text = (_CGROUP / "memory.max").read_text().strip()
        if text != "max":
            used = int((_CGROUP / "memory.current").read_text()) - _cached_bytes()
            free = min(free, max(0, int(text) - used))
    told = os.environ.get("ZO_HOST_MEMORY")
    return max(free, parse_bytes(told, "ZO_HOST_MEMORY")) if told else free


_CGROUP = Path("/sys/fs/cgroup")


def _cached_bytes() -> int:
    """Bytes of cached files that count as used in the control group but are released on demand."""
    fields = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    return int(fields.get("active_file", 0)) + int(fields.get("inactive_file", 0))
