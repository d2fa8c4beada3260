"""Texts in and out: what `generate` says is what plain transformers says, and answers are scored where they are."""

from __future__ import annotations

import copy
import random

import peft
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from support.zoo.models import BERT, VOCAB, ZOO
from zo_offload import ConfigError, Engine, MeZO
from zo_offload.cli import main

WORDS = "<pad> <s> </s> good bad it was the a film movie plot of very question capital france user".split()
WORDS += [f"w{i}" for i in range(len(WORDS), VOCAB)]  # a word for each token
NEW = {"max_new_tokens": 5, "min_new_tokens": 3, "do_sample": False}
TEXTS = ["the film was very", "question", "it was a plot of the movie"]


def word_tokenizer(form="$A", **options):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<s>", 1), ("</s>", 2)])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", **{"pad_token": "<pad>", **options}
    )  # fmt: skip


def strong(name, factor=2.0):
    """A model that says different things to different prompts."""
    model = ZOO[name].build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def engine_of(model, tokenizer=None, **settings):
    return Engine(copy.deepcopy(model), method=MeZO(lr=1e-6), offload="none", tokenizer=tokenizer, **settings)


@pytest.mark.parametrize("options", [NEW, {**NEW, "num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("form", ["$A", "<s> $A", "<s> $A </s>"], ids=["open", "begun", "closed"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_texts_are_those_of_plain_transformers(name, form, options):
    model, tokenizer = strong(name), word_tokenizer(form)
    model.generation_config.update(pad_token_id=0, eos_token_id=2, forced_eos_token_id=None)
    answers = name in ("t5", "bart")
    want = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        if not answers and form.endswith("</s>"):
            ids = ids[:, :-1]  # a text to be gone on with has not ended
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0]
        want.append(tokenizer.decode(out if answers else out[ids.shape[1] :], skip_special_tokens=True))
    with engine_of(model, tokenizer) as engine:
        assert engine.generate(TEXTS, **options) == want
        assert [engine.generate(text, **options) for text in TEXTS] == want
    assert any(want)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_ids_are_those_of_plain_transformers(name):
    model = strong(name)
    ids = torch.arange(3, 15).view(2, 6)
    want = model.generate(input_ids=ids, **NEW)
    with engine_of(model) as engine:
        assert torch.equal(engine.generate({"input_ids": ids}, **NEW), want)
        assert torch.equal(engine.generate(ids, **NEW), want)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_several_texts_of_one_prompt_all_come_back(name):
    model, tokenizer = strong(name), word_tokenizer()
    options = {**NEW, "num_beams": 4, "num_return_sequences": 3}
    with engine_of(model, tokenizer) as engine:
        one = engine.generate(TEXTS[0], **options)
        assert len(one) == 3 and engine.generate(TEXTS[:2], **options)[:3] == one
        assert len(engine.generate(TEXTS, **options)) == 9
        assert engine.generate(TEXTS[0], return_dict_in_generate=True, output_scores=True, **options) == one


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_memory_for_generating_is_planned_without_a_loss(name, caplog):
    with engine_of(strong(name), word_tokenizer()) as engine:
        engine.generate(TEXTS, **NEW)
        assert not engine.memory.unknown
    assert "could not be measured" not in caplog.text


def prompts_seen(engine, *prompts, **options):
    """The token ids that `generate` of transformers is given."""
    seen, real = [], engine.model.generate
    engine.model.generate = lambda **inputs: (seen.append(inputs["input_ids"].tolist()), real(**inputs))[1]
    for prompt in prompts:
        engine.generate(prompt, **NEW, **options)
    return [ids for rows in seen for ids in rows]


def test_a_text_that_begins_with_bos_has_one_and_one_that_ends_with_eos_keeps_it():
    with engine_of(strong("llama"), word_tokenizer("<s> $A </s>")) as engine:
        assert prompts_seen(engine, "<s> the film", "the film </s>", "the film") == [[1, 7, 9], [1, 7, 9, 2], [1, 7, 9]]


TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}it{% endif %}"
)


def test_a_conversation_goes_through_the_chat_template():
    tokenizer = word_tokenizer("<s> $A")
    talk = [{"role": "user", "content": "the film"}]
    with engine_of(strong("llama"), tokenizer) as engine:
        with pytest.raises(ConfigError, match="no chat template"):
            engine.generate(talk, **NEW)
        tokenizer.chat_template = TEMPLATE
        assert prompts_seen(engine, talk) == [[1, WORDS.index("user"), 7, 9, 5]]
        one = engine.generate(talk, **NEW)
        assert isinstance(one, str) and engine.generate([talk, "the film was"], **NEW)[0] == one


@pytest.mark.parametrize(
    "prompt, match",
    [([], "no prompt"), ("", "prompt 0 has no tokens"), ([3, 4], "prompt 0 is a int"), (7, "prompt 0 is")],
)
def test_what_is_no_prompt_is_named(prompt, match):
    with engine_of(strong("llama"), word_tokenizer()) as engine, pytest.raises(ConfigError, match=match):
        engine.generate(prompt, **NEW)


def test_positions_that_would_run_out_are_named_and_rotary_ones_go_on():
    long = "the film " * 31
    with engine_of(strong("gpt2"), word_tokenizer()) as engine:
        with pytest.raises(ConfigError, match=r"62 tokens and 5 new ones.* 64 positions.*max_new_tokens to 2"):
            engine.generate(long, **NEW)
        engine.generate(long, max_new_tokens=2)
    with engine_of(strong("llama"), word_tokenizer()) as engine:
        assert engine.generate(long, **NEW)


@pytest.mark.parametrize("prompt", ["the film", {"input_ids": torch.tensor([[5, 6]])}], ids=["text", "ids"])
def test_a_model_that_cannot_generate_says_so(tmp_path, prompt, capsys):
    model = tf.BertForSequenceClassification(tf.BertConfig(**BERT))
    with (
        engine_of(model, word_tokenizer()) as engine,
        pytest.raises(ConfigError, match="BertForSequenceClassification cannot generate.*--model-class"),
    ):
        engine.generate(prompt, **NEW)


def test_the_command_line_generates_from_an_encoder_decoder(tmp_path, capsys):
    model, tokenizer = strong("t5"), word_tokenizer("$A </s>")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    want = tokenizer.decode(model.generate(ids, **NEW)[0], skip_special_tokens=True)
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "base"), "--prompt", TEXTS[0], "--max-new-tokens", "5"]) == 0
    assert want and want in capsys.readouterr().out


# ---- answers -----------------------------------------------------------------------------------------------------

PROMPT = {"template": "{text} it was", "verbalizers": ["bad", "good"]}


def reviews(n=48):
    draw = random.Random(1)
    return [{"text": " ".join(draw.choice(WORDS[3:]) for _ in range(1 + i % 5)), "label": i % 2} for i in range(n)]


def tuned(kind):
    base = strong("llama", 3.0)
    config = {
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=6, task_type="CAUSAL_LM"),
        "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=6, task_type="CAUSAL_LM"),
    }[kind]()
    torch.manual_seed(5)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt" in name:
                parameter.normal_()
    return model


@pytest.mark.parametrize("words", [["bad", "good"], ["bad movie", "good"]], ids=["single", "several"])
@pytest.mark.parametrize("kind", ["lora", "prompt", "p-tuning", "prefix"])
def test_accuracy_is_read_behind_virtual_tokens(kind, words):
    model, tokenizer, rows = tuned(kind), word_tokenizer(), reviews(24)
    right, losses = 0, []
    with torch.no_grad():
        for row in rows:
            start = tokenizer(row["text"] + " it was")["input_ids"]
            scores = []
            for word in words:
                answer = tokenizer(word)["input_ids"]
                ids = torch.tensor([start + answer])
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(answer) - 1 : -1]
                scores.append(float(logits.log_softmax(-1)[range(len(answer)), answer].mean()))
            right += scores[row["label"]] == max(scores)
            losses.append(scores)
    with Engine(model, method=MeZO(lr=1e-6), offload="none", tokenizer=tokenizer, trainable="requires_grad") as engine:
        values = engine.evaluate(rows, batch_size=8, **{**PROMPT, "verbalizers": words})
        assert values["accuracy"] == pytest.approx(right / len(rows))
        if words == ["bad", "good"]:
            want = -sum(scores[row["label"]] for scores, row in zip(losses, rows, strict=True)) / len(rows)
            assert values["loss"] == pytest.approx(want, rel=1e-4)
            among = engine.evaluate(rows, batch_size=8, loss="options", **PROMPT)
            pairs = torch.tensor(losses, dtype=torch.float64)
            picked = pairs.log_softmax(-1)[range(len(rows)), [row["label"] for row in rows]]
            assert among == {"loss": pytest.approx(-float(picked.mean()), rel=1e-4), "accuracy": values["accuracy"]}
