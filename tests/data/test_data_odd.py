"""Data and options that are a little off, as people have them: what they become, or what is said."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf

from support.texts import CHAT, byte_tokenizer, write_text_model
from support.zoo.models import BERT
from zo_offload import ConfigError, DataError, Engine, MeZO
from zo_offload.data.batches import make_batches
from zo_offload.modules.kind import ModelKind

TAKEN = frozenset({"input_ids", "attention_mask", "labels"})
CAUSAL = ModelKind("causal", "a causal LM", shift=1, takes=TAKEN, vocabulary=260, positions=64)
SEQ2SEQ = ModelKind("seq2seq", "an encoder-decoder", takes=TAKEN, vocabulary=260)
ROWS = [{"text": t, "label": i % 2} for i, t in enumerate(["one fine day", "two", "three", "four and", "five", "six"])]
PROMPT = dict(template="{text} is", verbalizers=[" bad", " good"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("odd") / "base")


def make(rows, kind=CAUSAL, tokenizer=None, **options):
    """The rows' batch, as lists."""
    tokenizer = tokenizer or byte_tokenizer(chat_template=CHAT)
    made = make_batches(rows, batch_size=len(rows), kind=kind, tokenizer=tokenizer, shuffle=False, **options)
    return {name: value.tolist() for name, value in made.batch(0).items()}


def learned(batch, row=0):
    return byte_tokenizer().decode([x for x in batch["labels"][row] if x != -100])


def fit(base, data=ROWS, steps=2, **options):
    """A run's result; ROWS are two batches and a half."""
    with Engine(base, method=MeZO(lr=1e-3)) as engine:
        return engine.fit(data, steps=steps, batch_size=2, **options)


# ---- what rows become ------------------------------------------------------------------------------------------------


def test_rows_that_are_padded_already_do_not_learn_padding():
    right, left = [5, 6, 7, 0, 0], [0, 0, 5, 6, 7]
    rows = [
        {"input_ids": right, "attention_mask": [1, 1, 1, 0, 0]},
        {"input_ids": left, "attention_mask": [0, 0, 1, 1, 1]},
    ]
    assert make(rows)["labels"] == [[-100, 6, 7, -100, -100], [-100, -100, -100, 6, 7]]


@pytest.mark.parametrize("mask", [[1], [1, 1, 1, 1, 1]])
def test_a_mask_of_another_length_is_refused(mask):
    with pytest.raises(DataError, match=rf"row 0: {len(mask)} attention_mask for 3 input_ids"):
        make([{"input_ids": [5, 6, 7], "attention_mask": mask}])


@pytest.mark.parametrize("closes", [False, True], ids=["adds nothing", "adds EOS"])
def test_an_end_of_text_in_a_template_is_of_the_prompt(closes):
    class Closing:
        """byte_tokenizer with an EOS after each text."""

        inner = byte_tokenizer()
        eos_token_id = 1

        def __call__(self, text, add_special_tokens=True):
            ids = self.inner(text)["input_ids"]
            return {"input_ids": ids + [1] * (closes and add_special_tokens)}

    row = {"text": "ab", "answer": "x", "label": 0}
    prompt = make([row], tokenizer=Closing(), template="{text}</s>", verbalizers=["x", "y"])
    assert (prompt["input_ids"], prompt["labels"]) == ([[66, 67, 1, 89]], [[-100, -100, -100, 89]])
    told = make([row], tokenizer=Closing(), template="{text}</s>", target_column="answer")
    assert (told["input_ids"], told["labels"]) == ([[66, 67, 1, 89, 1]], [[-100, -100, -100, 89, 1]])


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yo"}]},
    {"instruction": "hi", "output": "yo"},
], ids=["messages", "prompt and completion", "instruction"])  # fmt: skip
def test_an_encoder_does_not_read_the_answer_of_a_conversation(row):
    batch = make([row], SEQ2SEQ)
    assert byte_tokenizer().decode(batch["input_ids"][0]) == "<user>hi</s>"
    assert learned(batch) == "<assistant>yo</s>"
    assert make([row])["input_ids"][0] == batch["input_ids"][0] + batch["labels"][0], "a causal model reads both"


@pytest.mark.parametrize("last", [
    {"role": "assistant", "content": None}, {"role": "assistant"}, {"role": "assistant", "content": " "},
    {"role": "assistant", "content": float("nan")}, {"role": "assistant", "content": []},
])  # fmt: skip
def test_an_answer_that_says_nothing_is_refused(last):
    with pytest.raises(DataError, match="list row 0: message 1.*(has no content|is empty)"):
        make([{"messages": [{"role": "user", "content": "hi"}, last]}])


def test_what_an_encoder_decoder_cuts_is_cut_as_its_tokenizer_would():
    tokenizer = byte_tokenizer()
    row = {"prompt": "abcdefgh", "completion": "ABCDEFGH"}
    batch = make([row], SEQ2SEQ, max_length=5)
    assert batch["input_ids"] == [tokenizer("abcde")["input_ids"]]
    assert batch["labels"] == [[*tokenizer("ABCD")["input_ids"], 1]]


@pytest.mark.parametrize(
    "label", [1, np.int64(1), torch.tensor(1), 1.0, np.float32(1), "1", "b"], ids=lambda x: f"{type(x).__name__} {x}"
)
def test_the_index_of_an_option_may_be_of_any_type(label):
    batch = make([{"q": "q", "options": ["a", "b"], "label": label}], template="{q}", verbalizers="{options}")
    assert learned(batch) == "b"


def test_a_number_that_is_an_index_and_a_text_is_neither():
    row = {"q": "q", "options": [3, 5, 1], "label": 1}
    with pytest.raises(DataError, match="label=1 is the index of '5' in 'options', but '1' is also a text in it"):
        make([row], template="{q}", verbalizers="{options}")
    assert learned(make([{**row, "label": "1"}], template="{q}", verbalizers="{options}")) == "1"


# ---- every row is looked at before the first step --------------------------------------------------------------------


def rows_of(bad, **good):
    return [*({"text": "some longer text than the others", "label": 0, **good} for _ in range(150)), bad]


@pytest.mark.parametrize("bad, options, message", [
    ({"a": "y" * 100, "label": 0}, dict(template="{text}", verbalizers=["{b}", "{a}"]), "the longest verbalizer"),
    ({"options": ["y" * 100, "z"], "label": 1}, dict(template="{text}", verbalizers="{options}"), "the longest verb"),
    ({"answer": "y" * 60}, dict(target_column="answer", max_length=40), "max_length leaves"),
], ids=["an option", "a listed option", "an answer"])  # fmt: skip
def test_a_row_that_would_fail_later_fails_at_once(bad, options, message):
    good = {"a": "u", "b": "v", "options": ["u", "v"], "answer": "w"}
    rows = rows_of({**good, "text": "xyz", **bad}, **good)
    with pytest.raises(DataError, match=f"row 150: .*{message}"):
        make_batches(rows, batch_size=2, kind=CAUSAL, tokenizer=byte_tokenizer(), **options)


def test_a_long_prefix_counts():
    with pytest.raises(DataError, match="row 0 has 74 tokens, but the model takes at most 64"):
        make(rows_of(ROWS[0]), prefix="x" * 35, **PROMPT)


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    (dict(pad_to_multiple_of=-8), "pad_to_multiple_of=-8: expected a whole number of at least 1"),
    (dict(max_length="64"), "max_length='64': expected a whole number"),
    (dict(text_column=[]), "text_column=.*expected the name of a column"),
    (dict(text_column=["text", "text", "text"], template=None, verbalizers=None, task="lm"), "takes a text or a pair"),
    (dict(label_column=["label"]), "label_column=.*expected a text"),
    (dict(prefix=None), "prefix=None: expected a text"),
    (dict(verbalizers={"0": False, "1": True}), "False is not a text. YAML reads yes, no"),
    (dict(template="{text!r}"), r"\{text!r\} is not a column's name"),
    (dict(tokenizer=tf.AutoTokenizer), "tokenizer= is the class AutoTokenizer"),
    (dict(tokenizer=byte_tokenizer().backend_tokenizer), r"PreTrainedTokenizerFast\(tokenizer_object="),
], ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")  # fmt: skip
def test_an_option_of_the_wrong_kind_is_named(options, message):
    with pytest.raises(DataError, match=message):
        make(ROWS, **{**PROMPT, **options})


@pytest.mark.parametrize("options", [
    dict(verbalizers={0: " bad", 1: " good"}), dict(verbalizers=(" bad", " good")), dict(max_length=np.int64(9)),
], ids=["numbers as keys", "a tuple", "numpy"])  # fmt: skip
def test_a_resume_repeats_options_of_any_form(base, tmp_path, options):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    call = dict(batch_size=np.int64(2), **{**PROMPT, **options})
    with Engine(base, method=MeZO(lr=1e-3), run_dir=tmp_path / "run") as engine:
        first = engine.fit(file, steps=np.int64(2), **call).losses
    with Engine.resume(tmp_path / "run") as engine:
        then = engine.fit(steps=4).losses
    with Engine(base, method=MeZO(lr=1e-3)) as engine:
        assert engine.fit(file, steps=4, **call).losses == first + then


@pytest.mark.parametrize("options, message", [
    (dict(epochs=float("inf"), steps=None), "epochs=inf: expected more than 0, and an end"),
    (dict(eval_every=1), "eval_every=1 is of evaluations, and there is none"),
    (dict(eval_rows=1), "eval_rows=1 is of evaluations"),
    (dict(metric="f1"), "metric='f1' is of evaluations"),
    (dict(compute_metrics=len), "compute_metrics needs an evaluation"),
    (dict(compute_metrics="accuracy", eval_data=ROWS), "compute_metrics='accuracy' is not a function"),
    (dict(save_dir="x"), "save_dir='x': nothing is exported"),
    (dict(eval_data=iter(ROWS), eval_every=1), "eval_data is an iterator, which can be read once"),
], ids=lambda x: " ".join(x) if isinstance(x, dict) else "")  # fmt: skip
def test_what_would_not_be_heeded_is_refused(base, options, message):
    with Engine(base) as engine, pytest.raises(ConfigError, match=message):
        engine.fit(ROWS, **{"steps": 2, "batch_size": 2, **PROMPT, **options})
    assert engine.log.version == 0


@pytest.mark.parametrize("name", ["step", "loss", "eval_loss"])
def test_a_metric_has_no_name_of_the_evaluations_own(base, name):
    with pytest.raises(ConfigError, match="a name that every evaluation uses itself"):
        fit(base, eval_data=ROWS, compute_metrics=lambda seen: {name: 7}, **PROMPT)


def test_one_callback_need_not_be_in_a_list(base):
    seen = []
    fit(base, callbacks=seen.append, **PROMPT)
    assert [record.step for record in seen] == [0, 1]


def test_no_evaluation_any_more(base, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with Engine(base, run_dir=tmp_path / "run") as engine:
        asked = dict(eval_data=file, eval_every=1, keep_best=True, early_stopping=3, metric="loss")
        engine.fit(file, steps=2, batch_size=2, **asked, **PROMPT)
    with Engine.resume(tmp_path / "run") as engine:
        assert [values["step"] for values in engine.fit(steps=3, eval_data=False).evals] == [1, 2]


# ---- forms -----------------------------------------------------------------------------------------------------------


def test_a_generator_of_rows_is_trained_on_as_the_list_is(base):
    with Engine(base, method=MeZO(lr=1e-3)) as engine:
        streamed = engine.fit((row for row in ROWS), steps=3, batch_size=2, **PROMPT).losses
    from torch.utils.data import DataLoader

    with Engine(base, method=MeZO(lr=1e-3)) as engine:
        assert engine.fit(DataLoader(ROWS, batch_size=2), steps=3, **PROMPT).losses == streamed


@pytest.mark.parametrize("problem, label", [("regression", 0.5), ("multi_label_classification", [1.0, 0.0, 1.0])])
def test_metrics_see_labels_that_are_numbers(problem, label):
    torch.manual_seed(1)
    labels = 1 if problem == "regression" else 3
    model = tf.BertForSequenceClassification(tf.BertConfig(**BERT, num_labels=labels, problem_type=problem)).eval()
    rows = [{"input_ids": [5, 6, 7 + i], "label": label} for i in range(5)]
    with torch.no_grad():
        plain = model(torch.tensor([row["input_ids"] for row in rows])).logits.numpy()
    seen = []
    with Engine(model) as engine:
        engine.evaluate(rows, batch_size=5, compute_metrics=lambda it: seen.append(it) or {"pearson": 0.5})
    assert np.array_equal(seen[0].predictions, plain)
    assert np.array_equal(seen[0].label_ids, np.array([label] * 5, dtype=np.float32))


@pytest.mark.parametrize("data, message", [
    (pd.DataFrame([[5, 1], [4, 0]]), "takes none of its columns 0, 1"),
    ([{"input_ids": [1, 2], "label": 0}, {"input_ids": [1, 2]}], "column 'labels' does not make a batch"),
    ([{"input_ids": [1, 2], "label": ["a"]}] * 2, "labels=.* are not numbers"),
], ids=["no header", "a class and none", "texts for labels"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*the column is left out")
def test_odd_rows_are_named(base, data, message):
    with Engine(base) as engine, pytest.raises(DataError, match=message):
        engine.fit(data, steps=1, batch_size=2)


def test_one_column_of_a_table_is_no_table_but_makes_prompts(base):
    column = pd.Series(["one", "two"])
    with Engine(base) as engine:
        assert engine.generate(column, max_new_tokens=2) == engine.generate(["one", "two"], max_new_tokens=2)
        with pytest.raises(DataError, match=r"data is a Series, one column: .* data.to_frame\('text'\)"):
            engine.fit(column, task="lm")


TOKENS = [{"input_ids": [5, 6, 7, 8]}] * 4
READY = [{"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "labels": torch.tensor([[5, 6, 7], [8, 9, 10]])}] * 3


@pytest.mark.parametrize("data, options, message", [
    (TOKENS, dict(prefix="Read:"), "prefix='Read:': nothing in the data .*rows that are tokens already"),
    (TOKENS, dict(text_column="body"), "text_column='body'"),
    (TOKENS, dict(task="sst2"), "task='sst2'"),
    (READY, dict(max_length=2), "max_length=2: .*batches that are ready"),
    (READY, dict(pad_to_multiple_of=8), "pad_to_multiple_of=8"),
    (READY, dict(label_column="y", task="lm"), "label_column='y', task='lm'"),
    (READY, dict(batch_size=4), "batch_size=4: the data has batches that are ready, of 2 rows"),
    ([{"text": "a b c d e"}] * 4, dict(label_column="y"), "label_column='y': .*texts without an answer"),
    ([{"prompt": "a b", "completion": "c"}] * 4, dict(label_column="y"), "prompts with their answers"),
], ids=lambda x: " ".join(x) if isinstance(x, dict) else "")  # fmt: skip
def test_an_option_that_nothing_in_the_data_is_looked_at_for_is_refused(base, data, options, message):
    with Engine(base, method=MeZO(batch_size=2), tokenizer=byte_tokenizer()) as engine:
        with pytest.raises(DataError, match=message):
            engine.fit(data, steps=1, **options)
        assert engine.active.parts is None, "no weight was read"
        # what only the other data are encoded by is not idle
        if "prefix" in options:
            engine.fit(data, eval_data=[{"prompt": "a b", "completion": "c"}] * 2, steps=1, **options)


def test_a_run_keeps_options_that_it_was_begun_with_and_an_evaluation_only_warns(base, caplog):
    with Engine(base, method=MeZO(batch_size=2), tokenizer=byte_tokenizer()) as engine:
        engine.evaluate(TOKENS, prefix="Read:")
    assert "prefix='Read:'" in caplog.text


def test_a_warm_up_that_the_schedule_has_not_is_refused(base):
    for schedule in ("constant", "constant_with_warmup", "linear"):
        with Engine(base, method=MeZO(batch_size=2, warmup_steps=2, schedule=schedule)) as engine:
            if schedule == "constant":
                with pytest.raises(ConfigError, match="warmup_steps=2: schedule 'constant' has no warm-up"):
                    engine.fit(TOKENS, steps=1)
            else:
                engine.fit(TOKENS, steps=1)


def test_settings_of_a_head_of_classes_are_refused_by_a_model_without_one(base):
    said = "num_labels=3: LlamaForCausalLM has no head of classes.*--model-class.*--template"
    with pytest.raises(ConfigError, match=said):
        Engine(base, num_labels=3)
    with pytest.raises(ConfigError, match="id2label="):
        Engine(base, id2label={0: "bad", 1: "good"})
    given = dict(model_class="AutoModelForSequenceClassification", id2label={0: "bad", 1: "good", 2: "so"})
    with Engine(base, **given) as engine:
        assert (engine.kind.classes, dict(engine.kind.class_ids)) == (3, {"bad": 0, "good": 1, "so": 2})
        assert engine.model.config.id2label == given["id2label"]
    with pytest.raises(ConfigError, match="model_class= is for a checkpoint"):
        Engine(engine.model, model_class="AutoModel")
    with pytest.raises(ConfigError, match="base= is of a module on meta"):
        Engine(base, base=object())


def test_rows_that_teach_nothing_are_told_of_before_the_first_step_with_their_number(base):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": labels} for labels in ([5, 6, 7, 8], [-100] * 4, [5] + [-100] * 3)]
    with pytest.warns(UserWarning, match="4 of 6 rows have no label that counts, the first is list row 1: "):
        made = make_batches(rows * 2, batch_size=3, kind=CAUSAL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.identity(), made.batch(0)
        make_batches(rows, batch_size=3, kind=CAUSAL, own_objective=True)


@pytest.mark.parametrize("row, options", [
    ({"labels": 1, "label": 0}, {}), ({"labels": 1, "label_ids": 0}, {}),
    ({"labels": 1, "y": 1}, {"label_column": "y"}),
])  # fmt: skip
def test_a_row_with_two_labels_is_refused(row, options):
    heads = ModelKind("classification", "a classifier", classes=2, takes=TAKEN)
    rows = [{"input_ids": [5, 6], **row}]
    name = next(name for name in row if name != "labels")
    with pytest.raises(DataError, match=f"row 0 has {name!r} .* and 'labels' .1.: which is the label cannot be told"):
        make(rows, kind=heads, **options)
    if not options:
        assert make([{**rows[0], name: 1}], kind=heads)["labels"] == [1]
