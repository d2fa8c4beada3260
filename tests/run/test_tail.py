"""A tail is trained by its exact gradient: as a plain loop of torch computes it, wherever blocks live, and whatever
stops a run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification, T5Config
from transformers import T5ForSequenceClassification

from support.compare import assert_same
from support.training import placed, stored_weights
from support.zoo.small import VOCAB, tiny_llama, tiny_opt, with_adapters
from zo_offload import FZOO, ConfigError, DivergenceError, Engine, JournalError, MeZO
from zo_offload.numerics.noise import noise, step_seed
from zo_offload.plan.plan import make_plan
from zo_offload.replay import replay, replayed

SIZE = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=VOCAB)
STEPS, RATE = 5, 2e-2
FEW = FZOO(lr=1e-2, eps=1e-3, directions=3, batch_size=4)


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZE, num_labels=3, max_position_embeddings=40)).eval()


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(**SIZE, num_labels=3, pad_token_id=0, num_key_value_heads=2, max_position_embeddings=40)
    return LlamaForSequenceClassification(config).eval()


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_labels=3, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return T5ForSequenceClassification(config).eval()


def adapted():
    return with_adapters(tiny_llama())


MODELS = {
    "bert": (bert, dict(tail="classifier")),
    "llama": (llama, dict(tail="score")),
    "t5": (t5, dict(tail="classification_head.out_proj")),
    "adapters": (adapted, dict(tail=["layers.1", "layers.2"], trainable="requires_grad")),
}


def data(kind, steps=STEPS):
    g = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCAB, (steps, 4, 9), generator=g)
    if kind == "adapters":
        return [{"input_ids": x, "labels": x} for x in ids]
    labels = torch.randint(0, 3, (steps, 4), generator=g)
    ids[:, :, -1] = 1  # T5 reads the state at the end token
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def fit(kind, steps=STEPS, method=FEW, micro_batches=1, **settings):
    make, of_tail = MODELS[kind]
    with Engine(make(), method=method, tail_lr=RATE, **{**of_tail, **settings}) as engine:
        losses = engine.fit(data(kind)[:steps], steps=steps, micro_batches=micro_batches).losses
        return losses, stored_weights(engine)


def chosen(model, globs):
    wanted = [globs] if isinstance(globs, str) else globs
    return {n for n, p in model.named_parameters() if p.requires_grad and any(f".{g}." in f".{n}" for g in wanted)}


def plain(kind, optimizer="adam", method=FEW):
    """Lanes one after another by hand, the tail by autograd on the loss of the lane at the weights, and torch's own
    optimizers."""
    make, settings = MODELS[kind]
    model = make()
    tail = chosen(model, settings["tail"])
    params = dict(model.named_parameters())
    lanes = {n for n, p in params.items() if p.requires_grad} - tail
    ids = {name: spec.param_id for name, spec in make_plan(model, data(kind)[0]).params.items()}
    for name, p in params.items():
        p.requires_grad_(name in tail)
    kept = [p for name, p in params.items() if name in tail]
    own = torch.optim.SGD(kept, lr=RATE) if optimizer == "sgd" else torch.optim.Adam(kept, lr=RATE, foreach=False)
    told = []
    for step, batch in enumerate(data(kind)):
        seeds = [step_seed(0, step, i) for i in range(method.directions)]
        w = {name: params[name].detach().clone() for name in lanes}
        z = {(s, n): noise(method.noise, s, ids[n], w[n].numel()).view(w[n].shape) for s in seeds for n in lanes}
        loss = model(**batch).loss
        own.zero_grad()
        loss.backward()
        others = []
        for s in seeds:
            for n in lanes:
                params[n].data = w[n] + method.eps * z[s, n]
            with torch.no_grad():
                others.append(float(model(**batch).loss))
        mean = sum(others) / len(others)
        spread = math.sqrt(sum((x - mean) ** 2 for x in others) / (len(others) - 1))
        for n in lanes:
            value = w[n]
            for s, other in zip(seeds, others, strict=True):
                value = value - torch.tensor(method.lr * (other - float(loss)) / (len(others) * spread)) * z[s, n]
            params[n].data = value
        own.step()
        told.append(float(loss))
    return told, {name: p.detach() for name, p in params.items()}


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_is_a_plain_loop_of_lanes_and_autograd(kind):
    want = plain(kind)
    assert len(set(want[0])) == STEPS
    assert_same(want, fit(kind))
    moved = {n: not torch.equal(w, dict(MODELS[kind][0]().named_parameters())[n]) for n, w in want[1].items()}
    assert any(moved[n] for n in chosen(MODELS[kind][0](), MODELS[kind][1]["tail"]))
