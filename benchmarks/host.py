"""What the host does between two modules: microseconds of its time for each owner that is served in a step.

    python -m benchmarks.host [--repeats 40] [--layers 24]

One JSON line a tier. OPT of that many layers, so narrow (32) that nothing but the host's own work takes time; one
thread, two lanes, a batch of 16 tokens. `turn_us` is a step's CPU seconds less those of as many plain forwards of the
same model, divided by the owners that it serves: hooks, switches between lanes, the kernels' calls with their few
elements, journal and window. `forward_us` is the plain forwards' share. CPU seconds of the process, since others on
the machine disturb these less than the clock; medians, and the quickest, over blocks of steps. A change is compared
with what it replaces in turns, with this command in both checkouts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM

from benchmarks.common import about, emit, quantile
from zo_offload import Engine, MeZO

STEPS = 10  # in a block that is timed as one


def narrow_opt(layers: int) -> OPTForCausalLM:
    """A model of many small modules."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=layers, ffn_dim=64, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    model.config.use_cache = False
    return model


def cpu_seconds(work: Callable[[], Any], repeats: int) -> list[float]:
    """Of one call, over blocks of them."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(STEPS):
            work()
        found.append((time.process_time() - start) / STEPS)
    return found


def turns(steps: list[float], forwards: list[float], owners: int) -> dict[str, float]:
    """Microseconds of an owner's turn, from the seconds of steps and of as many plain forwards."""
    return {
        "turn_us": round(1e6 * (quantile(steps, 0.5) - quantile(forwards, 0.5)) / owners, 1),
        "turn_us_quickest": round(1e6 * (min(steps) - min(forwards)) / owners, 1),
    }


def measured(layers: int, offload: Any, run_dir: Path | None, repeats: int) -> dict[str, Any]:
    """One tier's line."""
    ids = torch.randint(5, 100, (1, 16), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    plain = narrow_opt(layers)
    with (
        Engine(
            narrow_opt(layers), method=MeZO(lr=1e-6), offload=offload, run_dir=run_dir, snapshot_minutes=None
        ) as engine,
        torch.no_grad(),
    ):
        for _ in range(STEPS):  # watched, traced, the first folds
            engine.step(batch)
            plain(**batch)
        steps = cpu_seconds(lambda: engine.step(batch), repeats)
        forwards = [2 * t for t in cpu_seconds(lambda: plain(**batch), repeats)]
        owners = len(engine.plan.calls)
    return {
        "layers": layers, "offload": offload, "owners": owners, "lanes": 2, "repeats": repeats,
        **turns(steps, forwards, owners),
        "forward_us": round(1e6 * quantile(forwards, 0.5) / owners, 1),
        "step_ms": round(1e3 * quantile(steps, 0.5), 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--layers", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    common = about("host")
    for offload in ("none", "host", "disk"):
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder) / "run" if offload == "disk" else None
            emit(measured(options.layers, offload, run_dir, options.repeats), common)


if __name__ == "__main__":
    main()
