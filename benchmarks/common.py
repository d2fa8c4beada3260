"""What every benchmark says about itself: machine, versions, commit, date; and how repeats become numbers.

Benchmarks run as `python -m benchmarks.NAME` from the checkout, installed or not.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def quantile(times: list[float], q: float) -> float:
    return sorted(times)[min(len(times) - 1, round(q * (len(times) - 1)))]


def machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    return f"{model}, {platform.system()} {platform.machine()}"


def commit(checkout: Path = ROOT) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def opt_config(name: str) -> Any:
    """transformers' OPTConfig of that size, of no dtype. Raises ConfigError, with names like it, if there is none."""
    from zo_offload.cli import named_models

    if not named_models.is_named(name):
        raise named_models.unknown(name)
    config = named_models.named_config(name)
    config.dtype = None
    return config


def about(benchmark: str) -> dict[str, Any]:
    """The fields that are the same in every result of a run."""
    import torch
    import transformers

    from zo_offload.kernels import native

    library = native.library()
    return {
        "benchmark": benchmark,
        "isa": library.isa if library else "reference",
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "measured": True,
    }


def tell(lines: Iterable[str], out: Path | None) -> None:
    """Print lines as they come, and write them to a file if one is given."""
    told = []
    for line in lines:
        print(line, flush=True)
        told.append(line)
    if out:
        out.write_text("\n".join(told) + "\n")


def emit(result: dict[str, Any], common: dict[str, Any]) -> None:
    """One JSON line."""
    print(json.dumps(common | result), flush=True)
