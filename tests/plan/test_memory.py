"""Memory: the plan's terms on small cases, and a real process that stays inside the prediction."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from support.planning import plan_report
from zo_offload import BudgetError, Engine, MeZO
from zo_offload.plan.activations import Activations, Segment
from zo_offload.run.memory import pinned_blocks, plan_memory
from zo_offload.stream.scratch import ScratchPool
from zo_offload.system import host_memory

ROOT = Path(__file__).resolve().parents[2]


def engine(**settings):
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=8, intermediate_size=128, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    return Engine(LlamaForCausalLM(config).eval(), offload="host", method=MeZO(lr=1e-4), **settings)


def planned(made, **settings):
    return plan_memory(made.plan, made.layout, offload="host", perturbations=2, rows=8, **settings)


def test_terms_are_what_their_names_say():
    made = engine()
    layer = made.layout.block_bytes[made.plan.block_of("model.layers.0.mlp.gate_proj.weight")]
    held = Activations((Segment(-1, 0, 50), Segment(0, 10, 900), Segment(1, 100, 1000), Segment(1, 200, 800)), 7)
    plan = planned(made, activations=held)
    assert plan.terms["window"] == 3 * max(layer, made.layout.block_bytes[0])
    assert plan.terms["pinned"] == 0 and plan.order == "module"
    assert plan.terms["store"] == made.layout.total_bytes
    # one lane in the third segment, the other before the fourth; before the block of both; or not under way at all
    assert plan.terms["activations"] == 7 + 1000 + 200
    assert planned(made, activations=held, order="block").terms["activations"] == 7 + 1000 + 100
    assert planned(made, activations=held, order="lane").terms["activations"] == 7 + 1000
    assert planned(made, activations=held, micro_batches=3).terms["activations"] == 3 * 7 + 1000 + 5 * 200
    # the head is the largest module: 128 x 64 fp32, once a perturbation
    assert plan.terms["scratch"] == 2 * 128 * 64 * 4
    assert planned(made, order="block").terms["scratch"] == 128 * 64 * 4


def test_a_larger_budget_pins_more_and_is_kept():
    made = engine()
    least = planned(made, order="block", num_slots=2).device_bytes
    pinned = []
    for budget in range(least, least + 2 * made.layout.total_bytes, made.layout.total_bytes // 7):
        plan = planned(made, budget=budget)
        assert plan.device_bytes <= budget
        pinned.append(len(plan.window.pinned))
    assert pinned == sorted(pinned) and pinned[0] < pinned[-1] == len(made.plan.blocks)
    with pytest.raises(BudgetError, match="is too small: the least that works"):
        planned(made, budget=least - 1)


def test_pinned_blocks_are_the_often_visited_ones_then_spread():
    made = engine()
    tied = made.plan.block_of("model.embed_tokens.weight")
    assert pinned_blocks(made.plan, 1) == {tied}
    four = sorted(pinned_blocks(made.plan, 4) - {tied})
    assert len(four) == 3 and min(b - a for a, b in itertools.pairwise(four)) >= 2
    assert len(pinned_blocks(made.plan, len(made.plan.blocks))) == len(made.plan.blocks)


def test_scratch_is_used_again():
    pool = ScratchPool(lambda n: torch.empty(n, dtype=torch.uint8))
    for size in (10, 1000, 50, 1000):
        scratch = pool.take([(size,), (3, 5)], [torch.float32, torch.bfloat16], 2)
        assert [t.shape for t in scratch.tensors[1]] == [(size,), (3, 5)]
        scratch.tensors[0][0].fill_(1), scratch.tensors[1][0].fill_(2)
        assert float(scratch.tensors[0][0].sum()) == size
        assert {(t.data_ptr() - scratch.buffer.data_ptr()) % 256 for row in scratch.tensors for t in row} == {0}
        pool.give(scratch.tensors)
    assert pool.peak_bytes == 2 * (4096 + 256)
    outer, inner = pool.take([(5,)], [torch.float32], 1), pool.take([(5,)], [torch.float32], 1)
    third = pool.take([(2000,)], [torch.float32], 1)
    places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for s in (outer, inner, third) for t in s.tensors[0])
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places)), "none lies on another"
    assert pool.nbytes == pool.peak_bytes == 2 * (4096 + 256), "all three in the room of one"
    pool.give(inner.tensors)
    assert pool.take([(6,)], [torch.float32], 1).tensors[0][0].data_ptr() == inner.tensors[0][0].data_ptr()
    assert pool.take([(200,)], [torch.float32], 1).buffer.data_ptr() != outer.buffer.data_ptr(), "no room left"
    assert pool.nbytes == 2 * (4096 + 256) + 1024


def test_paper_sizes_are_planned_without_weights():
    lines = plan_report("opt-175b", storage="bf16", tokens=256)
    text = "\n".join(lines)
    assert "174.604 G parameters" in text and "x 96" in text and "349.21 GB" in text
    assert "tied, stored and perturbed once" in text


TRAINS_IN_LITTLE = """
import json, sys
sys.path.insert(0, {root!r})
import torch
from transformers import OPTConfig, OPTForCausalLM
from benchmarks.memory import RandomBase, high_water_bytes
from zo_offload import Engine, MeZO
torch.set_num_threads(2)
config = OPTConfig(vocab_size=512, hidden_size=512, num_hidden_layers={layers}, ffn_dim=2048, num_attention_heads=8,
                   word_embed_proj_dim=512, max_position_embeddings=64)
with torch.device("meta"):
    model = OPTForCausalLM(config).eval()
model.tie_weights()
ids = torch.randint(5, 500, (2, 16))
batch = dict(input_ids=ids, labels=ids)
engine = Engine(model, base=RandomBase({{n: p.shape for n, p in model.named_parameters()}}), method=MeZO(lr=1e-6),
                storage="fp32", offload="disk", run_dir={run!r}, example=batch)
predicted = engine.memory
with engine:
    for _ in range(3):
        engine.step(batch)
    resident = engine.active.streamer.resident_bytes
process, model = predicted.terms["process"], engine.layout.total_bytes
print(json.dumps([high_water_bytes(), predicted.total_bytes, process, resident, model]))
"""


def test_a_model_many_times_the_window_stays_inside_the_prediction(tmp_path, layers=12):
    code = TRAINS_IN_LITTLE.format(root=str(ROOT), layers=layers, run=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, predicted, process, resident, model = json.loads(done.stdout)
    assert resident == 3 * model // layers or resident < 3.2 * model / layers, "three layers at a time"
    assert 0.8 * predicted < peak <= 1.05 * predicted
    if layers == 36:
        assert model >= 5 * resident
        assert peak - process < model / 3, "far less than the model"


def test_a_control_groups_limit_counts_and_files_that_it_caches_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    monkeypatch.delenv("ZO_HOST_MEMORY", raising=False)
    host = host_memory.available_bytes()
    assert host > 3 << 20
    for name, text in [("max", "9000000\n"), ("current", "6000000\n"),
                       ("stat", "anon 1\nactive_file 300\ninactive_file 1000000\nfile_mapped 5\n")]:  # fmt: skip
        (tmp_path / f"memory.{name}").write_text(text)
    assert host_memory.available_bytes() == 9_000_000 - 6_000_000 + 1_000_300
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory.available_bytes() > 1 << 24
