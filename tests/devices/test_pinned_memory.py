"""Page-locked host memory of a GPU run: where there is little of it, where locking fails, and that it is let go.

The fake has what hid these faults on an ordinary Linux host: one pool for slabs, ring and torch's own pinned memory
(WSL2: 0.5 to 1 GB for all), unlocking that fails, and engines that nobody closes.
"""

from __future__ import annotations

import gc
import threading
import time
import warnings
import weakref

import pytest
import torch

from support import training
from support.compare import assert_same
from support.fake_cuda import FakeBackend, FakeCudaDevice
from support.training import METHOD
from support.zoo.small import tiny_opt
from zo_offload import BudgetError, Engine
from zo_offload.devices import pinned
from zo_offload.devices.cpu import before_unmapping, map_memory
from zo_offload.devices.pinned import RESERVE_BYTES, Lock
from zo_offload.devices.staging import NUM_CHUNKS, HostSlabs, Ring
from zo_offload.devices.streams import Stream
from zo_offload.journal.journal import Journal
from zo_offload.kernels.driver import CudaError
from zo_offload.run.session import Session
from zo_offload.tiers import HostTier

VOCAB, STEPS = 97, 4


def small_opt():
    return tiny_opt(2, vocab=VOCAB, hidden=16)


def batches(n=STEPS):
    return training.batches(n, length=9, vocab=VOCAB)


def train(**settings):
    with Engine(small_opt(), method=METHOD, **settings) as engine:
        return engine.fit(batches(), steps=STEPS, batch_size=4).losses, dict(engine.weights())


@pytest.mark.parametrize("pool", [0, 4096, RESERVE_BYTES, 1 << 40])
@pytest.mark.parametrize("offload", ["host", "disk"])
def test_a_run_goes_on_however_little_may_be_locked(use, tmp_path, offload, pool):
    """On a small pool the first slabs took what the ring, a step's scalars and its batches need; the run died."""
    settings = dict(offload=offload, num_slots=2)
    expected = train(**settings, **(dict(run_dir=tmp_path / "cpu") if offload == "disk" else {}))
    device = use(FakeCudaDevice(FakeBackend(pool=pool)))
    if offload == "disk":
        settings["run_dir"] = tmp_path / "run"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert_same(expected, train(device="cuda", **settings))
    reasons = [str(w.message) for w in told if "OUT_OF_MEMORY" in str(w.message) or "out of memory" in str(w.message)]
    assert bool(reasons) == bool(device.backend.refusals) and (device.backend.refusals > 0 or pool > 4096)
    assert device.backend.races == [] and device.backend.locked == 0


def test_scalars_and_batches_have_their_reserve(use):
    """The slabs take all that is left; what is small and comes later is page-locked all the same."""
    backend = use(FakeCudaDevice()).backend
    with (
        warnings.catch_warnings(record=True) as told,
        Engine(small_opt(), method=METHOD, device="cuda", offload="host", num_slots=2) as engine,
    ):
        warnings.simplefilter("always")
        largest = max(engine.active.prepared.layout.block_bytes)
        backend.pool = RESERVE_BYTES + 2 * NUM_CHUNKS * largest + largest + 5000
        engine.step(batches()[0])
        engine.active.streamer.window.tier.wait_pinned()
        engine.step(batches()[1])
    reasons = [str(w.message) for w in told]
    assert any("ring of chunks" in reason for reason in reasons) and backend.refusals
    assert not any("scalars and batches" in reason for reason in reasons)
    assert backend.locked == 0


def test_a_ring_is_whole_or_pageable_and_never_waits_for_chunks_that_were_not_made():
    """It counted a chunk before it had it: after three refusals the next fetch waited for ever."""
    ring = Ring(FakeBackend(fail_lock=0), 1 << 16, 3)
    assert "OUT_OF_MEMORY" in ring.refused

    def use_it():
        for _ in range(10):
            with ring.chunk() as chunk:
                assert chunk.numel() == 1 << 16

    thread = threading.Thread(target=use_it, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()


def test_buffers_of_files_are_exact(use, tmp_path):
    """torch rounds pinned memory up to a power of two: three buffers of the largest block took twice what they need."""
    device = use(FakeCudaDevice())
    with Engine(small_opt(), method=METHOD, device="cuda", offload="disk", run_dir=tmp_path, num_slots=2) as engine:
        engine.step(batches()[0])
        largest = max(engine.active.prepared.layout.block_bytes)
        assert device.backend.locked == 3 * largest
    assert device.backend.locked == 0


def test_buffers_of_files_that_cannot_be_locked_are_an_error_where_that_was_asked_for(use, tmp_path):
    device = use(FakeCudaDevice(FakeBackend(fail_lock=20_000)))
    with pytest.raises(BudgetError, match=r"buffers .*cannot be page-locked.*host_memory='staged'"):
        train(device="cuda", offload="disk", run_dir=tmp_path / "run", host_memory="pinned")
    assert device.backend.locked == 0


def test_only_what_streams_is_locked_and_what_is_visited_next_first(use):
    device = use(FakeCudaDevice())
    order, lock = [], device.backend.lock
    device.backend.lock = lambda memory: (order.append(memory.data_ptr()), lock(memory))
    with Engine(small_opt(), method=METHOD, device="cuda", offload="host", device_memory="4GiB") as engine:
        engine.step(batches()[0])
        tier = engine.active.streamer.window.tier
        tier.wait_pinned()
        assert len(engine.active.memory.window.pinned) == len(engine.plan.blocks) and tier.pinned_bytes == 0
    order.clear()
    with Engine(small_opt(), method=METHOD, device="cuda", offload="host", num_slots=2) as engine:
        engine.step(batches()[0])
        tier, window = engine.active.streamer.window.tier, engine.active.memory.window
        tier.wait_pinned()
        streamed = [b for b in dict.fromkeys(engine.plan.visits) if b not in window.pinned]
        addresses = [engine.active.session.tier.slabs[b].data_ptr() for b in streamed]
        assert [at for at in order if at in addresses] == addresses and streamed


def test_an_engine_that_nobody_closes_unlocks_and_is_freed(use):
    """In a notebook: `engine = Engine(...)` again, and the first one's pinned memory must not stay for good."""
    device, before = use(FakeCudaDevice()), set(threading.enumerate())

    def workers():
        return [t.name for t in set(threading.enumerate()) - before if t.name.startswith("zo_offload")]

    engine = Engine(small_opt(), method=METHOD, device="cuda", offload="host", num_slots=2)
    engine.step(batches()[0])
    assert workers()
    engine.active.streamer.window.tier.wait_pinned()
    assert device.backend.locked > 0
    gone = [weakref.ref(engine), weakref.ref(engine.active.streamer)]
    del engine
    for _ in range(50):
        gc.collect()
        if device.backend.locked == 0 and not any(ref() for ref in gone) and not workers():
            break
        time.sleep(0.02)
    assert device.backend.locked == 0 and [ref() for ref in gone] == [None, None] and workers() == []


def test_a_worker_keeps_nothing_of_an_op_that_has_run():
    """It waited for the next one with the last one in its hands, and with that the window, its slots and the slabs."""
    stream, held = Stream("test"), torch.empty(8)
    gone = weakref.ref(held)
    stream.submit(lambda held=held: None).wait()
    del held
    for _ in range(100):
        if gone() is None:
            break
        time.sleep(0.01)
    assert gone() is None
    stream.close()


def test_a_start_without_room_on_the_gpu_leaves_nothing_locked(use, monkeypatch):
    device = use(FakeCudaDevice())

    def full(nbytes):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device.backend, "empty", full)
    engine = Engine(small_opt(), method=METHOD, device="cuda", offload="host", num_slots=2)
    with pytest.raises(BudgetError, match="of GPU memory were asked for"):
        engine.step(batches()[0])
    del engine
    gc.collect()
    assert device.backend.locked == 0


def test_memory_that_goes_is_unlocked_before():
    backend, memory = FakeBackend(), map_memory(1 << 16)
    order = []
    Lock(backend, memory)
    before_unmapping(memory, lambda: order.append(backend.locked))
    view = memory[100:200]
    del memory
    gc.collect()
    assert backend.locked == 1 << 16  # a view keeps it
    del view
    gc.collect()
    assert backend.locked == 0 and order == [0]


def test_a_lock_that_is_released_is_not_released_again_with_its_memory():
    backend, memory = FakeBackend(), map_memory(1 << 16)
    lock = Lock(backend, memory)
    lock.release()
    lock.release()
    del memory
    gc.collect()
    assert backend.unlocks == 1


def test_unlocking_that_fails_is_told_and_keeps_nothing_from_being_closed(use, tmp_path, monkeypatch):
    """After a fault on the GPU every call fails: one failed unlock left the journal open and the other slabs locked."""
    device = use(FakeCudaDevice(FakeBackend(fail_unlock=True)))
    closed = []
    for kind in (Journal, Session):
        close = kind.close
        monkeypatch.setattr(kind, "close", lambda self, close=close: (closed.append(type(self)), close(self)))
    engine = Engine(small_opt(), method=METHOD, device="cuda", offload="host", num_slots=2, run_dir=tmp_path / "run")
    engine.step(batches()[0])
    tier = engine.active.streamer.window.tier
    tier.wait_pinned()
    slabs = len(tier._pinned)
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        engine.close()
    assert {Journal, Session} <= set(closed) and slabs > 3
    assert device.backend.unlocks >= slabs + 2 * NUM_CHUNKS


@pytest.mark.parametrize("release, told", [("6.6.87.2-microsoft-standard-WSL2", True), ("6.8.0-48-generic", False)])
def test_what_limits_page_locking_is_named(monkeypatch, release, told):
    """The driver does not look at `ulimit -l`; WSL2 has a limit of its own."""
    monkeypatch.setattr(pinned.platform, "release", lambda: release)
    text = str(pinned.refusal("the ring", 0, 1 << 20, "out of memory"))
    assert ("WSL2 lets all processes together lock" in text) is told and "ulimit" not in text


def test_staged_flushes_overlap():
    """While a chunk is copied into the slab the next ones are on their way: it enqueued one, waited, copied, and so
    on, at half the speed of a fetch."""
    happened = []

    class Noting(FakeBackend):
        def copy(self, to, source):
            happened.append("copy")
            super().copy(to, source)

        def synchronize(self, event):
            happened.append("wait")
            super().synchronize(event)

    backend = Noting(longest_s=0)
    backend.is_device = lambda tensor: True
    nbytes = 5 * 4096
    slabs = HostSlabs(HostTier([nbytes], map_memory), backend, "staged", [0])
    slabs._chunk_bytes = 4096
    device = torch.arange(nbytes, dtype=torch.int64).to(torch.uint8)
    slabs.flush(0, device, ((0, 9000), (9000, nbytes - 9000)), 1)
    assert happened[:NUM_CHUNKS] == ["copy"] * NUM_CHUNKS and happened.count("copy") == 6
    assert torch.equal(slabs._tier.slabs[0], device)
    slabs.close()


def test_flushes_on_two_threads_do_not_wait_for_each_other():
    backend = FakeBackend(longest_s=1e-3)
    backend.is_device = lambda tensor: True
    nbytes = 40 * 4096
    tier = HostTier([nbytes] * 4, map_memory)
    slabs = HostSlabs(tier, backend, "staged", [0])
    slabs._chunk_bytes = 4096
    data = [torch.full((nbytes,), 7 + b, dtype=torch.uint8) for b in range(4)]

    streams = [backend.make_stream() for _ in range(4)]

    def flush(block):
        with backend.on(streams[block]):
            slabs.flush(block, data[block], ((0, nbytes),), 1)

    threads = [threading.Thread(target=flush, args=(b,), daemon=True) for b in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for block in range(4):
        assert torch.equal(tier.slabs[block], data[block])
    slabs.close()
