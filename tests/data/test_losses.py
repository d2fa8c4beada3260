"""The loss that was asked for: what models and objectives may return, what goes into them, and what is refused."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F

from support.zoo.models import BERT, VOCAB, ZOO
from zo_offload import ConfigError, DataError, Engine, MeZO
from zo_offload.cli import main

METHOD = MeZO(lr=1e-3, batch_size=4)
WORDS = "[PAD] [EOS] [MASK] bad good it was very the film plot".split()


def word_tokenizer():
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", eos_token="[EOS]", mask_token="[MASK]"
    )  # fmt: skip


# ---- what a model returns ----------------------------------------------------------------------------------------


class Output:
    def __init__(self, loss, logits):
        self.loss, self.logits = loss, logits


FORMS = {
    "an object": Output,
    "a dict": lambda loss, logits: {"loss": loss, "logits": logits},
    "a tuple": lambda loss, logits: (loss, logits),
    "a list": lambda loss, logits: [loss, logits],
    "the loss alone": lambda loss, logits: loss,
    "a number": lambda loss, logits: float(loss) if not loss.is_meta else 0.0,
}


class Module(nn.Module):
    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.form = nn.Linear(8, 3), form

    def forward(self, x, labels):
        logits = self.head(x)
        return self.form(F.cross_entropy(logits, labels), logits)


def numbers(rows=4):
    g = torch.Generator().manual_seed(1)
    return {"x": torch.randn(rows, 8, generator=g), "labels": torch.arange(rows) % 3}


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_is_found_in_whatever_a_module_returns(form):
    batch = numbers()
    module = Module(FORMS[form])
    want = float(F.cross_entropy(module.head(batch["x"]), batch["labels"]))
    share = float((module.head(batch["x"]).argmax(-1) == batch["labels"]).double().mean())
    with Engine(module, method=METHOD, offload="none", example=batch) as engine:
        values = engine.evaluate([batch])
        assert values["loss"] == pytest.approx(want, rel=1e-6)
        assert values.get("accuracy") == (share if form not in ("the loss alone", "a number") else None)
        engine.step(batch)


@pytest.mark.parametrize(
    "form, match",
    [
        (lambda loss, logits: logits, r"a tensor of shape \[4, 3\]"),
        (lambda loss, logits: (logits, loss), r"tuple of a tensor of shape \[4, 3\]"),
        (lambda loss, logits: {"logits": logits}, "dict with logits"),
        (lambda loss, logits: {"loss": logits}, r"dict with loss \(a tensor of shape \[4, 3\]\)"),
        (lambda loss, logits: loss.view(1), r"a tensor of shape \[1\]"),
        (lambda loss, logits: None, "None"),
    ],
    ids=["logits", "loss-second", "no-loss", "loss-of-each", "one-element", "nothing"],
)
def test_anything_else_is_named(form, match):
    with (
        Engine(Module(form), method=METHOD, offload="none", example=numbers()) as engine,
        pytest.raises(
            DataError, match=rf"Module gave no loss for a batch with \['labels', 'x'\], but {match}.*objective="
        ),
    ):
        engine.step(numbers())


def test_a_model_without_a_head_is_named_with_classes_that_have_one(tmp_path, capsys):
    tf.BertModel(tf.BertConfig(**BERT)).save_pretrained(tmp_path / "base")
    with (
        Engine(tmp_path / "base", method=METHOD, offload="none", model_class="BertModel") as engine,
        pytest.raises(
            DataError, match=r"BertModel.* body without a head.*--model-class.*BertForSequenceClassification"
        ),
    ):
        engine.step({"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([1])})


def test_names_that_a_forward_does_not_take_are_named():
    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 1)

        def forward(self, x):
            return self.head(x).mean()

    with Engine(Strict(), method=METHOD, offload="none", example={"x": torch.ones(4, 8)}) as engine:
        engine.step({"x": torch.ones(4, 8)})
        with pytest.raises(DataError, match=r"Strict.forward takes no 'labels'"):
            engine.step(numbers())


# ---- what an objective returns -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, match",
    [
        (None, "None; expected"), (1 + 2j, r"complex \(1\+2j\)"), (np.complex64(1), "complex64"), ("1.0", "str '1.0'"),
        ((1.0, 2), "tuple of float, int.*Return the loss alone"), ({"loss": torch.tensor(1.0)}, "dict.*alone"),
        (torch.ones(2), r"shape \[2\].*mean"), (torch.tensor(1 + 2j), "a complex tensor"),
        (torch.empty(0), r"shape \[0\]"), (torch.empty((), device="meta"), "on meta"),
    ],
)  # fmt: skip
def test_what_is_no_number_is_named(value, match):
    with (
        Engine(
            Module(Output), method=METHOD, offload="none", example=numbers(), objective=lambda m, b: value
        ) as engine,
        pytest.raises(ConfigError, match=f"the objective returned .*{match}"),
    ):
        engine.step(numbers())


@pytest.mark.parametrize(
    "value",
    [
        2, True, np.float32(2), np.float64(2), np.int64(2), np.bool_(True), torch.tensor(2), torch.tensor([[2.0]]),
        torch.tensor(2.0, dtype=torch.bfloat16),
    ],
)  # fmt: skip
def test_numbers_of_every_kind_are_losses(value):
    with Engine(Module(Output), method=METHOD, offload="none", example=numbers(), objective=lambda m, b: value) as e:
        assert e.step(numbers()).loss == float(value)


# ---- features in the dtype of the model --------------------------------------------------------------------------


def pictures(**more):
    return {"pixel_values": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), **more)}


def sounds():
    features = torch.randn(4, 8, 24, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "labels": torch.full((4, 3), 5)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name, inputs", [("resnet", pictures), ("whisper", sounds)])
def test_features_in_float32_go_into_models_of_16_bits(name, inputs, dtype):
    model = ZOO[name].build(dtype)
    batch = inputs() | ({} if "labels" in inputs() else {"labels": torch.tensor([0, 1, 0, 1])})
    head = model.classifier[-1] if name == "resnet" else None
    if head is not None:  # a head on classes computes in float32
        head.forward = lambda x: F.linear(x.float(), head.weight.float(), head.bias.float())
    with torch.no_grad():
        plain = model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()})
    if head is not None:
        del head.forward
    with Engine(model, method=METHOD, offload="none") as engine:
        assert engine.evaluate([batch])["loss"] == float(plain.loss)
        assert torch.equal(engine.run(batch).logits, plain.logits)
        engine.fit([batch] * 2, steps=2)
    if name == "whisper":
        prompt = {"input_features": batch["input_features"]}
        want = model_of(name, dtype).generate(input_features=prompt["input_features"].to(dtype), max_new_tokens=4)
        with Engine(model_of(name, dtype), method=METHOD, offload="none") as engine:
            assert torch.equal(engine.generate(prompt, max_new_tokens=4), want)


def model_of(name, dtype):
    return ZOO[name].build(dtype)


@pytest.mark.parametrize("make", [lambda x: x.double(), lambda x: x.double().numpy(), lambda x: x.half()])
def test_features_of_another_precision_go_into_models_of_float32(make):
    pixels = pictures()["pixel_values"]
    rows = [{"pixel_values": make(pixels[i]), "labels": i % 2} for i in range(4)]
    with Engine(ZOO["resnet"].build(), method=METHOD, offload="none") as engine:
        got = engine.evaluate(rows, batch_size=4)["loss"]
        plain = [{"pixel_values": torch.stack([torch.as_tensor(make(p)).float() for p in pixels])} | {
            "labels": torch.tensor([0, 1, 0, 1])}]  # fmt: skip
        assert got == engine.evaluate(plain)["loss"]
        engine.fit(rows, steps=1, batch_size=4)


def test_sounds_of_different_lengths_are_named():
    rows = [
        {"input_features": torch.randn(8, 24), "labels": [5]},
        {"input_features": torch.randn(8, 20), "labels": [5]},
    ]
    rows = [{**row, "input_features": row["input_features"][0]} for row in rows]
    with (
        Engine(ZOO["whisper"].build(), method=METHOD, offload="none") as engine,
        pytest.raises(DataError, match="'input_features' does not make a batch.*lengths are 20 to 24.*collate_fn"),
    ):
        engine.evaluate(rows, batch_size=2)


def test_labels_and_numbers_of_rows_keep_their_precision():
    seen = {}

    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 1, dtype=torch.bfloat16)

        def forward(self, x, times, labels):
            seen.update(x=x.dtype, times=times.dtype, labels=labels.dtype)
            return ((self.head(x)[:, 0] - labels) * times).square().mean()

    batch = {"x": torch.ones(4, 8), "times": torch.tensor([1.0, 2.0, 3.0, 999.5]), "labels": torch.rand(4)}
    with Engine(Timed(), method=METHOD, offload="none", example=batch) as engine:
        engine.step(batch)
    assert seen == {"x": torch.bfloat16, "times": torch.float32, "labels": torch.float32}


def test_what_only_an_objective_reads_is_left_as_it_is():
    seen = []

    def objective(model, batch):
        seen.append((batch["teacher"].dtype, batch["x"].dtype))
        return (model(batch["x"], batch["labels"]).logits - batch["teacher"]).square().mean()

    batch = {**numbers(), "teacher": torch.rand(4, 3)}
    module = Module(Output).to(torch.bfloat16)
    with Engine(module, method=METHOD, offload="none", example=numbers(), objective=objective) as engine:
        engine.step(batch)
    assert set(seen[-2:]) == {(torch.float32, torch.float32)}


# ---- the loss among the verbalizers ------------------------------------------------------------------------------

REVIEWS = [{"text": "the film was " + "very " * (i % 3), "label": i % 2} for i in range(8)]
PROMPT = {"template": "{text} it was", "verbalizers": ["bad", "good"]}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_loss_among_the_verbalizers_is_that_of_their_logits(name, parts):
    tokenizer, model = word_tokenizer(), ZOO[name].build()
    words = torch.tensor([WORDS.index("bad"), WORDS.index("good")])
    total = right = 0.0
    with torch.no_grad():
        for row in REVIEWS:
            ids = torch.tensor([tokenizer(row["text"] + " it was")["input_ids"]])
            logits = model(ids).logits[0, -1, words]
            total += float(F.cross_entropy(logits[None], torch.tensor([row["label"]])))
            right += float(logits.argmax() == row["label"])
    method = MeZO(lr=1e-9, eps=1e-4)
    with Engine(copy.deepcopy(model), method=method, offload="none", tokenizer=tokenizer) as engine:
        options = dict(batch_size=8, loss="options", **PROMPT)
        assert engine.evaluate(REVIEWS, **options) == {
            "loss": pytest.approx(total / 8, rel=1e-5), "accuracy": right / 8,
        }  # fmt: skip
        fitted = engine.fit(REVIEWS, steps=1, micro_batches=parts, eval_data=REVIEWS, **options)
        assert fitted.losses[0] == pytest.approx(total / 8, rel=1e-4)
        assert fitted.evals[0]["loss"] == pytest.approx(total / 8, rel=1e-4)
        assert engine.evaluate(REVIEWS, batch_size=8, **PROMPT)["loss"] != pytest.approx(total / 8, rel=1e-3)


def test_a_run_on_the_verbalizers_loss_is_not_resumed_on_another(tmp_path):
    options = dict(batch_size=4, **PROMPT)
    model = ZOO["llama"].build()
    settings = dict(offload="none", tokenizer=word_tokenizer())
    with Engine(copy.deepcopy(model), method=METHOD, run_dir=tmp_path / "run", **settings) as engine:
        engine.fit(REVIEWS, steps=2, loss="options", **options)
    for loss, steps in (("model", 3), ("options", 3)):
        with Engine.resume(tmp_path / "run", copy.deepcopy(model), tokenizer=word_tokenizer()) as engine:
            if loss == "model":
                with pytest.raises(Exception, match="data|loss"):
                    engine.fit(REVIEWS, steps=steps, loss=loss, **options)
            else:
                assert engine.fit(REVIEWS, steps=steps, loss=loss, **options).steps == 1


@pytest.mark.parametrize(
    "options, match",
    [
        ({"loss": "option", **PROMPT}, "choose 'model'"),
        ({"loss": "options"}, "pass template= and verbalizers="),
    ],
)
def test_what_has_no_verbalizers_has_no_such_loss(options, match):
    with (
        Engine(ZOO["llama"].build(), method=METHOD, offload="none", tokenizer=word_tokenizer()) as engine,
        pytest.raises(DataError, match=match),
    ):
        engine.fit([{"text": r["text"], "label": r["label"]} if "template" in options else {"text": r["text"]}
                    for r in REVIEWS], steps=1, batch_size=4, **options)  # fmt: skip


def test_two_losses_are_one_too_many():
    objective = lambda model, batch: model(**batch).loss  # noqa: E731
    with (
        Engine(
            ZOO["llama"].build(), method=METHOD, offload="none", tokenizer=word_tokenizer(), objective=objective
        ) as engine,
        pytest.raises(ConfigError, match="two losses"),
    ):
        engine.fit(REVIEWS, steps=1, batch_size=4, loss="options", **PROMPT)


def test_the_command_line_has_it(tmp_path, capsys):
    ZOO["llama"].build().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in REVIEWS))
    arguments = ["--data", str(tmp_path / "rows.jsonl"), "--batch-size", "4", "--template", PROMPT["template"],
                 "--verbalizers", *PROMPT["verbalizers"]]  # fmt: skip
    shown = []
    for loss in ([], ["--loss", "options"]):
        assert main(["eval", str(tmp_path / "base"), *arguments, *loss]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] != shown[1]
    assert main(["fit", str(tmp_path / "base"), *arguments, "--loss", "options", "--steps", "1", "--quiet"]) == 0
    assert len(WORDS) < VOCAB
