"""Answers of prompts are scored where each kind of model gives them: against one row and one answer at a time."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from support.zoo.models import BART, BERT, VOCAB, ZOO
from zo_offload import DataError, Engine, MeZO
from zo_offload.cli import main

WORDS = "<pad> <s> </s> <mask> <unk> bad good it was the a film movie plot of very question capital".split()
METHOD = MeZO(lr=1e-9, eps=1e-6, batch_size=4)


def word_tokenizer():
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", mask_token="<mask>",
        unk_token="<unk>",
    )  # fmt: skip


def strong(make, factor=3.0):
    torch.manual_seed(4)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


KINDS = {
    "causal": (lambda: ZOO["gpt2"].build(), "{text} it was", ["bad", "good"]),
    "causal, of several tokens": (lambda: ZOO["gpt2"].build(), "{text} it was", ["bad", "very good film"]),
    "causal that shifts nothing": (
        lambda: tf.BartForCausalLM(tf.BartConfig(**{**BART, "encoder_layers": 2, "is_encoder_decoder": False})),
        "{text} it was",
        ["bad", "very good"],
    ),
    "masked": (lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT)), "{text} it was {mask} film", ["bad", "good"]),
    "masked, two masks": (
        lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT)),
        "{text} it was {mask} {mask}",
        ["very bad", "a good"],
    ),
    "encoder-decoder": (lambda: ZOO["t5"].build(), "{text} it was", ["bad", "very good"]),
}


def rows(n=12):
    draw = random.Random(2)
    return [{"text": " ".join(draw.choice(WORDS[5:]) for _ in range(1 + i % 5)), "label": i % 2} for i in range(n)]


def mean_log_p(model, kind, tokenizer, text, template, word):
    """Of one answer to one prompt, unpadded: (mean over its tokens, their number)."""
    answer = tokenizer(word)["input_ids"]
    if kind.startswith("masked"):
        ids = torch.tensor([tokenizer(template.format(text=text, mask="<mask>"))["input_ids"]])
        logits = model(input_ids=ids).logits[0][ids[0] == 3]
    elif kind == "encoder-decoder":
        ids, answer = torch.tensor([tokenizer(template.format(text=text))["input_ids"]]), [*answer, 2]
        logits = model(input_ids=ids, labels=torch.tensor([answer])).logits[0]
    else:
        start = tokenizer(template.format(text=text))["input_ids"]
        ids = torch.tensor([start + answer])
        logits = model(input_ids=ids).logits[0, len(start) - 1 : -1]
    return float(logits.log_softmax(-1)[range(len(answer)), answer].mean()), len(answer)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_accuracy_and_the_loss_among_answers_are_those_of_each_row_alone(kind):
    make, template, words = KINDS[kind]
    model, tokenizer, data = strong(make), word_tokenizer(), rows()
    with torch.no_grad():
        scored = [[mean_log_p(model, kind, tokenizer, row["text"], template, word) for word in words] for row in data]
    picked = [scores[row["label"]] for scores, row in zip(scored, data, strict=True)]
    loss = -sum(mean * n for mean, n in picked) / sum(n for _, n in picked)
    means = [[mean for mean, _ in scores] for scores in scored]
    right = sum(max(its) == its[row["label"]] for its, row in zip(means, data, strict=True))
    among = torch.tensor(means, dtype=torch.float64).log_softmax(-1)
    among_loss = -float(among[range(len(data)), [row["label"] for row in data]].mean())
    options = dict(template=template, verbalizers=words)
    with Engine(copy.deepcopy(model), method=METHOD, offload="none", tokenizer=tokenizer) as engine:
        for batch_size in (1, 5, 12):
            values = engine.evaluate(data, batch_size=batch_size, **options)
            assert values == {"loss": pytest.approx(loss, rel=1e-4), "accuracy": pytest.approx(right / len(data))}
            values = engine.evaluate(data, batch_size=batch_size, loss="options", **options)
            assert values == {"loss": pytest.approx(among_loss, rel=1e-4), "accuracy": pytest.approx(right / len(data))}
        fitted = engine.fit(data, steps=1, batch_size=12, micro_batches=3, loss="options", **options)
        assert fitted.losses[0] == pytest.approx(among_loss, rel=1e-3)


def test_rows_with_answers_of_their_own_are_scored_by_them():
    draw = random.Random(3)
    pairs = [(draw.choice(WORDS[5:11]), "very " + draw.choice(WORDS[11:])) for _ in range(10)]
    data = [{"text": "the film", "label": i % 2, "first": a, "second": b} for i, (a, b) in enumerate(pairs)]
    model, tokenizer = strong(lambda: ZOO["gpt2"].build()), word_tokenizer()
    right = 0
    with torch.no_grad():
        for row in data:
            answers = (row["first"], row["second"])
            means = [mean_log_p(model, "causal", tokenizer, row["text"], "{text} it was", word)[0] for word in answers]
            right += means[row["label"]] == max(means)
    with Engine(model, method=METHOD, offload="none", tokenizer=tokenizer) as engine:
        for batch_size in (1, 4, 10):
            values = engine.evaluate(
                data, batch_size=batch_size, template="{text} it was", verbalizers=["{first}", "{second}"]
            )
            assert values["accuracy"] == pytest.approx(right / len(data))


def test_an_answer_that_the_model_has_no_places_for_is_named():
    config = tf.GPT2Config(vocab_size=VOCAB, n_positions=8, n_embd=32, n_layer=1, n_head=4)
    with Engine(tf.GPT2LMHeadModel(config).eval(), method=METHOD, offload="none", tokenizer=word_tokenizer()) as engine:
        options = dict(template="{text} it was", verbalizers=["bad", "a very very good film"])
        with pytest.raises(DataError, match=r"longest verbalizer .* 10 tokens, .* at most 8.*max_length=4|tokens"):
            engine.evaluate([{"text": "the film of", "label": 0}], batch_size=1, **options)


def test_the_command_line_trains_a_masked_model_among_answers(tmp_path, capsys):
    make, template, words = KINDS["masked, two masks"]
    strong(make).save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    arguments = ["--data", str(tmp_path / "rows.jsonl"), "--batch-size", "4", "--template", template]
    arguments += ["--loss", "options", "--verbalizers", *words]
    assert main(["fit", str(tmp_path / "base"), *arguments, "--steps", "2", "--micro-batches", "2", "--quiet"]) == 0
    assert main(["eval", str(tmp_path / "base"), *arguments]) == 0
    assert "accuracy" in capsys.readouterr().out
