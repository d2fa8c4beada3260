"""Runs that are stopped, broken off or continued with something else: what they leave, and what they refuse."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import threading
import time

import pytest
import torch

from support.compare import assert_same
from support.training import METHOD, ROWS, batches, stored_weights, train
from support.training import fit_rows as fit
from support.zoo.small import tiny_llama, tiny_opt
from zo_offload import ConfigError, DivergenceError, Engine, JournalError, MeZO, Stopped, StorageError
from zo_offload.journal.journal import Journal
from zo_offload.plan.blocks import BLOCK_NUMEL
from zo_offload.run.active import Run
from zo_offload.system.signals import stop_signals


def metrics(run, key):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("offload", ["none", "disk"])
def test_a_signal_ends_the_run_after_the_step_and_it_goes_on_as_if_nothing_had_been(signum, offload, tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    settings = dict(method=METHOD, offload=offload, storage="bf16")
    with Engine(tiny_opt(), **settings, run_dir=tmp_path / "never") as engine:
        fit(engine)
        want = stored_weights(engine)

    def stop(record):
        if record.step == 3:
            os.kill(os.getpid(), signum)

    with (
        Engine(tiny_opt(), **settings, run_dir=tmp_path / "run") as engine,
        pytest.raises(Stopped, match=f"stopped by {signal.Signals(signum).name} after 4 steps; resume it from") as info,
    ):
        fit(engine, callback=stop)
    assert (info.value.signum, info.value.step) == (signum, 4)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    with Engine.resume(tmp_path / "run", tiny_opt()) as engine:
        assert fit(engine).steps == 5
        assert_same(want, stored_weights(engine))


def test_a_second_signal_stops_in_mid_step_without_a_flush_and_is_resumable(tmp_path):
    def objective(model, batch):
        if engine.log.version == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return model(**batch).loss

    want = train(tiny_opt(), 9, ROWS)
    settings = dict(method=METHOD, offload="disk", fold_every=1)
    with (
        Engine(tiny_opt(), objective=objective, run_dir=tmp_path / "run", **settings) as engine,
        pytest.raises(KeyboardInterrupt, match="second SIGINT"),
    ):
        fit(engine)
    assert len(Journal.open(tmp_path / "run" / "journal.zoj").steps) == 3
    with Engine.resume(tmp_path / "run", tiny_opt(), objective=lambda model, batch: model(**batch).loss) as engine:
        fit(engine)
        assert_same(want[1], stored_weights(engine))


def test_signals_of_others_are_left_alone():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *a: seen.append(a[0]))
    try:
        with stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM] and stop.signum is None
    finally:
        signal.signal(signal.SIGTERM, before)


def test_fit_works_on_another_thread():
    results = []

    def work():
        with Engine(tiny_opt(), method=METHOD) as engine:
            results.append(fit(engine, steps=2).steps)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [2]


# ---- evaluation and data ---------------------------------------------------------------------------------------------


class Crash(BaseException):
    pass


def test_an_evaluation_that_a_crash_prevented_is_made_up_for(tmp_path, monkeypatch):
    settings = dict(method=METHOD, offload="none", run_dir=tmp_path / "run")
    options = dict(eval_data=ROWS[:4], eval_every=2)
    with Engine(tiny_opt(), method=METHOD) as engine:
        never = fit(engine, steps=7, **options).evals
    real = Run.measure

    def crash(self, *args, **options):
        if self.log.version == 4:
            raise Crash
        return real(self, *args, **options)

    monkeypatch.setattr(Run, "measure", crash)
    with pytest.raises(Crash), Engine(tiny_opt(), **settings) as engine:
        fit(engine, steps=7, **options)
    monkeypatch.undo()
    with Engine.resume(tmp_path / "run", tiny_opt()) as engine:
        assert fit(engine, steps=7, **options).evals == never
    assert [e["step"] for e in never] == [2, 4, 6, 7]
    assert metrics(tmp_path / "run", "eval_loss") == {e["step"]: e["loss"] for e in never}


@pytest.mark.parametrize(
    "data, options, message",
    [
        (ROWS[::-1], {}, "data.digest: the journal has '.*new_data=True .--new-data"),
        (ROWS[:-1], {}, "data.rows: the journal has 18, this engine 17"),
        (ROWS, dict(batch_size=3), "data.batch_size: the journal has 4, this engine 3"),
        (ROWS, dict(micro_batches=2), "data.micro_batches: the journal has 1, this engine 2"),
        (ROWS, dict(max_length=5), "data.encoder.max_length: the journal has None, this engine 5"),
        (batches(9), {}, "data.batches: the journal has None, this engine 'list'"),
    ],
)
def test_other_data_is_refused_with_its_digest_unless_asked_for(data, options, message, tmp_path):
    with Engine(tiny_opt(), method=METHOD, offload="none", run_dir=tmp_path / "run") as engine:
        fit(engine, steps=3)
    options = {"batch_size": 4, **options}
    with Engine.resume(tmp_path / "run", tiny_opt()) as engine, pytest.raises(JournalError, match=message):
        engine.fit(data, steps=5, **options)
    with Engine.resume(tmp_path / "run", tiny_opt()) as engine:
        assert engine.fit(data, steps=5, new_data=True, **options).steps == 2


def test_what_must_not_change_is_named_with_what_may(tmp_path):
    with Engine(tiny_opt(), method=METHOD, offload="none", storage="bf16", run_dir=tmp_path / "run") as engine:
        fit(engine, steps=2)
    for change, name in (
        (dict(storage="fp32"), "storage: the journal has"),
        (dict(rounding="stochastic"), "rounding: the journal has 'nearest', this engine 'stochastic'"),
        (dict(fold_every=2), "fold_every: the journal has 4, this engine 2"),
        (dict(trainable="layers.*.fc1"), "trainable: the journal has"),
        (dict(seed=5), "seed: the journal has 0, this engine 5"),
    ):
        with (
            pytest.raises(JournalError, match=name + r".*may change.*may not"),
            Engine.resume(tmp_path / "run", tiny_opt(), **change) as engine,
        ):
            fit(engine)
    with (
        pytest.raises(JournalError, match="plan: the journal has"),
        Engine.resume(tmp_path / "run", tiny_llama()) as engine,
    ):
        fit(engine)


def test_a_changed_checkpoint_is_refused_by_tensor_even_if_no_block_needs_it(tmp_path):
    tiny_opt().save_pretrained(tmp_path / "base")
    with Engine(str(tmp_path / "base"), method=METHOD, offload="disk", run_dir=tmp_path / "run") as engine:
        fit(engine, steps=2)
    other = tiny_opt()
    for p in other.parameters():
        p.data.mul_(1.5)
    other.save_pretrained(tmp_path / "base")
    with (
        pytest.raises(JournalError, match="base weights are not the run's: '.*' has digest [0-9a-f]{16}, the journal"),
        Engine.resume(tmp_path / "run") as engine,
    ):
        fit(engine)


# ---- losses that are not finite --------------------------------------------------------------------------------------


def test_halving_eps_is_journaled_and_goes_on_after_a_resume(tmp_path):
    def objective(model, batch):
        loss = model(**batch).loss
        return loss * math.nan if engine.log.version in bad else loss

    bad = (1, 4)
    method = MeZO(lr=1e-3, batch_size=4, on_nonfinite="halve_eps")
    with Engine(tiny_opt(), method=method, objective=objective, offload="none", run_dir=tmp_path / "a") as engine:
        fit(engine, steps=8)
        want = stored_weights(engine)
        assert engine.eps_halvings == 2
    with Engine(tiny_opt(), method=method, objective=objective, offload="none", run_dir=tmp_path / "b") as engine:
        fit(engine, steps=3)
    with Engine.resume(tmp_path / "b", tiny_opt(), objective=objective) as engine:
        fit(engine, steps=8)
        assert engine.eps_halvings == 2
        assert_same(want, stored_weights(engine))
    records = Journal.open(tmp_path / "b" / "journal.zoj").steps
    assert [r.step for r in records if r.halved] == [r.step for r in records if r.skipped] == [1, 4]
    bad = range(20)
    with (
        Engine(tiny_opt(), method=method, objective=objective, offload="none") as engine,
        pytest.raises(DivergenceError, match="step 10"),
    ):
        fit(engine, steps=20)


# ---- directories -----------------------------------------------------------------------------------------------------


def test_one_process_a_run_directory(tmp_path):
    with Engine(tiny_opt(), method=METHOD, offload="none", run_dir=tmp_path / "run") as engine:
        fit(engine, steps=1)
        with (
            pytest.raises(ConfigError, match="run is in use by another engine of this process"),
            Engine.resume(tmp_path / "run", tiny_opt()) as second,
        ):
            fit(second)
    pid = os.fork()
    if pid == 0:  # holds the lock until it is killed
        from zo_offload.system.lock import RunLock

        held = RunLock.take(tmp_path / "run")
        (tmp_path / "held").write_text("x")
        signal.pause()
        held.release()
    try:
        while not (tmp_path / "held").exists():
            pass
        with (
            pytest.raises(ConfigError, match=f"run is in use by process {pid} on "),
            Engine.resume(tmp_path / "run", tiny_opt()) as engine,
        ):
            fit(engine)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with Engine.resume(tmp_path / "run", tiny_opt()) as engine:  # a dead holder holds nothing
        fit(engine, steps=2)


def test_a_run_that_never_started_is_begun_anew(tmp_path, monkeypatch):
    """Killed while the blocks were written, before there was a journal: nothing was trained, nothing is in the way."""
    tiny_opt().save_pretrained(tmp_path / "base")
    settings = dict(method=METHOD, offload="disk", run_dir=tmp_path / "run")
    monkeypatch.setattr("zo_offload.run.session.ingest", lambda *a, **k: (_ for _ in ()).throw(Crash()))
    with pytest.raises(Crash), Engine(str(tmp_path / "base"), **settings) as engine:
        fit(engine)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "journal.zoj").exists()
    with Engine.resume(tmp_path / "run") as engine:
        assert fit(engine, steps=2).steps == 2
    with pytest.raises(ConfigError, match="holds a run"):
        Engine(str(tmp_path / "base"), **settings)


def test_a_journal_that_vanishes_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("zo_offload.journal.journal.COMMIT_S", 0.01)

    def remove(record):
        if record.step == 2:
            (tmp_path / "run" / "journal.zoj").unlink()

    engine = Engine(tiny_opt(), method=METHOD, offload="disk", run_dir=tmp_path / "run", fold_every=1)
    with pytest.raises(StorageError, match="deleted while the run used it"):
        fit(engine, steps=9, callback=remove)
    with pytest.raises(StorageError, match="deleted"):
        engine.close()


def test_user_code_that_fails_leaves_a_run_that_goes_on(tmp_path):
    want = train(tiny_opt(), 9, ROWS)

    def callback(record):
        if record.step == 4:
            raise RuntimeError("user code failed")

    settings = dict(method=METHOD, offload="disk", run_dir=tmp_path / "run")
    with Engine(tiny_opt(), **settings) as engine, pytest.raises(RuntimeError, match="user code failed"):
        fit(engine, callback=callback)
    with Engine.resume(tmp_path / "run", tiny_opt()) as engine:
        assert fit(engine).steps == 4
        assert_same(want[1], stored_weights(engine))


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == 11:
            raise OSError("row 11 cannot be read")
        return torch.tensor(ROWS[index]["input_ids"])


def collate(rows):
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}


def test_a_data_worker_that_fails_leaves_a_run_that_goes_on(tmp_path):
    data = torch.utils.data.DataLoader(Rows(), batch_size=4, num_workers=1, collate_fn=collate)
    with (
        Engine(tiny_opt(), method=METHOD, offload="disk", run_dir=tmp_path / "run") as engine,
        pytest.raises(OSError, match="row 11 cannot be read"),
    ):
        engine.fit(data, steps=9)
    with Engine.resume(tmp_path / "run", tiny_opt()) as engine:
        engine.active.start()
        assert engine.log.version == 2


# ---- snapshots -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["none", "host"])
@pytest.mark.parametrize("storage, limit", [("fp32", BLOCK_NUMEL), ("bf16", BLOCK_NUMEL), ("bf16", 900)])
def test_a_run_in_memory_resumes_from_its_snapshots(offload, storage, limit, tmp_path):
    """A layer in several blocks is taken in one turn: the blocks are many more than the steps."""
    settings = dict(method=METHOD, offload=offload, storage=storage, snapshot_steps=3, fold_every=1, block_numel=limit)
    settings["run_dir"] = tmp_path / "run"
    with Engine(tiny_opt(), **settings) as engine:
        engine.fit(batches(), steps=9, callback=lambda record: engine.active.session.settle())  # no turn is skipped
        taken = engine.active.session.snapshots.taken
        want = stored_weights(engine)
    assert taken >= len(engine.plan.blocks), "every block once at least"
    with Engine.resume(tmp_path / "run", tiny_opt()) as engine:
        engine.active.start()
        versions = [engine.active.session.tier.version(b) for b in range(len(engine.plan.blocks))]
        assert all(0 < version <= 9 for version in versions), versions
        assert_same(want, stored_weights(engine))
    with Engine.resume(tmp_path / "run", tiny_opt(), offload="disk") as engine:
        assert_same(want, stored_weights(engine))


def test_a_snapshot_that_fails_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    settings = dict(method=METHOD, offload="host", snapshot_steps=2, run_dir=tmp_path / "run")
    monkeypatch.setattr(os, "pwritev", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with Engine(tiny_opt(), **settings) as engine:
        result = engine.fit(batches(), steps=6)
    monkeypatch.undo()
    assert result.losses == train(tiny_opt(), 6)[0]
    assert "no snapshot: writing" in caplog.text and "No space left" in caplog.text


def test_pinned_blocks_of_a_disk_run_are_snapshotted_too(tmp_path):
    settings = dict(method=METHOD, offload="disk", snapshot_steps=2, fold_every=1, run_dir=tmp_path / "run")
    with Engine(tiny_opt(), device_memory="100MB", **settings) as engine:
        engine.active.start(batches()[0])
        assert engine.memory.window.pinned
        for batch in batches(8):
            engine.step(batch)
        engine.active.session.settle()
        versions = [engine.active.session.tier.version(b) for b in engine.memory.window.pinned]
        assert max(versions) > 0
        engine.active.at_once = True  # no flush at the end: what a crash leaves
    with Engine.resume(tmp_path / "run", tiny_opt()) as engine:
        assert_same(train(tiny_opt(), 8)[1], stored_weights(engine))


def test_block_files_that_were_never_all_made_are_made_again(tmp_path):
    """A run in memory makes them at its first snapshot: killed in between, some are missing and none was used."""
    with Engine(tiny_opt(), method=METHOD, offload="host", run_dir=tmp_path / "run") as engine:
        fit(engine, steps=3)
        want = stored_weights(engine)
        shapes = engine.active.session.snapshots._open().shapes
    (tmp_path / "run" / "blocks" / "shapes.json").unlink()
    (tmp_path / "run" / "blocks" / "00002.zob").unlink()
    os.truncate(tmp_path / "run" / "blocks" / "00001.zob", 0)
    with Engine.resume(tmp_path / "run", tiny_opt(), snapshot_steps=1) as engine:
        assert_same(want, stored_weights(engine))
        fit(engine, steps=4)
        engine.active.session.settle()
    assert len(list((tmp_path / "run" / "blocks").glob("*.zob"))) == len(shapes)


def test_a_read_only_file_system_is_said_to_be_one(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", refuse)
    with (
        pytest.raises(
            StorageError, match=r"making .*run: Read-only file system.*Nothing was trained.*make it writable"
        ),
        Engine(tiny_opt(), method=METHOD, offload="disk", run_dir=tmp_path / "run") as engine,
    ):
        fit(engine)


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    want = train(tiny_opt(), 6, ROWS)
    jumps = iter(range(0, 10**15, 10**9))
    monkeypatch.setattr(time, "time", lambda: float(10**10 - next(jumps)))
    with Engine(tiny_opt(), method=METHOD, offload="disk", run_dir=tmp_path / "run") as engine:
        fit(engine, steps=6)
        assert_same(want[1], stored_weights(engine))


def test_a_data_set_smaller_than_a_batch_is_taken_whole_by_each_step(tmp_path):
    with (
        Engine(tiny_opt(), method=METHOD, offload="disk", run_dir=tmp_path / "run") as engine,
        pytest.warns(UserWarning, match="has 3 rows, fewer than batch_size=4: each step takes them all"),
    ):
        assert engine.fit(ROWS[:3], steps=2, batch_size=4).steps == 2
