"""Files, tasks and the command line as a newcomer has them: what is read, or the one line that says what is wrong."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys

import pytest
from torch.utils.data import DataLoader

from support.texts import write_text_model
from zo_offload import DataError, Engine
from zo_offload.cli import main
from zo_offload.data.files import open_file
from zo_offload.journal.selection import larger_is_better

ROWS = [{"text": t, "label": i % 2} for i, t in enumerate(["one fine day", "two", "three", "four and", "five", "six"])]
PROMPT = ("--template", "{text} is", "--verbalizers", " bad", " good")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("odd files") / "base")


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def rows_of(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(open_file(path, lambda row: 0))


def said(capsys, *args):
    """Exit status and what was printed, of the command line."""
    try:
        status = main([str(arg) for arg in args])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out + err


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_mark_before_utf8_is_no_text(tmp_path):
    assert rows_of(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo") == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", "one\rtwo\r", "has carriage returns and no line ends"),
    ("a.csv", "text,label,text\na,0,b\n", "the header has 'text' twice"),
    ("a.tsv", 'text\tlabel\n"Good\t1\nbad\t0\nfine"\t1\n', "line 2: a field begins with a quote, .* in line 4"),
    ("a.tsv", 'text\tlabel\n"Good" film\t1\n', "If quotes are ordinary characters"),
    ("a.jsonl", '{"text": "a", "text": "b"}\n', "line 1 is not JSON: 'text' is there twice"),
    ("a.json", '[{"text": "a", "text": "b"}]', "'text' is there twice"),
    ("a.jsonl", '{"text": ' + "[" * 200_000, "line 1 is not JSON: maximum recursion"),
    ("a.jsonl", '{"label": ' + "1" * 5000 + "}", "line 1 is not JSON: Exceeds the limit"),
])  # fmt: skip
def test_a_file_that_would_be_misread_is_refused(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path / name, content)


def test_quoted_fields_of_a_tsv_may_have_tabs_or_lines(tmp_path):
    rows = rows_of(tmp_path / "a.tsv", 'text\tlabel\n"a\tb"\t1\n"c\nd"\t0\n')
    assert rows == [{"text": "a\tb", "label": "1"}, {"text": "c\nd", "label": "0"}]


def test_a_loader_may_give_its_rows_as_they_are(base):
    prompt = dict(template="{text} is", verbalizers=[" bad", " good"])
    with Engine(base) as engine:
        loader = DataLoader(ROWS, batch_size=2, collate_fn=lambda rows: rows)
        assert engine.evaluate(loader, **prompt) == engine.evaluate(ROWS, batch_size=2, **prompt)


# ---- tasks of one's own ----------------------------------------------------------------------------------------------

FILES = '[files]\ntrain = "rows.jsonl"\ndev = "rows.jsonl"\n'
ASKED = '[prompt]\ntemplate = "{text} is"\nverbalizers = [" bad", " good"]\n'


@pytest.mark.parametrize("text, message", [
    (FILES + ASKED + "[score]\ngenerate = true\n", "needs answers"),
    (FILES + ASKED + '[score]\nanswers = "text"\n', "without generate = true"),
    (FILES + ASKED + '[score]\ngenerate = true\nanswers = "text"\nmax_new_tokens = "a"\n', "max_new_tokens = 'a'"),
    (FILES + ASKED + '[read]\nskip = { text = "two" }\n', "skip text = 'two': expected a list"),
    (FILES + ASKED + '[read]\neach = "text"\n', "each = 'text': expected a list of texts"),
    (FILES + ASKED + '[read]\neach = ["text"]\n', "record 0: 'text', named by each, is 'one fine day', not a list"),
    (FILES + ASKED + "[read]\nformat = []\n", r"format=\[\]: choose one of"),
    (FILES + ASKED + '[columns]\ntext = 5\nlabel = "label"\n', "column text = 5: expected a path"),
    (FILES + ASKED + '[columns]\ntext = { prefix = " " }\n', "column 'text' names no path"),
    (FILES + ASKED + '[columns]\ntext = { path = "text", prefx = " " }\n', "no 'prefx'. Did you mean prefix"),
    (FILES + ASKED + '[columns]\ntext = { path = "text", slice_of = "label" }\n', "record 0 is not what the task's"),
    ("[files]\ntrain = 5\n" + ASKED, "files train = 5: expected a file's name"),
    ("columns = []\n" + FILES + ASKED, r"columns = \[\]: expected a table"),
], ids=lambda text: re.sub(r"\W+", " ", text[-30:]) if "=" in text and "\n" in text else "")  # fmt: skip
def test_a_task_of_the_wrong_kind_is_told(base, data, text, message):
    (data.parent / "own.toml").write_text(text)
    with Engine(base) as engine, pytest.raises(DataError, match=message):
        engine.preview(data.parent, task=str(data.parent / "own.toml"))


def test_answers_that_are_no_texts_are_named(base, data):
    generated = '[prompt]\ntemplate = "{text}:"\ntarget_column = "text2"\n[score]\ngenerate = true\nanswers = "right"\n'
    (data.parent / "own.toml").write_text(FILES + generated + "max_new_tokens = 1\n")
    row = {"text": "q", "text2": "a", "right": {"text": ["a"]}}
    with Engine(base) as engine, pytest.raises(DataError, match="row 0: column 'right' is a dict; expected text"):
        engine.evaluate([row], task=str(data.parent / "own.toml"))


# ---- the command line ------------------------------------------------------------------------------------------------


def test_lines_ends_are_written_alike_in_all_texts(base, data, capsys):
    words = ("--verbalizers", r"\nbad", r"\ngood", "--prefix", r"Q\n")
    _, shown = said(capsys, "fit", base, "--data", data, "--template", r"{text}\nA:", *words, "--dry-run")
    assert "Q\none fine day\nA:»\nbad«" in shown
    status, shown = said(capsys, "generate", base, "--prompt", r"a\nb", "--max-new-tokens", "1")
    assert status == 0 and shown.startswith("a\nb")


def test_labels_that_are_texts_name_their_words(base, data, capsys):
    data.write_text(data.read_text().replace('"label": 0', '"label": "neg"').replace('"label": 1', '"label": "pos"'))
    by_label = '{"pos": " good", "neg": " bad"}'
    _, shown = said(capsys, "fit", base, "--data", data, *PROMPT[:3], by_label, "--dry-run")
    assert "one fine day is» bad«" in shown and "two is» good«" in shown
    _, shown = said(capsys, "fit", base, "--data", data, *PROMPT, "--dry-run")
    assert "label='neg', but the verbalizers are for '0', '1'" in shown and """--verbalizers '{"neg": ...}'""" in shown


@pytest.mark.parametrize("content, message", [
    ("steps: 2\nsteps: 3\n", "'steps' is there twice"),
    ("template: '{text} is'\nverbalizers: {0: no, 1: yes}\n", "False is not a text. YAML reads yes, no"),
], ids=["a key twice", "no and yes"])  # fmt: skip
def test_a_config_that_yaml_would_misread_is_refused(base, data, capsys, content, message):
    config = data.parent / "fit.yaml"
    config.write_text(content)
    status, shown = said(capsys, "fit", base, "--data", data, "--config", config, "--dry-run")
    assert status == 2 and message in shown


def test_a_config_is_utf8_and_has_a_home(base, data, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(data.parent))
    (data.parent / "fit.yaml").write_bytes(b"\xef\xbb\xbf" + "data: ~/rows.jsonl\nprefix: 'é '\n".encode())
    _, shown = said(capsys, "fit", base, "--config", "~/fit.yaml", *PROMPT, "--dry-run")
    assert "é one fine day is» bad«" in shown
    for option in ("--data", "--run-dir", "--config", "--task", "--out"):
        status, shown = said(capsys, "fit", base, "--data", data, option, "~nosuchuser/x", *PROMPT)
        assert status == 2 and "there is no such user" in shown
    with Engine(base, run_dir="~/run") as engine:
        assert engine.run_dir == data.parent / "run"


@pytest.mark.parametrize("args, message", [
    (("fit", "--steps", "1e3"), "expected a whole number, not '1e3'"),
    (("export", "--step", "last"), "'last' is neither a step's number nor best"),
    (("generate", "--prompt", "a", "--temperature", "nan"), "nan is not a temperature"),
    (("generate", "--prompt", "a\udcff"), "prompt 0 is not valid text"),
    (("journal", "show", "--last", "0"), "0 is less than 1"),
], ids=lambda x: " ".join(x[:3]).encode("ascii", "replace").decode() if isinstance(x, tuple) else "")  # fmt: skip
def test_a_value_is_told_in_words(base, capsys, args, message):
    command, *rest = args
    status, shown = said(capsys, command, *([base] if command != "journal" else []), *rest)
    assert status == 2 and message in shown


def test_an_export_that_could_not_be_written_is_told_before_the_steps(base, data, capsys):
    fit = ("fit", base, "--data", data, *PROMPT, "--steps", "1", "--run-dir", data.parent / "a" / "run")
    for out, message in (
        (data.parent / "a" / "run", "would hold the run"),
        (data.parent / "a", "would hold the run"),
        ("/proc/tuned", "nothing can be written in /proc"),
    ):
        status, shown = said(capsys, *fit, "--out", out)
        assert status == 2 and message in shown
    assert not (data.parent / "a").exists()


def test_output_that_is_closed_or_ascii_does_not_matter(base, data, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["fit", str(base), "--data", str(data), *PROMPT, "--steps", "1", "--log-every", "1"]) == 0
    assert sys.stdout is None, "as it was"
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert main(["fit", str(base), "--data", str(data), *PROMPT, "--dry-run"]) == 0
    narrow.flush()
    assert rb"one fine day is\xbb bad\xab" in narrow.buffer.getvalue()


def test_a_log_in_a_process_without_standard_error(base, data):
    code = f"""
from zo_offload import Engine
with Engine({str(base)!r}) as engine:
    engine.fit({str(data)!r}, steps=1, batch_size=2, progress=True, template="{{text}} is", verbalizers=[" a", " b"])
    open({str(data.parent / "done")!r}, "w").close()
"""
    run = [sys.executable, "-c", code]
    subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *run], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    assert (data.parent / "done").exists()


# ---- what is better --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loss", "error_rate", "word_error_rate", "val/nll", "ppl", "logloss", "brier_score"])
def test_names_that_are_better_when_smaller(name):
    assert not larger_is_better(name)


@pytest.mark.parametrize("name", ["accuracy", "f1", "em", "glossary_f1", "piece", "filter", "rouge_l"])
def test_names_that_are_better_when_larger(name):
    assert larger_is_better(name)


def test_a_page_says_the_best_as_the_run_kept_it(base, data, capsys):
    values = iter([3.0, 1.0, 2.0])
    with Engine(base, run_dir=data.parent / "run") as engine:
        prompt = dict(template="{text} is", verbalizers=[" bad", " good"])
        result = engine.fit(
            data, steps=3, batch_size=2, eval_data=data, eval_every=1, metric="perplexity", keep_best=True,
            compute_metrics=lambda seen: {"perplexity": next(values)}, **prompt,
        )  # fmt: skip
    assert result.best["perplexity"] == 1.0
    assert said(capsys, "report", data.parent / "run")[0] == 0
    assert "3 → 2 (best 1)" in (data.parent / "run" / "report.html").read_text()
