"""Whatever raises wherever: the same engine goes on bit for bit, or says once that it must be reopened."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random
import signal
import threading
import warnings

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks import interrupts
from support.compare import assert_same
from support.on_device import around_writes
from support.zoo.models import save_tiny_llama
from zo_offload import ConfigError, Engine, MeZO, StorageError
from zo_offload.checkpoint.checkpoint import Checkpoint
from zo_offload.errors import TornError
from zo_offload.modules.modes import current_modes
from zo_offload.run import vacated, wiring
from zo_offload.system import diskio
from zo_offload.system.closing import Closing
from zo_offload.system.signals import StopRequest, stop_signals

STEPS = 8
TIERS = ("none", "host", "disk")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def batch(step):
    g = torch.Generator().manual_seed(step)
    return {"x": torch.randn(4, 6, generator=g), "y": torch.randint(3, (4,), generator=g)}


def engine(run, offload="host", objective=loss, **settings):
    settings = dict(fold_every=2, snapshot_steps=2, block_numel=70) | settings
    return Engine(net(), method=MeZO(lr=1e-2), objective=objective, run_dir=run, offload=offload, **settings)


def reopened(run, **settings):
    found = Engine.resume(run, net(), objective=loss, **settings)
    found.weights()
    return found


def go_on(e, steps=STEPS):
    while e.log.version < steps:
        e.step(batch(e.log.version))


class InContextManagers(interrupts.AtBytecode):
    """Counts and breaks off in contextlib alone: where an exit that is not called leaves something behind."""

    def enter(self, frame, event, arg):
        return super().enter(frame, event, arg) if "contextlib" in frame.f_code.co_filename else None


def test_opening_a_checkpoint_that_is_broken_off_leaves_torch_as_it_was(tmp_path):
    base = save_tiny_llama(tmp_path / "base", layers=1)
    linspace, tie = torch.linspace, PreTrainedModel.tie_weights
    before, kept = current_modes(), []
    with InContextManagers(None) as counted:
        Checkpoint.open(base).build_model()
    for n in range(1, counted.seen + 1):
        try:
            with InContextManagers(n):
                Checkpoint.open(base).build_model()
        except interrupts.Interrupt as broken:
            kept.append(broken)  # as a notebook keeps the last error, and with it every frame of the traceback
        assert current_modes() == before, n
        assert torch.linspace is linspace and PreTrainedModel.tie_weights is tie, n
    assert len(kept) > 50


def outcome(e):
    return [record.loss for record in e.journal.steps], dict(e.weights())


class Steps(torch.utils.data.Dataset):
    """Batches of all steps; `broken["loader"]`: the step whose batch cannot be had once."""

    def __init__(self, broken):
        self.broken = broken

    def __len__(self):
        return STEPS

    def __getitem__(self, step):
        if self.broken.get("loader") == step:
            del self.broken["loader"]
            raise OSError("row cannot be read")
        return batch(step)


def loader(broken=None):
    return torch.utils.data.DataLoader(Steps({} if broken is None else broken), batch_size=None)


@pytest.fixture(scope="module")
def want(tmp_path_factory):
    with engine(tmp_path_factory.mktemp("never") / "run") as e:
        go_on(e)
        return outcome(e)


def assert_whole(e, run, want):
    """The engine goes on to the end as if nothing had been, and so does the run it leaves."""
    go_on(e)
    assert_same(outcome(e), want)
    e.close()
    with reopened(run) as e:
        assert e.journal.dropped_bytes == 0
        assert_same(outcome(e), want)


# ---- exceptions at any bytecode --------------------------------------------------------------------------------------


def test_interrupts_at_random_bytecodes_leave_every_tier_as_it_would_have_been(tmp_path):
    """The harness in its small version; benchmarks/results has the long one."""
    ways = [way for way in interrupts.settings() if way["storage"] == "bf16"]
    result = interrupts.interrupts(tmp_path, 8, random.Random(4), ways, each=4)
    assert result["interrupts"] >= 8 and result["wrong"] == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
@pytest.mark.parametrize("offload", TIERS)
def test_a_fold_that_was_just_done_is_not_done_again(offload, error, tmp_path, want, monkeypatch):
    """A signal that came during the native call raises as it returns: the bytes are new, nothing says so yet."""
    count = [0]

    def passing(run, mark):
        run()
        count[0] += 1
        if count[0] in (2, 5, 9):
            raise error("as the native call returned")

    around_writes(monkeypatch, passing)
    e = engine(tmp_path / "run", offload)
    for _ in range(6):
        try:
            go_on(e)
        except error:
            continue
    assert count[0] > 9
    assert_whole(e, tmp_path / "run", want)


@pytest.mark.parametrize("offload, slots", [("none", None), ("host", None), ("host", 2), ("disk", None)])
def test_a_block_of_which_nothing_is_known_is_read_again_or_the_engine_says_so(
    offload, slots, tmp_path, want, monkeypatch
):
    """Behind a window the tier has the bytes of before; used where they lie, these are the only ones."""
    count = [0]

    def passing(run, mark):
        run()
        count[0] += 1
        if count[0] == 3:
            mark.in_parts = True  # as without the native library
            raise KeyboardInterrupt

    around_writes(monkeypatch, passing)
    run = tmp_path / "run"
    e = engine(run, offload, num_slots=slots)
    with pytest.raises(KeyboardInterrupt):
        go_on(e)
    if offload != "disk" and slots is None:
        for call in (lambda: e.step(batch(0)), lambda: e.run(batch(0), loss), lambda: dict(e.weights())):
            with pytest.raises(TornError, match=r"weights in memory \(.*were being written.*Engine.resume\('.*run'\)"):
                call()
        e.close()
        e = reopened(run)
    assert_whole(e, run, want)


def test_a_half_copied_host_block_is_told_and_rebuilt(tmp_path, want, monkeypatch):
    from zo_offload.tiers import HostTier

    real, count = HostTier.flush, [0]

    def flush(self, block, data, spans, version):
        count[0] += version > 0
        if version and count[0] == 2:
            self._versions[block] = -1
            raise MemoryError("in the midst of it")
        real(self, block, data, spans, version)

    monkeypatch.setattr(HostTier, "flush", flush)
    run = tmp_path / "run"
    e = engine(run, num_slots=2)
    with pytest.raises(MemoryError):
        go_on(e)
    with pytest.raises(TornError):
        e.step(batch(e.log.version))
    e.close()
    assert_whole(reopened(run), run, want)


@pytest.mark.parametrize("where", ["before", "half", "after"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_a_record_is_never_in_the_journal_twice(where, error, tmp_path, want, monkeypatch):
    real, count = diskio.append, [0]

    def append(fd, data):
        count[0] += len(data) == 64
        if len(data) == 64 and count[0] in (3, 4, 6):
            real(fd, {"before": b"", "half": data[:30], "after": data}[where])
            raise error
        real(fd, data)

    monkeypatch.setattr(diskio, "append", append)
    e = engine(tmp_path / "run")
    for _ in range(5):
        try:
            go_on(e)
        except error:
            continue
    assert count[0] > STEPS
    assert_whole(e, tmp_path / "run", want)


def test_a_journal_that_somebody_else_writes_to_ends_the_run(tmp_path):
    with pytest.raises(StorageError, match="another process changed it"), engine(tmp_path / "run") as e:
        go_on(e, 2)
        with open(tmp_path / "run" / "journal.zoj", "ab") as file:
            file.write(bytes(64))
        go_on(e)


@pytest.mark.parametrize("offload", TIERS)
def test_errors_of_the_objective_the_callback_and_the_loader(offload, tmp_path):
    def objective(model, inputs):
        if broken.get("objective") == e.log.version:
            del broken["objective"]
            raise RuntimeError("mine")
        return loss(model, inputs)

    def callback(record):
        if record.step == broken.get("callback"):
            del broken["callback"]
            raise KeyError("mine too")

    broken = {}
    with engine(tmp_path / "never", offload) as e:
        e.fit(loader(broken), steps=STEPS)
        want = outcome(e)
    broken = {"objective": 1, "callback": 3, "loader": 5}
    e = engine(tmp_path / "run", offload, objective)
    for _ in range(4):
        try:
            e.fit(loader(broken), steps=STEPS, callback=callback)
        except (RuntimeError, KeyError, OSError):
            continue
    assert not broken
    assert_whole(e, tmp_path / "run", want)


def test_steps_that_were_launched_and_not_finished_come_first(tmp_path, want):
    with engine(tmp_path / "run") as e:
        waiting = [e.active.launch(batch(step)) for step in range(STEPS)]
        for launched in waiting:
            e.active.finish(launched)
        with pytest.raises(ConfigError, match="step 3 is not under way: it was finished before, or interrupted"):
            e.active.finish(waiting[3])
        assert_same(outcome(e), want)


# ---- signals ---------------------------------------------------------------------------------------------------------


def test_the_second_signal_waits_for_a_place_and_the_third_does_not():
    with stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        stop.look()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt, match="second SIGINT"):
            stop.look()
        with pytest.raises(KeyboardInterrupt, match="a third signal after the second SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    stop.look()


def test_second_signals_to_a_fit_leave_every_tier_as_it_would_have_been(tmp_path):
    ways = [way for way in interrupts.settings() if way["storage"] == "fp32"]
    result = interrupts.second_signals(tmp_path, 3, random.Random(1), ways)
    assert result["second_signals"] >= 3 and result["wrong"] == 0


# ---- who is inside ---------------------------------------------------------------------------------------------------


def test_a_second_thread_is_refused_and_a_callback_is_not(tmp_path, want):
    inside, leave, seen = threading.Event(), threading.Event(), []

    def wait(model, inputs):
        if threading.current_thread() is worker:
            inside.set()
            leave.wait(20)
        return loss(model, inputs)

    e = engine(tmp_path / "run", objective=wait)
    worker = threading.Thread(target=lambda: e.step(batch(0)), name="first")
    worker.start()
    assert inside.wait(20)
    for call in (lambda: e.step(batch(0)), lambda: e.run(batch(0), loss), e.close):
        with pytest.raises(
            ConfigError, match="thread 'first' is inside this engine, and it takes one thread at a time"
        ):
            call()
    leave.set()
    worker.join()
    e.step(batch(1))
    e.fit(loader(), steps=3, callback=lambda record: seen.append(e.run(batch(0), loss)))
    assert len(seen) == 1
    assert_whole(e, tmp_path / "run", want)


def test_an_objective_that_calls_its_own_engine_is_told(tmp_path, want):
    def objective(model, inputs):
        if e.log.version == 2 and not tried:
            for call in (lambda: e.step(batch(2)), lambda: e.run(batch(0), loss), e.close, lambda: dict(e.weights())):
                with pytest.raises(ConfigError, match="from within one of its own passes"):
                    call()
                tried.append(call)
        return loss(model, inputs)

    tried = []
    e = engine(tmp_path / "run", objective=objective)
    assert_whole(e, tmp_path / "run", want)
    assert len(tried) == 4


def test_a_forked_process_is_refused_and_leaves_the_run_alone(tmp_path, want):
    e = engine(tmp_path / "run", "disk")
    go_on(e, 3)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            e.step(batch(3))
        except ConfigError as error:
            status = 0 if f"runs in process {os.getppid()}, from which this one was forked" in str(error) else 2
            e.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert_whole(e, tmp_path / "run", want)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickle.dumps], ids=["deepcopy", "copy", "pickle"])
def test_an_engine_cannot_be_copied(copied, tmp_path):
    with engine(tmp_path / "run") as e:
        for _ in range(2):
            with pytest.raises(ConfigError, match="neither copied nor pickled: save_pretrained"):
                copied(e)
            e.step(batch(e.log.version))


# ---- the end ---------------------------------------------------------------------------------------------------------


class StoppedAtOnce(StopRequest):
    def look(self):
        raise KeyboardInterrupt


def left(run):
    files = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    ours = [t.name for t in threading.enumerate() if t.name.startswith("zo_offload")]
    return [name for name in files if str(run) in name], ours


@pytest.mark.parametrize("offload", TIERS)
@pytest.mark.parametrize("how", ["after steps", "in mid-step"])
def test_a_dropped_engine_gives_everything_back(offload, how, tmp_path, want):
    gc.collect()
    before = left(tmp_path)[1]
    model = net()
    e = Engine(
        model, method=MeZO(lr=1e-2), objective=loss, run_dir=tmp_path / "run", offload=offload, fold_every=2,
        snapshot_steps=2, block_numel=70,
    )  # fmt: skip
    go_on(e, 3)
    if how == "in mid-step":
        e.active.heed(StoppedAtOnce())
        with pytest.raises(KeyboardInterrupt):
            e.step(batch(3))
    files, threads = left(tmp_path)
    assert files and len(threads) > len(before)
    with pytest.warns(ResourceWarning, match="dropped without close"):
        del e  # no collector is needed: nothing that it has holds it
    assert left(tmp_path) == ([], before)
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert {hook.__module__ for hook in hooks} <= {"zo_offload.modules.away"}, (
        "but for what refuses a model without weights"
    )
    assert_whole(reopened(tmp_path / "run"), tmp_path / "run", want)


def test_close_releases_everything_whatever_fails(tmp_path, want):
    e = engine(tmp_path / "run", "disk")
    go_on(e, 3)
    tier, passes = e.active.session.tier, e.active.parts.passes
    real = tier.close

    def fail():
        raise OSError("close failed")

    tier.close = fail
    with pytest.raises(OSError, match="close failed"):
        e.close()
    assert not passes.model[0]._forward_hooks
    real()
    assert left(tmp_path)[0] == []
    e.close()
    assert_whole(reopened(tmp_path / "run"), tmp_path / "run", want)


def test_a_close_that_is_interrupted_is_finished_by_the_next(tmp_path, want):
    e = engine(tmp_path / "run", "disk")
    go_on(e, 3)
    real, tries = e.active.parts.streamer.close, []

    def close():
        tries.append(1)
        if len(tries) == 1:
            raise KeyboardInterrupt
        real()

    e.active.closing._left[2] = close
    with pytest.raises(KeyboardInterrupt):
        e.close()
    e.close()
    assert left(tmp_path)[0] == [] and len(tries) == 2
    assert_whole(reopened(tmp_path / "run"), tmp_path / "run", want)


def test_a_start_that_fails_leaves_the_model_and_the_directory_as_they_were(tmp_path, want, monkeypatch):
    model = net()
    values = copy.deepcopy(model.state_dict())
    e = Engine(
        model, method=MeZO(lr=1e-2), objective=loss, run_dir=tmp_path / "run", offload="disk", fold_every=2,
        block_numel=70,
    )  # fmt: skip
    for module, name, error in ((vacated, "move_what_stays", KeyboardInterrupt), (wiring, "Streamer", MemoryError)):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, error=error, **k: (_ for _ in ()).throw(error()))
        with pytest.raises(error):
            e.step(batch(0))
        monkeypatch.setattr(module, name, real)
        if name == "move_what_stays":
            assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
            assert left(tmp_path)[0] == []
    assert_whole(e, tmp_path / "run", want)


def test_restore_can_be_repeated_after_it_was_interrupted(tmp_path, want, monkeypatch):
    import zo_offload.devices.placing

    e = engine(tmp_path / "run")
    go_on(e)
    real = zo_offload.devices.placing.Homes.bring_back
    monkeypatch.setattr(
        zo_offload.devices.placing.Homes, "bring_back", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt())
    )
    with pytest.raises(KeyboardInterrupt):
        e.restore()
    monkeypatch.setattr(zo_offload.devices.placing.Homes, "bring_back", real)
    assert all(torch.equal(value, want[1][name]) for name, value in e.restore().state_dict().items())


def test_closing_goes_on_after_a_failure_and_tells_the_first():
    done, closing = [], Closing()

    def fail(name):
        done.append(name)
        raise ValueError(name)

    closing.add(lambda: done.append("oldest"))
    closing.add(lambda: fail("middle"))
    closing.add(lambda: fail("newest"))
    with pytest.raises(ValueError, match="newest") as info:
        closing.close()
    assert done == ["newest", "newest", "middle", "middle", "oldest"] and "middle" in str(info.value.__notes__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        closing.close()
    assert len(done) == 5
