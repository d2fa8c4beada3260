"""Runs and journals of earlier versions open, resume and replay to the same bits.

data/runs_format2.tar.xz, made by version 0.1 (journal "ZOJ2", block files "ZOB2", header format 2): `base/`, a tiny
Llama whose weights are multiples of 2**-14; `rows.jsonl`; run directories as a kill after their last step left them,
with blocks and snapshots that lag behind; and expected.json, digests of their weights at the last step and at step 3.
    mezo-fp32    disk, a fold a step, weight decay, linear schedule over 14 steps, two layers trained of a tied model
    mezo-bf16    disk, a fold in 4 steps, stochastic rounding       mezo-int8+8   disk, Rademacher noise, scales
    fzoo-host    four directions, snapshots of a run in memory      data-null     evaluated before its first `fit`
data/runs_format3.tar.xz, the same base, rows and kinds of runs, made when journals were "ZOJ3": a record an update.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from zo_offload import Engine, MeZO, SignSGD
from zo_offload.cli import command as cli
from zo_offload.cli import journal_tools
from zo_offload.errors import JournalError
from zo_offload.journal import run_directory
from zo_offload.replay import replayed

RUNS = {
    2: ("mezo-fp32", "mezo-bf16", "mezo-int8+8", "fzoo-host", "data-null"),
    3: ("mezo-fp32", "mezo-int8+8", "fzoo-host"),
}
EACH = [pytest.param(form, name, id=f"ZOJ{form}-{name}") for form, names in RUNS.items() for name in names]


@pytest.fixture
def form() -> int:
    return 2


@pytest.fixture
def old(form: int, tmp_path: Path) -> Path:
    with tarfile.open(Path(__file__).resolve().parents[1] / "data" / f"runs_format{form}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.fixture
def expected(old: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((old / "expected.json").read_text())
    return found


def digest(weights: Iterator[tuple[str, torch.Tensor]]) -> str:
    found = hashlib.sha256()
    for name, tensor in weights:
        found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("form, name", EACH)
def test_an_old_run_goes_on_from_the_same_bits(old: Path, expected: dict[str, Any], name: str, form: int) -> None:
    journal = old / name / "journal.zoj"
    with Engine.resume(old / name, model=str(old / "base")) as engine:
        assert digest(engine.weights()) == expected[name]["weights"]
        assert engine.log.version == expected[name]["steps"]
        engine.fit(old / "rows.jsonl", steps=expected[name]["steps"] + 3, batch_size=4)
        after = digest(engine.weights())
    assert after != expected[name]["weights"]
    with replayed(old / "base", old / name) as engine:
        assert digest(engine.weights()) == after
    with Engine.resume(old / name, model=str(old / "base")) as engine:  # its blocks are of both versions by now
        assert digest(engine.weights()) == after
    assert all(sound for sound, _ in journal_tools.check(old / name))
    assert journal.read_bytes()[:4] == b"ZOJ%d" % form


@pytest.mark.parametrize("form, name", EACH)
def test_an_old_journal_replays_to_the_same_bits(old: Path, expected: dict[str, Any], name: str) -> None:
    with replayed(old / "base", old / name / "journal.zoj") as engine:
        assert digest(engine.weights()) == expected[name]["weights"]
    with replayed(old / "base", old / name / "journal.zoj", to=3) as engine:
        assert digest(engine.weights()) == expected[name]["weights_at_3"]


def test_an_old_run_is_told_by_what_it_recorded(old: Path) -> None:
    rows = (old / "rows.jsonl").read_text().splitlines()
    (old / "rows.jsonl").write_text("\n".join([*rows[1:], rows[0]]) + "\n")
    with (
        Engine.resume(old / "mezo-bf16", model=str(old / "base")) as engine,
        pytest.raises(JournalError, match="data"),
    ):
        engine.fit(old / "rows.jsonl", steps=12, batch_size=4)


def test_an_old_journal_is_cut_and_goes_on(old: Path, expected: dict[str, Any]) -> None:
    assert cli.main(["journal", "cut", str(old / "mezo-bf16"), "--to", "3"]) == 0
    with Engine.resume(old / "mezo-bf16", model=str(old / "base")) as engine:
        assert digest(engine.weights()) == expected["mezo-bf16"]["weights_at_3"]


def test_a_run_keeps_the_folding_that_its_version_chose(old: Path, tmp_path: Path, monkeypatch) -> None:
    """By default, that is: nothing was asked for, and a newer version would choose otherwise."""
    rows, settings = old / "rows.jsonl", dict(storage="bf16", offload="disk")
    with Engine(old / "base", method=MeZO(lr=1e-2), **settings, fold_every=3, run_dir=tmp_path / "whole") as engine:
        engine.fit(rows, steps=8, batch_size=4)
        whole = digest(engine.weights())
    with monkeypatch.context() as patch:
        patch.setattr("zo_offload.run.prepare.choose_fold_every", lambda given, *rest: 3 if given is None else given)
        with Engine(old / "base", method=MeZO(lr=1e-2), **settings, run_dir=tmp_path / "run") as engine:
            engine.fit(rows, steps=5, batch_size=4)
    with Engine(old / "base", method=MeZO(lr=1e-2), **settings, run_dir=tmp_path / "new") as engine:
        assert engine.fold_every != 3
    with Engine.resume(tmp_path / "run") as engine:
        assert engine.fold_every == 3
        engine.fit(steps=8)
        assert digest(engine.weights()) == whole
    with replayed(old / "base", tmp_path / "run") as engine:
        assert digest(engine.weights()) == whole


def test_a_run_keeps_the_layout_of_its_noise(old: Path, tmp_path: Path) -> None:
    """Layout 1 can be asked for, is another run than the newest, and is kept by whatever goes on with it."""
    rows, found = old / "rows.jsonl", {}
    for layout in (1, 2):
        run_dir = tmp_path / f"layout{layout}"
        with Engine(old / "base", method=MeZO(lr=1e-2, noise_layout=layout), offload="disk", run_dir=run_dir) as engine:
            engine.fit(rows, steps=3, batch_size=4)
            whole = digest(engine.weights())
        with replayed(old / "base", run_dir) as engine:
            assert engine.method.noise.layout == layout
            assert digest(engine.weights()) == whole
        with Engine.resume(run_dir) as engine:
            assert engine.method.noise.layout == layout
            engine.fit(steps=5)
            found[layout] = digest(engine.weights())
        with Engine(old / "base", method=MeZO(lr=1e-2, noise_layout=layout), offload="host") as engine:
            engine.fit(rows, steps=5, batch_size=4)
            assert digest(engine.weights()) == found[layout]
    assert found[1] != found[2]


def test_a_method_that_is_passed_again_takes_the_runs_layout(old: Path, tmp_path: Path) -> None:
    given = SignSGD(lr=1e-2)
    with Engine.resume(old / "mezo-bf16", model=str(old / "base")) as engine:
        was = engine.method
    assert was.noise_layout == 1
    record = run_directory.method_of(was)
    assert run_directory.make_method(record, given).noise_layout == 1
    del record["noise_layout"]  # as runs of version 0.1 have it
    assert run_directory.make_method(record, given).noise_layout == 1
    record["noise_layout"] = 2
    assert run_directory.make_method(record, given).noise_layout == 2
    assert run_directory.make_method(record, SignSGD(lr=1e-2, noise_layout=1)).noise_layout == 1, "and is then refused"


def test_the_layout_is_an_option_of_the_command_line(old: Path, tmp_path: Path, capsys: Any) -> None:
    options = ["--steps", "2", "--batch-size", "4", "--offload", "disk", "--noise-layout", "1", "--quiet"]
    run_dir = str(tmp_path / "run")
    assert cli.main(["fit", str(old / "base"), "--data", str(old / "rows.jsonl"), "--run-dir", run_dir, *options]) == 0
    with replayed(old / "base", run_dir) as engine:
        assert engine.method.noise.layout == 1
    assert cli.main(["fit", "--resume", run_dir, "--data", str(old / "rows.jsonl"), "--noise-layout", "2"]) == 2
    assert "--noise-layout" in capsys.readouterr().err
