"""On a GPU: whole runs. Losses and weights do not depend on where blocks live, how they move, or when they are read."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

import zo_offload
from support import training
from support.compare import assert_same
from zo_offload import FZOO, BudgetError, Engine, MeZO
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
    return training.batches(n, rows=2, length=33, vocab=VOCAB)


def train(net=None, steps=STEPS, method=METHOD, micro_batches=1, **settings):
    with Engine(net if net is not None else model(), method=method, device="cuda", **settings) as engine:
        losses = engine.fit(batches(steps), steps=steps, batch_size=2, micro_batches=micro_batches).losses
        return losses, dict(engine.weights())


@functools.cache
def resident(dtype, **more):
    """What every way below must give."""
    return train(model(dtype=dtype), offload="none", **more)


# without num_slots a GPU keeps all blocks that its memory takes: of models as small as these, all of them
WAYS = {
    "host, blocks kept": dict(offload="host"),
    "host, 3 slots": dict(offload="host", num_slots=3),
    "host, 2 slots": dict(offload="host", num_slots=2),
    "host, 4 slots, 1 ahead": dict(offload="host", num_slots=4, prefetch=1),
    "host, no overlap": dict(offload="host", overlap=False, num_slots=1),
    "host, staged": dict(offload="host", num_slots=3, host_memory="staged"),
    "host, pinned": dict(offload="host", num_slots=3, host_memory="pinned"),
    "host, block order": dict(offload="host", num_slots=3, order="block"),
    "disk": dict(offload="disk", num_slots=3),
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
    assert_same(train(model(dtype=dtype), **settings), resident(dtype, **more))


def test_many_directions_a_step():
    # with the weights themselves more lanes than one launch takes
    settings = dict(method=FZOO(lr=1e-3, directions=18, weight_decay=0.1), steps=3, fold_every=2)
    assert_same(train(offload="none", **settings), train(offload="host", **settings))


def test_the_same_seed_twice():
    assert_same(*(train(offload="host", num_slots=2, steps=4) for _ in range(2)))


@pytest.mark.parametrize("num_slots", [2, 3])
def test_long_copies_short_compute(num_slots):
    """Wide, shallow blocks: a copy that is not waited for is wrong for certain."""
    wide = dict(hidden=2048, layers=6)
    assert_same(
        train(model(**wide), offload="none", fold_every=1),
        train(model(**wide), offload="host", num_slots=num_slots, fold_every=1),
    )


def test_micro_batches_and_a_resumed_run(tmp_path):
    disk = dict(offload="disk", num_slots=2, micro_batches=2)
    whole = train(run_dir=tmp_path / "a", **disk)
    train(run_dir=tmp_path / "b", steps=3, **disk)
    with Engine.resume(tmp_path / "b", model()) as engine:
        engine.fit(batches(), steps=STEPS, batch_size=2, micro_batches=2, new_data=True)
        assert_same(whole[1], dict(engine.weights()))


@pytest.mark.parametrize("offload", ["none", "host"])
def test_a_step_does_not_wait_for_the_gpu(monkeypatch, offload):
    """torch says where the host asked for a value, and our own waits are noted: a warm run's steps have neither."""
    with Engine(model(), method=METHOD, device="cuda", offload=offload, num_slots=3) as engine:
        engine.fit(batches(3), steps=3, batch_size=2)
        backend, waits = engine.device.backend, []

        def watch(name):
            original = getattr(backend, name)

            def noted(what):
                if threading.current_thread() is threading.main_thread():
                    waits.append(name)
                original(what)

            monkeypatch.setattr(backend, name, noted)

        watch("synchronize")
        watch("drain")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                engine.active.launch(batches(1)[0])
            found = list(waits)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        monkeypatch.undo()
    package = Path(zo_offload.__file__).parent
    ours = [f"{w.filename}:{w.lineno}" for w in caught if Path(w.filename).is_relative_to(package)]
    assert not ours and not found, (ours, found)


def test_memory_that_is_not_there_is_an_error_with_numbers():
    with (
        pytest.raises(BudgetError, match=r"GPU memory were asked for|too small"),
        Engine(model(), method=METHOD, device="cuda", offload="host", device_memory="1kB") as engine,
    ):
        engine.fit(batches(), steps=1, batch_size=2)


def test_memory_may_be_locked_or_not():
    """Prints whether it was: the test below runs this one where it should not be."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same(train(offload="none", steps=2), train(offload="host", num_slots=2, steps=2))
    print("locking was", "refused" if any("page-locked" in str(w.message) for w in caught) else "allowed")


def test_page_locking_that_is_refused():
    """In a process that may lock nothing; root may all the same, and then there is nothing to refuse."""
    code = (
        "import pytest, resource, sys; resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))\n"
        f"sys.exit(pytest.main(['-q', '-s', '-p', 'no:cacheprovider', {__file__!r}, '-k', 'locked_or_not']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "locking was" in done.stdout
    if "locking was allowed" in done.stdout:
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


def test_the_link_has_two_directions(gpu):
    """Rates are of all that was copied, and none is better than the clock allows; however busy the machine is."""
    nbytes, repeats = 64 << 20, 4
    start = time.perf_counter()
    link = measure_link(torch.device(gpu), nbytes, repeats)
    wall = time.perf_counter() - start
    copied = repeats * nbytes / 1e9
    seconds = [copied / rate for rate in (link.fetch_gbs, link.flush_gbs, link.both_fetch_gbs, link.both_flush_gbs)]
    assert seconds[0] + seconds[1] + max(seconds[2:]) <= wall
    if gpu == "cuda":  # copies there do not wait for a busy host
        assert min(copied / s for s in seconds) > 0.5


def test_evaluation_and_export(gpu, tmp_path):
    with Engine(model(), method=METHOD, device="cuda", offload="host", num_slots=2) as engine:
        engine.fit(batches(), steps=2, batch_size=2, eval_data=batches(), eval_every=1)
        engine.save_pretrained(tmp_path / "out")
        logits = engine.run(batches(1)[0]).logits.cpu()
    plain = OPTForCausalLM.from_pretrained(tmp_path / "out").to(gpu).eval()
    with torch.no_grad():
        expected = plain(batches(1)[0]["input_ids"].to(gpu)).logits.cpu()
    assert torch.allclose(logits.float(), expected.float(), atol=2e-2)


def test_generated_ids_do_not_depend_on_where_blocks_live():
    inputs = {"input_ids": batches(1)[0]["input_ids"][:, :7], "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    found = []
    for offload in ("none", "host"):
        with Engine(model(), method=METHOD, device="cuda", offload=offload) as engine:
            engine.fit(batches(2), steps=2, batch_size=2)
            found.append(engine.generate(inputs, max_new_tokens=9, do_sample=False).cpu())
    assert torch.equal(*found) and found[0].shape == (2, 16)
