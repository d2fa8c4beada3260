"""Inputs and labels by the kind of model, as users meet them: through `fit`, `evaluate` and the command line."""

from __future__ import annotations

import gzip
import json
import re

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from transformers import PreTrainedTokenizerFast

from support.zoo.models import BART, BERT, LLAMA, ZOO, Tiny
from zo_offload import Engine, MeZO
from zo_offload.cli import main
from zo_offload.errors import DataError

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
WORDS = "good bad great film it was a the question answer what capital of france paris rome user assistant :".split()
ID = {word: i for i, word in enumerate(SPECIAL + WORDS)}
PAD, BOS, EOS, UNK, MASK = range(5)


def ids(text: str) -> list[int]:
    return [ID[word] for word in text.split()]


def make_tokenizer(single: str | None = None, **special):
    core = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if single is not None:
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    tokens = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>")
    return PreTrainedTokenizerFast(tokenizer_object=core, **{**tokens, **special})


MODELS = {
    "causal": ZOO["llama"],
    "causal-unshifted": Tiny("BartForCausalLM", "BartConfig", BART),
    "masked": Tiny("BertForMaskedLM", "BertConfig", BERT),
    "roberta": ZOO["roberta"],
    "t5": ZOO["t5"],
    "bart": ZOO["bart"],
    "classifier": Tiny("BertForSequenceClassification", "BertConfig", BERT),
    "regression": Tiny("BertForSequenceClassification", "BertConfig", dict(BERT, num_labels=1)),
    "several": Tiny(
        "BertForSequenceClassification", "BertConfig",
        dict(BERT, num_labels=3, problem_type="multi_label_classification"),
    ),
    "tokens": Tiny("BertForTokenClassification", "BertConfig", dict(BERT, num_labels=3)),
    "questions": Tiny("BertForQuestionAnswering", "BertConfig", BERT),
    "choice": Tiny("BertForMultipleChoice", "BertConfig", BERT),
    "bare": Tiny("BertModel", "BertConfig", BERT),
}  # fmt: skip


def engine_of(model, **options):
    model = MODELS[model].build() if isinstance(model, str) else model
    defaults = {"method": MeZO(lr=1e-6, batch_size=2), "offload": "none", "tokenizer": make_tokenizer()}
    return Engine(model, **{**defaults, **options})


def batch_of(model, rows, **options):
    """The first batch that a fit of the engine gives its model."""
    engine_options = {name: options.pop(name) for name in ("tokenizer", "objective") if name in options}
    with engine_of(model, **engine_options) as engine:
        engine.fit(rows, steps=1, **options)
        batches = engine.batching.batches(rows, 2, options, shuffle=False)
        return {name: value.tolist() for name, value in batches.first().items()}


def refusal(model, rows, **options):
    """What fit and evaluate say, before weights are read."""
    engine_options = {name: options.pop(name) for name in ("tokenizer", "objective") if name in options}
    with engine_of(model, **engine_options) as engine:
        with pytest.raises(DataError) as error:
            engine.fit(rows, steps=3, **options)
        assert engine.active.session is None, "weights were read"
    return str(error.value)


# ---- the answer is never in the input -------------------------------------------------------------------------------

REVIEWS = [{"text": "the film", "label": 1}, {"text": "a film it was", "label": 0}]
PROMPT = dict(template="{text} it was", verbalizers=["bad", "good"])
CLOZE = dict(template="{text} it was {mask} :", verbalizers=["bad", "good"])
QA = [{"prompt": "what capital of france :", "completion": " paris"}, {"prompt": "what :", "completion": " rome"}]
WAYS = {
    "causal": ("causal", REVIEWS, PROMPT), "causal-unshifted": ("causal-unshifted", REVIEWS, PROMPT),
    "masked": ("masked", REVIEWS, CLOZE), "roberta": ("roberta", REVIEWS, CLOZE),
    "t5": ("t5", REVIEWS, PROMPT), "bart": ("bart", REVIEWS, PROMPT),
    "causal-completion": ("causal", QA, {}), "t5-completion": ("t5", QA, {}),
    "t5-target": ("t5", [{"text": "what", "target": "paris"}, {"text": "question", "target": "rome"}], {}),
    "causal-target": ("causal", [{"q": "what", "a": "paris"}] * 2, dict(template="{q} :", target_column="a")),
    "choice": ("causal", [{"text": "the", "x": "good film", "y": "bad", "label": 0}] * 2,
               dict(template="{text} it was", verbalizers=["{x}", "{y}"])),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_the_answer_is_never_in_what_it_is_predicted_from(way):
    model, rows, options = WAYS[way]
    batch = batch_of(model, rows, **options)
    for given, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        asked = [i for i, label in enumerate(labels) if label != -100]
        assert asked, "a row without a loss"
        for place in asked:
            if way.startswith(("t5", "bart", "masked", "roberta")):
                seen = given
            else:  # what stands before the label's token, wherever the model looks for the label
                seen = given[: place + (way == "causal-unshifted")]
            assert labels[place] in (EOS,) or labels[place] not in seen


def test_a_prompt_is_laid_out_by_the_kind_of_model():
    assert batch_of("masked", REVIEWS, **CLOZE)["input_ids"][0] == [*ids("the film it was"), MASK, ID[":"], PAD, PAD]
    assert batch_of("masked", REVIEWS, **CLOZE)["labels"][0] == [-100] * 4 + [ID["good"], -100, -100, -100]
    t5 = batch_of("t5", REVIEWS, **PROMPT)
    assert t5["input_ids"][0] == [*ids("the film it was"), PAD, PAD] and t5["labels"][0] == [ID["good"], EOS]
    causal = batch_of("causal", REVIEWS, **PROMPT)
    assert causal["input_ids"][0][:5] == ids("the film it was good") and causal["labels"][0][4] == ID["good"]
    unshifted = batch_of("causal-unshifted", REVIEWS, **PROMPT)
    assert unshifted["labels"][0][3] == ID["good"] and unshifted["labels"][0][4] == -100


def test_a_masked_prompt_that_is_cut_keeps_its_mask():
    rows = [{"text": "the film was a film it was the film", "label": 0}] * 2
    batch = batch_of("masked", rows, tokenizer=make_tokenizer("<s> $A </s>"), max_length=7, **CLOZE)
    assert batch["input_ids"][0] == [BOS, *ids("film it was"), MASK, ID[":"], EOS]
    front = dict(template="{mask} : {text}", verbalizers=["bad", "good"])
    batch = batch_of("masked", rows, tokenizer=make_tokenizer("<s> $A </s>"), max_length=7, **front)
    assert batch["input_ids"][0] == [BOS, MASK, *ids(": the film was"), EOS]


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [("masked", CLOZE, 1), ("t5", PROMPT, 1), ("bart", PROMPT, 1), ("causal-unshifted", PROMPT, 1),
     ("masked", dict(template="{text} {mask} {mask}", verbalizers=["bad film", "good film"]), 2)],
)  # fmt: skip
def test_accuracy_is_read_where_the_answer_is_asked_for(model, options, words):
    """Against the model itself, asked row by row."""
    net = MODELS[model].build()
    tokenizer, rows = make_tokenizer(), [{"text": "the film" + " a" * i, "label": i % 2} for i in range(6)]
    right = 0
    for row in rows:
        text = options["template"].format(text=row["text"], mask="<mask>")
        given = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            if model in ("t5", "bart"):
                logits = net(input_ids=given, labels=torch.tensor([[5, EOS]])).logits[0, :1]
            else:
                logits = net(input_ids=given, **({"use_cache": False} if "causal" in model else {})).logits[0]
                logits = logits[given[0] == MASK] if model == "masked" else logits[-1:]
        scores = [
            sum(float(logits[i].log_softmax(-1)[token]) for i, token in enumerate(ids(word)[:words]))
            for word in options["verbalizers"]
        ]
        right += int(scores.index(max(scores)) == row["label"])
    with engine_of(net) as engine:
        assert engine.evaluate(rows, batch_size=4, **options)["accuracy"] == right / len(rows)


def test_choices_of_each_row_are_filled_in_and_compared():
    rows = [
        {"premise": "the film", "choice1": "was good", "choice2": "was bad a film", "label": i % 2} for i in range(4)
    ]
    options = dict(template="{premise} it", verbalizers=["{choice1}", "{choice2}"])
    batch = batch_of("causal", rows, **options)
    assert batch["input_ids"][0][:5] == ids("the film it was good") and batch["labels"][0][3:5] == ids("was good")
    with engine_of("causal") as engine:
        whole = engine.evaluate(rows, batch_size=4, **options)
        other = engine.evaluate([{**row, "choice2": "was great"} for row in rows], batch_size=1, **options)
    assert whole["accuracy"] == 0.5 and set(other) == {"loss", "accuracy"}
    assert "lacks 'choice2'" in refusal("causal", [{"premise": "a", "choice1": "a", "label": 0}] * 2, **options)


# ---- text without an answer -----------------------------------------------------------------------------------------


def test_plain_text_of_a_causal_model_ends_with_eos_and_begins_with_one_bos():
    rows = [{"text": "<s> the film"}, {"text": "the film was good"}]
    for single in ("<s> $A", "<s> $A </s>"):
        batch = batch_of("causal", rows, tokenizer=make_tokenizer(single))
        assert batch["input_ids"][0] == [BOS, *ids("the film"), EOS, PAD, PAD]
        assert batch["labels"][0] == [-100, *ids("the film"), EOS, -100, -100]
    cut = batch_of("causal", rows, tokenizer=make_tokenizer("<s> $A"), max_length=3)
    assert cut["input_ids"] == [[BOS, *ids("the film")], [BOS, *ids("the film")]]


def test_random_masks_are_those_of_the_seed_and_the_step():
    rows = [{"text": " ".join(WORDS[i : i + 9])} for i in range(8)]

    def losses(steps=6, seed=0, run=None):
        with engine_of("masked", seed=seed) as engine:
            return engine.fit(rows, steps=steps).losses, engine.evaluate(rows, batch_size=3)["loss"]

    torch.manual_seed(1)
    first = losses()
    torch.manual_seed(2)
    assert losses() == first and losses(seed=1)[0] != first[0]
    batch = batch_of("masked", rows)
    for given, labels, row in zip(batch["input_ids"], batch["labels"], rows, strict=False):
        asked = [i for i, label in enumerate(labels) if label != -100]
        assert 1 <= len(asked) < 9
        assert [labels[i] if i in asked else given[i] for i in range(9)] == ids(row["text"])


# ---- labels by the head ---------------------------------------------------------------------------------------------

FINE = {
    "classifier": ([{"input_ids": [5, 6], "label_ids": 1}, {"input_ids": [5, 6, 7], "label_ids": 0}], [1, 0]),
    "classifier-floats": ([{"text": "good", "label": 1.0}, {"text": "bad film", "label": "0"}], [1, 0]),
    "classifier-truth": ([{"text": "good", "label": True}, {"text": "bad film", "label": False}], [1, 0]),
    "classifier-names": ([{"text": "good", "label": "LABEL_1"}, {"text": "bad", "label": "LABEL_0"}], [1, 0]),
    "regression": ([{"text": "good", "label": "0.5"}, {"text": "bad film", "label": 2}], [0.5, 2.0]),
    "several": ([{"text": "good", "label": [1, 0, 1]}, {"text": "bad", "label": [0, 0, 1]}], [[1, 0, 1], [0, 0, 1]]),
    "tokens": ([{"input_ids": [5, 6], "labels": [0, 2]}, {"input_ids": [5], "labels": [1]}], [[0, 2], [1, -100]]),
    "choice": ([{"input_ids": [[5, 6], [7]], "label": 1}, {"input_ids": [[5], [7, 8, 9]], "label": 0}], [1, 0]),
    "questions": ([{"input_ids": [5, 6, 7], "start_positions": 0, "end_positions": 1}] * 2, None),
}


@pytest.mark.parametrize("way", FINE)
def test_labels_are_as_the_head_takes_them(way):
    rows, labels = FINE[way]
    batch = batch_of(way.partition("-")[0], rows)
    assert batch.get("labels") == labels


def test_a_question_weighs_as_a_row():
    rows = [{"input_ids": [5] * n, "start_positions": 1, "end_positions": n - 1} for n in (9, 3, 4, 5)]
    with engine_of("questions") as engine:
        parts = [engine.evaluate([row] * 2, batch_size=2)["loss"] for row in rows]
        assert engine.evaluate(rows, batch_size=1)["loss"] == pytest.approx(sum(parts) / 4, abs=1e-6)


def rows_with(good, bad, at=5):
    """Eight rows, of which one deep in is bad: the first two steps do not see it."""
    return [dict(bad if i == at else good) for i in range(8)]


TEXT = {"text": "the film", "label": 1}
IDS = {"input_ids": [5, 6, 7]}
REFUSED = {
    "label on a causal model": ("causal", [TEXT] * 2, {}, "template= and verbalizers="),
    "label on a masked model": ("masked", [TEXT] * 2, {}, "template= and verbalizers="),
    "prompt without a mask": ("masked", REVIEWS, PROMPT, r"Put {mask} where the answer belongs"),
    "two masks, words of one": ("masked", REVIEWS, dict(template="{text} {mask} {mask}", verbalizers=["a", "good"]),
                                "'a' is 1 tokens, but the template has 2 masks"),
    "mask in the text": ("masked", rows_with(TEXT, {"text": "a <mask>", "label": 0}, 0), CLOZE, "row 0: 2 masks"),
    "text for an encoder-decoder": ("t5", [{"text": "the film"}] * 2, {}, "target_column="),
    "tokens for an encoder-decoder": ("t5", [IDS] * 2, {}, "row 0 has no labels"),
    "text for token classes": ("tokens", [{"text": "the film"}] * 2, {}, "labels of the same length"),
    "text for questions": ("questions", [{"text": "the film"}] * 2, {}, "start_positions"),
    "no head": ("bare", [{"text": "the film"}] * 2, {}, "--model-class"),
    "prompt for a classifier": ("classifier", REVIEWS, PROMPT, "no head that predicts words"),
    "words alike": ("causal", REVIEWS, dict(template="{text}", verbalizers=["good", " good"]), "the same tokens"),
    "words unknown": ("causal", REVIEWS, dict(template="{text}", verbalizers=["good", "nice"]), "'nice' is not in"),
    "choices alike deep in": ("causal", rows_with({"text": "a", "x": "good", "label": 0},
                                                  {"text": "a", "x": "bad", "label": 0}),
                              dict(template="{text}", verbalizers=["{x}", "bad"]), "row 5: .* the same tokens"),
    "JSON braces": ("causal", REVIEWS, dict(template='{"review": "{text}"}', verbalizers=["a", "good"]),
                    "write {{ and }} for braces"),
    "unclosed brace": ("causal", REVIEWS, dict(template="{text", verbalizers=["a", "good"]), "write {{ and }}"),
    "braces in a word": ("causal", REVIEWS, dict(template="{text}", verbalizers=["{0}", "good"]), "column's name"),
    "label's column in the prompt": ("causal", REVIEWS, dict(template="{text} {label}", verbalizers=["a", "good"]),
                                     "holds the answer"),
    "class beyond the head": ("classifier", rows_with(TEXT, {**TEXT, "label": 4}), {}, "row 5: label=4.* 2 classes"),
    "class below 0": ("classifier", rows_with(TEXT, {**TEXT, "label": -1}), {}, "row 5: label=-1"),
    "class between": ("classifier", rows_with(TEXT, {**TEXT, "label": 0.5}), {}, "row 5: label=0.5 is not a class"),
    "class not a number": ("classifier", rows_with(TEXT, {**TEXT, "label": float("nan")}), {}, "row 5: label=nan"),
    "class None": ("classifier", rows_with(TEXT, {**TEXT, "label": None}), {}, "row 5: label=None"),
    "class in words": ("classifier", rows_with(TEXT, {**TEXT, "label": "spam"}), {}, "row 5: label='spam'.*label2id"),
    "no class": ("classifier", rows_with(TEXT, {"text": "a"}), {}, "row 5 lacks 'label'"),
    "tokenised, no class": ("classifier", rows_with({**IDS, "label": 1}, IDS), {}, "row 5 has no labels"),
    "tokenised, class beyond": ("classifier", rows_with({**IDS, "label": 1}, {**IDS, "label": 2}), {},
                                "row 5: labels=2"),
    "token class beyond": ("tokens", rows_with({**IDS, "labels": [0, 1, 2]}, {**IDS, "labels": [0, 1, 3]}), {},
                           "row 5: labels=3"),
    "token classes missing": ("tokens", rows_with({**IDS, "labels": [0, 1, 2]}, {**IDS, "labels": [0, 1]}), {},
                              "row 5: 2 labels for 3 tokens"),
    "two labels of three": ("several", rows_with({**TEXT, "label": [1, 0, 1]}, {**TEXT, "label": [1, 0]}), {},
                            "row 5: label holds 2 numbers"),
    "span beyond": ("questions", rows_with({**IDS, "start_positions": 0, "end_positions": 2},
                                           {**IDS, "start_positions": 0, "end_positions": 3}), {},
                    "row 5: end_positions=3"),
    "choice beyond": ("choice", rows_with({"input_ids": [[5], [6]], "label": 1}, {"input_ids": [[5], [6]], "label": 2}),
                      {}, "row 5: labels=2, and the row has 2 choices"),
    "text None": ("causal", rows_with({"text": "the film"}, {"text": None}), {}, "row 5: column 'text' is empty"),
    "text NaN": ("causal", rows_with({"text": "a"}, {"text": float("nan")}), {}, "row 5: column 'text' is empty"),
    "text empty": ("causal", rows_with({"text": "the film"}, {"text": " "}), {}, "row 5: no text in 'text'"),
    "template without a column": ("causal", [TEXT] * 2, {**PROMPT, "template": "It was"}, "has no column in braces"),
    "text a list": ("causal", rows_with({"text": "a"}, {"text": "a", "x": 1} | {"text": ["a"]}), {}, "row 5"),
    "half a surrogate": ("causal", rows_with({"text": "a"}, {"text": "a \ud83d"}), {}, "row 5: .* surrogate pair"),
    "label unknown to the words": ("causal", rows_with(TEXT, {**TEXT, "label": 7}), PROMPT, "row 5: label=7"),
    "too long deep in": ("causal", rows_with({"text": "a"}, {"text": "a " * 80}), {}, "row 5 has 81 tokens.* 64"),
    "token beyond the vocabulary": ("causal", rows_with(IDS, {"input_ids": [5, 96]}), {}, "row 5 has token 96"),
    "label beyond the vocabulary": ("t5", rows_with({**IDS, "labels": [5]}, {**IDS, "labels": [96]}), {}, "holds 96"),
    "labels longer than the decoder": ("bart", rows_with({**IDS, "labels": [5]}, {**IDS, "labels": [5] * 65}), {},
                                       "row 5 has 65 labels, but the decoder takes at most 64"),
    "max_length cuts all labels": ("causal", rows_with({**IDS, "labels": [-100, 6, 7]},
                                                       {**IDS, "labels": [-100, -100, 7]}), dict(max_length=2),
                                   "row 5: max_length=2 cuts away every label"),
    "max_length leaves one token": ("causal", [{"text": "the film"}] * 2, dict(max_length=1), "nothing to predict"),
    "empty completion": ("causal", rows_with(QA[0], {**QA[0], "completion": ""}), {}, "row 5: no text in 'completion'"),
    "messages without a template": ("causal", [{"messages": [{"role": "user", "content": "a"}]}] * 2, {},
                                    "no chat template"),
    "an option misspelt": ("causal", [IDS] * 2, dict(tempalte="a"), "Did you mean template="),
}  # fmt: skip


@pytest.mark.parametrize("way", REFUSED)
def test_what_cannot_be_right_is_refused_before_the_first_step(way):
    model, rows, options, message = REFUSED[way]
    found = refusal(model, rows, **options)

    assert re.search(message.replace("{", r"\{").replace("}", r"\}"), found), found


def test_a_causal_head_that_sees_ahead_is_refused():
    net = transformers.BertLMHeadModel(transformers.BertConfig(**BERT))
    assert "sees each answer ahead" in refusal(net, [{"text": "the film"}] * 2)
    assert "sees each answer ahead" in refusal(net, REVIEWS, **PROMPT)
    assert "sees each answer ahead" in refusal(net, [IDS] * 2)


def test_a_classifier_that_cannot_tell_padding_is_refused_or_takes_single_rows():
    net = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**dict(LLAMA, pad_token_id=None)))
    rows = [{"input_ids": [5] * (3 + i), "label": i % 2} for i in range(4)]
    assert "Set model.config.pad_token_id, or use batch_size=1" in refusal(net, rows)
    with engine_of(net) as engine:
        assert len(engine.fit(rows, steps=2, batch_size=1).losses) == 2


def test_padding_is_what_the_model_takes_for_it():
    net = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**dict(LLAMA, pad_token_id=7)))
    batch = batch_of(net, [{"text": "the film was", "label": 1}, {"text": "good", "label": 0}])
    assert batch["input_ids"][1] == [ID["good"], 7, 7]


def test_the_last_message_is_what_a_chat_learns():
    tokenizer = make_tokenizer("<s> $A")
    tokenizer.chat_template = (
        "{{ '<s> ' }}{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' }}{% endfor %}"
    )
    chat = [{"role": "user", "content": "what capital of france"}, {"role": "assistant", "content": "paris"}]
    batch = batch_of("causal", [{"messages": chat}] * 2, tokenizer=tokenizer)
    assert batch["input_ids"][0] == [BOS, *ids("user : what capital of france assistant : paris")]
    assert batch["labels"][0] == [-100] * 7 + ids("assistant : paris")


# ---- forms of data --------------------------------------------------------------------------------------------------


class Rows(IterableDataset):
    def __iter__(self):
        for i in range(7):
            yield {"input_ids": torch.tensor([5, 6, 7 + i])}


class Pairs(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {"chosen": torch.tensor([5, 6]), "rejected": torch.tensor([7, 8])}


def square(model, batch):
    return (model(batch[0] if isinstance(batch, tuple) else batch["x"]) ** 2).mean()


def test_rows_of_a_stream_are_put_into_batches():
    with engine_of("causal") as engine:
        streamed = engine.fit(Rows(), steps=5).losses
        values = engine.evaluate(Rows())
    with engine_of("causal") as engine:
        rows = [{"input_ids": [5, 6, 7 + i]} for i in (0, 1, 2, 3, 4, 5, 0, 1, 2, 3)]
        assert engine.fit(DataLoader(Stacked(rows), 2), steps=5).losses == streamed
    assert set(values) == {"loss"}


class Stacked(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = torch.tensor(self.rows[i]["input_ids"])
        return {
            "input_ids": row,
            "attention_mask": torch.ones_like(row),
            "labels": torch.cat([row[:1] * 0 - 100, row[1:]]),
        }


@pytest.mark.parametrize("form", ["tuples", "tensors", "dicts", "nested", "list of tuples"])
def test_an_objective_of_ones_own_is_given_what_the_loader_gives(form):
    torch.manual_seed(0)
    x, net = torch.randn(8, 4), nn.Linear(4, 1)
    given = []

    def objective(model, batch):
        given.append(type(batch))
        value = batch["in"]["x"] if form == "nested" else batch if isinstance(batch, torch.Tensor) else None
        return square(model, (value,) if value is not None else batch)

    data = {
        "tuples": DataLoader(TensorDataset(x, x), batch_size=2), "tensors": DataLoader(x, batch_size=2),
        "dicts": [{"x": x[i : i + 2]} for i in (0, 2, 4, 6)],
        "nested": [{"in": {"x": x[i : i + 2]}} for i in (0, 2, 4, 6)],
        "list of tuples": [(x[i : i + 2], x[i : i + 2]) for i in (0, 2, 4, 6)],
    }[form]  # fmt: skip
    with engine_of(net, objective=objective, tokenizer=None, example={"input": x[:2]}) as engine:
        assert len(engine.fit(data, steps=3).losses) == 3
        value = engine.evaluate(data)["loss"]
    assert value == pytest.approx(float((nn.functional.linear(x, *(p for p in net_of(x))) ** 2).mean()), abs=1e-3)
    kinds = {"tuples": tuple, "tensors": torch.Tensor, "list of tuples": tuple}
    assert set(given) <= {kinds.get(form, dict)} | {dict} and (form in ("dicts", "nested") or kinds[form] in given)


def net_of(x):
    torch.manual_seed(0)
    torch.randn(8, 4)
    return list(nn.Linear(4, 1).parameters())


def test_ready_batches_with_names_of_their_own_are_not_rows():
    seen = []

    def objective(model, batch):
        seen.append({name: tuple(value.shape) for name, value in batch.items()})
        return model(input_ids=batch["chosen"]).logits.mean() - model(input_ids=batch["rejected"]).logits.mean()

    ready = [{"chosen": torch.full((3, 4), 5), "rejected": torch.full((3, 4), 6)} for _ in range(2)]
    with engine_of("causal", objective=objective) as engine:
        engine.fit(ready, steps=2)
        engine.fit(Pairs(), steps=4)
    assert seen[0] == {"chosen": (3, 4), "rejected": (3, 4)} and seen[-1] == {"chosen": (2, 2), "rejected": (2, 2)}


def test_an_iterator_can_be_evaluated_once():
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
    with engine_of("causal") as engine:
        whole = engine.evaluate([batch, batch])
        assert engine.evaluate(iter([batch, batch])) == whole


def test_tables_splits_and_few_rows():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": ["good", "bad film"], "label": [1.0, 0.0]})
    with engine_of("classifier") as engine:
        assert set(engine.evaluate(frame)) == {"loss", "accuracy"}
        with pytest.warns(UserWarning, match="2 rows, fewer than batch_size=16: each step takes them all"):
            assert len(engine.fit(frame, steps=3, batch_size=16).losses) == 3
    found = refusal("causal", {"train": [{"text": "a"}], "test": [{"text": "a"}]})
    assert "data is a dict of train, test: pass one of them, data['train']" in found


def test_columns_that_the_model_does_not_take_are_left_out_and_named():
    rows = [{**IDS, "label": i % 2, "idx": i, "meta": {"a": 1}} for i in range(4)]
    with pytest.warns(UserWarning, match="BertForSequenceClassification takes no 'idx'"):
        assert "idx" not in batch_of("classifier", rows)


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pytest.importorskip("pyarrow")
        pytest.importorskip("pandas").DataFrame(rows).to_parquet(path)
    elif path.suffix.lower() in (".csv", ".tsv"):
        tab = "\t" if path.suffix == ".tsv" else ","
        path.write_text(f"text{tab}label\n" + "".join(f"{row['text']}{tab}{row['label']}\n" for row in rows))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.csv", "a.CSV", "a.tsv", "a.json", "a.jsonl.gz", "a.parquet"])
def test_every_kind_of_file_gives_the_same_run(tmp_path, name):
    rows = [{"text": "good film", "label": 1}, {"text": "bad", "label": 0}, {"text": "a film", "label": 1}]
    with engine_of("classifier") as engine:
        want = engine.fit(rows, steps=2).losses
    with engine_of("classifier") as engine:
        assert engine.fit(write(tmp_path / name, rows), steps=2).losses == want


def test_a_csv_field_may_be_long(tmp_path):
    (tmp_path / "long.csv").write_text("text,label\n" + "film " * 40_000 + ",1\nbad,0\n")
    with engine_of("classifier") as engine:
        assert engine.fit(tmp_path / "long.csv", steps=2, max_length=8).steps == 2


# ---- runs of the first encoding ---


def fit_run(model, run, rows, steps, options, resume=False):
    made = dict(offload="disk", method=MeZO(lr=1e-3, batch_size=2))
    tokenizer = options.pop("tokenizer", None) or make_tokenizer("<s> $A")
    net = MODELS[model].build()
    engine = Engine.resume(run, net, tokenizer=tokenizer) if resume else Engine(
        net, tokenizer=tokenizer, run_dir=run, **made
    )  # fmt: skip
    with engine:
        losses = engine.fit(rows, steps=steps, batch_size=2, **options).losses
        first = {k: v.tolist() for k, v in engine.batching.batches(rows, 2, options, shuffle=False).first().items()}
    return losses, first


FIRST = {
    "text": ("causal", [{"text": "<s> the film was"}, {"text": "a film"}] * 3, {}),
    "prompt": ("causal", [{"text": "<s> the film", "label": 1}, {"text": "a film", "label": 0}] * 3, PROMPT),
    "tokens": ("causal", [{"input_ids": [5, 6, 7 + i]} for i in range(6)], {}),
    "classes": ("classifier", [{"text": "the film", "label": 1}, {"text": "a film", "label": 0}] * 3, {}),
}


@pytest.mark.parametrize("way", FIRST)
def test_a_run_goes_on_with_the_encoding_that_it_was_begun_with(tmp_path, monkeypatch, way):
    model, rows, options = FIRST[way]
    with monkeypatch.context() as old:
        for module in ("run.active", "journal.identity"):
            old.setattr(f"zo_offload.{module}.ENCODING", 1)
        whole, first = fit_run(model, tmp_path / "whole", rows, 5, dict(options))
        begun, _ = fit_run(model, tmp_path / "run", rows, 2, dict(options))
    rest, again = fit_run(model, tmp_path / "run", rows, 5, dict(options), resume=True)
    assert begun + rest == whole and again == first
    if way == "text":
        assert first["input_ids"] == [[BOS, BOS, *ids("the film was")], [BOS, *ids("a film"), PAD, PAD]]
        assert first["labels"] == [[-100, BOS, *ids("the film was")], [-100, *ids("a film"), -100, -100]]


@pytest.mark.parametrize("way", ["masked", "t5", "questions"])
def test_a_run_that_the_first_encoding_made_wrong_is_refused_by_name(tmp_path, monkeypatch, way):
    rows = {"masked": REVIEWS, "t5": REVIEWS, "questions": [{**IDS, "start_positions": 0, "end_positions": 1}] * 2}[way]
    options = {} if way == "questions" else PROMPT
    with monkeypatch.context() as old:
        for module in ("run.active", "journal.identity"):
            old.setattr(f"zo_offload.{module}.ENCODING", 1)
        old.setattr("zo_offload.data.first_encoding.FirstEncoding._check_kind", lambda *args: None)
        fit_run(way, tmp_path / "run", rows, 2, dict(options))
    with pytest.raises(DataError, match="begun by a version that .* Start the run again"):
        fit_run(way, tmp_path / "run", rows, 4, dict(options), resume=True)


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    def save(model):
        path = tmp_path / "model"
        MODELS[model].build().save_pretrained(path)
        make_tokenizer().save_pretrained(path)
        return str(path)

    return save


def test_the_command_line_refuses_and_fits_by_the_kind_of_model(tmp_path, checkpoint, capsys):
    data = write(tmp_path / "a.jsonl", [TEXT, {**TEXT, "label": 0}] * 2)
    model, run = checkpoint("masked"), tmp_path / "run"
    common = ["--data", str(data), "--steps", "2", "--batch-size", "2", "--quiet", "--offload", "disk"]
    assert main(["fit", model, *common, "--run-dir", str(run)]) == 2
    assert "--template" in capsys.readouterr().err and not run.exists()
    words = ["--template", "{text} it was {mask}", "--verbalizers", "bad", "good"]
    assert main(["fit", model, *common, "--run-dir", str(run), *words]) == 0
    assert main(["eval", str(run), "--data", str(data), *words]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_pairs_and_targets_on_the_command_line(tmp_path, checkpoint):
    data = write(tmp_path / "a.jsonl", [{"q": "what", "of": "france", "a": "paris", "label": 1}] * 2)
    model = checkpoint("t5")
    common = ["fit", model, "--data", str(data), "--steps", "1", "--batch-size", "2", "--quiet", "--offload", "none"]
    assert main([*common, "--text-column", "q", "--target-column", "a"]) == 0
    assert main([*common, "--text-column", "q", "of", "--target-column", "a"]) == 0
    assert main(common) == 2
