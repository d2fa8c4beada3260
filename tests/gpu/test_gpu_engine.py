"""On a GPU: whole runs. Losses and weights do not depend on where blocks live, how they move, or when they are read."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from zo_offload import BudgetError, Engine, MeZO
from zo_offload.devices.link import measure_link
from zo_offload.devices.nvml import DriverMemory

STEPS, VOCAB = 6, 499
METHOD = MeZO(lr=1e-3, eps=1e-3, weight_decay=0.1)


def model(hidden=64, layers=4, dtype=torch.bfloat16, vocab=VOCAB):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, ffn_dim=4 * hidden, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=hidden,
    )  # fmt: skip
    return OPTForCausalLM(config).to(dtype).eval()


def batches(n=STEPS):
    g = torch.Generator().manual_seed(5)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, VOCAB, (n, 2, 33), generator=g)]


def train(net=None, steps=STEPS, method=METHOD, micro_batches=1, **settings):
    with Engine(net if net is not None else model(), method=method, device="cuda", **settings) as engine:
        losses = engine.fit(batches(steps), steps=steps, batch_size=2, micro_batches=micro_batches).losses
        return losses, dict(engine.weights())


def assert_same(a, b):
    assert a[0] == b[0]
    for name in a[1]:
        assert torch.equal(a[1][name], b[1][name]), f"{name}: {(a[1][name] != b[1][name]).sum()} values differ"


WAYS = {
    "host": dict(offload="host"),
    "host, 2 slots": dict(offload="host", num_slots=2),
    "host, 4 slots, 1 ahead": dict(offload="host", num_slots=4, prefetch=1),
    "host, no overlap": dict(offload="host", overlap=False, num_slots=1),
    "host, staged": dict(offload="host", host_memory="staged"),
    "host, pinned": dict(offload="host", host_memory="pinned"),
    "host, block order": dict(offload="host", order="block"),
    "disk": dict(offload="disk"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype, more", [
    (torch.bfloat16, dict(fold_every=1)),
    (torch.float16, dict(fold_every=4)),
    (torch.float32, dict(storage="bf16+16", fold_every=2)),
    (torch.float32, dict(storage="int8", rounding="stochastic", fold_every=1)),
])  # fmt: skip
def test_where_blocks_live_changes_nothing(tmp_path, way, dtype, more):
    settings = WAYS[way] | more | (dict(run_dir=tmp_path / "run") if way == "disk" else {})
    assert_same(train(model(dtype=dtype), offload="none", **more), train(model(dtype=dtype), **settings))


def test_the_same_seed_twice():
    assert_same(train(offload="host"), train(offload="host"))


@pytest.mark.parametrize("num_slots", [2, 3])
def test_long_copies_short_compute(num_slots):
    """Wide, shallow blocks: a copy that is not waited for is wrong for certain."""
    wide = dict(hidden=2048, layers=6)
    assert_same(
        train(model(**wide), offload="none", fold_every=1),
        train(model(**wide), offload="host", num_slots=num_slots, fold_every=1),
    )


def test_micro_batches_and_a_resumed_run(tmp_path):
    whole = train(offload="disk", run_dir=tmp_path / "a", micro_batches=2)
    train(offload="disk", run_dir=tmp_path / "b", micro_batches=2, steps=3)
    with Engine.resume(tmp_path / "b", model()) as engine:
        engine.fit(batches(), steps=STEPS, batch_size=2, micro_batches=2, new_data=True)
        assert_same((None, whole[1]), (None, dict(engine.weights())))


def test_a_step_does_not_wait_for_the_gpu():
    """torch says where the host asked for a value; in the steps of a warm run nothing of ours does."""
    with Engine(model(), method=METHOD, device="cuda", offload="host") as engine:
        engine.fit(batches(3), steps=3, batch_size=2)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            import warnings

            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                engine._launch(batches(1)[0], None, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    ours = [str(w.filename) for w in caught if "zo_offload" in str(w.filename)]
    assert not ours, ours


def test_memory_that_is_not_there_is_an_error_with_numbers():
    with (
        pytest.raises(BudgetError, match=r"GPU memory were asked for|too small"),
        Engine(model(), method=METHOD, device="cuda", offload="host", device_memory="1kB") as engine,
    ):
        engine.fit(batches(), steps=1, batch_size=2)


def test_page_locking_that_is_refused(tmp_path):
    """In a process that may lock nothing; root may all the same, and then there is nothing to refuse."""
    code = (
        "import resource, sys, warnings; resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))\n"
        f"sys.path.insert(0, {str(__file__.rsplit('/', 1)[0])!r})\n"
        "import test_gpu_engine as t\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    t.assert_same(t.train(offload='none'), t.train(offload='host'))\n"
        "print('refused' if any('page-locked' in str(w.message) for w in caught) else 'allowed')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    if done.stdout.split()[-1] == "allowed":
        pytest.skip("this process may lock memory whatever its limit")


def test_the_budget_is_kept_as_the_driver_counts_it():
    memory = DriverMemory(0)
    before = memory.device_used()
    if before is None:
        pytest.skip(memory.reason)
    budget = 3 << 30
    with Engine(
        model(hidden=2048, layers=24), method=METHOD, device="cuda", offload="host", device_memory=budget
    ) as engine:  # fmt: skip
        engine.fit(batches(2), steps=2, batch_size=2)
        context = engine.device.context_bytes
        used = memory.device_used() - before
    assert used <= budget, f"{used >> 20} MiB used of {budget >> 20}, {context >> 20} MiB of it the context"


def test_the_link_has_two_directions():
    link = measure_link(torch.device("cuda:0"))
    assert min(link.fetch_gbs, link.flush_gbs, link.both_fetch_gbs, link.both_flush_gbs) > 1


def test_evaluation_and_export(tmp_path):
    with Engine(model(), method=METHOD, device="cuda", offload="host") as engine:
        engine.fit(batches(), steps=2, batch_size=2, eval_data=batches(), eval_every=1)
        engine.save_pretrained(tmp_path / "out")
        logits = engine.run(batches(1)[0]).logits.cpu()
    plain = OPTForCausalLM.from_pretrained(tmp_path / "out").cuda().eval()
    with torch.no_grad():
        expected = plain(batches(1)[0]["input_ids"].cuda()).logits.cpu()
    assert torch.allclose(logits.float(), expected.float(), atol=2e-2)
