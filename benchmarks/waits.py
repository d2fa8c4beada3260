"""Which code would make the host wait for a GPU in a step, asked of a GPU that is not there.

    python -m benchmarks.waits [--models opt llama ...] [--zoo]

Tiny models of transformers' classes on the tests' stand-in for a GPU (tests/support/fake_gpu.py), which notes every op
that would stop the host. A step of MeZO in bfloat16 with two lanes is launched and not read. One line a model and kind
of batch: no attention mask, a mask of ones, padded rows. `waits`: by file and line of the innermost caller outside of
torch, how often in one step. --zoo: all text models of the tests' zoo, padded.

Another version of transformers: `pip install --no-deps --target FOLDER transformers==5.17.0`, and PYTHONPATH=FOLDER.
"""

from __future__ import annotations

import argparse
import collections
import re
import sys
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import zo_offload.run.opening
from benchmarks.common import ROOT, about, emit
from zo_offload import Engine, MeZO
from zo_offload.modules import tiles
from zo_offload.numerics import cuda_kernels

sys.path.append(str(ROOT / "tests"))
from support.fake_gpu import FakeGpu, Gpu, HostKernels, reason  # type: ignore[import-not-found]
from support.zoo.archs import ARCH, build, lm_batch  # type: ignore[import-not-found]

MODELS = "opt llama qwen3 mistral gemma3 phi3 mixtral gpt_oss deepseek_v3 gpt2 t5".split()
MASKS = ("none", "ones", "padded")


def masked(batch: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """The batch with such a mask; None: it has no rows that can be padded."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor):
        return None
    mask = torch.ones_like(ids)
    if kind == "padded":
        mask[0, -2:] = 0
    batch = {key: value for key, value in batch.items() if key != "attention_mask"}
    return batch if kind == "none" else batch | {"attention_mask": mask}


def waits_of(name: str, kind: str) -> dict[str, int] | None:
    """The places that wait in a step, and how often."""
    batch = masked(ARCH[name].batch(0), kind)
    if batch is None:
        return None
    gpu = Gpu()
    with (
        patch.object(zo_offload.run.opening, "make_device", lambda _: FakeGpu(gpu, longest_s=1e-4)),
        patch.object(cuda_kernels, "kernels", lambda _: HostKernels(gpu)),
        patch.object(tiles, "_is_plain", lambda _: True),
        gpu,
        Engine(
            build(ARCH[name]).bfloat16(), method=MeZO(lr=1e-3), device="cuda", offload="host", num_slots=2
        ) as engine,
    ):
        for _ in range(2):  # the first pass is watched
            engine.step(batch)
        gpu.waits.clear()
        launched = engine.active.launch(batch)
        places = [wait.split(" at ")[1].split(" < ")[0] for wait in gpu.waits]
        engine.active.finish(launched)
    return dict(collections.Counter(re.sub(r".*/(?=transformers/|zo_offload/)", "", place) for place in places))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--zoo", action="store_true")
    options = parser.parse_args()
    if reason():
        raise SystemExit(reason())
    torch.set_num_threads(1)
    common = about("waits")
    names = [name for name, arch in ARCH.items() if arch.batch is lm_batch] if options.zoo else options.models
    for name in names:
        for kind in ("padded",) if options.zoo else MASKS:
            found = waits_of(name, kind)
            if found is not None:
                emit({"model": name, "mask": kind, "a_step": sum(found.values()), "waits": found}, common)


if __name__ == "__main__":
    main()
