"""On a GPU: linear layers in pieces. No copy of the output; as near to the exact product as the whole one; any tier."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from support.training import squares
from support.zoo.archs import ARCH, build
from zo_offload import Engine, MeZO
from zo_offload.modules.tiles import tiled_linear

CUTS = [slice(0, 512), slice(512, 1024), slice(1024, 1349)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pieces_are_as_exact_as_the_whole_and_are_written_in_place(dtype, autocast, bias, gpu):
    torch.manual_seed(0)
    x, w = torch.randn(4, 96, 256).to(gpu, dtype), torch.randn(1349, 256).to(gpu, dtype)
    b = torch.randn(1349).to(gpu, dtype) if bias else None
    with torch.no_grad(), torch.autocast(gpu, torch.bfloat16, enabled=autocast, cache_enabled=False):
        whole = F.linear(x, w, b)
        tiled_linear(x, CUTS, lambda k: w[CUTS[k]], b)  # the library's workspace comes with the first product
        if gpu == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        got = tiled_linear(x, CUTS, lambda k: w[CUTS[k]], b)
        if gpu == "cuda" and not autocast:
            assert torch.cuda.max_memory_allocated() - before <= whole.nbytes + 2048
    assert got.dtype == whole.dtype and got.is_contiguous()
    exact = F.linear(x.double(), w.double(), None if b is None else b.double())
    error, plain = ((y.double() - exact).abs().max() for y in (got, whole))
    assert error <= 2 * plain


@pytest.mark.parametrize("name", ["opt", "llama-tied", "mixtral", "t5"])
def test_an_architecture_in_pieces_streams_as_it_runs_resident(name):
    arch = ARCH[name]
    batch = arch.batch(0)

    def losses(offload: str, **settings) -> list[float]:
        with Engine(build(arch), method=MeZO(lr=1e-3), objective=squares, device="cuda", offload=offload, example=batch,
                    block_numel=700, **settings) as engine:  # fmt: skip
            return [engine.step(batch).loss for _ in range(3)]

    assert losses("none") == losses("host", num_slots=2) == losses("host", num_slots=3, order="block")
