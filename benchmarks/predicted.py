"""Predicted steps beside their floor, for named models on named GPUs: python -m benchmarks.predicted [--out FILE]

The floor is the larger of what the link and the two forwards take; the step is the simulation of the ops that run
(`zo_offload.cli.timeline`), everything streamed from host memory, MeZO, one row, through the smallest window that
overlaps. Where the link binds and the step is over 1.05 of its floor, larger windows are tried: a run takes as many
slots as fit into the GPU's memory. No GPU is used or needed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.common import tell
from zo_offload import MeZO
from zo_offload.cli.answer import shares, work_in
from zo_offload.cli.costs import Step, Work, step_seconds
from zo_offload.cli.hardware import AbsentGpu, Gpu, find_gpu
from zo_offload.cli.plan_details import Planned, plan_step
from zo_offload.cli.timeline import simulate
from zo_offload.plan.activations import NOT_MEASURED

MODELS = "opt-1.3b opt-6.7b opt-13b opt-30b opt-66b opt-175b llama-3-70b deepseek-v3".split()
GPUS = "rtx-4060 rtx-4090 a100 h200".split()
TOKENS = (512, 2048, 16384)
GOAL, SLOTS = 1.05, (3, 6, 12, 24, 48)


def rows(models: list[str]) -> Iterator[str]:
    yield f"| model | tokens | {' | '.join(f'{gpu}: step, what binds, over its floor' for gpu in GPUS)} |"
    yield "|---" * (2 + len(GPUS)) + "|"
    for model in models:
        made = plan_step(model, method=MeZO(), tokens=64, batch_size=1, on=AbsentGpu(None), blind=True)
        made = replace(made, activations=NOT_MEASURED)  # only the window is asked for here, its smallest
        ready = made.prepared.stored_as(made.base.dtype_of, storage=None, offload="host")
        made = made.with_memory(ready)
        share = shares(made.module, made.checkpoint.config)
        limit = int(getattr(made.checkpoint.config, "max_position_embeddings", 0) or max(TOKENS))
        for tokens in TOKENS:
            if tokens > limit:
                continue
            cells = []
            for name in GPUS:
                gpu = find_gpu(name)
                work = work_in(replace(made, tokens=tokens))
                step = step_seconds(work, gpu, gpu.link)
                floor = max(step.parts["the link"], step.forwards)
                over = partial(_over, made, share, work, step, gpu)
                least = over(SLOTS[0])
                cell = f"{least * floor:.2f} s, {step.binds[4:]}, {least:.2f}"
                if least > GOAL and step.binds == "the link":
                    tried = ((slots, over(slots)) for slots in SLOTS[1:])
                    slots, reached = next((pair for pair in tried if pair[1] <= GOAL), (0, 0.0))
                    cell += f" ({reached:.2f} with {slots} slots)" if slots else f" (with {SLOTS[-1]} slots, too)"
                cells.append(cell)
            yield f"| {model} | {tokens} | {' | '.join(cells)} |"


def _over(made: Planned, share: Mapping[str, float], work: Work, step: Step, gpu: Gpu, slots: int) -> float:
    """The simulated step over its floor, with so many slots."""
    window = replace(made.memory.window, num_slots=slots, ahead=slots - 1)
    found = simulate(
        made.prepared.plan, made.prepared.layout, window, work, step, gpu.link, offload="host", share=share
    )  # fmt: skip
    return found.step_s / max(step.parts["the link"], step.forwards)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    head = [
        "# Predicted steps over their floor",
        "",
        "`python -m benchmarks.predicted`: MeZO, one row, all blocks streamed from host memory in the checkpoint's",
        "16 bits, the smallest window (3 slots). The floor is the larger of the link's time and the two forwards'; the",
        "step is simulated from the ops that run. From public rates (docs/planning.md); nothing was measured. In",
        "brackets: where the link binds and 3 slots are over 1.05, the least of 6, 12, 24 and 48 slots that is not. A",
        "run on a GPU takes as many slots as fit into its memory.",
        "",
    ]
    tell(itertools.chain(head, rows(args.models)), args.out)


if __name__ == "__main__":
    sys.exit(main())
