"""Run directories: nothing of others is overwritten, what took no step is begun again, odd files are our errors."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.zoo.models import save_tiny_llama
from zo_offload import ConfigError, Engine, JournalError, MeZO, StorageError, ZOError
from zo_offload.cli import main
from zo_offload.config import EngineConfig
from zo_offload.journal import run_directory
from zo_offload.run.opening import open_model
from zo_offload.run.origin import RunOrigin
from zo_offload.system import diskio
from zo_offload.tiers import DiskTier

ROWS = [{"input_ids": [3 + (7 * r + 5 * c + r * c) % 60 for c in range(8)]} for r in range(12)]
METHOD = MeZO(lr=1e-3, batch_size=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("bases") / "base", layers=1)


def engine_in(base: Path, run: Path, **settings: Any) -> Engine:
    return Engine(str(base), run_dir=run, **{"method": METHOD, "offload": "disk", **settings})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FOREIGN = {
    "a checkpoint": lambda folder, base: shutil.copytree(base, folder, dirs_exist_ok=True),
    "a config.json": lambda folder, base: (folder / "config.json").write_text('{"model_type": "llama"}'),
    "a config.json that is no JSON": lambda folder, base: (folder / "config.json").write_text("{"),
    "weights alone": lambda folder, base: shutil.copy(base / "model.safetensors", folder),
    "weights of torch": lambda folder, base: (folder / "pytorch_model.bin").write_bytes(b"x"),
    "blocks of somebody's": lambda folder, base: (folder / "blocks").mkdir(),
    "metrics of somebody's": lambda folder, base: (folder / "metrics.jsonl").write_text("{}\n"),
    "metrics that are a directory": lambda folder, base: (folder / "metrics.jsonl").mkdir(),
    "a journal of somebody's": lambda folder, base: (folder / "journal.zoj").write_text("dear diary"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_run_is_not_begun_where_something_else_lies(base: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    FOREIGN[what](folder, base)
    before = files(folder)
    with pytest.raises(ConfigError, match=r"run_dir='.*folder' holds"):
        engine_in(base, folder)
    assert files(folder) == before


def test_what_does_not_collide_may_lie_there(base: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "train.jsonl").write_text("{}")
    with engine_in(base, tmp_path) as engine:
        engine.fit(ROWS, steps=1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_base_may_appear_between_the_engine_and_its_first_step(base: Path, tmp_path: Path) -> None:
    with engine_in(base, tmp_path / "run") as engine:
        shutil.copytree(base, tmp_path / "run")
        with pytest.raises(ConfigError, match="holds a config.json that is not a run's"):
            engine.fit(ROWS, steps=1)
    assert files(tmp_path / "run") == files(base)


# ---- runs of no steps ------------------------------------------------------------------------------------------------


def broken(model: Any, batch: Any) -> Any:
    raise RuntimeError("no loss")


@pytest.mark.parametrize("way", ["begun again", "resumed"])
def test_a_run_whose_first_step_failed_does_not_block_the_corrected_command(
    base: Path, tmp_path: Path, way: str
) -> None:
    data, run = tmp_path / "d.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with engine_in(base, run, objective=broken) as engine, pytest.raises(RuntimeError, match="no loss"):
        engine.fit(data, steps=2, batch_size=2)
    assert run_directory.is_without_steps(run)
    if way == "begun again":
        assert main(["fit", str(base), "--data", str(data), "--run-dir", str(run), "--steps", "2", "--batch-size", "4",
                     "--lr", "1e-3", "--storage", "bf16", "--quiet", "--offload", "disk"]) == 0  # fmt: skip
    else:
        with Engine.resume(run, objective=lambda model, batch: model(**batch).loss) as engine:
            engine.fit(ROWS[:8], steps=2, batch_size=4)
    with pytest.raises(ConfigError, match="holds a run"):
        engine_in(base, run)


def test_an_evaluation_before_a_run_is_begun_again_is_not_its_own(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with engine_in(base, run) as engine:
        engine.evaluate(ROWS)
        (run / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 77}\n')
    with engine_in(base, run, storage="bf16") as engine:
        assert engine.fit(ROWS, steps=1).evals == []
    with Engine.resume(run) as engine:
        assert engine.fit(ROWS, steps=2).evals == []


def test_a_journal_that_was_taken_away_is_missed(base: Path, tmp_path: Path) -> None:
    with engine_in(base, tmp_path / "run") as engine:
        engine.fit(ROWS, steps=2)
    (tmp_path / "run" / "journal.zoj").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="holds metrics.jsonl but no journal.zoj, which is the run"):
        engine_in(base, tmp_path / "run")
    with pytest.raises(JournalError, match="journal.zoj is missing, and it is the run"):
        Engine.resume(tmp_path / "run")


# ---- places, and odd files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["disk", "none"])
def test_a_relative_run_dir_is_where_it_was_said(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offload: str
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    engine = engine_in(base, Path("run"), offload=offload, snapshot_steps=1)
    monkeypatch.chdir(tmp_path / "two")
    with engine:
        engine.fit(ROWS, steps=2, callback=lambda record: os.chdir(tmp_path / ("one", "two")[record.step % 2]))
    monkeypatch.chdir(tmp_path / "one")
    resumed = Engine.resume("run")
    monkeypatch.chdir(tmp_path / "two")
    with resumed:
        assert resumed.fit(ROWS, steps=3).steps == 1
    assert list((tmp_path / "two").iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", "journal.zoj", "metrics.jsonl", "lock", "blocks/00000.zob"])
def test_a_pipe_in_a_file_s_place_is_an_error_and_not_a_wait(base: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    with engine_in(base, run) as engine:
        engine.fit(ROWS, steps=1)
    (run / name).unlink()
    os.mkfifo(run / name)
    if name == "metrics.jsonl":  # is for people: the run goes on without it
        with Engine.resume(run) as engine:
            assert engine.fit(ROWS, steps=2).steps == 1
        return
    with pytest.raises(ZOError):
        Engine.resume(run).fit(ROWS, steps=2)


@pytest.mark.parametrize(
    "setting", [dict(threads="a"), dict(threads=0), dict(num_slots="3"), dict(seed=1.5), dict(block_numel=[1]),
                dict(storage=5), dict(compute=["fp32"]), dict(device=7), dict(trainable=5), dict(overlap="yes"),
                dict(snapshot_minutes="x"), dict(device_memory=[1]), dict(device_memory="1.2.3GB"),
                dict(device_memory=float("inf")), dict(io_threads=None), dict(io_threads=10**30), dict(threads=10**30),
                dict(block_numel=None), dict(seed=None), dict(device=None), dict(overlap=None), dict(keep=5),
                dict(keep=[1]), dict(whole=5)],
    ids=str,
)  # fmt: skip
def test_an_edited_setting_is_named(base: Path, tmp_path: Path, setting: dict[str, Any]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    record = {"model": str(base), "model_class": None, "settings": {**setting}, "method": {"name": "mezo"}}
    record["settings"].setdefault("trainable", None)
    (run / "config.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=next(iter(setting))):
        Engine.resume(run)


@pytest.mark.parametrize(
    "change", [dict(model=...), dict(model=5), dict(model_class=[]), dict(fit=3), dict(settings=[]), dict(method=None),
               dict(method={"name": "mezo", "tunes": []}), dict(method={"name": "mezo", "warmup_steps": 1e300})],
    ids=str,
)  # fmt: skip
def test_an_edited_record_is_refused(base: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    with engine_in(base, tmp_path / "run") as engine:
        engine.fit(ROWS, steps=1)
    path = tmp_path / "run" / "config.json"
    record = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in record.items() if value is not ...}))
    with pytest.raises(JournalError):
        Engine.resume(tmp_path / "run")


def test_metrics_are_json_and_odd_lines_are_passed_over(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    method = MeZO(lr=1e-3, batch_size=4, on_nonfinite="skip")
    nan = lambda model, batch: model(**batch).loss * float("nan")  # noqa: E731
    with engine_in(base, run, method=method, objective=nan) as engine:
        engine.fit(ROWS, steps=2, eval_data=ROWS[:4])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 1e999, "eval_loss": 1}\n{"step": [], "eval_loss": 2}\n{"step": 2, "eval_loss": NaN}\n')
    with Engine.resume(run, objective=nan) as engine:
        assert [values["step"] for values in engine.fit(ROWS, steps=2).evals] == [2]


@pytest.mark.parametrize("broken_call", ["replace_file", "sync_directory", "write_at", "append"])
def test_a_full_disk_while_a_run_begins_is_a_storage_error(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken_call: str
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(diskio, broken_call, full)
    engine = engine_in(base, tmp_path / "run")
    with pytest.raises(StorageError, match="No space left on device"):
        engine.fit(ROWS, steps=1)
    monkeypatch.undo()
    with engine_in(base, tmp_path / "run") as again:  # what was begun is not in the way
        assert again.fit(ROWS, steps=1).steps == 1


def test_no_step_is_in_a_block_before_there_is_a_journal(base: Path) -> None:
    """The write-ahead rule also where a run begins: its blocks are filled first, from the base alone."""
    origin = RunOrigin(open_model(base, MeZO(), EngineConfig()))
    origin.before_write(0)
    assert origin.history(0) == 0 and not origin.rebuilds
    with pytest.raises(AssertionError, match="a block at step 1 was to be written before there is a journal"):
        origin.before_write(1)


def test_the_lock_file_vanishes_while_a_run_begins(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = DiskTier.create

    def remove(*args: Any, **options: Any) -> Any:
        (tmp_path / "run" / "lock").unlink()
        return create(*args, **options)

    monkeypatch.setattr(DiskTier, "create", remove)
    with engine_in(base, tmp_path / "run") as engine, pytest.raises(ConfigError, match="'lock' was removed"):
        engine.fit(ROWS, steps=1)
