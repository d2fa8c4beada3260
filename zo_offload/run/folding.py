"""fold_every="auto": how many steps a fold sums up, from what noise and writing cost on this machine.

A step that does not fold makes the noise of all pending updates again, and writes nothing. With c seconds for a
weight's noise, f seconds to write one and n noises in a step, folding every K steps costs n c (K + 1) / 2 + f / K a
weight and step, which is least at K = sqrt(2 f / (n c)). Both are measured when the run begins: c with the run's noise
on its threads, f in the run's directory. Writes are measured through to the medium, unless the page cache holds all
that is written several times over: then a block is written many times before the system brings it to the medium. In 16
bits and less each fold rounds, and K is at least the default, so that small updates add up before they are rounded.
Where numbers depend on it, the choice is part of the run's record.

Only runs on a CPU that write blocks to files are measured; the others keep their default. On a GPU the link, the host
and the kernels would have to be measured together.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..formats import get_format
from ..kernels.records import STILL, Update
from ..numerics.fused import fused_pass
from ..numerics.noise import NoiseSpec
from ..plan.layout import Layout
from ..plan.plan import Plan
from ..plan.storage import is_lossless
from ..ranks.alone import Alone
from ..system import diskio
from ..system.host_memory import available_bytes
from .prepare import Prepared

MOST = 16
"""No K is larger: stored blocks that are many steps old make a resume replay as many, and gain little more."""
CACHES = 4
"""Linux lets a fifth of the memory be unwritten pages before it holds up who writes."""
_NUMEL = 1 << 22
_PENDING = 4
_WRITTEN = 32 << 20


@dataclass(frozen=True)
class FoldCosts:
    """Seconds: of one noise a weight, and of writing a byte to the run's directory and reading it for the fold."""

    noise_s: float
    byte_s: float


def decide_folds(prepared: Prepared, ranks: Alone) -> Prepared:
    """`prepared` with fold_every="auto" decided, and a line with the reason. Ranks use rank 0's measurement: all must
    fold at the same steps. Where numbers depend on it, the number takes the place of "auto" in the settings, and so in
    the run's record; elsewhere each resume measures again. Raises StorageError if the run's directory cannot be
    written to."""
    config, layout = prepared.config, prepared.layout
    if config.fold_every != "auto":
        return prepared
    rounds = not is_lossless(prepared.plan, layout)
    if prepared.offload != "disk" or config.device != "cpu" or layout.written <= prepared.plan.resident:
        chosen, why = prepared.fold_every, "only a CPU that writes files is measured, and this is the default"
    else:
        chosen, why = _measured(prepared, ranks)
        if rounds and chosen < prepared.fold_every:
            chosen, why = prepared.fold_every, f"{why}, and fewer would round small updates away"
    decided = (*prepared.decided, f"fold_every auto takes {chosen}: {why}")
    config = replace(config, fold_every=chosen) if rounds else config
    return replace(prepared, config=config, fold_every=chosen, decided=decided)


def _measured(prepared: Prepared, ranks: Alone) -> tuple[int, str]:
    config, layout, method = prepared.config, prepared.layout, prepared.method
    assert config.run_dir is not None, "offload='disk' has one"
    run_dir = Path(config.run_dir)
    through = 2 * layout.total_bytes > available_bytes() / CACHES
    costs = ranks.first("opening", lambda: asdict(measure(method.noise, run_dir, config.threads, through)))
    return least_costly(FoldCosts(**costs), prepared.plan, layout, method.noises)


def least_costly(costs: FoldCosts, plan: Plan, layout: Layout, noises: int) -> tuple[int, str]:
    """(K, what it follows from) for a model in this layout; see the module."""
    written = sum(nbytes for spans in layout.spans for _, nbytes in spans)
    write_s = costs.byte_s * written / max(1, plan.trainable_numel)
    noise_s = costs.noise_s * noises
    found = min(MOST, max(1, round(math.sqrt(2 * write_s / noise_s))))
    return found, f"a weight's noise takes {1e9 * noise_s:.2f} ns a step here, writing it {1e9 * write_s:.2f} ns"


def measure(noise: NoiseSpec, run_dir: Path, threads: int | None, through: bool) -> FoldCosts:
    """The costs of the run's noise and of writing to its directory, now; takes some tenths of a second. through: to the
    medium, not to the page cache alone."""
    return FoldCosts(_noise_seconds(noise, threads), _byte_seconds(run_dir, through))


def _noise_seconds(noise: NoiseSpec, threads: int | None) -> float:
    """Of one more pending update, a weight."""
    stored = torch.zeros(4 * _NUMEL, dtype=torch.uint8, device="cpu")
    out = torch.zeros(_NUMEL, dtype=torch.float32, device="cpu")

    noise = noise.of((_NUMEL >> 10, 1 << 10))

    def passed(pending: int) -> None:
        updates = [Update(seed, 2.0**-20, fold=False) for seed in range(pending)]
        fused_pass(
            stored, get_format("fp32"), param_id=1, numel=_NUMEL, updates=updates, noise=noise, write_back=False,
            perturbations=[STILL], outs=[out], threads=threads,
        )  # fmt: skip

    few, many = _quickest([lambda: passed(1), lambda: passed(1 + _PENDING)])
    return max(many - few, many / 100) / (_PENDING * _NUMEL)


def _byte_seconds(run_dir: Path, through: bool) -> float:
    """Of writing a byte to a file, and of reading it again from the page cache."""
    folder = next(path for path in (run_dir, *run_dir.parents) if path.is_dir())
    data = bytearray(os.urandom(1 << 20))
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:

            def write() -> None:
                for at in range(0, _WRITTEN, len(data)):
                    diskio.write_at(file.fileno(), memoryview(data), at)
                if through:
                    diskio.sync(file.fileno())

            def read() -> None:
                file.seek(0)
                while file.readinto(data):
                    pass

            return sum(_quickest([write, read])) / _WRITTEN
    except OSError as error:
        raise diskio.storage_error(error, "writing", folder, then="Nothing was trained yet.") from error


def _quickest(works: list[Callable[[], Any]]) -> list[float]:
    """Seconds of each, the best of three, in turns; the first turn warms up."""
    best = [math.inf] * len(works)
    for turn in range(4):
        for i, work in enumerate(works):
            start = time.perf_counter()
            work()
            if turn:
                best[i] = min(best[i], time.perf_counter() - start)
    return best
