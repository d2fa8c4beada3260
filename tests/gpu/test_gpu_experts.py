"""On a GPU: stacked experts in runs. The host does not wait; as near to the exact sum as the whole; any tier."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from support.training import squares
from support.zoo.archs import ARCH, build
from zo_offload import Engine, MeZO
from zo_offload.modules.experts import in_runs, set_rows

E, H, F, TOKENS = 8, 64, 96, 70


def experts(cls, implementation, gpu, dtype):
    config = SimpleNamespace(
        num_local_experts=E, hidden_size=H, intermediate_size=F, hidden_act="silu", swiglu_alpha=1.7, swiglu_limit=7.0,
        _experts_implementation=implementation,
    )  # fmt: skip
    torch.manual_seed(0)
    module = cls(config).to(gpu, dtype)
    for p in module.parameters():
        p.data.copy_(torch.randn(p.shape) * 0.2)
    return module


def in_parts(module, held, given):
    """Rows that are gone when the next ones are there, as in scratch; a run of one expert is followed by itself."""
    whole = [p.data for p in module.parameters()]
    memory = [torch.full_like(w[:held], float("nan")) for w in whole]
    runs = [slice(first, first + held) for first in range(0, E, held)]

    def hold(k):
        set_rows(module, [m.copy_(w[runs[k]]) for m, w in zip(memory, whole, strict=True)])

    try:
        return in_runs(module, runs, given, {}, hold)
    finally:
        set_rows(module, whole)


@pytest.mark.parametrize("held", [1, 2, 4])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("cls", [MixtralExperts, GptOssExperts])
def test_runs_of_experts_are_as_exact_as_the_whole_and_grouped_ones_do_not_wait(cls, implementation, held, gpu):
    module, exact = experts(cls, implementation, gpu, torch.bfloat16), experts(cls, "eager", gpu, torch.float64)
    for p, q in zip(exact.parameters(), module.parameters(), strict=True):
        p.data.copy_(q.data)
    x = torch.randn(TOKENS, H).to(gpu, torch.bfloat16)
    index = torch.rand(TOKENS, E).argsort(1)[:, :3].to(gpu)
    weights = torch.rand(TOKENS, 3).to(gpu, torch.bfloat16)
    with torch.no_grad():
        whole, want = module(x, index, weights), exact(x.double(), index, weights.double())
        in_parts(module, held, (x, index, weights))  # libraries are loaded with the first products
        try:
            torch.cuda.set_sync_debug_mode("error" if implementation == "grouped_mm" else "default")
            got = in_parts(module, held, (x, index, weights))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        again = in_parts(module, held, (x, index, weights))
    assert torch.equal(got, again)
    error, plain = ((y.double() - want).square().mean().sqrt() for y in (got, whole))
    assert error <= 1.5 * plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_in_runs_stream_as_they_run_resident(name, dtype):
    arch = ARCH[name]
    batch = arch.batch(0)

    def losses(offload: str, **settings) -> list[float]:
        with Engine(build(arch).to(dtype), method=MeZO(lr=1e-3), objective=squares, device="cuda", offload=offload,
                    example=batch, block_numel=5000, **settings) as engine:  # fmt: skip
            assert any(len(engine.plan.portions(owner)) > 1 for owner in engine.plan.owners if "experts" in owner.name)
            return [engine.step(batch).loss for _ in range(3)]

    assert losses("none") == losses("host", num_slots=2) == losses("host", num_slots=3, order="block")
