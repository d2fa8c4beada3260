"""Inputs and labels by the kind of model, as users meet them: through `fit`, `evaluate` and the command line."""

from __future__ import annotations

import pytest
from tiny_models import ZOO
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from zo_offload import Engine, MeZO
from zo_offload.errors import DataError

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
WORDS = "good bad great film it was a the question answer what capital of france paris rome user assistant :".split()
ID = {word: i for i, word in enumerate(SPECIAL + WORDS)}


def make_tokenizer(**special):
    core = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>")
    return PreTrainedTokenizerFast(tokenizer_object=core, **{**tokens, **special})


def engine_of(model, **options):
    options = {"method": MeZO(lr=1e-6, batch_size=2), "offload": "none", "tokenizer": make_tokenizer(), **options}
    return Engine(model, **options)


LABELLED = [{"text": "the film was good", "label": 1}, {"text": "it was bad", "label": 0}] * 2


@pytest.mark.parametrize("call", ["fit", "evaluate"])
def test_labelled_text_for_a_causal_model_is_explained(call):
    with engine_of(ZOO["llama"].build()) as engine, pytest.raises(DataError, match="template= and verbalizers="):
        engine.fit(LABELLED, steps=1) if call == "fit" else engine.evaluate(LABELLED)
