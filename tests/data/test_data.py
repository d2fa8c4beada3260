"""Batches: what users give, what the model gets, and what is said when the two do not fit."""

from __future__ import annotations

import csv
import json
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from support.zoo.models import ZOO, Tiny
from zo_offload import Engine, MeZO
from zo_offload.data.batches import Batches, batch_tokens, fingerprint, make_batches, open_rows
from zo_offload.data.measures import OptionsLoss
from zo_offload.data.micro_batches import label_counts, split_micro_batches
from zo_offload.errors import DataError
from zo_offload.modules.kind import UNKNOWN, kind_of

WORDS = "[PAD] [BOS] [EOS] good bad fine film was it very the a It review so boring not".split()
PAD, BOS, EOS = 0, 1, 2
ID = {word: i for i, word in enumerate(WORDS)}


CAUSAL, CLASSIFIER = (kind_of(ZOO[name].build()) for name in ("llama", "bert"))


def count(batch):
    """What the mean loss of a causal language model's batch is over."""
    return next(iter(label_counts(batch, 1).values()))


def make(data, *, kind=CAUSAL, **options):
    """Batches for a causal language model, or for the kind given."""
    return make_batches(data, kind=kind, **options)


@pytest.fixture(scope="module")
def tokenizer():
    """Words split at blanks; a BOS before, nothing after."""
    core = Tokenizer(models.WordLevel(ID, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", pair="[BOS] $A [EOS] $B", special_tokens=[("[BOS]", BOS), ("[EOS]", EOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]")


@pytest.fixture(scope="module")
def llama():
    return ZOO["llama"].build()


def ids(text: str) -> list[int]:
    return [ID[word] for word in text.split()]


def loss_of(model, batch) -> float:
    return float(model(**batch).loss)


# ---- rows to batches ------------------------------------------------------------------------------------------------


def test_tokenised_rows_are_padded_and_labelled():
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 10, 11, 12]}]
    batch = make(rows, batch_size=2, shuffle=False).batch(0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100], [-100, 9, 10, 11, 12]]


def test_labels_that_are_given_are_kept():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = make(rows, batch_size=2, shuffle=False).batch(0)
    assert batch["labels"].tolist() == [[-100, -100, 7], [8, -100, -100]]
    seq2seq = [{"input_ids": [5, 6, 7], "labels": [4, 3]}, {"input_ids": [8], "labels": [8]}]
    batch = make(seq2seq, batch_size=2, shuffle=False, kind=kind_of(ZOO["t5"].build())).batch(0)
    assert batch["labels"].tolist() == [[4, 3], [8, -100]] and batch["input_ids"].shape == (2, 3)


def test_numbers_of_one_shape_are_stacked():
    rows = [{"pixel_values": torch.full((3, 2, 2), float(i)), "label": i} for i in range(3)]
    batch = make(rows, batch_size=3, shuffle=False, kind=UNKNOWN).batch(0)
    assert batch["pixel_values"].shape == (3, 3, 2, 2) and batch["labels"].tolist() == [0, 1, 2]
    regression = make([{"input_ids": [1], "label": 0.5}], batch_size=1, shuffle=False, kind=UNKNOWN).batch(0)
    assert regression["labels"].dtype == torch.float32


def test_text_is_tokenised_for_language_modelling(tokenizer):
    rows = [{"text": "the film"}, {"text": "it was very good"}]
    batch = make(rows, batch_size=2, shuffle=False, tokenizer=tokenizer).batch(0)
    first, second = [*ids("the film"), EOS], [*ids("it was very good"), EOS]
    assert batch["input_ids"].tolist() == [[BOS, *first, PAD, PAD], [BOS, *second]]
    assert batch["labels"].tolist() == [[-100, *first, -100, -100], [-100, *second]]
    cut = make(rows, batch_size=2, shuffle=False, tokenizer=tokenizer, max_length=3).batch(0)
    assert cut["input_ids"].tolist() == [[BOS, *ids("the film")], [BOS, *ids("it was")]]


def test_text_with_a_number_is_classification(tokenizer):
    rows = [{"text": "good film", "label": 1}, {"text": "bad", "label": "0"}]
    batch = make(rows, batch_size=2, shuffle=False, tokenizer=tokenizer, kind=CLASSIFIER).batch(0)
    assert batch["labels"].tolist() == [1, 0] and batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    pairs = [{"a": "good", "b": "fine", "y": 1}]
    options = dict(text_column=("a", "b"), label_column="y", task="classification")
    batch = make(pairs, batch_size=1, shuffle=False, tokenizer=tokenizer, kind=CLASSIFIER, **options).batch(0)
    assert batch["input_ids"].tolist() == [[BOS, ID["good"], EOS, ID["fine"]]] and batch["labels"].tolist() == [1]


PROMPT = dict(template="{text} It was", verbalizers=[" bad", " good"])


def test_a_prompt_has_its_loss_on_the_label_word_only(tokenizer):
    rows = [{"text": "the film", "label": 1}, {"text": "so very boring", "label": "0"}]
    batch = make(rows, batch_size=2, shuffle=False, tokenizer=tokenizer, **PROMPT).batch(0)
    first, second = [BOS, *ids("the film It was good")], [BOS, *ids("so very boring It was bad")]
    assert batch["input_ids"].tolist() == [[*first, PAD], second]
    assert batch["labels"].tolist() == [[-100] * 5 + [ID["good"], -100], [-100] * 6 + [ID["bad"]]]


def test_a_prompt_that_is_cut_keeps_its_question(tokenizer):
    rows = [{"text": "the film was very very boring", "label": 0}]
    batch = make(rows, batch_size=1, shuffle=False, tokenizer=tokenizer, max_length=6, **PROMPT).batch(0)
    assert batch["input_ids"].tolist() == [[BOS, *ids("very boring It was bad")]]


def test_verbalizers_may_be_named_by_label(tokenizer):
    rows = [{"text": "the film", "label": "pos"}]
    options = dict(tokenizer=tokenizer, template="{text} It was", verbalizers={"neg": " bad", "pos": " good"})
    batch = make(rows, batch_size=1, shuffle=False, **options).batch(0)
    assert batch["labels"][0, -1] == ID["good"]


@pytest.mark.parametrize(("multiple", "limit", "length"), [(1, None, 5), (4, None, 8), (8, 6, 6)])
def test_padding_to_a_multiple_stays_within_the_model(multiple, limit, length):
    rows = [{"input_ids": [1] * 5}, {"input_ids": [1] * 2}]
    options = dict(pad_to_multiple_of=multiple, kind=replace(CAUSAL, positions=limit))
    assert make(rows, batch_size=2, shuffle=False, **options).batch(0)["input_ids"].shape == (2, length)


# ---- the batch of a step --------------------------------------------------------------------------------------------


def numbered(n: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": [i, i]} for i in range(n)]


def rows_of(batch) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def test_a_batch_is_a_function_of_seed_and_step():
    batches = make(numbered(10), batch_size=3, seed=5)
    forward = [rows_of(batches.batch(step)) for step in range(9)]
    torch.manual_seed(99)  # the global generator has no say, nor has the order of asking
    other = make(numbered(10), batch_size=3, seed=5)
    assert [rows_of(other.batch(step)) for step in reversed(range(9))] == forward[::-1]
    assert [rows_of(make(numbered(10), batch_size=3, seed=6).batch(s)) for s in range(9)] != forward
    for epoch in range(3):
        seen = [i for rows in forward[3 * epoch : 3 * epoch + 3] for i in rows]
        assert len(set(seen)) == 9 and set(seen) < set(range(10))
    assert forward[:3] != forward[3:6]


def test_an_epoch_for_evaluation_is_everything_once_in_order():
    batches = make(numbered(7), batch_size=3, shuffle=False)
    assert [rows_of(batch) for batch in batches.epoch()] == [[0, 1, 2], [3, 4, 5], [6]]
    small = make(numbered(2), batch_size=3, shuffle=False)
    assert [rows_of(batch) for batch in small.epoch()] == [[0, 1]]
    with pytest.raises(DataError, match="2 rows, fewer than batch_size=3"):
        small.batch(0)


class Squares(Dataset):
    def __len__(self):
        return 9

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        return {"input_ids": torch.tensor([index, index * index])}


def test_a_dataset_is_read_by_index():
    batches = make(Squares(), batch_size=2, shuffle=False)
    assert batches.batch(1)["input_ids"].tolist() == [[2, 4], [3, 9]]


def test_a_shuffling_loader_resumes_where_it_was():
    def loader():
        return DataLoader(Squares(), batch_size=2, shuffle=True)

    torch.manual_seed(1)
    whole = make(loader(), batch_size=2, seed=3)
    before = torch.get_rng_state()
    sequence = [rows_of(whole.batch(step)) for step in range(12)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)  # another process, another global state
    resumed = make(loader(), batch_size=2, seed=3)
    assert [rows_of(resumed.batch(step)) for step in range(7, 12)] == sequence[7:]
    assert rows_of(resumed.batch(3)) == sequence[3]  # and back
    assert sorted(i for rows in sequence[:5] for i in rows) == list(range(9)) and sequence[:5] != sequence[5:10]


@pytest.mark.parametrize("version", [1, 2])
def test_a_loader_with_a_generator_of_its_own_begins_where_its_run_had_it(version):
    """Runs of the earlier format opened the loader once before its first epoch."""

    def loader():
        return DataLoader(Squares(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3))

    plain = loader()
    if version == 1:
        iter(plain)
    expected = [rows_of(batch) for _ in range(2) for batch in plain]
    batches = make(loader(), batch_size=2, version=version)
    assert [rows_of(batches.batch(step)) for step in range(10)] == expected


@pytest.mark.parametrize("eval_data", ["the same loader", "another loader"])
def test_persistent_workers_give_the_batches_that_none_give_also_where_evaluations_read_them_too(eval_data):
    rows = [{"input_ids": torch.tensor([i, i + 1, i + 2]), "labels": torch.tensor([i, 3, i])} for i in range(3, 11)]

    def loader(workers):
        return DataLoader(rows, 4, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

    def losses(train, evaluation):
        with Engine(ZOO["llama"].build(), method=MeZO(lr=1e-3)) as engine:
            result = engine.fit(train, steps=5, eval_data=evaluation, eval_every=3)
            return result.losses, result.evals

    given = loader(1)
    assert losses(given, given if eval_data == "the same loader" else loader(1)) == losses(loader(0), loader(0))
    assert losses(given, False) == (losses(loader(0), False))  # and again


def test_an_iterable_starts_over_at_its_end():
    given = [{"input_ids": torch.tensor([[i]])} for i in range(3)]
    batches = make(given, batch_size=1)
    assert [rows_of(batches.batch(step)) for step in range(7)] == [[0], [1], [2], [0], [1], [2], [0]]
    assert len(list(batches.epoch())) == 3


def test_an_iterator_ends_with_an_error():
    batches = make(({"input_ids": torch.tensor([[i]])} for i in range(3)), batch_size=1)
    assert [rows_of(batches.batch(step)) for step in range(3)] == [[0], [1], [2]]
    with pytest.raises(DataError, match=r"gave no batches in epoch 1 \(after 3 in all\)"):
        batches.batch(3)
    with pytest.raises(DataError, match="cannot be read again from step 0"):
        batches.batch(0)


def test_batches_pass_through():
    batches = make(numbered(4), batch_size=2)
    assert make(batches, batch_size=7) is batches and isinstance(batches, Batches)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_jsonl_and_csv(tmp_path, tokenizer):
    rows = [{"text": "good, very good", "label": 1}, {"text": "bad", "label": 0}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "a.csv").write_text('text,label\r\n"good, very good",1\r\nbad,0\r\n')
    assert list(open_rows(tmp_path / "a.jsonl")) == rows
    assert list(open_rows(tmp_path / "a.csv")) == [{k: str(v) for k, v in row.items()} for row in rows]
    one, two = (
        make(tmp_path / name, batch_size=2, tokenizer=tokenizer, seed=1, **PROMPT).batch(0)
        for name in ("a.jsonl", "a.csv")
    )
    assert fingerprint(one) == fingerprint(two)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n["x"]\n', "a.jsonl line 3 is a JSON list"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl line 1 is not JSON"),
        ("a.jsonl", b"\n", "holds no rows"),
        ("a.csv", b"text,n\na,1\nb\n", "a.csv line 3: .* header text, n"),
        ("a.csv", b"text,label\na,1,2\n", "a.csv line 2: .* header text, label"),
        ("a.csv", b'text,label\n"a,1\n', "a.csv after line 1: unexpected end"),
        ("a.csv", b"text,label\n\xff,1\n", "a.csv after line .* Save it as UTF-8"),
        ("a.csv", b"text,label\n", "holds no rows"),
        ("a.doc", b"x", r"\.doc is not read; give \.jsonl, "),
        ("a.jsonl", None, "does not exist"),
    ],
)
def test_unreadable_files_are_named_with_the_line(tmp_path, tokenizer, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        make(tmp_path / name, batch_size=1, tokenizer=tokenizer)


AWKWARD = {
    "a.jsonl": '\ufeff{"text": "a", "n": 1}\r\n\n   \n{"text": "é\u2028 \U0001f600", "n": 2}\n{"n": 3}\n\n{"t": "end"}',
    "b.csv": '\ufefftext,n\r\n\r\n"two\r\nlines, é",1\r\n\n"a ""quoted"" one",2\rof the old kind,3\n"",4\n\nend,5',
    "c.csv": "text\n\n\nx\n\ny\n\n",
}


def in_memory(path) -> list[dict]:
    """The rows, read whole: what a row file has to equal."""
    if path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file, strict=True))
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]


@pytest.mark.parametrize("name", AWKWARD)
def test_rows_of_a_file_in_any_order_are_those_of_the_whole_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(AWKWARD[name].encode())
    wanted, rows = in_memory(path), open_rows(path)
    assert len(rows) == len(wanted) > 1
    for index in [*reversed(range(len(wanted))), *range(-len(wanted), 0)]:
        assert rows[index] == wanted[index]
    assert rows[1:] == wanted[1:] and list(rows) == wanted
    with pytest.raises(IndexError):
        rows[len(wanted)]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_batches_of_a_file_are_those_of_its_rows(tmp_path, tokenizer, suffix):
    given = [{"text": " ".join(WORDS[3 + i % 7 : 4 + i % 7 + i % 5]), "label": str(i % 2)} for i in range(23)]
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        path.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in given))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in given))
    of_file, of_list = (make(data, batch_size=4, tokenizer=tokenizer, seed=5, **PROMPT) for data in (path, given))
    assert of_file.identity() == of_list.identity()
    for step in range(12):
        assert fingerprint(of_file.batch(step)) == fingerprint(of_list.batch(step))
    assert [fingerprint(b) for b in of_file.epoch()] == [fingerprint(b) for b in of_list.epoch()]
    sizes = [len(row["text"]) for row in given]
    assert of_file.rows.longest == sorted(range(23), key=lambda i: -sizes[i])[:8]


def test_a_file_is_not_in_memory_and_may_not_change(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 1000, "n": i}) + "\n" for i in range(2000)))
    tracemalloc.start()
    rows = open_rows(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows[1234]["n"] == 1234
    assert most < 400_000 < path.stat().st_size / 5, "a buffer and 16 kB of places"
    with open(path, "a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match=r"a\.jsonl was changed after it was opened"):
        rows[0]


# ---- errors ---------------------------------------------------------------------------------------------------------


def batches_of(*rows, batch_size=1, **options):
    return make(list(rows), batch_size=batch_size, **options)


def test_data_that_cannot_be_used_is_named(tokenizer, llama):
    text = {"text": "good film", "label": 1}
    for attempt, message in [
        (lambda: batches_of(), "list is empty"),
        (lambda: batches_of(text, batch_size=0, tokenizer=tokenizer), "batch_size=0"),
        (lambda: batches_of(text), r"row 0 holds text \(columns text, label\): pass tokenizer="),
        (lambda: batches_of({"txt": "a"}, tokenizer=tokenizer), "row 0 lacks 'text', its columns are 'txt'"),
        (lambda: batches_of({"text": "a"}, tokenizer=tokenizer, **PROMPT), "lacks 'label', its columns are 'text'"),
        (lambda: batches_of({"text": "a", "label": 2}, tokenizer=tokenizer, **PROMPT), "label=2, but .* for '0', '1'"),
        (lambda: batches_of({**text, "label": "x"}, tokenizer=tokenizer, kind=CLASSIFIER), "label='x' is not a number"),
        (lambda: batches_of(text, tokenizer=tokenizer), "causal LM without classes"),
        (lambda: batches_of(text, tokenizer=tokenizer, template="{text}"), "go together"),
        (lambda: batches_of(text, tokenizer=tokenizer, template="{text}", verbalizers=["a"]), "at least two"),
        (lambda: batches_of(text, template="{text}", verbalizers=["a", "b"]), "need a tokenizer"),
        (lambda: batches_of(text, tokenizer=tokenizer, task="lm", **PROMPT), "a template means task='prompt'"),
        (lambda: batches_of({"input_ids": []}), "row 0 has no tokens"),
        (lambda: batches_of({"a": 1}), "LlamaForCausalLM takes none of its columns 'a'"),
        (lambda: batches_of([1, 2]), "row 0: expected a dict, found list"),
        (lambda: make({"input_ids": 1}, batch_size=1), "data is a dict"),
        (lambda: make(3, batch_size=1), "data is a int"),
        (lambda: make(iter([(torch.ones(1),)]), batch_size=1), "gives tuples, one per row"),
        (lambda: make(iter([{"a": {}}]), batch_size=1, batched=True).batch(0), r"holds no tensors \(a: dict\)"),
        (lambda: make(DataLoader(Squares(), 10, drop_last=True), batch_size=1).batch(0), "gave no batches"),
        (lambda: batches_of({"a": 1.0, "b": 1}, {"a": 1.0}, batch_size=2, kind=UNKNOWN).batch(0), "different"),
        (lambda: batches_of({"x": [1.0]}, {"x": [1.0, 2.0]}, batch_size=2, kind=UNKNOWN).batch(0), "'x' does not"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=message):
            attempt()


def test_rows_too_long_for_the_model_are_found_at_once(tokenizer, llama):
    rows = [{"text": "good"}] * 50 + [{"text": "very " * 64}]
    with pytest.raises(DataError, match="row 50 has 66 tokens, but the model takes at most 64. Pass max_length=64"):
        make(rows, batch_size=1, tokenizer=tokenizer, kind=kind_of(llama))
    batches = make(rows, batch_size=1, tokenizer=tokenizer, kind=kind_of(llama), max_length=64, shuffle=False)
    assert batches.batch(50)["input_ids"].shape == (1, 64)
    with pytest.raises(DataError, match="max_length=65, but the model takes at most 64"):
        make(rows, batch_size=1, tokenizer=tokenizer, kind=kind_of(llama), max_length=65)


@pytest.mark.parametrize(("name", "limit"), [("llama", 64), ("gpt2", 64), ("bert", 64), ("roberta", 62), ("t5", None)])
def test_the_limit_of_a_model(name, limit):
    model = ZOO[name].build()
    assert kind_of(model).positions == limit
    if limit is not None:
        fits, exceeds = torch.full((1, limit), 5), torch.full((1, limit + 1), 5)
        model(input_ids=fits)
        if name in ("gpt2", "bert", "roberta"):  # learnt positions: one more is out of the table
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=exceeds)


# ---- helpers --------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_the_documented_crc_and_sees_everything():
    batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[3, 4]]), "flag": True}
    crc = zlib.crc32(b"flag True")
    for key in ("input_ids", "labels"):
        crc = zlib.crc32(f"{key} torch.int64 [1, 2]".encode(), crc)
        crc = zlib.crc32(batch[key].numpy().tobytes(), crc)
    assert fingerprint(batch) == crc
    assert fingerprint(dict(reversed(batch.items()))) == crc
    others = [
        {**batch, "flag": False},
        {**batch, "labels": torch.tensor([[3, 5]])},
        {**batch, "labels": torch.tensor([3, 4])},
        {**batch, "labels": torch.tensor([[3, 4]], dtype=torch.int32)},
        {"input_ids": batch["labels"], "labels": batch["input_ids"], "flag": True},
        {k: batch[k] for k in ("input_ids", "labels")},
    ]
    assert crc not in {fingerprint(other) for other in others}


class Anything:
    """An object whose repr tells its address and nothing else."""


def test_the_fingerprint_of_what_is_no_plain_tensor():
    same = [lambda: {"x": torch.eye(3).to_sparse()}, lambda: {"x": torch.eye(3).to_sparse_csr()},
            lambda: {"x": torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)])},
            lambda: {"x": torch.ones(2), "meta": Anything()}, lambda: {"x": torch.ones(2), "y": np.arange(3000)},
            lambda: {"x": torch.ones(2, dtype=torch.complex64).conj()}]  # fmt: skip
    for make in same:
        assert fingerprint(make()) == fingerprint(make())
    edited = np.arange(3000)
    edited[1500] = 0  # numpy prints neither
    others = [{"x": (2 * torch.eye(3)).to_sparse()}, {"x": torch.eye(3)[[1, 0, 2]].to_sparse_csr()},
              {"x": torch.nested.nested_tensor([torch.ones(3), torch.zeros(2)])},
              {"x": torch.ones(2), "y": edited}]  # fmt: skip
    assert {fingerprint(other) for other in others}.isdisjoint(fingerprint(make()) for make in same)


def test_tokens_and_weights_of_a_batch():
    padded = make([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}], batch_size=2, shuffle=False).batch(0)
    assert batch_tokens(padded) == 4 and count(padded) == 2
    assert batch_tokens({"input_ids": torch.ones(2, 5)}) == 10
    images = {"pixel_values": torch.ones(3, 3, 4, 4), "labels": torch.tensor([0, 1, -100])}
    assert batch_tokens(images) == 3 and count(images) == 2
    assert count({"x": torch.ones(3, 2), "labels": torch.rand(3)}) == 3
    assert count({"x": torch.ones(3, 2)}) == 3


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_weighted_micro_batches_are_the_batch(llama, parts):
    rows = [{"input_ids": list(range(3, 5 + n))} for n in range(5)]
    batch = {**make(rows, batch_size=5, shuffle=False).batch(0), "use_cache": False}
    pieces = split_micro_batches(batch, parts)
    assert [len(p["input_ids"]) for p in pieces] == [len(t) for t in torch.arange(5).tensor_split(parts)]
    assert all(p["use_cache"] is False for p in pieces)
    assert torch.equal(torch.cat([p["input_ids"] for p in pieces]), batch["input_ids"])
    with torch.no_grad():
        whole = loss_of(llama, batch)
        total = sum(count(p) * loss_of(llama, p) for p in pieces) / sum(map(count, pieces))
    assert abs(total - whole) < 1e-5


def test_a_batch_cannot_be_cut_finer_than_rows():
    with pytest.raises(DataError, match="a batch of 2 rows cannot be cut into 3"):
        split_micro_batches({"input_ids": torch.ones(2, 3)}, 3)


# ---- measuring ------------------------------------------------------------------------------------------------------


class Scripted(torch.nn.Module):
    """A language model that always favours one word, and counts its forwards."""

    def __init__(self, favourite: str):
        super().__init__()
        self.favourite, self.calls = ID[favourite], 0

    def forward(self, input_ids, attention_mask=None, labels=None):
        self.calls += 1
        logits = torch.zeros(*input_ids.shape, len(WORDS))
        logits[..., self.favourite] = 2.0
        shifted = (
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            if labels is not None
            else None
        )
        return type("Output", (), {"logits": logits, "loss": shifted})()


REVIEWS = [{"text": "the film", "label": y} for y in (1, 1, 0)]


def test_accuracy_over_single_words(tokenizer):
    batches = make(REVIEWS, batch_size=3, shuffle=False, tokenizer=tokenizer, **PROMPT)
    model = Scripted("good")
    values = batches.measure(model, batches.batch(0), loss_of, count(batches.batch(0)))
    assert values["accuracy"] == (pytest.approx(2 / 3), 3.0) and model.calls == 1
    normal = torch.zeros(len(WORDS)).index_fill(0, torch.tensor([ID["good"]]), 2.0).log_softmax(0)
    expected = -(2 * normal[ID["good"]] + normal[ID["bad"]]) / 3
    assert values["loss"] == (pytest.approx(float(expected)), 3.0)
    among = -(2 * 2.0 - 3 * torch.tensor([0.0, 2.0]).logsumexp(0)) / 3
    assert float(OptionsLoss(batches.encoder)(model, batches.batch(0))) == pytest.approx(float(among))


def test_accuracy_over_words_of_several_tokens(tokenizer):
    words = [" bad", " so very good", " not fine film"]
    texts = ["the film", "a very very bad film", "film", "it was", "review so boring", "good good good"]
    model = ZOO["llama"].build()

    def scores(text: str) -> list[float]:  # one by one, unpadded
        start = tokenizer(text + " It was", return_tensors="pt")["input_ids"].shape[1]
        full = [tokenizer(text + " It was" + word, return_tensors="pt")["input_ids"] for word in words]
        logs = [model(f).logits[0, :-1].log_softmax(-1).gather(-1, f[0, 1:, None])[start - 1 :] for f in full]
        return [float(log.mean()) for log in logs]

    with torch.no_grad():
        best = [max(range(3), key=scores(text).__getitem__) for text in texts]
        assert set(best) != {0}  # the sum of log-probabilities would favour the short one
        rows = [{"text": text, "label": label} for text, label in zip(texts, best, strict=True)]
        options = dict(tokenizer=tokenizer, template="{text} It was", verbalizers=words)
        batches = make(rows, batch_size=len(rows), shuffle=False, **options)
        batch = batches.batch(0)
        values = batches.measure(model, batch, loss_of, count(batch))
        assert values["accuracy"] == (1.0, 6.0)
        assert values["loss"] == (pytest.approx(loss_of(model, batch), abs=1e-5), count(batch))


def test_accuracy_of_a_classifier_and_none_for_plain_text(tokenizer, llama):
    rows = [{"text": "good film", "label": 1}, {"text": "bad", "label": 0}, {"text": "boring", "label": 1}]
    classifier = Tiny("BertForSequenceClassification", "BertConfig", ZOO["bert"].options).build()
    batches = make(rows, batch_size=3, shuffle=False, tokenizer=tokenizer, kind=kind_of(classifier))
    batch = batches.batch(0)
    with torch.no_grad():
        values = batches.measure(classifier, batch, loss_of, count(batch))
        output = classifier(**batch)
    assert values["accuracy"] == (pytest.approx(float((output.logits.argmax(-1) == batch["labels"]).float().mean())), 3)
    assert values["loss"] == (float(output.loss), 3)
    plain = make([{"text": "good film"}], batch_size=1, shuffle=False, tokenizer=tokenizer)
    with torch.no_grad():
        assert set(plain.measure(llama, plain.batch(0), loss_of, 1.0)) == {"loss"}


def test_an_objective_may_use_the_model_as_it_likes(tokenizer, llama):
    batches = make(REVIEWS, batch_size=3, shuffle=False, tokenizer=tokenizer, **PROMPT)

    def objective(model, batch):
        assert model.config.vocab_size == 96 and next(model.parameters()).dtype == torch.float32
        return 0.25 + 0 * float(model(**batch).loss)

    with torch.no_grad():
        assert batches.measure(llama, batches.batch(0), objective, 3.0)["loss"] == (0.25, 3.0)


class Endless(IterableDataset):
    def __iter__(self):
        n = 0
        while True:
            yield {"input_ids": torch.tensor([n, n])}
            n += 1


def test_an_endless_stream_is_read_forward():
    batches = make(DataLoader(Endless(), batch_size=2), batch_size=2)
    assert rows_of(batches.batch(5)) == [10, 11] and rows_of(batches.batch(6)) == [12, 13]
