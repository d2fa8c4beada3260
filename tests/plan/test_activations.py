"""Activations: what is found on meta is what torch's allocator hands out in a real forward, and lanes hold."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from torch.profiler import ProfilerActivity, profile

from zo_offload.modules.chunked_loss import losses_in_chunks
from zo_offload.modules.watch import UseWatch
from zo_offload.plan.activations import is_fused, measure_activations, merged
from zo_offload.plan.plan import make_plan

_SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512)
_LLAMA = dict(_SIZES, vocab_size=200, intermediate_size=256, num_key_value_heads=2)
MODELS = {
    "opt": ("OPTForCausalLM", "OPTConfig", dict(_SIZES, vocab_size=200, ffn_dim=256, word_embed_proj_dim=64)),
    "opt, large vocabulary": (
        "OPTForCausalLM",
        "OPTConfig",
        dict(_SIZES, vocab_size=20_000, ffn_dim=256, word_embed_proj_dim=64),
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", dict(_LLAMA, num_local_experts=4)),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", dict(vocab_size=200, n_embd=64, n_layer=2, n_head=4, n_positions=512)),
    "bloom": ("BloomForCausalLM", "BloomConfig", dict(vocab_size=200, hidden_size=64, n_layer=2, n_head=4)),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", dict(_SIZES, vocab_size=200, intermediate_size=256)),
}


def loss(model, batch):
    return model(**batch).loss


def batch_of(tokens=256):
    ids = torch.randint(5, 190, (2, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def build(name, dtype=torch.float32, **more):
    model, config, sizes = MODELS[name]
    return getattr(tf, model)(getattr(tf, config)(**sizes, **more)).eval().to(dtype)


def handed_out(run, folder) -> int:
    """The most bytes that torch's CPU allocator had out at once during a run, beside what was out before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    path = folder / "trace.json"
    seen.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_meta_counts_what_the_allocator_hands_out(name, dtype, tmp_path):
    model, batch = build(name, dtype), batch_of()
    found = measure_activations(model, make_plan(model, batch, call=loss), batch, loss)

    def run():
        with torch.no_grad(), losses_in_chunks(model):
            loss(model, batch)

    run()  # tables that a model makes at its first call are not activations
    assert found.peak == pytest.approx(handed_out(run, tmp_path), rel=0.01)
    assert found.inputs == 2 * batch["labels"].nbytes


def test_the_cpu_has_a_fused_kernel_where_torch_says_so():
    cases = [((4, 8), {}), ((2, 8), dict(enable_gqa=True)), ((4, 6), {}), ((4, 8), dict(dropout_p=0.1))]
    for heads, size in {case for case, _ in cases}:
        for more in (more for case, more in cases if case == (heads, size)):
            q, k, v = torch.zeros(1, 4, 16, 8), torch.zeros(1, heads, 16, 8), torch.zeros(1, heads, 16, size)
            assert is_fused("cpu", q, k, v, **more) == (torch._fused_sdp_choice(q, k, v, **more) == 1), (heads, more)


def test_a_gpu_has_flash_for_16_bits_and_else_the_efficient_kernel():
    q, wide, mask = torch.zeros(1, 4, 16, 8), torch.zeros(1, 4, 16, 6), torch.ones(1, 1, 16, 16).bool()
    half = q.bfloat16()
    assert is_fused("cuda", half, half, half) and is_fused("cuda", half, half, half, mask)
    assert is_fused("cuda", half, half, half, enable_gqa=True)
    assert not is_fused("cuda", half, half, half, mask, enable_gqa=True)
    assert is_fused("cuda", q, q, wide) and not is_fused("cuda", q, q, q, enable_gqa=True)


def starts_of_blocks(name, **more):
    model, batch = build(name, **more), batch_of()
    found = measure_activations(model, make_plan(model, batch, call=loss), batch, loss)
    return found, [segment.held for segment in merged(found.segments)]


def test_waiting_lanes_hold_less_than_a_running_one():
    found, held = starts_of_blocks("opt", use_cache=False)
    by_module, by_block, by_lane = (found.together(order, 2) for order in ("module", "block", "lane"))
    assert by_lane == found.peak + found.inputs < by_block <= by_module < 2 * found.peak
    hidden = 2 * 256 * 64 * 4
    assert held[0] == 0 and held[2] == held[3], "the same before each layer"
    assert 3 * hidden <= held[2] < 3.1 * hidden, "hidden states, and two embeddings that OPT's forward does not let go"


def test_a_cache_is_held_from_block_to_block():
    _, held = starts_of_blocks("opt", use_cache=True)
    assert held[3] - held[2] == 2 * 2 * 256 * 64 * 4, "keys and values of a layer"


def test_a_watch_keeps_nothing_of_memory_that_is_gone():
    """A struct kept for each module's weights would lie in the holes that the next layer's activations need."""
    watch = UseWatch({})
    kept, gone = torch.zeros(3), torch.zeros(3)
    assert watch.track(kept, "kept") is not None and watch.track(gone, "gone") is not None
    view = gone[1:]
    del gone
    assert len(watch.origins) == 2, "a view may still be used"
    del view
    assert [origin.name for origin in watch.origins.values()] == ["kept"]


def test_a_forward_that_needs_values_says_why_nothing_is_known():
    class Picky(torch.nn.Linear):
        def forward(self, x):
            if float(self.weight.sum().item()) == 1.0:
                raise RuntimeError("made up")
            return super().forward(x)

    model = torch.nn.Sequential(Picky(4, 4), Picky(4, 4))
    call = lambda m, b: m(b["x"])  # noqa: E731
    batch = {"x": torch.zeros(2, 4)}
    found = measure_activations(model, make_plan(model, batch, call=call), batch, call)
    assert found.segments == () and found.peak == 0 and found.unknown == "RuntimeError: made up"
    assert found.together("module", 2) == batch["x"].nbytes
