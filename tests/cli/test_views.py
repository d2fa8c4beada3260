"""`plot` and `report`: their numbers are the run's, whatever was stopped, resumed or cut; the page stands by itself."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.texts import write_text_model
from support.zoo.small import tiny_opt
from zo_offload import Conservative, Engine, MeZO
from zo_offload.cli import main
from zo_offload.cli.before_after import examples
from zo_offload.cli.chart import short, ticks
from zo_offload.cli.history import read_history
from zo_offload.cli.step_chart import StepTimes, read_times, step_chart

ROWS = [{"input_ids": [3 + (7 * i + k) % 60 for k in range(6)]} for i in range(8)]
STEPS = 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of five steps in two goes, the second in the same process, with an evaluation after each second step."""
    path = tmp_path_factory.mktemp("views") / "a <run> & more"
    engine = Engine(tiny_opt(), method=MeZO(lr=1e-3, batch_size=2), offload="disk", run_dir=path, num_slots=2)
    with engine:
        for steps in (3, STEPS):
            engine.fit(ROWS, steps=steps, eval_data=ROWS[:4], eval_every=2)
    return path


def call(*args):
    return main([str(arg) for arg in args])


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_history_is_what_the_run_did(run):
    history = read_history(run)
    written = [line for line in lines(run) if "loss" in line]
    assert [point.step for point in history.points] == list(range(STEPS))
    assert [point.loss for point in history.points] == [line["loss"] for line in written]
    assert history.points[-1].cost["forwards"] == 2 * STEPS
    # two calls of fit, each of which counts from zero
    assert history.fetch_bytes == written[2]["fetch_bytes"] + written[-1]["fetch_bytes"] > 0
    assert history.seconds == pytest.approx(written[2]["seconds"] + written[-1]["seconds"])
    assert [values["step"] for values in history.evals] == [2, 3, 4, 5]
    # memory as it was planned, once a call of fit, and as the process had it
    planned = [line["memory"] for line in written if "memory" in line]
    assert len(planned) == 2 and history.memory == planned[-1] and {"window", "process"} <= set(history.memory)
    assert history.formats == ["fp32"] and history.peak_bytes == written[-1]["peak_bytes"] > planned[-1]["window"]
    assert [y for _, y in history.curve("loss", "steps")] == [values["loss"] for values in history.evals]
    assert [x for x, _ in history.curve("loss", "forwards")] == [4, 6, 8, 10]


def test_forwards_of_all_visits_of_a_step_are_counted(tmp_path):
    with Engine(tiny_opt(), method=Conservative(lr=1e-4, batch_size=2), run_dir=tmp_path / "run") as engine:
        engine.fit(ROWS, steps=2)
    assert read_history(tmp_path / "run").points[-1].cost["forwards"] == 2 * 5


def test_one_step_is_timed_and_drawn(run):
    times = read_times(run)
    assert times is not None and times.step in range(STEPS) and times.seconds > 0
    with Engine.resume(run, tiny_opt()) as engine:
        names = {block.name for block in engine.plan.blocks}
        fetched = [name for what, name, *_ in times.spans if what == "fetch"]
        assert names == {name for what, name, *_ in times.spans if what == "fused"}
        assert set(fetched) <= names and len(set(fetched)) >= len(names) - 2, "but for what was fetched ahead"
    assert all(start >= 0 and seconds >= 0 for _, _, start, seconds in times.spans)
    assert 0 < times.share("fused") < 1 and 0 <= times.share("wait") < 1
    drawn = ElementTree.fromstring(step_chart(times)).findall(".//{*}title")
    # of a slow step, bars too narrow to be seen are one
    assert len(names) <= len(drawn) <= sum(start <= times.seconds for _, _, start, _ in times.spans)


@pytest.mark.parametrize("text", ["", "[]", '{"traceEvents": [{"ph": "X", "tid": 9}]}',
                                  '{"traceEvents": [], "seconds": NaN, "step": 1}', "\0"])  # fmt: skip
def test_times_that_cannot_be_read_are_left_out(tmp_path, text):
    (tmp_path / "timeline.json").write_text(text)
    assert read_times(tmp_path) is None
    assert read_times(tmp_path / "nowhere") is None


def test_a_share_counts_what_overlaps_once():
    spans = [("fetch", "a", 0.0, 0.5), ("fetch", "b", 0.25, 0.5), ("fetch", "c", 0.9, 5.0), ("wait", "a", 0.0, 0.1)]
    times = StepTimes(3, 1.0, spans)
    assert times.share("fetch") == pytest.approx(0.85) and times.share("wait") == 0.1 and times.share("flush") == 0.0


class Page(HTMLParser):
    """Tags in order, and whether each that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_stands_by_itself(run, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert call("report", run, "--out", out) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    page = Page(out.read_text())
    assert not page.open and sum(tag == "svg" for tag, _ in page.tags) >= 2
    assert not [tag for tag, attrs in page.tags if tag in ("script", "link", "img") or {"src", "href"} & set(attrs)]
    assert run.name in page.words
    last = read_history(run).evals[-1]["loss"]
    assert any(f"{last:.4g}" in words for words in page.words)


def test_plots_are_svg_files_with_a_point_an_evaluation(run, tmp_path):
    for axis in ("steps", "forwards", "bytes", "seconds"):
        out = tmp_path / f"{axis}.svg"
        assert call("plot", run, "--x", axis, "--out", out) == 0
        tree = ElementTree.parse(out)
        assert len(tree.findall(".//{*}circle")) == len(read_history(run).evals)


def test_runs_stand_beside_each_other(run, tmp_path):
    other = tmp_path / "other"
    with Engine(tiny_opt(), method=MeZO(lr=1e-4, batch_size=2), run_dir=other) as engine:
        engine.fit(ROWS, steps=1)  # no evaluation, nothing moved
    out = tmp_path / "both.html"
    assert call("report", run, other, "--out", out) == 0
    page = Page(out.read_text())
    assert "other" in page.words and "not measured" in page.words


def test_files_of_others_are_left(run, tmp_path, capsys):
    out = tmp_path / "mine.html"
    out.write_text("mine")
    assert call("report", run, "--out", out) == 2 and out.read_text() == "mine"
    assert "--overwrite" in capsys.readouterr().err
    assert call("report", run, "--out", out, "--overwrite") == 0 and out.read_text() != "mine"
    ours = run / "report.html"
    assert call("report", run) == 0 and call("report", run) == 0  # its own, of last time, is replaced
    ours.write_text("mine")
    assert call("report", run) == 2 and ours.read_text() == "mine"
    ours.unlink()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["plot", "{tmp}"], "holds no run"),
        (["plot", "{run}", "--y", "f1"], "--y f1: these runs have loss"),
        (["report", "{run}", "--out", "{tmp}/no/page.html"], "is not a directory"),
    ],
    ids=["no run", "nothing of that name", "no folder"],
)
def test_what_cannot_be_drawn_is_said(run, tmp_path, capsys, args, said):
    assert call(*(arg.format(run=run, tmp=tmp_path) for arg in args)) == 2
    assert said in capsys.readouterr().err


def test_metrics_may_be_odd_or_gone(run, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "journal.zoj").write_bytes((run / "journal.zoj").read_bytes())
    (copy / "metrics.jsonl").write_text(
        '{"step": 1, "loss": nu\n[1]\n{"step": "x", "loss": 1}\n{"step": 0, "eval_loss": null}\n'
    )
    history = read_history(copy)
    assert len(history.points) == STEPS and history.seconds == 0 and history.curve("loss", "steps") == []
    assert call("report", copy, "--out", tmp_path / "odd.html") == 0
    (copy / "metrics.jsonl").unlink()
    assert call("plot", copy, "--out", tmp_path / "none.svg") == 0


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 7), (-3.2, 1e9), (0.1, 0.1), (1e-9, 2e-9), (0.6436, 0.6441)])
def test_ticks_are_round_and_hold_the_values(low, high):
    found = ticks(low, high)
    assert found == sorted(set(found)) and found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8


def test_numbers_of_an_axis_are_short():
    assert [short(v) for v in (0, 0.25, 2000, 12000, 3.2e9)] == ["0", "0.25", "2000", "12k", "3.2G"]


WORDS = ["--template", "{text} It was", "--verbalizers", " bad", " good"]
REVIEWS = [{"text": f"film {i}", "label": i % 2, "prompt": f"say {i}:", "completion": f" {i}{i}"} for i in range(6)]


def loss_of(model, ids, tokenizer, word):
    tail = torch.tensor([[*tokenizer(word, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
    labels = torch.cat([torch.full_like(ids, -100), tail], 1)
    with torch.no_grad():
        return float(model(input_ids=torch.cat([ids, tail], 1), labels=labels).loss)


@pytest.mark.parametrize("how", ["options", "text", "completion"])
def test_the_page_shows_answers_before_and_after(tmp_path, capsys, how):
    """The model's answers, as plain transformers gives them at the base and at the run's export."""
    base, data, kept, out = (tmp_path / name for name in ("base", "rows.jsonl", "run", "tuned"))
    write_text_model(base)
    keys = {"options": ("text", "label"), "text": ("text",), "completion": ("prompt", "completion")}[how]
    data.write_text("".join(json.dumps({key: row[key] for key in keys}) + "\n" for row in REVIEWS))
    options = WORDS if how == "options" else []
    assert call("fit", base, "--data", data, "--eval-data", data, "--steps", 4, "--batch-size", 3, "--lr", 0.02,
                "--run-dir", kept, "--out", out, "--quiet", *options) == 0  # fmt: skip
    found = examples(kept, 4)
    assert call("report", kept, "--examples", 4) == 0
    page = (kept / "report.html").read_text()
    assert "Before and after" in page and "as wanted, of 4" in page
    assert [row.text for row in found] != [row.wanted for row in found] and len(found) == 4
    tokenizer = AutoTokenizer.from_pretrained(base)
    for when, folder in (("before", base), ("after", out)):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        for row in found:
            ids = tokenizer(row.text, return_tensors="pt")["input_ids"]
            ids = ids[:, :-1] if int(ids[0, -1]) == tokenizer.eos_token_id else ids
            if how == "options":
                bad, good = (loss_of(model, ids, tokenizer, word) for word in (" bad", " good"))
                want = "good" if good < bad else "bad"
            else:
                said = model.generate(ids, max_new_tokens=48, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
                want = tokenizer.decode(said, skip_special_tokens=True)
            assert getattr(row, when) == want.strip(), (how, when, row)
    assert call("report", kept, "--examples", 0) == 2
    assert "--examples 0" in capsys.readouterr().err


def test_a_run_of_a_module_has_no_answers_to_show(run, capsys):
    assert call("report", run, "--examples", 2) == 2
    assert "module in memory" in capsys.readouterr().err
