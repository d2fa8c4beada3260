"""Tasks: each paper's official files become rows, are trained on and scored; a task of one's own is one file."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.texts import write_text_model
from zo_offload import DataError, Engine, MeZO
from zo_offload.cli import main
from zo_offload.data.answers import exact_match, f1
from zo_offload.data.tasks import find_task, sampled, task_names

PAIR = {"premise": "It rained.", "hypothesis": "It was wet.", "label": "entailment"}
NLI = {"sentence1": "A man eats.", "sentence2": "A man sleeps.", "gold_label": "contradiction"}


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


OFFICIAL = {
    "sst2": ("train.tsv", 'sentence\tlabel\na "fine film \t1\ndull\t0\n'),
    "sst5": ("train.txt", "(4 (2 A) (4 (3 great) (2 film)))\n(0 (1 -LRB-) (0 awful))\n"),
    "trec": ("train_5500.label", "HUM:ind Who wrote Caf\xe9 ?\nLOC:city Where is it ?\n"),
    "snli": ("snli_1.0_train.jsonl", lines(NLI, {**NLI, "gold_label": "-"}, {**NLI, "gold_label": "neutral"})),
    "mnli": ("train.tsv", "index\tsentence1\tsentence2\tgold_label\n0\tA\tB\tneutral\n1\tC\tD\tentailment\n"),
    "rte": ("train.jsonl", lines(PAIR, {**PAIR, "label": "not_entailment"})),
    "cb": ("train.jsonl", lines(PAIR, {**PAIR, "label": "contradiction"})),
    "boolq": ("train.jsonl", lines({"passage": "Cats purr.", "question": "do cats purr", "label": True},
                                   {"passage": "Dogs bark.", "question": "do dogs fly", "label": False})),
    "wsc": ("train.jsonl", lines(
        {"text": "Mark told Pete lies.", "label": False, "target": {"span1_text": "Mark", "span2_text": "he"}},
        {"text": "Ann saw Bo.", "label": True, "target": {"span1_text": "Bo", "span2_text": "her"}})),
    "wic": ("train.jsonl", lines({"word": "bank", "sentence1": "a bank", "sentence2": "the bank", "label": True},
                                 {"word": "bar", "sentence1": "a bar", "sentence2": "to bar", "label": False})),
    "multirc": ("train.jsonl", lines({"passage": {"text": "A text.", "questions": [
        {"question": "Why?", "answers": [{"text": "so", "label": 1}, {"text": "not", "label": 0}]}]}})),
    "copa": ("train.jsonl", lines(
        {"premise": "He fell.", "choice1": "He slipped.", "choice2": "He sang.", "question": "cause", "label": 0},
        {"premise": "It broke.", "choice1": "It shone.", "choice2": "It fell.", "question": "effect", "label": 1})),
    "record": ("train.jsonl", lines({
        "passage": {"text": "Ann met Bo and Cy.", "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 9},
                                                               {"start": 15, "end": 16}]},
        "qas": [{"query": "@placeholder met Bo.", "answers": [{"start": 0, "end": 2, "text": "Ann"}]},
                {"query": "Ann met @placeholder.", "answers": [{"text": "Bo"}, {"text": "Cy"}]}]})),
    "squad": ("train-v1.1.json", json.dumps({"version": "1.1", "data": [{"title": "Cats", "paragraphs": [
        {"context": "Cats purr loudly.", "qas": [{"id": "1", "question": "Who purrs?", "answers": [
            {"answer_start": 0, "text": "Cats"}, {"answer_start": 0, "text": "the cats"}]}]}]}]})),
    "drop": ("drop_dataset_train.json", json.dumps({"nfl_1": {"passage": "Two goals.", "qa_pairs": [
        {"question": "How many?", "answer": {"number": "2", "date": {}, "spans": []}},
        {"question": "Who?", "answer": {"number": "", "date": {}, "spans": ["Ann", "Bo"]}},
        {"question": "When?", "answer": {"number": "", "date": {"day": "3", "month": "May", "year": ""}, "spans": []}},
    ]}})),
}  # fmt: skip

FIRST = {
    "sst2": {"text": 'a "fine film ', "label": "1"},
    "sst5": {"text": "A great film", "label": 4},
    "trec": {"text": "Who wrote Caf\xe9 ?", "label": "HUM", "fine": "HUM:ind"},
    "snli": {"premise": "A man eats.", "hypothesis": "A man sleeps.", "label": "contradiction"},
    "mnli": {"premise": "A", "hypothesis": "B", "label": "neutral"},
    "rte": PAIR, "cb": PAIR,
    "boolq": {"passage": "Cats purr.", "question": "do cats purr", "label": True},
    "wsc": {"text": "Mark told Pete lies.", "noun": "Mark", "pronoun": "he", "label": False},
    "wic": {"word": "bank", "sentence1": "a bank", "sentence2": "the bank", "label": True},
    "multirc": {"passage": "A text.", "question": "Why?", "answer": "so", "label": 1},
    "copa": {"premise": "He fell.", "link": "This happened because:", "choice1": "He slipped.",
             "choice2": "He sang.", "label": 0},
    "record": {"passage": "Ann met Bo and Cy.", "query": "@placeholder met Bo.", "entities": ["Ann", "Bo", "Cy"],
               "label": "Ann"},
    "squad": {"title": "Cats", "context": "Cats purr loudly.", "question": "Who purrs?", "answer": " Cats",
              "answers": ["Cats", "the cats"]},
    "drop": {"passage": "Two goals.", "question": "How many?", "answer": " 2", "answers": ["2"]},
}  # fmt: skip


def write(folder, name, split="train"):
    file, text = OFFICIAL[name]
    names = find_task(name).files[split]
    target = file if split == "train" else next(n for n in names if n.endswith(file.rpartition(".")[2]))
    encoding = "latin-1" if name == "trec" else "utf-8"
    (folder / target).write_text(text, encoding=encoding)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("tasks") / "base")


def test_all_tasks_of_the_papers_are_there():
    assert set(task_names()) == set(OFFICIAL) and len(OFFICIAL) == 15


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_files_become_rows(name, tmp_path):
    rows = find_task(name).rows(write(tmp_path, name), "train")
    assert rows[0] == FIRST[name]


def test_rows_that_others_hold_are_found_and_left_out(tmp_path):
    assert [r["label"] for r in find_task("snli").rows(write(tmp_path, "snli"), "train")] == [
        "contradiction",
        "neutral",
    ]
    record = find_task("record").rows(write(tmp_path, "record"), "train")
    assert record[1] == {**FIRST["record"], "query": "Ann met @placeholder.", "entities": ["Ann", "Bo"], "label": "Bo"}
    drop = [row["answer"] for row in find_task("drop").rows(write(tmp_path, "drop"), "train")]
    assert drop == [" 2", " Ann, Bo", " 3 May"]
    assert find_task("multirc").rows(write(tmp_path, "multirc"), "train")[1]["answer"] == "not"


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_task_trains_and_is_evaluated(name, base, tmp_path):
    folder = write(write(tmp_path, name), name, "dev")
    with Engine(base, method=MeZO(lr=1e-4, batch_size=2)) as engine:
        result = engine.fit(folder, steps=1, batch_size=1, task=name)
        values = result.evals[-1]
        assert {"em", "f1"} <= set(values) if name in ("squad", "drop") else "accuracy" in values
        text = engine.preview(folder, task=name)
        assert f"{name}: " in text and "»" in text


def test_the_recipes_loss_is_over_the_options(base, tmp_path):
    """sst2's loss is the cross-entropy among its words, as plain transformers computes it."""
    folder = write(tmp_path, "sst2", "dev")
    with Engine(base) as engine:
        values = engine.evaluate(folder, task="sst2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    words, total = [" negative", " positive"], 0.0
    for row in find_task("sst2").rows(folder, "dev"):
        prompt = tokenizer(f"Review: {row['text']}\nSentiment:")["input_ids"]
        scores = []
        for word in words:
            ids = tokenizer(word, add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            scores.append(torch.stack([logits[len(prompt) + i - 1, t] for i, t in enumerate(ids)]).mean())
        total -= float(torch.stack(scores).log_softmax(0)[int(row["label"])].detach())
    assert values["loss"] == pytest.approx(total / 2, rel=1e-5)  # another order of sums


def test_options_of_different_numbers_are_compared_row_by_row(base):
    rows = [{"q": "a", "options": ["x", "yy", "z z"], "label": "yy"}, {"q": "b", "options": ["1", "22"], "label": 0}]
    prompt = dict(template="{q}:", verbalizers=" {options}")
    with Engine(base) as engine:
        together = engine.evaluate(rows, **prompt)
        alone = [engine.evaluate([row], **prompt) for row in rows]
        assert together["accuracy"] == sum(values["accuracy"] for values in alone) / 2
        with pytest.raises(DataError, match=r"row 0: label='w' is none of 'options': \['x', 'yy', 'z z'\]"):
            engine.evaluate([{**rows[0], "label": "w"}], **prompt)
        with pytest.raises(DataError, match="row 0: column 'options' is 'x'; expected a list of two or more"):
            engine.evaluate([{**rows[0], "options": "x"}], **prompt)


def test_demonstrations_stand_before_the_prompt_and_are_chosen_by_the_seed(base):
    train = [{"text": f"film {i}", "label": i % 2} for i in range(20)]
    prompt = dict(template="{text} is", verbalizers=[" bad", " good"])
    dev = train[:3]
    with Engine(base, seed=5) as engine:
        shot = engine.evaluate(dev, shots=2, demonstrations=train, **prompt)
        chosen = sampled(train[3:], 2, 5, "demonstrations that are not evaluated themselves")
        text = "".join(f"{row['text']} is{[' bad', ' good'][row['label']]}\n\n" for row in chosen)
        assert shot == engine.evaluate(dev, prefix=text, **prompt) != engine.evaluate(dev, **prompt)
        with pytest.raises(DataError, match="2 demonstrations that are not evaluated themselves.* there are 0"):
            engine.evaluate(train, shots=2, **prompt)
    with Engine(base, seed=6) as engine:
        assert engine.evaluate(dev, shots=2, demonstrations=train, **prompt) != shot


def test_the_table_has_base_in_context_and_tuned(base, tmp_path, capsys):
    folder, run = write(write(tmp_path, "boolq"), "boolq", "dev"), tmp_path / "run"
    with open(folder / "train.jsonl", "a") as file:  # that dev has not: a demonstration is never evaluated itself
        file.write(lines({"passage": "Fish swim.", "question": "do fish swim", "label": True}))
    args = ("--task", "boolq", "--data", folder, "--steps", 2, "--batch-size", 2, "--run-dir", run, "--lr", "1e-3",
            "--quiet", "--eval-every", 1)  # fmt: skip
    assert main([str(a) for a in ("fit", base, *args)]) == 0
    kept = json.loads((run / "config.json").read_text())["fit"]
    assert kept["keep_best"] is True and kept["eval_data"] == str(folder) and kept["options"]["task"] == "boolq"
    capsys.readouterr()
    assert main(["eval", str(run), "--shots", "0", "1"]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in table] == [
        ["base", "0", "shots"], ["base", "1", "shots"], ["tuned", "0", "shots"], ["tuned", "1", "shots"],
    ]  # fmt: skip
    assert main(["eval", str(base), "--task", "boolq", "--data", str(folder)]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert f"{alone['loss']:.4f}" == table[0][table[0].index("loss") + 1]


def test_a_task_of_ones_own_is_one_file(base, tmp_path, monkeypatch):
    (tmp_path / "mood.toml").write_text(
        'about = "moods"\n[files]\ntrain = "a.csv"\ndev = "b.csv"\n[columns]\ntext = "note"\nlabel = "mood"\n'
        '[prompt]\ntemplate = "{text} I am"\nverbalizers = { good = " glad", bad = " sad" }\nloss = "options"\n'
    )
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text('note,mood\n"sun, sea",good\nrain,bad\n')
    monkeypatch.chdir(tmp_path)
    with Engine(base, run_dir=tmp_path / "run") as engine:
        assert engine.fit(tmp_path, steps=1, batch_size=2, task="mood.toml").evals[-1]["accuracy"] in (0.0, 0.5, 1.0)
    monkeypatch.chdir("/")
    with Engine.resume(tmp_path / "run") as engine:
        assert engine.fit(steps=2).steps == 1


@pytest.mark.parametrize("change, message", [
    ("[promt]\n", r"\[promt\] is not a section of a task. Did you mean prompt\?"),
    ("[read]\nformat = 'jsnl'\n", r"format='jsnl': choose one of jsonl.*Did you mean jsonl\?"),
    ("[read]\nech = []\n", r"\[read\] has no 'ech'. Did you mean each\?"),
    ("[", "is not TOML"),
    ("about = 'x'\n", r"\[files\] is missing"),
])  # fmt: skip
def test_what_is_wrong_in_a_task_is_said(tmp_path, change, message):
    (tmp_path / "own.toml").write_text(change)
    with pytest.raises(DataError, match=message):
        find_task(str(tmp_path / "own.toml"))


def test_what_is_wrong_with_a_tasks_data_is_said(base, tmp_path):
    with Engine(base) as engine:
        with pytest.raises(DataError, match=r"task='sst3' is not known. Did you mean sst5\?"):
            engine.fit(tmp_path, steps=1, task="sst3")
        with pytest.raises(DataError, match="has no train.tsv, which task 'sst2' reads as train"):
            engine.fit(tmp_path, steps=1, task="sst2")
        (tmp_path / "train.jsonl").write_text(lines({"passage": "p", "question": "q", "label": True}, {"passage": "p"}))
        with pytest.raises(DataError, match=r"train.jsonl record 1 has no 'question': there are passage"):
            engine.fit(tmp_path, steps=1, task="boolq")
        with pytest.raises(DataError, match="5 rows of boolq were asked for, and there are 2"):
            engine.fit(write(tmp_path, "boolq"), steps=1, task="boolq", train_rows=5)


def test_a_published_recipe_brings_its_loss_and_its_selection(base, tmp_path):
    rows = tmp_path / "a.jsonl"
    rows.write_text(lines(*({"text": f"film {i}", "label": i % 2} for i in range(6))))
    prompt = dict(template="{text} is", verbalizers=[" bad", " good"])

    def kept(method, **more):
        run = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        with Engine(base, method=method, run_dir=run) as engine:
            engine.fit(rows, steps=1, batch_size=2, eval_data=rows, **more)
        fit = json.loads((run / "config.json").read_text())["fit"]
        return fit["options"].get("loss"), fit.get("keep_best")

    assert kept(MeZO.preset("opt"), **prompt) == ("options", True)
    assert kept(MeZO.preset("opt"), loss="model", keep_best=False, **prompt) == ("model", False)
    assert kept(MeZO(lr=1e-6), **prompt) == (None, None)
    assert kept(MeZO.preset("opt"), task="lm") == (None, True)


def test_answers_are_compared_as_squad_does():
    assert exact_match("The Cats!", ["cats"]) == 1.0 and exact_match("cat", ["cats", "a cat."]) == 1.0
    assert (
        f1("two cats", ["cats", "dogs"]) == pytest.approx(2 / 3) and f1("", ["cats"]) == 0.0 and f1("the", ["a"]) == 1.0
    )


def test_so_many_rows_are_chosen_by_the_seed(base):
    rows = [{"text": "a" * (i + 1)} for i in range(10)]
    with Engine(base) as engine:
        few = engine.fit(rows, steps=2, batch_size=2, train_rows=4, eval_data=rows, eval_rows=3)
        again = engine.evaluate(rows, eval_rows=3, batch_size=2)
        assert again["loss"] == few.evals[-1]["loss"] != engine.evaluate(rows, batch_size=2)["loss"]
        with pytest.raises(DataError, match="is read in order, and rows cannot be chosen"):
            engine.evaluate(iter(rows), eval_rows=3)
