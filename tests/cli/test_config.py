"""Options: one definition a flag, a config file's key and a keyword; what is misspelt is told with the nearest name."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import get_type_hints

import pytest
import yaml

from support.training import ROWS
from support.zoo.small import tiny_llama
from zo_offload import ConfigError, DataError, Engine, EngineConfig, MeZO, __version__
from zo_offload.cli import main
from zo_offload.cli.command import RUN
from zo_offload.cli.parser import parse
from zo_offload.config import EngineSettings
from zo_offload.data.encode import Encoder
from zo_offload.data.options import DataOptions
from zo_offload.journal.calls import FitCall
from zo_offload.methods import METHODS

FLAGS = ["--lr", "1e-3", "--batch-size", "4", "--steps", "3", "--seed", "7", "--storage", "bf16+16", "--quiet"]
SAME = dict(lr=1e-3, batch_size=4, steps=3, seed=7, storage="bf16+16", quiet=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    tiny_llama().save_pretrained(folder / "base")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def call(*args):
    return main([str(arg) for arg in args])


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def by_flags(files):
    run = files / "by-flags"
    assert call("fit", files / "base", "--data", files / "train.jsonl", "--run-dir", run, *FLAGS) == 0
    return losses(run)


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_a_config_file_is_the_flags(files, by_flags, tmp_path, form):
    values = dict(SAME, model=str(files / "base"), data=str(files / "train.jsonl"), run_dir=str(tmp_path / "run"))
    path = tmp_path / f"fit.{form}"
    path.write_text(yaml.safe_dump(values) if form == "yaml" else json.dumps({k.replace("_", "-"): v
                                                                              for k, v in values.items()}))  # fmt: skip
    assert call("fit", "--config", path) == 0
    assert losses(tmp_path / "run") == by_flags


def test_flags_come_before_the_file(files, by_flags, tmp_path):
    path = tmp_path / "fit.yaml"
    path.write_text(yaml.safe_dump({**SAME, "data": str(files / "train.jsonl"), "steps": 9, "lr": 5e-1}))
    run = tmp_path / "run"
    assert call("fit", files / "base", "--config", path, "--steps", 3, "--lr", "1e-3", "--run-dir", run) == 0
    assert losses(run) == by_flags


def test_a_runs_own_config_repeats_it(files, by_flags, tmp_path):
    run = tmp_path / "again"
    assert call("fit", "--config", files / "by-flags" / "config.json", "--run-dir", run, "--quiet") == 0
    assert losses(run) == by_flags
    first, second = (json.loads((path / "config.json").read_text()) for path in (files / "by-flags", run))
    assert first == second
    other = tmp_path / "other"
    assert call("fit", "--config", run / "config.json", "--run-dir", other, "--quiet", "--eps", 1e-2) == 0
    assert json.loads((other / "config.json").read_text())["method"]["eps"] == 1e-2 and losses(other) != by_flags


def test_numbers_that_yaml_takes_for_text_are_numbers(files, tmp_path):
    path = tmp_path / "fit.yaml"
    path.write_text(f"model: {files / 'base'}\ndata: {files / 'train.jsonl'}\nlr: 1e-3\nsteps: 1\nbatch-size: 4\n"
                    "quiet: true\n")  # fmt: skip
    assert call("fit", "--config", path) == 0


@pytest.mark.parametrize(
    "text, message",
    [
        ("stpes: 3", "'stpes' is no option of zo-offload fit. Did you mean steps?"),
        ("steps: many", "steps='many': expected a whole number"),
        ("steps: 0", "steps=0: 0 is less than 1"),
        ("steps: 2.5", "steps=2.5: expected a whole number"),
        ("overlap: perhaps", "overlap='perhaps': expected true or false"),
        ("offload: dsk", "offload='dsk': choose one of auto, none, host, disk. Did you mean disk?"),
        ("seed: [1, 2]", "seed=[1, 2]: expected a whole number"),
        ("- a\n- b", "expected options by name"),
        ("a: [", "is malformed"),
    ],
    ids=lambda text: text[:14].replace("\n", " "),
)
def test_what_is_wrong_in_a_config_is_said(tmp_path, capsys, text, message):
    path = tmp_path / "fit.yaml"
    path.write_text(text)
    assert call("fit", "--config", path) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, message",
    [
        (["fit", "base", "--dta", "x"], "--dta is not an option of it. Did you mean --data?"),
        (["fit", "base", "--data", "x", "--stpes=3"], "--stpes is not an option of it. Did you mean --steps?"),
        (["fitt"], "'fitt' is not a command. Did you mean fit?"),
        (["fit", "--data", "x"], "MODEL is missing: checkpoint directory"),
        (["plan"], "MODEL is missing"),
        (["journal", "shw", "x"], "invalid choice: 'shw'"),
        (["fit", "base", "--offload", "disc"], "invalid choice: 'disc'"),
    ],
    ids=lambda args: " ".join(args)[:30] if isinstance(args, list) else "",
)
def test_what_is_wrong_on_the_command_line_is_one_line(capsys, args, message):
    with pytest.raises(SystemExit, match="2"):
        main(args)
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and "--help lists all" in error


@pytest.mark.parametrize("args, message", [
    (["fit", "base"], "--data is missing"), (["eval", "base"], "--data is missing"),
    (["generate", "base"], "--prompt is missing"), (["export", "base"], "--out is missing"),
    (["replay", "base", "run"], "--out is missing"),
])  # fmt: skip
def test_what_is_missing_is_said(capsys, args, message):
    assert main(args) == 2 and message in capsys.readouterr().err


def test_misspelt_keywords_are_told_with_the_nearest():
    with pytest.raises(ConfigError, match=r"offlod= is no setting of Engine. Did you mean offload=\?"):
        Engine(tiny_llama(), offlod="disk")
    with pytest.raises(
        ConfigError,
        match=r"methd= is no setting of Engine. Did you mean method=\? A .*config_overrides={'methd'",
    ):
        Engine(tiny_llama(), methd=MeZO(lr=1e-3))
    with Engine(tiny_llama()) as engine:
        with pytest.raises(DataError, match=r"step= is not an option of fit.*Did you mean steps=\?"):
            engine.fit(ROWS, step=3)
        with pytest.raises(DataError, match=r"early_stoping= is not an option.*Did you mean early_stopping=\?"):
            engine.fit(ROWS, early_stoping=3)
        with pytest.raises(DataError, match=r"templte= is not an option of fit, evaluate.*Did you mean template=\?"):
            engine.evaluate(ROWS, templte="{text}")


def test_type_checkers_see_every_setting():
    of_loading = ("num_labels", "attn_implementation", "dtype", "torch_dtype", "revision")
    settings = {name: hint for name, hint in get_type_hints(EngineSettings).items() if name not in of_loading}
    assert settings == get_type_hints(EngineConfig)
    hints = get_type_hints(Encoder)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(Encoder) if not f.name.startswith("_")}
    for name in ("kind", "own_objective", "version"):
        del fields[name]
    found = get_type_hints(DataOptions)
    del found["preprocess_logits_for_metrics"]
    assert found == fields


def test_every_field_is_a_flag_with_help_that_has_its_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    names = [f.name for kind in (FitCall, EngineConfig, METHODS["mezo"]) for f in dataclasses.fields(kind)
             if f.name not in ("options", "tunes")]  # fmt: skip
    flags = {name: f"--{name.replace('_', '-')}" for name in names}
    missing = [name for name, flag in flags.items() if f"{flag} " not in text and f"{flag}, " not in text]
    assert missing == []
    for words in (
        "(default: auto)",
        "Default: the method's",
        "Default: 1",
        "(default: eval)",
        "Default num_slots - 1",
    ):
        assert words in text, words


def test_a_flag_a_key_and_a_keyword_have_one_name():
    asked = ["fit", "base", "--data", "x", "--keep-best", "--no-overlap", "--text-column", "a,b"]
    args = parse(asked, dict.fromkeys(RUN, main))
    assert args.keep_best is True and args.overlap is False and args.text_column == ["a,b"]
    known = {f.name for kind in (FitCall, EngineConfig, Encoder) for f in dataclasses.fields(kind)}
    own = {"model", "config", "base", "resume", "new_data", "out", "quiet", "model_class", "num_labels", "tokenizer",
           "dry_run", "method", "lora", "merge", "patience", "serve", "token_file", "audit", "tolerance",
           "attn_implementation", "preset", "method_options", "run"}  # fmt: skip
    methods = {f.name for kind in METHODS.values() for f in dataclasses.fields(kind)}
    assert set(vars(args)) <= known | own | methods


def test_version_and_module(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"zo-offload {__version__}\n"
    done = subprocess.run([sys.executable, "-m", "zo_offload", "fit", "--version"], capture_output=True, text=True)
    assert done.returncode == 2 and "--version is not an option" in done.stderr, "the module takes the same commands"


def test_a_reader_that_has_enough_is_no_error(files):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "zo_offload", "plan", files / "base"], stdout=write,
                          stderr=subprocess.PIPE, text=True)  # fmt: skip
    os.close(write)
    assert done.returncode == 141 and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
