"""What a model is taken for, and how many tokens it takes: read off the model, and held against its own forward."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from support.zoo.models import BART, BERT, LLAMA, TEXT, VOCAB, ZOO, Tiny
from zo_offload import Engine, MeZO
from zo_offload.errors import DataError
from zo_offload.modules.kind import kind_of

RELATIVE = dict(BERT, relative_attention=True, position_biased_input=False, pos_att_type=["p2c", "c2p"])
LIMITED = {  # (model, most tokens, most labels); None: they do not run out
    "roberta": (ZOO["roberta"], 62, None),
    "mpnet": (Tiny("MPNetForMaskedLM", "MPNetConfig", BERT), 62, None),
    "longformer": (Tiny("LongformerForMaskedLM", "LongformerConfig", dict(BERT, attention_window=8)), 62, None),
    "esm": (
        Tiny("EsmForMaskedLM", "EsmConfig", dict(BERT, pad_token_id=1, mask_token_id=4,
             position_embedding_type="absolute")), 62, None,
    ),
    "ibert": (Tiny("IBertForMaskedLM", "IBertConfig", BERT), 62, None),
    "data2vec": (Tiny("Data2VecTextForMaskedLM", "Data2VecTextConfig", BERT), 62, None),
    "bert": (Tiny("BertForMaskedLM", "BertConfig", BERT), 64, None),
    "electra": (Tiny("ElectraForMaskedLM", "ElectraConfig", BERT), 64, None),
    "opt": (ZOO["opt"], 64, None),
    "gpt2": (ZOO["gpt2"], 64, None),
    "bart": (ZOO["bart"], 64, 64),
    "pegasus": (Tiny("PegasusForConditionalGeneration", "PegasusConfig", BART), 64, 64),
    "blenderbot": (Tiny("BlenderbotForConditionalGeneration", "BlenderbotConfig", BART), 64, 64),
    "led": (
        Tiny("LEDForConditionalGeneration", "LEDConfig",
             dict(BART, max_encoder_position_embeddings=64, max_decoder_position_embeddings=32, attention_window=8)),
        64, 32,
    ),
    "mpt": (Tiny("MptForCausalLM", "MptConfig", dict(vocab_size=VOCAB, d_model=32, n_heads=4, n_layers=1,
                                                     max_seq_len=24)), 24, None),
    "t5": (ZOO["t5"], None, None),
    "deberta-v3": (Tiny("DebertaV2ForMaskedLM", "DebertaV2Config", RELATIVE), None, None),
    "bloom": (Tiny("BloomForCausalLM", "BloomConfig", dict(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4)),
              None, None),
    "falcon-alibi": (Tiny("FalconForCausalLM", "FalconConfig", dict(TEXT, alibi=True)), None, None),
    "mamba": (ZOO["mamba"], None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITED)
def test_a_model_takes_as_many_tokens_as_it_is_said_to_and_no_more(name):
    tiny, limit, labels = LIMITED[name]
    model = tiny.build()
    kind = kind_of(model)
    assert (kind.positions, kind.label_positions) == (limit, labels)

    def run(tokens: int, answer: int = 4) -> None:
        batch = {"input_ids": torch.full((1, tokens), 5)}
        if kind.name == "seq2seq":
            batch["labels"] = torch.full((1, answer), 6)
        with torch.no_grad():
            model(**batch)

    run(limit or 200)
    if limit is not None:
        with pytest.raises((IndexError, RuntimeError)):
            run(limit + 1)
    if labels is not None:
        run(5, labels)
        with pytest.raises((IndexError, RuntimeError)):
            run(5, labels + 1)


def test_a_decoder_of_sound_is_limited_and_its_encoder_of_sound_is_not():
    kind = kind_of(ZOO["whisper"].build())
    assert (kind.name, kind.positions, kind.label_positions) == ("seq2seq", None, 16)


@pytest.mark.parametrize("adapter", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_take_positions(adapter):
    peft = pytest.importorskip("peft")
    base = ZOO["opt"].build()
    model = peft.get_peft_model(base, getattr(peft, adapter)(num_virtual_tokens=6, task_type="CAUSAL_LM")).eval()
    kind = kind_of(model)
    assert (kind.name, kind.positions, kind.virtual) == ("causal", 58, 6)
    with torch.no_grad():
        model(input_ids=torch.full((1, 58), 5), attention_mask=torch.ones(1, 58))
    engine = Engine(model, method=MeZO(batch_size=1), offload="none", trainable="requires_grad")
    with engine, pytest.raises(DataError, match="row 0 has 59 tokens, but the model takes at most 58"):
        engine.fit([{"input_ids": [5] * 59}], steps=1)


class OfMyOwn(transformers.LlamaForCausalLM):
    pass


KINDS = {
    "LlamaForCausalLM": "causal", "GPT2LMHeadModel": "causal", "LlavaForConditionalGeneration": "causal",
    "RobertaForMaskedLM": "masked", "T5ForConditionalGeneration": "seq2seq", "BartForConditionalGeneration": "seq2seq",
    "BertForSequenceClassification": "classification", "ViTForImageClassification": "classification",
    "BertForPreTraining": "other",
}  # fmt: skip


def test_every_class_is_of_its_kind():
    found = {type(model).__name__: kind_of(model).name for model in (tiny.build() for tiny in ZOO.values())}
    assert {name: found[name] for name in KINDS} == KINDS
    bert = transformers.BertConfig(**BERT)
    for name, kind in [
        ("BertForTokenClassification", "tokens"), ("BertForQuestionAnswering", "questions"),
        ("BertForMultipleChoice", "choice"), ("BertModel", "bare"), ("BertForNextSentencePrediction", "other"),
    ]:  # fmt: skip
        assert kind_of(getattr(transformers, name)(bert)).name == kind
    own = OfMyOwn(transformers.LlamaConfig(**LLAMA))
    assert (kind_of(own).name, kind_of(own).model, kind_of(own).shift) == ("causal", "OfMyOwn", 1)
    assert kind_of(nn.Linear(2, 2)).name == "other" and kind_of(torch.compile(own)).name == "causal"


def test_a_causal_head_on_an_encoder_is_told_from_one_on_a_decoder():
    model = transformers.BertLMHeadModel(transformers.BertConfig(**BERT))
    assert kind_of(model).sees_ahead
    model = transformers.BertLMHeadModel(transformers.BertConfig(**BERT, is_decoder=True))
    assert not kind_of(model).sees_ahead and not kind_of(ZOO["llama"].build()).sees_ahead


def test_code_that_comes_with_a_checkpoint_says_its_kind_itself():
    class Foreign(nn.Module):
        config = transformers.LlamaConfig(**LLAMA, auto_map={"AutoModelForCausalLM": "somewhere--modeling.Foreign"})

        def forward(self, input_ids):
            return input_ids

    kind = kind_of(Foreign())
    assert kind.name == "causal" and kind.takes == {"input_ids"}
