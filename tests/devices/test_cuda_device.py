"""The CUDA device's streams, events, host memory and late steps, run without a GPU over `fake_cuda.py`.

Everything but `TorchCuda` and the kernels is the code that will run on a GPU. Copies are late and reordered, losses
arrive late, device memory starts as rubbish; losses and weights must be those of the CPU, bit for bit, without a race.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import zo_offload.run.opening
import zo_offload.run.wiring
from support import training
from support.compare import assert_same
from support.fake_cuda import COMPUTE, DelayedCpuDevice, FakeBackend, FakeCudaDevice
from support.on_device import around_writes
from support.training import METHOD
from support.zoo.small import tiny_opt
from zo_offload import BudgetError, DivergenceError, Engine, MeZO
from zo_offload.devices import CpuDevice, Event
from zo_offload.devices.cuda import LIBRARY_BYTES, CudaDevice
from zo_offload.devices.link import Link
from zo_offload.devices.pinned import RESERVE_BYTES
from zo_offload.devices.staging import NUM_CHUNKS, HostSlabs, Ring
from zo_offload.journal import run_directory
from zo_offload.journal.journal import read_journal
from zo_offload.kernels.driver import CudaError
from zo_offload.lanes.rows import gather, unseen
from zo_offload.lanes.serving import LaneRun, Portion, Served
from zo_offload.stream.window import BlockWindow
from zo_offload.tiers import HostTier

VOCAB, STEPS = 97, 5


def small_opt(dtype=torch.float32):
    return tiny_opt(dtype=dtype, vocab=VOCAB, hidden=16)


def batches(n=STEPS):
    return training.batches(n, length=9, vocab=VOCAB)


def train(model=None, steps=STEPS, micro_batches=1, method=METHOD, data=None, **settings):
    with Engine(model or small_opt(), method=method, **settings) as engine:
        result = engine.fit(data or batches(), steps=steps, micro_batches=micro_batches, batch_size=4)
        return result.losses, dict(engine.weights())


@functools.cache
def resident(dtype=torch.float32, micro_batches=1, **more):
    """What the CPU device gives with everything in memory; made before a test puts another device in its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zo_offload.run.opening, "make_device", lambda name: CpuDevice())
        return train(small_opt(dtype), offload="none", micro_batches=micro_batches, **more)


WAYS = {
    "resident": dict(offload="none"),
    "host": dict(offload="host"),
    "host, 2 slots": dict(offload="host", num_slots=2),
    "host, 3 slots, 1 ahead": dict(offload="host", num_slots=3, prefetch=1),
    "host, no overlap": dict(offload="host", overlap=False, num_slots=1),
    "host, 2 fetch workers": dict(offload="host", io_threads=2),
    "host, staged": dict(offload="host", host_memory="staged"),
    "host, pinned": dict(offload="host", host_memory="pinned"),
    "host, block order": dict(offload="host", order="block"),
    "disk": dict(offload="disk"),
    "disk, 2 slots": dict(offload="disk", num_slots=2),
}


@pytest.mark.parametrize("dtype, more", [
    (torch.float32, {}),
    (torch.bfloat16, dict(fold_every=3)),
    (torch.bfloat16, dict(rounding="stochastic", fold_every=1)),
])  # fmt: skip
@pytest.mark.parametrize("way", WAYS)
def test_streams_and_late_losses_give_the_cpus_numbers(use, tmp_path, way, dtype, more):
    settings = {**WAYS[way], **more}
    if settings["offload"] == "disk":
        settings["run_dir"] = tmp_path / "run"
    expected = resident(dtype, **more)
    device = use(FakeCudaDevice(FakeBackend(seed=hash(way) % 1000)))
    assert_same(expected, train(small_opt(dtype), device="cuda", **settings))
    assert device.backend.races == []
    assert settings["offload"] == "none" or device.backend.copies > STEPS


@pytest.mark.parametrize("seed", range(3))
def test_copies_much_slower_than_compute(use, seed):
    """Long copies, short compute, two slots: whatever is not ordered is caught now."""
    expected = resident()
    device = use(FakeCudaDevice(FakeBackend(seed, longest_s=2e-2)))
    assert_same(expected, train(device="cuda", offload="host", num_slots=2))
    assert device.backend.races == []


@pytest.mark.parametrize("broken", ["fetch does not wait for compute", "fetch does not wait for flush"])
def test_the_race_checker_sees_a_missing_wait(use, monkeypatch, broken):
    device = use(FakeCudaDevice())
    if "compute" in broken:
        monkeypatch.setattr(device, "mark", lambda: _set(device.event()))
    else:
        before = BlockWindow._event

        def event(self, key):
            return _set(self.device.event()) if key[0] == "flush" else before(self, key)

        monkeypatch.setattr(BlockWindow, "_event", event)
    train(device="cuda", offload="host", num_slots=2)
    assert device.backend.races


def _set(event):
    """An event that nothing is behind: set on the host, and never recorded in a stream."""
    Event.set(event)
    assert event.is_done()
    return event


def test_a_step_never_waits_for_its_own_loss(use, monkeypatch):
    """Step t's losses are asked for after step t + 1 was launched, except at the end."""
    order = []
    device = use(DelayedCpuDevice())
    later = device.later

    def noted(values):
        order.append("launch")
        pending = later(values)
        get = pending.get
        pending.get = lambda: order.append("read") or get()
        return pending

    monkeypatch.setattr(device, "later", noted)
    train(offload="host", steps=4)
    assert order == ["launch", "launch", "read", "launch", "read", "launch", "read", "read"]


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("offload", ["none", "host", "disk"])
def test_late_losses_on_the_cpu_change_nothing(use, tmp_path, offload, micro_batches):
    settings = dict(offload=offload, run_dir=tmp_path / "a") if offload == "disk" else dict(offload=offload)
    prompt = resident(micro_batches=micro_batches)
    if offload == "disk":
        prompt = train(micro_batches=micro_batches, **settings)
    if offload == "disk":
        settings["run_dir"] = tmp_path / "b"
    use(DelayedCpuDevice(3))
    assert_same(prompt, train(micro_batches=micro_batches, **settings))
    if offload == "disk":
        a, b = (read_journal((tmp_path / run / run_directory.JOURNAL).read_bytes()) for run in "ab")
        assert a.steps == b.steps


def loss_that_fails_at(step):
    """An objective whose loss is NaN on one step's batch; on none with step=None: mended, and by name the same."""
    bad = None if step is None else batches()[step]["input_ids"]

    def objective(model, batch):
        loss = model(**batch).loss
        return loss * math.nan if bad is not None and torch.equal(batch["input_ids"], bad) else loss

    return objective


def test_a_step_that_is_not_finite_is_skipped_on_the_device_too(use, tmp_path):
    results = []
    for late in (False, True):
        if late:
            use(DelayedCpuDevice())
        with Engine(
            small_opt(), method=MeZO(lr=1e-3, on_nonfinite="skip"), objective=loss_that_fails_at(2), offload="disk",
            run_dir=tmp_path / str(late),
        ) as engine:  # fmt: skip
            losses = engine.fit(batches(), steps=STEPS, batch_size=4).losses
            results.append((losses, dict(engine.weights())))
    (a, weights), (b, late_weights) = results
    assert math.isnan(a[2]) and math.isnan(b[2]) and a[:2] + a[3:] == b[:2] + b[3:]
    for name in weights:
        assert torch.equal(weights[name], late_weights[name])


@pytest.mark.parametrize("fold_every", [1, 4])
def test_a_run_that_stops_ends_where_it_says_and_goes_on_from_there(use, tmp_path, fold_every):
    use(DelayedCpuDevice())
    settings = dict(offload="disk", run_dir=tmp_path / "run", fold_every=fold_every)
    with Engine(small_opt(torch.bfloat16), method=MeZO(lr=1e-3), objective=loss_that_fails_at(2), **settings) as engine:
        with pytest.raises(DivergenceError, match="step 2"):
            engine.fit(batches(), steps=STEPS, batch_size=4)
        after = dict(engine.weights())
    # the step that diverged is in the journal, as one that changes nothing; the one launched after it is not
    contents = read_journal((tmp_path / "run" / run_directory.JOURNAL).read_bytes())
    assert [u.coeff for u in contents.steps[2].updates] == [0.0] and len(contents.steps) == 3
    expected = train(small_opt(torch.bfloat16), steps=2, method=MeZO(lr=1e-3), offload="none", fold_every=fold_every)[1]
    if fold_every == 1:
        for name in expected:
            assert torch.equal(expected[name], after[name]), name
    with Engine.resume(tmp_path / "run", small_opt(torch.bfloat16), objective=loss_that_fails_at(None)) as engine:
        assert len(engine.fit(batches(), steps=STEPS, batch_size=4).losses) == STEPS - 3


def test_an_update_that_would_overflow_is_refused_on_the_device_too(use):
    method = MeZO(lr=1e8, on_nonfinite="skip")
    prompt = train(small_opt(torch.float16), method=method, offload="none", steps=3)
    use(DelayedCpuDevice())
    late = train(small_opt(torch.float16), method=method, offload="none", steps=3)
    assert all(math.isnan(x) for x in prompt[0]) and all(math.isnan(x) for x in late[0])
    for name in prompt[1]:
        assert torch.equal(prompt[1][name], late[1][name])


def test_a_resumed_run_equals_one_that_was_never_stopped(use, tmp_path):
    use(FakeCudaDevice())
    whole = train(device="cuda", offload="disk", run_dir=tmp_path / "a")
    train(steps=3, device="cuda", offload="disk", run_dir=tmp_path / "b")
    with Engine.resume(tmp_path / "b", small_opt()) as engine:
        engine.fit(batches(), steps=STEPS, batch_size=4)
        assert_same(whole[1], dict(engine.weights()))


def refusing(backend, slabs):
    """A driver that locks ring and reserve, and so many bytes more."""
    real, sizes = backend.lock, []

    def lock(memory):
        if memory.numel() < RESERVE_BYTES and len(sizes) > 2 * NUM_CHUNKS and sum(sizes[7:]) + memory.numel() > slabs:
            raise CudaError("cuMemHostRegister: CUDA_ERROR_OUT_OF_MEMORY", 2)
        real(memory)
        sizes.append(memory.numel())

    return lock


def test_locking_that_fails_falls_back_and_says_so(use, monkeypatch):
    expected = resident()
    device = use(FakeCudaDevice())
    monkeypatch.setattr(device.backend, "lock", refusing(device.backend, slabs=20_000))
    with pytest.warns(UserWarning, match=r"cannot be page-locked.* of .* are locked.*goes on through a ring"):
        assert_same(expected, train(device="cuda", offload="host"))


@pytest.mark.parametrize("slabs, what", [(20_000, r"host memory of block \d"), (None, "the ring")])
def test_locking_that_fails_is_an_error_where_it_was_asked_for(use, monkeypatch, slabs, what):
    device = use(FakeCudaDevice(FakeBackend(fail_lock=None if slabs else 20_000)))
    if slabs:
        monkeypatch.setattr(device.backend, "lock", refusing(device.backend, slabs))
    with pytest.raises(BudgetError, match=rf"{what}.* cannot be page-locked.*host_memory='staged'"):
        train(device="cuda", offload="host", host_memory="pinned")


def test_slabs_are_exact_and_locked_once():
    backend = FakeBackend()
    tier = HostTier([4096, 12288, 8192], FakeCudaDevice(backend).host_alloc)
    slabs = HostSlabs(tier, backend, "auto", [2, 0, 1])
    slabs.wait_pinned()
    assert slabs.pinned_bytes == 4096 + 12288 + 8192
    assert backend.locked == slabs.pinned_bytes + 2 * NUM_CHUNKS * 12288  # and the rings; no reserve any more
    slabs.close()
    assert backend.locked == 0


def test_a_start_that_fails_leaves_no_memory_locked(use, monkeypatch):
    device = use(FakeCudaDevice())
    want = train(device="cuda", offload="host", steps=2)
    real = zo_offload.run.wiring.Streamer
    monkeypatch.setattr(zo_offload.run.wiring, "Streamer", lambda *a, **k: (_ for _ in ()).throw(MemoryError()))
    with Engine(small_opt(), method=METHOD, device="cuda", offload="host") as engine:
        with pytest.raises(MemoryError):
            engine.run(batches()[0])
        assert device.backend.locked == 0
        monkeypatch.setattr(zo_offload.run.wiring, "Streamer", real)
        losses = engine.fit(batches(), steps=2, batch_size=4).losses
        assert_same(want, (losses, dict(engine.weights())))
    assert device.backend.locked == 0


def test_forked_processes_have_no_part_in_host_memory_of_blocks():
    """Page-locked memory that a fork shares is copied at once, or copied on write: away from under the GPU."""
    slab, plain = FakeCudaDevice().host_alloc(1 << 16), CpuDevice().host_alloc(1 << 16)
    assert "dc" in mapping_flags(slab.data_ptr()) and "dc" not in mapping_flags(plain.data_ptr())


def mapping_flags(address):
    """VmFlags of the mapping that an address is in (proc(5))."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"{address:#x} is not mapped")


def test_the_link_is_measured_once_and_before_pages_are_locked(use, monkeypatch):
    """Locking takes the driver's locks, and copies that wait for them would make the link look slow."""
    happened = []
    link = Link(50.0, 50.0, 40.0, 40.0)
    monkeypatch.setattr("zo_offload.devices.cuda.measure_link", lambda *a, **k: happened.append("measured") or link)
    device = use(FakeCudaDevice())
    monkeypatch.setattr(device, "measure_link", lambda: CudaDevice.measure_link(device))
    lock = device.backend.lock
    monkeypatch.setattr(device.backend, "lock", lambda memory: (happened.append("locked"), lock(memory)))
    for _ in range(2):
        train(device="cuda", offload="host", steps=1)
    assert happened[0] == "measured" and happened.count("measured") == 1 and "locked" in happened


def test_a_ring_makes_no_more_pieces_than_it_may():
    ring = Ring(FakeBackend(), 1 << 12, 2)
    for _ in range(7):
        with ring.chunk(), ring.chunk():
            pass
    assert ring.nbytes == 2 << 12


def test_rows_of_ids_that_the_host_does_not_know():
    """Ids in device memory: the rows come repeats and all, and the embedding is the same."""
    weight = torch.randn(11, 5)
    embedding = nn.Embedding(11, 5, padding_idx=3)
    ids = [torch.tensor([[4, 4, 1]]), torch.tensor([[9, 4, 0]])]
    results = []
    for known in (True, False):
        lanes = [LaneRun(i, None) for i in range(2)]
        for lane, i in zip(lanes, ids, strict=True):
            lane.ids = i if known else i.to("meta")
        portion = Portion(
            pieces=None, block=0, spans=False, names=("e.weight",), params=(embedding.weight,), shapes=((11, 5),),
            resting=(), strides=(None,), is_laid_out=False,
        )  # fmt: skip
        served = Served(0, type("O", (), {"name": "e", "rows": True})(), embedding, [portion])
        if known:
            rows = gather(served, lanes)
            results.append([nn.functional.embedding(lane.ids, weight[rows], 3) for lane in lanes])
        else:
            rows = gather(served, lanes, lambda tensor: None)
            assert rows.shape == (6,) and [lane.ids.shape for lane in lanes] == [(1, 3), (1, 3)]
    for i, found in zip(ids, results[0], strict=True):
        assert torch.equal(found, weight[i])


def test_more_ids_that_the_host_does_not_know_than_there_are_rows():
    """Then every row is asked for once; an id that does not exist gets the row that does not, which comes as NaN."""
    weight = torch.randn(11, 5)
    ids = torch.tensor([[4, 4, 1, 10, 0, 2, 3], [9, 4, 0, 11, -3, 900, 8]])
    rows, places = unseen(list(ids), 11)
    assert rows.tolist() == list(range(12))
    given = torch.cat([weight, torch.full((1, 5), math.nan)])[rows]
    exists, found = (ids >= 0) & (ids < 11), nn.functional.embedding(places.view(2, 7), given)
    assert torch.equal(found[exists], weight[ids[exists]]) and found[~exists].isnan().all()
    assert unseen([ids[:, :5]], 11)[0].tolist() == ids[:, :5].flatten().tolist()


def test_bf16_where_it_is_emulated_is_warned_about(use, tmp_path):
    """A T4 or V100, with a checkpoint in bf16: its own dtype, as everywhere, with a word about what would be fast."""
    small_opt().bfloat16().save_pretrained(tmp_path / "base")
    device = use(FakeCudaDevice())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Engine(tmp_path / "base", method=METHOD).close()
    device.backend.bf16 = False
    with pytest.warns(UserWarning, match=r"no bf16 units and emulates them.*compute='fp16'"):
        Engine(tmp_path / "base", method=METHOD).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Engine(tmp_path / "base", method=METHOD, compute="fp16").close()


def test_nothing_is_warned_about_in_a_plain_run(use):
    use(FakeCudaDevice())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(device="cuda", offload="host", steps=2)


def test_a_budget_is_what_the_driver_counts():
    """The context comes off first, and what is too small for it says so; nothing given takes most of what is free."""
    device = CudaDevice(FakeBackend(), context_bytes=500 << 20)
    free = device.free_bytes()
    assert device.budget(6 << 30) == (6 << 30) - (500 << 20) - LIBRARY_BYTES
    assert device.budget(None, chosen=True) is None
    assert device.budget(None) == int(0.8 * free) - LIBRARY_BYTES
    with pytest.raises(BudgetError, match=r"device_memory=600\.0 MB is too small: the CUDA context takes 524\.3 MB"):
        device.budget(600_000_000)


def test_the_least_time_for_what_a_step_moves():
    """Both directions at once while both have work, then the rest alone."""
    link = Link(fetch_gbs=50, flush_gbs=40, both_fetch_gbs=25, both_flush_gbs=20)
    assert link.seconds(50e9, 0) == pytest.approx(1.0)
    assert link.seconds(25e9, 20e9) == pytest.approx(1.0)
    assert link.seconds(75e9, 20e9) == pytest.approx(2.0)  # one second together, then 50 GB alone
    assert link.seconds(0, 40e9) == pytest.approx(1.0)


def test_a_profile_names_what_a_step_does(use):
    """Spans cost nothing where no profiler runs, so one that runs has to be noticed."""
    use(FakeCudaDevice())
    with Engine(small_opt(), method=METHOD, device="cuda", offload="host") as engine:
        engine.step(batches(1)[0])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            engine.step(batches(1)[0])
    names = {event.key for event in profile.key_averages()}
    assert {"zo_offload.stream:fused", "zo_offload.stream:wait"} <= names


def test_a_slot_is_not_fetched_into_while_its_memory_is_still_computed_with(use):
    """An allocator may give a slot the memory of a tensor whose last kernel has not run: the first fetch waits too."""
    device = use(FakeCudaDevice())
    empty = device.backend.empty

    def in_use(nbytes):
        memory = empty(nbytes)
        device.backend.access(memory, True, COMPUTE, "a kernel of before")
        return memory

    device.backend.empty = in_use
    train(device="cuda", offload="host", num_slots=2, steps=1)
    assert device.backend.races == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_broken_off_pass_launched_is_waited_for(use, monkeypatch, when):
    """Kernels that were launched before an exception run on: the next pass must not fetch into what they write."""
    expected = resident()
    device = use(FakeCudaDevice())
    writes = 0

    def broken_off(run, mark):
        nonlocal writes
        writes += 1
        stops = writes in (5, 24)
        if stops and when == "before":
            raise KeyboardInterrupt
        run()
        if stops:
            raise KeyboardInterrupt

    around_writes(monkeypatch, broken_off)
    losses, stopped = [], 0
    with Engine(small_opt(), method=METHOD, device="cuda", offload="host", num_slots=2) as engine:
        while len(losses) < STEPS:
            try:
                losses.append(engine.step(batches()[len(losses)]).loss)
            except KeyboardInterrupt:
                stopped += 1
        weights = dict(engine.weights())
    assert stopped == 2
    assert_same(expected, (losses, weights))
    assert device.backend.races == []
