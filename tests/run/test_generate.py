"""Text from streamed weights: what plain `generate` gives, in one pass a token; and losses keep nothing for it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration

from support.training import batches
from support.zoo.small import VOCAB, tiny_llama
from zo_offload import ConfigError, Engine, MeZO

NEW = 6


def prompts(rows=2, length=5):
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def settings_of(offload, tmp_path):
    return {"offload": offload} | ({"num_slots": 2} if offload != "none" else {}) | (
        {"run_dir": tmp_path / "run"} if offload == "disk" else {}
    )  # fmt: skip


@pytest.mark.parametrize("offload", ["none", "host", "disk"])
@pytest.mark.parametrize("cached", [True, False])
def test_generated_ids_are_plain_ones_and_each_token_is_one_pass(tmp_path, offload, cached):
    model = tiny_llama()
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "use_cache": cached}
    want = copy.deepcopy(model).generate(**prompts(), **options)
    with Engine(model, **settings_of(offload, tmp_path)) as engine:
        assert torch.equal(engine.generate(prompts(), **options), want)
        streamed = sum(engine.layout.block_bytes) if offload != "none" else 0
        assert engine.active.streamer.traffic.fetch_bytes == NEW * streamed


def test_sampled_ids_are_plain_ones_of_the_same_seed():
    model = tiny_llama()
    options = {"max_new_tokens": NEW, "do_sample": True, "pad_token_id": 0}
    torch.manual_seed(3)
    want = copy.deepcopy(model).generate(**prompts(), **options)
    with Engine(model, offload="host", num_slots=2) as engine:
        torch.manual_seed(3)
        assert torch.equal(engine.generate(prompts(), **options), want)


def test_an_encoder_that_runs_once_and_a_decoder_that_runs_for_each_token():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    options = {"max_new_tokens": NEW, "do_sample": False}
    want = copy.deepcopy(model).generate(**prompts(), **options)
    with Engine(model, offload="host", num_slots=2) as engine:
        assert torch.equal(engine.generate(prompts(), **options), want)


def test_training_on_what_is_generated_is_the_same_wherever_blocks_live(tmp_path):
    def objective(model, batch):
        out = model.generate(**batch, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        return out[:, 5:].float().mean() / VOCAB

    seen = []
    for offload in ("none", "host", "disk"):
        method = MeZO(lr=0.1, eps=0.3)
        with Engine(tiny_llama(), method=method, objective=objective, **settings_of(offload, tmp_path)) as engine:
            losses = [engine.step(prompts(), micro_batches=2).loss for _ in range(3)]
            seen.append((losses, dict(engine.weights())))
            if offload == "host":  # two lanes a micro-batch, in step: each token is one pass for all of them
                assert engine.active.streamer.traffic.fetch_bytes >= 3 * NEW * sum(engine.layout.block_bytes)
                assert engine.active.streamer.traffic.fetch_bytes < 4 * NEW * sum(engine.layout.block_bytes)
    assert len(set(seen[0][0])) > 1, "the objective must have moved"
    for losses, weights in seen[1:]:
        assert losses == seen[0][0] and all(torch.equal(weights[n], w) for n, w in seen[0][1].items())


class Letters:
    """A tokenizer of one token a letter, padded on the right as for training."""

    padding_side, pad_token_id, eos_token_id = "right", None, None

    def __call__(self, text):
        return {"input_ids": [3 + ord(letter) % (VOCAB - 3) for letter in text]}

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(int(i)) for i in ids)


def test_prompts_of_different_lengths_get_what_each_gets_alone():
    with Engine(tiny_llama(), offload="host", num_slots=2, tokenizer=Letters()) as engine:
        options = {"max_new_tokens": 4, "do_sample": False}
        both = engine.generate(["a longer prompt", "short"], **options)
        assert both == [engine.generate(text, **options) for text in ("a longer prompt", "short")]
        assert all(len(text.split()) == 4 for text in both)
        with pytest.raises(ConfigError, match="prompt 1 has no tokens"):
            engine.generate(["fine", ""])
    with Engine(tiny_llama()) as engine, pytest.raises(ConfigError, match="generating text needs a tokenizer"):
        engine.generate("anything")


def test_a_loss_keeps_no_keys_and_values_and_the_config_is_as_it_was():
    model, kept = tiny_llama(), []
    assert model.config.use_cache
    model.register_forward_hook(lambda module, args, out: kept.append(out.past_key_values))
    with Engine(model) as engine:
        kept.clear()  # of the trace, on meta
        engine.fit(batches()[:2], steps=2, eval_data=batches()[:1], batch_size=4)
        assert kept and not any(kept) and model.config.use_cache
        kept.clear()
        engine.run({"input_ids": batches()[0]["input_ids"]})
        assert isinstance(kept[0], DynamicCache), "a forward of the caller's own is as the model has it"
