"""Whole runs on tensors that are not the host's (`fake_gpu.py`): nothing is mixed up, and nothing waits in a step.

What a model's own code does is its own; here it is asked what ours does around it. Numbers are compared within the
fake GPU: torch attends there by other kernels than on the CPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from transformers import OPTForCausalLM

import zo_offload.run.opening
from support import training
from support.compare import assert_same
from support.fake_gpu import DEVICE, FakeGpu, Gpu, GpuTensor, HostKernels, MixedDevices, reason
from support.training import METHOD, squares
from support.zoo.archs import ARCH, build
from support.zoo.small import tiny_opt
from zo_offload import Engine, MeZO
from zo_offload.devices import placing
from zo_offload.modules import tiles
from zo_offload.modules.experts import products_run_ahead
from zo_offload.numerics import cuda_kernels
from zo_offload.numerics.on_gpu import OnGpu
from zo_offload.replay import replayed

pytestmark = pytest.mark.skipif(bool(reason()), reason=reason() or "-")


STEPS, VOCAB = 4, 97


def small_opt():
    return tiny_opt(2, vocab=VOCAB, hidden=16)


def batches(n):
    return training.batches(n, length=9, vocab=VOCAB)


@pytest.fixture
def gpu(monkeypatch):
    """The memory of a GPU; engines with device="cuda" use it, each with streams of its own."""
    gpu = Gpu()
    made = gpu.devices = []

    def make_device(name):
        made.append(FakeGpu(gpu, longest_s=2e-4))
        return made[-1]

    kernels = HostKernels(gpu)
    monkeypatch.setattr(zo_offload.run.opening, "make_device", make_device)
    monkeypatch.setattr(cuda_kernels, "kernels", lambda index: kernels)
    monkeypatch.setattr(tiles, "_is_plain", lambda x: True)  # a GpuTensor is one to the code that runs on a GPU
    with gpu:
        yield gpu
    for device in made:
        assert not device.backend.races and not device.backend.foreign


def ours(waits):
    """Waits whose innermost caller outside of torch is this package."""
    innermost = (wait.split(" at ")[1].split(" < ")[0] for wait in waits)
    return [where for where in innermost if "zo_offload/" in where and "watch.py" not in where]


TIERS = {
    "none": dict(offload="none"),
    "host": dict(offload="host", num_slots=2),
    "host, staged": dict(offload="host", num_slots=2, host_memory="staged"),
    "host, block order": dict(offload="host", num_slots=3, order="block"),
    "disk": dict(offload="disk", num_slots=2),
}
MORE = {
    "folds": dict(fold_every=3),
    "split": dict(storage="int8+8", fold_every=2),
    "pieces": dict(block_numel=600, fold_every=2),
    "frozen": dict(trainable="model.decoder.layers.1.*"),
}


@pytest.mark.parametrize("more", MORE)
def test_every_tier_gives_the_same_numbers_and_waits_for_nothing(gpu, tmp_path, more):
    results = []
    tiers = TIERS if more == "folds" else {name: TIERS[name] for name in ("none", "host")}
    for name, tier in tiers.items():
        settings = MORE[more] | tier | (dict(run_dir=tmp_path / name) if name == "disk" else {})
        with Engine(small_opt(), method=METHOD, device="cuda", **settings) as engine:
            losses = engine.fit(batches(2), steps=2, batch_size=4, micro_batches=2).losses
            gpu.waits.clear()
            launched = [engine.active.launch(batch, micro_batches=2) for batch in batches(3)]
            assert ours(gpu.waits) == []
            losses += [engine.active.finish(step).loss for step in launched]
            results.append((losses, dict(engine.weights())))
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_models_that_look_at_masks_wait_for_nothing(gpu, monkeypatch, name):
    """transformers' code asks whether rows are padded; the numbers are the same if it has to ask the GPU."""
    batch = ARCH[name].batch(0)
    mask = torch.ones_like(batch["input_ids"])
    padded = batch | {"attention_mask": mask.clone()}
    padded["attention_mask"][0, -2:] = 0
    losses = []
    for asked in (False, True):
        if asked:
            monkeypatch.setattr(placing, "known", lambda there, host: there)
        with Engine(build(ARCH[name]), method=METHOD, device="cuda", offload="host", num_slots=2) as engine:
            losses.append([engine.step(each).loss for each in (padded, batch | {"attention_mask": mask})])
            gpu.waits.clear()
            launched = engine.active.launch(padded)
            waited = [wait for wait in gpu.waits if "watch.py" not in wait]
            assert bool(waited) == asked, waited
            losses[-1].append(engine.active.finish(launched).loss)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_a_step_launches_once_an_owner_with_the_numbers_of_once_a_parameter(gpu, monkeypatch, storage):
    """Weight and bias together; a format of its own (what is too small for groups) is a launch of its own."""
    results, launches = [], []
    for joined in (True, False):
        if not joined:
            monkeypatch.setattr(OnGpu, "ready", lambda self, calls: None)
        with Engine(
            small_opt(), method=METHOD, device="cuda", offload="host", num_slots=2, storage=storage, fold_every=2
        ) as engine:
            losses, kernels = engine.fit(batches(3), steps=3, batch_size=4).losses, cuda_kernels.kernels(0)
            kernels.launches.clear()
            losses.append(engine.step(batches(4)[3]).loss)
            launches.append(len(kernels.launches))
            results.append((losses, dict(engine.weights())))
            plan, places = engine.plan, engine.active.streamer.layout.places
            owners = [plan.pieces_in(plan.owners[call]) for call in plan.calls]
    assert_same(*results)
    formats = [{(places[piece].block, places[piece].fmt.name) for piece in pieces} for pieces in owners]
    assert launches == [sum(map(len, formats)), sum(map(len, owners))]
    assert launches[0] == len(owners) < launches[1] or storage == "int8"


def test_the_device_is_entered_once_a_pass_not_once_a_launch(gpu, monkeypatch):
    """With another GPU as torch's current one, each launch would switch and switch back."""
    inside, launch = [], HostKernels.launch

    def watched(self, *args):
        inside.append(gpu.devices[-1].backend.depth)
        launch(self, *args)

    with Engine(small_opt(), method=METHOD, device="cuda", offload="host", num_slots=2) as engine:
        engine.step(batches(1)[0])
        backend = gpu.devices[-1].backend
        monkeypatch.setattr(HostKernels, "launch", watched)
        before = backend.entries
        engine.step(batches(2)[1])
        assert backend.entries - before == 1 and len(inside) > 10 and set(inside) == {1}


@pytest.mark.parametrize("name", "llama-tied gpt2 gpt_oss t5 Rows Routed Overlap NestedTies".split())
def test_an_architecture_streams_as_it_runs_resident(gpu, name):
    arch = ARCH[name]

    def losses(offload, **settings):
        with Engine(
            build(arch), method=MeZO(lr=1e-3), objective=squares, device="cuda", offload=offload, example=arch.batch(0),
            **settings,
        ) as engine:  # fmt: skip
            found = [engine.step(arch.batch(0)).loss]
            gpu.waits.clear()
            launched = engine.active.launch(arch.batch(1))
            # float32 products of experts wait in torch anyway: there their rows are looked at, once a call
            assert [where for where in ours(gpu.waits) if "experts.py" not in where] == []
            return [*found, engine.active.finish(launched).loss]

    assert losses("none", block_numel=700) == losses("host", num_slots=2, block_numel=700)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_wait_only_where_torchs_product_does(gpu, monkeypatch, dtype):
    """bf16 on Hopper and Blackwell's data centre cards: torch's grouped product runs ahead, and so do we. Elsewhere it
    copies its offsets to the host twice a run of experts: the rows are read once a call instead."""
    arch = ARCH["gpt_oss"]
    with Engine(
        build(arch).to(dtype), method=MeZO(lr=1e-3), device="cuda", offload="host", num_slots=2, block_numel=700
    ) as engine:
        engine.step(arch.batch(0))
        gpu.waits.clear()
        launched = engine.active.launch(arch.batch(1))
        waits = [wait for wait in gpu.waits if "experts.py" in wait or "_grouped_mm" in wait]
        engine.active.finish(launched)
    assert bool(waits) == (dtype is torch.float32)
    for capability, ahead in (((9, 0), True), ((10, 0), True), ((8, 9), False), ((12, 0), False), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        assert products_run_ahead(DEVICE, torch.bfloat16) is ahead
        assert not products_run_ahead(DEVICE, torch.float16)
    assert not products_run_ahead(torch.device("cpu"), torch.bfloat16)


def test_evaluation_of_a_split_format_stays_on_the_gpu(gpu):
    """Both planes of every piece went to the host and back, at every batch."""
    settings = dict(method=METHOD, device="cuda", offload="host", num_slots=2, storage="int8+8", fold_every=2)
    with Engine(small_opt(), **settings) as engine:
        engine.fit(batches(3), steps=3, batch_size=4)
        engine.evaluate(batches(1), batch_size=4)
        gpu.waits.clear()
        engine.evaluate(batches(1), batch_size=4)
        assert not [wait for wait in gpu.waits if "zo_offload/stream/" in wait or "zo_offload/numerics/" in wait]


@pytest.mark.parametrize("offload", ["none", "host", "disk"])
def test_a_run_is_evaluated_snapshotted_resumed_and_exported(gpu, tmp_path, offload):
    settings = dict(device="cuda", offload=offload, snapshot_steps=2, storage="int8+8", fold_every=2)
    settings |= {} if offload == "none" else dict(num_slots=2)
    options = dict(batch_size=4, eval_data=batches(2), eval_every=2)
    with Engine(small_opt(), method=METHOD, run_dir=tmp_path / "whole", **settings) as engine:
        whole = engine.fit(batches(STEPS), steps=STEPS, **options), dict(engine.weights())
    with Engine(small_opt(), method=METHOD, run_dir=tmp_path / "run", **settings) as engine:
        engine.fit(batches(STEPS), steps=3, **options)
    with Engine.resume(tmp_path / "run", small_opt()) as engine:
        again = engine.fit(batches(STEPS), steps=STEPS, new_data=True, **options)
        assert_same((again.evals[-1], whole[1]), (whole[0].evals[-1], dict(engine.weights())))
        engine.save_pretrained(tmp_path / "out")
    plain = OPTForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, whole[1][name])


@pytest.mark.parametrize("offload", ["none", "host"])
def test_what_is_restored_is_where_it_was(gpu, offload):
    """The module as it was given, on the host: buffers as well as parameters, so that it runs."""
    model = build(ARCH["llama"])
    with Engine(model, method=METHOD, device="cuda", offload=offload) as engine:
        engine.step(ARCH["llama"].batch(0))
        expected = dict(engine.weights())
        assert engine.restore() is model
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]) and not isinstance(parameter, GpuTensor)
    with torch.no_grad():
        assert model(**ARCH["llama"].batch(0)).loss.isfinite()


def test_a_checkpoint_is_trained_and_replayed(gpu, tmp_path):
    small_opt().save_pretrained(tmp_path / "base")
    with Engine(
        tmp_path / "base", method=METHOD, device="cuda", offload="host", num_slots=2, run_dir=tmp_path / "run"
    ) as engine:
        engine.fit(batches(STEPS), steps=STEPS, batch_size=4)
        expected, score = dict(engine.weights()), engine.evaluate(batches(2), batch_size=4)
    with replayed(tmp_path / "base", tmp_path / "run") as engine:
        assert_same((score, expected), (engine.evaluate(batches(2), batch_size=4), dict(engine.weights())))


def test_a_pass_that_fails_leaves_a_run_that_goes_on(gpu):
    """In the midst of a step, with blocks under way: the next steps are those of a run where nothing failed."""
    patience = [math.inf]

    def objective(model, batch):
        loss = model(**batch).loss
        patience[0] -= 1
        if patience[0] < 0:
            raise RuntimeError("out of patience")
        return loss

    settings = dict(method=METHOD, device="cuda", offload="host", num_slots=2, fold_every=1)
    with Engine(small_opt(), **settings) as engine:
        expected = [engine.step(batch).loss for batch in batches(4)]
    with Engine(small_opt(), objective=objective, **settings) as engine:
        found = [engine.step(batch).loss for batch in batches(2)]
        patience[0] = 1
        with pytest.raises(RuntimeError, match="out of patience"):
            engine.step(batches(3)[2])
        patience[0] = math.inf
        assert found + [engine.step(batch).loss for batch in batches(4)[2:]] == expected


@pytest.mark.parametrize("offload", ["host", "disk"])
def test_one_read_that_fails_ends_one_step(gpu, monkeypatch, tmp_path, offload):
    """The first failure was raised again by the clean-up, which then never came to its end: the engine was dead."""
    settings = dict(method=METHOD, device="cuda", offload=offload, num_slots=2, fold_every=1)
    more = dict(run_dir=tmp_path / "run") if offload == "disk" else {}
    with Engine(small_opt(), **settings, **(dict(run_dir=tmp_path / "whole") if more else {})) as engine:
        expected = [engine.step(batch).loss for batch in batches(4)]
    with Engine(small_opt(), **settings, **more) as engine:
        found = [engine.step(batch).loss for batch in batches(2)]
        tier, left = engine.active.streamer.window.tier, [3]
        fetch = tier.fetch

        def failing(*args):
            left[0] -= 1
            if left[0] == 0:
                raise OSError("one read failed")
            fetch(*args)

        monkeypatch.setattr(tier, "fetch", failing)
        with pytest.raises(OSError, match="one read failed"):
            engine.step(batches(3)[2])
        assert found + [engine.step(batch).loss for batch in batches(4)[2:]] == expected


def test_the_stand_in_sees_what_it_is_there_for(gpu):
    """Tensors of both sides in one op, and each kind of wait."""
    there, here = torch.ones(4, device="cuda"), torch.ones(4)
    assert there.device == DEVICE and there.is_cuda and (there + 1).device == DEVICE and (there * here[0]).is_cuda
    for mixed in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here @ there):
        with pytest.raises(MixedDevices):
            mixed()
    pinned = here.pin_memory()
    gpu.waits.clear()
    pinned.to(DEVICE, non_blocking=True)
    there.copy_(pinned, non_blocking=True)
    torch.where(there > 0, there, 0.0).sum().double()
    assert gpu.waits == []
    for number, waits in enumerate((
        lambda: there.sum().item(), lambda: bool(there[0]), lambda: there.cpu(), lambda: here.to(DEVICE),
        lambda: here.to(DEVICE, non_blocking=True), lambda: there[there > 0], lambda: there.nonzero(),
        lambda: there.unique(), lambda: there.tolist(), lambda: here.copy_(there),
        lambda: torch.tensor(2, device=DEVICE),
    )):  # fmt: skip
        waits()
        assert len(gpu.waits) == number + 1 and "test_device_memory.py" in gpu.waits[-1], number
