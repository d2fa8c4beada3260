"""The forms in which people hold data, each through Engine: what a row becomes is what the same rows would."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import datasets
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from support.texts import CHAT, byte_tokenizer, write_text_model
from zo_offload import DataError, Engine, MeZO
from zo_offload.cli import main
from zo_offload.data.batches import make_batches
from zo_offload.modules.kind import ModelKind

TEXTS = ["one fine day", "two", "three little words here", "four and", "five", "six is enough"]
ROWS = [{"text": text} for text in TEXTS]
TAKEN = frozenset({"input_ids", "attention_mask", "labels"})
CAUSAL = ModelKind("causal", "a causal LM", shift=1, takes=TAKEN, vocabulary=260, positions=1024)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("forms") / "base")


def losses(base, data, **options):
    with Engine(base, method=MeZO(lr=1e-3)) as engine:
        return engine.fit(data, steps=4, batch_size=2, **options).losses


def make(data, **options):
    return make_batches(data, batch_size=2, kind=CAUSAL, tokenizer=byte_tokenizer(), **options)


def write(path, form):
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    if form == "txt":
        path.write_text("\n".join(TEXTS[:3]) + "\n\n" + "\r\n".join(TEXTS[3:]))
    elif form in ("gz", "bz2", "xz"):
        path.write_bytes({"gz": gzip, "bz2": bz2, "xz": lzma}[form].compress(text.encode()))
    elif form == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    elif form == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.parquet", "a.saved"]
)
def test_every_file_gives_the_same_steps(base, tmp_path, name):
    assert losses(base, write(tmp_path / name, name.rpartition(".")[2])) == losses(base, ROWS)


def test_a_datasets_stream_is_read_in_order(base):
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    assert losses(base, stream) == losses(base, datasets.Dataset.from_list(ROWS).to_iterable_dataset())
    assert len(set(losses(base, stream))) == 4


def test_tensors_go_to_an_objective_of_ones_own():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    pairs = TensorDataset(torch.randn(8, 3), torch.tensor([0, 1] * 4))

    def objective(model, batch):
        x, y = batch
        return torch.nn.functional.cross_entropy(model(x), y)

    with Engine(model, method=MeZO(lr=1e-2), objective=objective) as engine:
        assert len(engine.fit(DataLoader(pairs, batch_size=4), steps=3).losses) == 3
        with pytest.raises(DataError, match=r"gives tuples, one per row: pass DataLoader\(data, batch_size=...\)"):
            engine.fit(pairs, steps=4)


# ---- instructions ----------------------------------------------------------------------------------------------------

ALPACA = {"instruction": "Say it.", "input": "red", "output": "Red!"}


def learned(batch, row=0):
    ids, labels = batch["input_ids"][row], batch["labels"][row]
    text = byte_tokenizer().decode
    return text(ids[batch["attention_mask"][row] != 0]), text(labels[labels != -100])


def test_instructions_without_a_chat_template_are_written_plainly():
    batch = make([ALPACA, {**ALPACA, "input": ""}], shuffle=False).batch(0)
    assert learned(batch) == (
        "### Instruction:\nSay it.\n\n### Input:\nred\n\n### Response:\nRed!</s>", "Red!</s>",
    )  # fmt: skip
    assert learned(batch, 1)[0] == "### Instruction:\nSay it.\n\n### Response:\nRed!</s>"


@pytest.mark.parametrize("row", [
    ALPACA,
    {"messages": [{"role": "user", "content": "Say it.\n\nred"}, {"role": "assistant", "content": "Red!"}]},
    {"conversations": [{"from": "human", "value": "Say it.\n\nred"}, {"from": "gpt", "value": "Red!"}]},
], ids=["instruction", "messages", "conversations"])  # fmt: skip
def test_all_conversations_go_through_the_chat_template(row):
    tokenizer = byte_tokenizer(chat_template=CHAT)
    batch = make_batches([row] * 2, batch_size=2, kind=CAUSAL, tokenizer=tokenizer, shuffle=False).batch(0)
    assert learned(batch) == ("<user>Say it.\n\nred</s><assistant>Red!</s>", "<assistant>Red!</s>")


def test_ones_own_columns_and_templates_come_first():
    batch = make([ALPACA] * 2, shuffle=False, template="{instruction} {input}:", target_column="output").batch(0)
    assert learned(batch)[0] == "Say it. red:Red!</s>"
    plain = make([{**ALPACA, "text": "only this"}] * 2, shuffle=False).batch(0)
    assert learned(plain)[0] == "only this</s>"


# ---- packing ---------------------------------------------------------------------------------------------------------


def test_packed_rows_are_the_texts_one_after_another(base, tmp_path):
    tokenizer = byte_tokenizer()
    whole = [token for text in TEXTS for token in [*tokenizer(text)["input_ids"], 1]]
    batches = make(ROWS, packing=True, max_length=10, shuffle=False)
    found = [row for batch in batches.epoch() for row in batch["input_ids"].tolist()]
    assert [token for row in found for token in row][: len(whole)] == whole and all(
        len(row) == 10 for row in found[:-1]
    )
    labels = batches.batch(0)["labels"][0].tolist()
    assert labels == [-100, *found[0][1:]], "every token but a row's first is learned"
    with Engine(base, method=MeZO(lr=1e-3), run_dir=tmp_path / "run") as engine:
        first = engine.fit(write(tmp_path / "a.txt", "txt"), steps=2, batch_size=2, packing=True, max_length=10)
    with Engine.resume(tmp_path / "run") as engine:
        rest = engine.fit(steps=4)
    assert first.losses + rest.losses == losses(base, ROWS, packing=True, max_length=10)


def test_a_text_that_is_longer_than_the_model_can_be_packed(base):
    long = [{"text": "word " * 500}] * 2
    with Engine(base) as engine:
        with pytest.raises(DataError, match="takes at most 1024"):
            engine.fit(long, steps=1, batch_size=1)
        assert engine.fit(long, steps=1, batch_size=1, packing=True).steps == 1


@pytest.mark.parametrize("data, options, message", [
    (ROWS, dict(packing=True, kind=ModelKind("classification", "a classifier")), "a classifier is not a causal LM"),
    ([{"words": "a"}], dict(packing=True), "row 0 lacks 'text', its columns are 'words'. Pass text_column="),
    (["a film"], dict(packing=True), "row 0: expected a dict, found str. For a text, {'text': ...}"),
    ([*ROWS, 7], dict(packing=True), "expected a dict, found int."),
    (["a film"] * 4, dict(length_buckets=True), "row 0: expected a dict, found str. For a text, {'text': ...}"),
    ([{"text": None}], dict(packing=True), "row 0: column 'text' is empty"),
    (iter(ROWS), dict(packing=True), "packing and length_buckets are for a file"),
    (ROWS, dict(packing=True, kind=ModelKind("causal", "a model", takes=TAKEN)), "needs max_length="),
])  # fmt: skip
def test_what_cannot_be_packed_is_said(data, options, message):
    with pytest.raises(DataError, match=message):
        make_batches(data, batch_size=2, **{"kind": CAUSAL, "tokenizer": byte_tokenizer(), **options})


# ---- length buckets --------------------------------------------------------------------------------------------------


def test_buckets_pad_less_and_still_show_every_row_once():
    rows = [{"text": "x" * (1 + 7 * i % 97)} for i in range(97)]
    options = dict(batch_size=8, kind=CAUSAL, tokenizer=byte_tokenizer(), seed=3)
    plain, bucketed = (make_batches(rows, length_buckets=on, **options) for on in (False, True))
    assert len(plain) == len(bucketed) == 12

    def padding(batches, epoch):
        made = [batches.batch(epoch * 12 + i) for i in range(12)]
        rows = [int(row.sum()) for batch in made for row in batch["attention_mask"]]
        return sum(batch["attention_mask"].numel() for batch in made) - sum(rows), rows

    assert padding(bucketed, 0)[0] * 4 < padding(plain, 0)[0]
    for epoch in (0, 1):
        seen = padding(bucketed, epoch)[1]
        assert sorted(seen) == sorted(set(seen)), "rows differ in length, so none came twice"
        assert seen != sorted(seen), "the order of batches is random"
    again = make_batches(rows, length_buckets=True, **options)
    assert torch.equal(again.batch(17)["input_ids"], bucketed.batch(17)["input_ids"]), "a function of the step"


# ---- looking at it ---------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_rows_as_the_model_will_see_them(base, tmp_path, capsys):
    path, run = tmp_path / "a.jsonl", tmp_path / "run"
    path.write_text("".join(json.dumps({"text": f"film {i}", "label": i % 2}) + "\n" for i in range(6)))
    args = ["fit", base, "--data", path, "--template", "{text} was", "--verbalizers", " bad", " good", "--run-dir", run]
    assert main([*map(str, args), "--batch-size", "2", "--dry-run"]) == 0
    first, *shown = capsys.readouterr().out.splitlines()
    assert first == (
        "a.jsonl: 6 rows, 3 steps of 2 an epoch; 14 tokens a row, 15 at most; 4.5 of them learned; labels 0 3, 1 3"
    )
    assert shown[0] == "a.jsonl row 0 (14 tokens): film 0 was» bad«" and shown[1].endswith("film 1 was» good«")
    assert not run.exists()


def test_two_columns_make_a_pair_on_the_command_line(base, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"a": "one", "b": "two"}) + "\n")
    assert main(["fit", str(base), "--data", str(path), "--text-column", "a,b", "--dry-run"]) == 0
    assert "o»netwo</s>«" in capsys.readouterr().out


@pytest.mark.parametrize("make_it, message", [
    (lambda path: path.mkdir(), "is a folder, but not a dataset that datasets saved"),
    (lambda path: datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(path),
     "is a DatasetDict of train: give one of them"),
], ids=["folder", "dict"])  # fmt: skip
def test_folders_that_are_no_dataset_are_said(base, tmp_path, make_it, message):
    make_it(tmp_path / "data")
    with Engine(base) as engine, pytest.raises(DataError, match=message):
        engine.fit(tmp_path / "data", steps=1)
