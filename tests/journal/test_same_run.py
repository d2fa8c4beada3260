"""A run goes on only as what it was: base and config, objective, method, data, the length of its schedule."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from support.zoo.models import save_tiny_llama
from zo_offload import ConfigError, Engine, JournalError, MeZO, ZOError
from zo_offload.cli import main
from zo_offload.data.digests import RowsDigest, rows_identity
from zo_offload.journal import run_directory
from zo_offload.journal.journal import read_journal

ROWS = [{"input_ids": [3 + (7 * r + 5 * c + r * c) % 60 for c in range(8)]} for r in range(20)]
METHOD = MeZO(lr=1e-3, batch_size=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("bases") / "base", layers=2)


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "base"))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def begin(base: Path, run: Path, data: Any = ROWS, steps: int = 3, *, method: MeZO = METHOD, **settings: Any) -> None:
    fit = {k: settings.pop(k) for k in ("batch_size", "micro_batches") if k in settings}
    with Engine(str(base), method=method, run_dir=run, **{"offload": "none", **settings}) as engine:
        engine.fit(data, steps=steps, **fit)


def losses_of(run: Path, data: Any = None, steps: int = 5, *, fit: dict[str, Any] | None = None, **changes: Any) -> Any:
    with Engine.resume(run, **changes) as engine:
        return engine.fit(data, steps=steps, **(fit or {})).losses


# ---- data ------------------------------------------------------------------------------------------------------------


def edited(row: int) -> Callable[[list[Any]], list[Any]]:
    return lambda rows: [*rows[:row], {"input_ids": [*rows[row]["input_ids"][:-1], 4]}, *rows[row + 1 :]]


EDITS: dict[str, Callable[[list[Any]], list[Any]]] = {
    "an odd row": edited(4097),
    "the last row": edited(8999),
    "two rows swapped": lambda rows: [*rows[:11], rows[12], rows[11], *rows[13:]],
    "a row added": lambda rows: [*rows, rows[0]],
    "a row removed": lambda rows: rows[:-1],
    "a column added": lambda rows: [{**rows[0], "weight": 1}, *rows[1:]],
}


@pytest.mark.parametrize("kind", ["file", "list"])
def test_any_edited_row_of_many_is_told(base: Path, tmp_path: Path, kind: str) -> None:
    rows = [{"input_ids": [3 + (r + c) % 60 for c in range(4)], "n": r} for r in range(9000)]
    data = write(tmp_path / "d.jsonl", rows) if kind == "file" else rows
    begin(base, tmp_path / "run", data)
    for name, edit in EDITS.items():
        other = write(tmp_path / "d.jsonl", edit(rows)) if kind == "file" else edit(rows)
        with pytest.raises(JournalError, match=r"data\.(digest|rows).*new_data=True"):
            losses_of(tmp_path / "run", other, fit=dict(batch_size=4))
            pytest.fail(f"{name}: not told")
    same = write(tmp_path / "d.jsonl", rows) if kind == "file" else list(rows)
    assert len(losses_of(tmp_path / "run", same)) == 2


@pytest.mark.parametrize("before", ["evaluate", "weights", "step"])
def test_data_is_bound_at_the_first_fit_whatever_came_before(base: Path, tmp_path: Path, before: str) -> None:
    batch = {"input_ids": torch.tensor([ROWS[0]["input_ids"]]), "labels": torch.tensor([ROWS[0]["input_ids"]])}
    with Engine(str(base), method=METHOD, offload="none", run_dir=tmp_path / "run") as engine:
        {
            "evaluate": lambda: engine.evaluate(ROWS, batch_size=4),
            "weights": lambda: list(engine.weights()),
            "step": lambda: engine.step(batch),
        }[before]()
        engine.fit(ROWS, steps=3)
    with pytest.raises(JournalError, match="data.digest"):
        losses_of(tmp_path / "run", ROWS[::-1])
    assert len(losses_of(tmp_path / "run", ROWS)) == 2
    with Engine.resume(tmp_path / "run") as engine:
        engine.fit(ROWS[::-1], steps=6, new_data=True)  # from here on it is the run's
    with pytest.raises(JournalError, match="data.digest"):
        losses_of(tmp_path / "run", ROWS, steps=7)
    assert len(losses_of(tmp_path / "run", ROWS[::-1], steps=7)) == 1


def test_the_same_engine_asks_for_other_data_too(base: Path, tmp_path: Path) -> None:
    with Engine(str(base), method=METHOD, offload="none", run_dir=tmp_path / "run") as engine:
        engine.fit(ROWS, steps=2)
        with pytest.raises(JournalError, match="data.rows"):
            engine.fit(ROWS[:8], steps=4)
        engine.fit(ROWS[:8], steps=4, new_data=True)


def test_parts_of_a_loader_s_batches_are_bound_too(base: Path, tmp_path: Path) -> None:
    ids = torch.tensor([row["input_ids"] for row in ROWS])
    loader = torch.utils.data.DataLoader([{"input_ids": x, "labels": x} for x in ids], batch_size=4)
    begin(base, tmp_path / "run", loader)
    with pytest.raises(JournalError, match="data.micro_batches"):
        losses_of(tmp_path / "run", loader, fit=dict(micro_batches=2))
    fewer = torch.utils.data.DataLoader([{"input_ids": x, "labels": x} for x in ids[:12]], batch_size=4)
    with pytest.raises(JournalError, match="data.rows"):
        losses_of(tmp_path / "run", fewer)
    assert len(losses_of(tmp_path / "run", loader)) == 2


@dataclass
class Made:
    """A dataset whose rows are made when they are asked for."""

    count: int
    random: bool = False

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": [int.from_bytes(os.urandom(2), "little") if self.random else i]}


def test_what_is_known_of_rows_is_said() -> None:
    assert "known" not in rows_identity(Made(100))
    assert rows_identity(Made(100)) == rows_identity([Made(100)[i] for i in range(100)])
    assert rows_identity(Made(10_000))["known"] == "4096 rows of 10000"
    assert rows_identity(Made(10, random=True))["digest"] == ""


def test_rows_count_whole_whatever_they_hold() -> None:
    def digest(value: Any) -> str:
        found = RowsDigest()
        found.add({"x": value})
        return found.hex()

    long = np.zeros(5000)
    other = long.copy()
    other[2500] = 1  # where a printed array has dots
    values = [
        long, other, torch.from_numpy(long), torch.from_numpy(other), [long], [other], [torch.from_numpy(other)],
        {"a": long}, {"a": other}, "1", 1, 1.0, True, None, b"1", [1], ["1"], [[1]], [1, [2]], {"a": {"b": 1}},
        {"a": {"b": 2}}, "é", "\ud800", np.float32(1), np.array(["a"], dtype=object),
        torch.zeros(2, dtype=torch.bfloat16),
    ]  # fmt: skip
    digests = [digest(value) for value in values]
    assert len(set(digests)) == len(values)
    assert digests == [digest(value) for value in values]
    assert digest({"b": 1, "a": [long]}) == digest({"a": [long.copy()], "b": 1})


def test_a_huggingface_dataset_is_its_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"row {i}", "ids": [i, i + 1], "label": i % 2} for i in range(50)]
    whole = datasets.Dataset.from_list(rows)
    assert rows_identity(whole) == rows_identity(rows)
    assert rows_identity(whole.select([1, 0, *range(2, 50)])) == rows_identity([rows[1], rows[0], *rows[2:]])
    assert rows_identity(whole.with_format("torch")) == rows_identity(rows)


# ---- the base --------------------------------------------------------------------------------------------------------


CHANGES = {
    "fit": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=4),  # tensors of the same shapes
    "eval": dict(rms_norm_eps=0.5),
    "export": dict(rope_parameters=dict(rope_theta=2.0, rope_type="default")),
    "replay": dict(hidden_act="relu"),
}


@pytest.mark.parametrize("tool", CHANGES)
def test_an_edited_config_of_the_base_is_refused(
    base: Path, tmp_path: Path, tool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "d.jsonl", ROWS)
    begin(base, tmp_path / "run", data, offload="disk")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **CHANGES[tool]}))
    run = str(tmp_path / "run")
    command = {
        "fit": ["fit", run, "--resume", "--steps", "5", "--quiet"],
        "eval": ["eval", run, "--data", str(data)],
        "export": ["export", run, "--out", str(tmp_path / "out")],
        "replay": ["replay", str(base), run, "--out", str(tmp_path / "out")],
    }[tool]
    assert main(command) == 2
    assert f"config.{next(iter(CHANGES[tool]))}" in capsys.readouterr().err
    (base / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9", "_name_or_path": "x"}))
    assert main(command) == 0


def test_another_version_of_what_computes_is_said(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begin(base, tmp_path / "run")
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert len(losses_of(tmp_path / "run", ROWS)) == 2
    assert "was begun with torch" in caplog.text and "here 9.9.9" in caplog.text


def test_the_config_of_a_module_in_memory_counts_too(made: Path, tmp_path: Path) -> None:
    def model(**change: Any) -> Any:
        found = transformers.LlamaForCausalLM.from_pretrained(made, **change)
        return found.eval()

    with Engine(model(), method=METHOD, offload="none", run_dir=tmp_path / "run") as engine:
        engine.fit(ROWS, steps=2)
    with pytest.raises(JournalError, match="config.rms_norm_eps"):
        losses_of(tmp_path / "run", ROWS, model=model(rms_norm_eps=0.1))
    assert len(losses_of(tmp_path / "run", ROWS, model=model())) == 3


# ---- the objective and the method ------------------------------------------------------------------------------------


def tenfold(model: Any, batch: Any) -> Any:
    return model(**batch).loss * 10


def squared(model: Any, batch: Any) -> Any:
    return model(**batch).loss ** 2


class Loss:
    def __call__(self, model: Any, batch: Any) -> Any:
        return tenfold(model, batch)


@pytest.mark.parametrize(
    "first, then, message",
    [
        (tenfold, None, "was trained with objective='.*tenfold', but would go on with the model's own loss"),
        (None, tenfold, "was trained with the model's own loss, but would go on with objective='.*tenfold'"),
        (tenfold, squared, "tenfold.*squared"),
        (Loss(), None, "Loss"),
        (lambda m, b: tenfold(m, b), None, "<lambda>"),
        (functools.partial(tenfold), None, "tenfold"),
        (tenfold, tenfold, None),
        (Loss(), Loss(), None),
        (lambda m, b: tenfold(m, b), lambda m, b: tenfold(m, b), None),
    ],
)  # fmt: skip
def test_an_objective_is_part_of_the_run(
    base: Path, tmp_path: Path, first: Any, then: Any, message: str | None
) -> None:
    begin(base, tmp_path / "run", steps=1, objective=first)
    batch = {"input_ids": torch.tensor([ROWS[0]["input_ids"]]), "labels": torch.tensor([ROWS[0]["input_ids"]])}
    passed = {} if then is None else {"objective": then}
    with Engine.resume(tmp_path / "run", **passed) as engine:
        assert list(engine.weights())  # they can be had in any case
        if message is None:
            engine.fit(ROWS, steps=2)
            return
        with pytest.raises(JournalError, match=message):
            engine.step(batch)
    with Engine.resume(tmp_path / "run", **passed) as engine, pytest.raises(JournalError, match=message):
        engine.fit(ROWS, steps=2)


class SignMeZO(MeZO):
    def clipped(self, grad: torch.Tensor) -> torch.Tensor:
        return torch.sign(grad)


class OtherSign(SignMeZO):
    pass


def test_a_method_of_one_s_own_is_not_taken_for_another(base: Path, tmp_path: Path) -> None:
    begin(base, tmp_path / "run", method=SignMeZO(lr=1e-3, batch_size=4))
    with pytest.raises(JournalError, match="a method of your own, '.*:SignMeZO': pass it again"):
        losses_of(tmp_path / "run", ROWS)
    with pytest.raises(JournalError, match=r"method\.class: the journal has '.*SignMeZO', this engine '.*OtherSign'"):
        losses_of(tmp_path / "run", ROWS, method=OtherSign(lr=1e-3, batch_size=4))
    with pytest.raises(JournalError, match=r"method\.lr: the journal has 0.001, this engine 0.1"):
        losses_of(tmp_path / "run", ROWS, method=SignMeZO(lr=0.1, batch_size=4))
    with Engine.resume(tmp_path / "run", method=SignMeZO(lr=1e-3, batch_size=4)) as engine:
        engine.fit(ROWS, steps=5)
        assert {abs(record.grad) for record in engine.journal.steps} == {1.0}
    begin(base, tmp_path / "plain")
    with pytest.raises(JournalError, match=r"method\.class: the journal has None"):
        losses_of(tmp_path / "plain", ROWS, method=SignMeZO(lr=1e-3, batch_size=4))


# ---- the schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_over_so_many_steps_is_not_lengthened(base: Path, tmp_path: Path, schedule: str) -> None:
    method = MeZO(lr=1e-3, batch_size=4, schedule=schedule)
    begin(base, tmp_path / "whole", steps=6, method=method)
    with Engine(str(base), method=method, offload="none", run_dir=tmp_path / "run") as engine:
        with pytest.raises(RuntimeError, match="stop"):
            engine.fit(ROWS, steps=6, callback=lambda record: stop() if record.step == 2 else None)
        with pytest.raises(ConfigError, match="steps=12: the run's learning rate depends on .* begun for 6"):
            engine.fit(ROWS, steps=12)
    with pytest.raises(ConfigError, match="begun for 6"):
        losses_of(tmp_path / "run", ROWS, steps=12)
    losses_of(tmp_path / "run", ROWS, steps=4)  # an earlier end is a part of the same run
    losses_of(tmp_path / "run", ROWS, steps=6)
    with Engine.resume(tmp_path / "whole") as one, Engine.resume(tmp_path / "run") as two:
        for (_, a), (_, b) in zip(one.weights(), two.weights(), strict=True):
            assert torch.equal(a, b)


def stop() -> None:
    raise RuntimeError("stop")


@pytest.mark.parametrize("schedule, warmup", [("constant", 0), ("constant_with_warmup", 4), ("inverse_sqrt", 2)])
def test_a_schedule_without_an_end_is_gone_on_with(base: Path, tmp_path: Path, schedule: str, warmup: int) -> None:
    begin(base, tmp_path / "run", method=MeZO(lr=1e-3, batch_size=4, schedule=schedule, warmup_steps=warmup))
    assert len(losses_of(tmp_path / "run", ROWS, steps=20)) == 17


# ---- the command line repeats what it was begun with -----------------------------------------------------------------


def test_a_resume_needs_to_be_told_nothing_twice(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, dev = write(tmp_path / "d.jsonl", ROWS), write(tmp_path / "dev.jsonl", ROWS[:4])
    run = str(tmp_path / "run")
    fit = ["fit", str(base), "--data", str(data), "--batch-size", "2", "--micro-batches", "2", "--max-length", "6",
           "--eval-data", str(dev), "--quiet", "--offload", "none", "--lr", "1e-3"]  # fmt: skip
    assert main([*fit, "--steps", "6", "--run-dir", str(tmp_path / "whole")]) == 0
    assert main([*fit, "--steps", "3", "--run-dir", run]) == 0
    capsys.readouterr()
    assert main(["fit", run, "--resume", "--steps", "6", "--quiet"]) == 0
    assert '"step": 6, "loss"' in capsys.readouterr().out
    with Engine.resume(run) as one, Engine.resume(tmp_path / "whole") as two:
        assert [r.loss for r in one.active.start() and one.journal.steps] == [
            r.loss for r in two.active.start() and two.journal.steps
        ]
    for flags, what in (
        (["--batch-size", "4"], "data.batch_size"),
        (["--micro-batches", "1"], "data.micro_batches"),
        (["--max-length", "5"], "data.encoder.max_length"),
    ):
        assert main(["fit", run, "--resume", "--steps", "8", "--quiet", *flags]) == 2
        assert what in (error := capsys.readouterr().err) and "--new-data" in error
    elsewhere = Path(shutil.copy(data, tmp_path / "copy.jsonl"))
    data.unlink()
    assert main(["fit", run, "--resume", "--steps", "7", "--quiet", "--data", str(elsewhere)]) == 0
    assert main(["fit", run, "--resume", "--steps", "8", "--quiet", "--batch-size", "4", "--new-data"]) == 0
    assert run_directory.load_config(Path(run))["fit"]["batch_size"] == 4


def steps_of(run: str | Path) -> list[Any]:
    return read_journal((Path(run) / "journal.zoj").read_bytes()).steps


def test_data_that_was_in_memory_has_to_be_given_again(base: Path, tmp_path: Path) -> None:
    begin(base, tmp_path / "run", batch_size=2)
    with pytest.raises(ConfigError, match="fit needs train_data"):
        losses_of(tmp_path / "run")
    assert len(losses_of(tmp_path / "run", ROWS)) == 2  # of two rows each, as it was


def test_a_base_that_was_moved_can_be_named(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "d.jsonl", ROWS)
    begin(base, tmp_path / "run", data, offload="disk")
    moved = str(shutil.move(base, tmp_path / "elsewhere"))
    run = str(tmp_path / "run")
    assert main(["export", run, "--out", str(tmp_path / "no")]) == 2
    assert "does not exist" in (error := capsys.readouterr().err) and "--base" in error
    assert main(["fit", run, "--resume", "--base", moved, "--steps", "4", "--quiet"]) == 0
    assert main(["eval", run, "--base", moved, "--data", str(data)]) == 0
    assert main(["export", run, "--base", moved, "--out", str(tmp_path / "out")]) == 0
    assert main(["fit", moved, "--base", moved, "--data", str(data)]) == 2
    capsys.readouterr()
    assert main(["fit", moved, "--resume"]) == 2 and "not a run's configuration, but a chec" in capsys.readouterr().err
    assert main(["fit", str(tmp_path / "gone"), "--resume"]) == 2
    assert "does not exist. If the run was moved" in capsys.readouterr().err
    elsewhere = data.rename(tmp_path / "other.jsonl")
    again = ["fit", run, "--resume", "--base", moved, "--steps", "5", "--quiet"]
    assert main(again) == 2
    assert f"the run's data, {data}, does not exist. If it was moved" in (error := capsys.readouterr().err)
    assert "(--data)" in error
    assert main([*again, "--data", str(elsewhere)]) == 0
    other = transformers.LlamaForCausalLM.from_pretrained(moved)
    other.model.norm.weight.data.mul_(1.1)
    other.model.layers[0].mlp.up_proj.weight.data.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    assert main(["fit", run, "--resume", "--base", str(tmp_path / "other"), "--steps", "6", "--quiet"]) == 2
    assert "base weights are not the run's" in capsys.readouterr().err


def test_errors_are_ours() -> None:
    assert issubclass(JournalError, ZOError) and issubclass(ConfigError, ZOError)
