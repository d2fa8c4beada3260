"""Losses in chunks of rows: the bits of transformers' own functions, and never a whole float32 copy."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from support.zoo.archs import ALL, build
from zo_offload import Engine, MeZO
from zo_offload.data.losses import model_loss, weighing
from zo_offload.modules import chunked_loss
from zo_offload.modules.chunked_loss import causal_lm_loss, losses_in_chunks, masked_lm_loss

PAIRS = [(ForCausalLMLoss, causal_lm_loss), (ForMaskedLMLoss, masked_lm_loss)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# causal language models of different families, and one that masks; V = 97 words, so a chunk is 4 rows of 22
THROUGH = ["opt", "llama-tied", "qwen3", "gpt2", "gpt_neox", "bloom", "falcon", "phi3", "mistral", "gemma2", "mixtral"]
THROUGH += ["mamba", "granite", "modernbert"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 1)  # 4 rows a chunk, whatever the vocabulary


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and (torch.equal(a, b) or bool(a.isnan() and b.isnan()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("theirs, ours", PAIRS, ids=["causal", "masked"])
def test_chunks_give_the_bits_of_the_whole(theirs, ours, dtype):
    sizes = itertools.product([(1, 5), (2, 7), (3, 129), (1, 4)], [1, 2, 33, 97, 1025])
    for seed, ((rows, tokens), vocabulary) in enumerate(sizes):
        draw = torch.Generator().manual_seed(seed)
        logits = (torch.randn(rows, tokens, vocabulary, generator=draw) * 10 ** (seed % 3 - 1)).to(dtype)
        labels = torch.randint(0, vocabulary, (rows, tokens), generator=draw)
        some = labels.masked_fill(torch.rand(rows, tokens, generator=draw) < 0.4, -100)
        for wanted in (labels, some, torch.full_like(labels, -100)):
            for items in (None, 7, torch.tensor(5)):
                expected = theirs(logits, wanted, vocabulary, items)
                assert same(ours(logits, wanted, vocabulary, items), expected), (rows, tokens, vocabulary, items)


def test_other_ignore_indices_and_labels_that_are_shifted_already():
    logits, labels = torch.randn(3, 21, 50), torch.randint(0, 50, (3, 21))
    for ignored in (0, 3):
        assert same(
            masked_lm_loss(logits, labels, 50, None, ignored), ForMaskedLMLoss(logits, labels, 50, None, ignored)
        )
    expected = ForCausalLMLoss(logits, None, 50, shift_labels=labels)
    assert same(causal_lm_loss(logits, None, 50, shift_labels=labels), expected)
    assert expected != ForCausalLMLoss(logits, labels, 50)


def test_logits_that_are_part_of_something_larger():
    wide = torch.randn(2, 20, 60).bfloat16()
    labels = torch.randint(0, 50, (2, 19))
    for logits in (wide[:, :19, :50], wide[:, 1:, :50], wide.transpose(0, 1)[:19, :, :50].transpose(0, 1)):
        assert same(causal_lm_loss(logits, labels, 50), ForCausalLMLoss(logits, labels, 50))


@pytest.mark.parametrize("label", [50, -7])
def test_a_label_out_of_range_is_the_error_it_was(label):
    logits, labels = torch.randn(1, 21, 50), torch.zeros(1, 21, dtype=torch.int64)
    labels[0, 9] = label
    with pytest.raises(IndexError) as theirs:
        ForCausalLMLoss(logits, labels, 50)
    with pytest.raises(IndexError) as ours:
        causal_lm_loss(logits, labels, 50)
    assert str(ours.value) == str(theirs.value)
    with pytest.raises(ValueError, match="to match target batch_size"):
        causal_lm_loss(logits, labels[:, :20], 50)


class Largest(TorchDispatchMode):
    """The most bytes of float32 that one op of a run made."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, torch.Tensor) and made.dtype is torch.float32:
                self.nbytes = max(self.nbytes, made.nbytes)
        return out


def test_no_whole_copy_is_ever_made(monkeypatch):
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * 1000 * 16)
    logits, labels = torch.randn(4, 100, 1000).bfloat16(), torch.randint(0, 1000, (4, 100))
    with Largest() as largest:
        causal_lm_loss(logits, labels, 1000)
    assert largest.nbytes == 16 * 1000 * 4
    with Largest() as largest:
        ForCausalLMLoss(logits, labels, 1000)
    assert largest.nbytes == 400 * 1000 * 4


@pytest.mark.parametrize("name", THROUGH)
def test_an_engine_that_chunks_has_the_losses_of_one_that_does_not(name, monkeypatch):
    arch = next(arch for arch in ALL if arch.name == name)
    batch, calls = arch.batch(0), []
    count = chunked_loss.cross_entropy_in_chunks
    monkeypatch.setattr(chunked_loss, "cross_entropy_in_chunks", lambda *a, **k: calls.append(1) or count(*a, **k))

    def losses(**settings):
        with Engine(build(arch), method=MeZO(lr=1e-3), example=batch, **settings) as engine:
            return [engine.step(batch, micro_batches=m).loss for m in (1, 2)]

    def plain(model, inputs):
        return model(**inputs).loss

    plain.weight = weighing(build(arch), model_loss)
    chunked = losses()
    assert len(calls) >= 2 + 4
    calls.clear()
    assert chunked == losses(objective=plain)
    assert not calls, "an objective that is given is left alone"


def llama(**more):
    sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40)
    return LlamaForCausalLM(LlamaConfig(**sizes, **more)).eval()


def test_the_model_gets_its_loss_back_after_errors_too():
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.given, self.other = llama(), llama(), llama()
            self.given.loss_function = ForCausalLMLoss
            self.other.loss_function = print

    model = Wrapped()
    for failing in (False, True):
        try:
            with losses_in_chunks(model):
                assert model.inner.loss_function is causal_lm_loss is model.given.loss_function
                assert model.other.loss_function is print
                if failing:
                    raise KeyError
        except KeyError:
            pass
        assert "_loss_function" not in vars(model.inner) and model.inner.loss_function is ForCausalLMLoss
        assert vars(model.given)["_loss_function"] is ForCausalLMLoss and model.other.loss_function is print


def test_a_model_with_a_loss_of_its_own_is_left_alone():
    class Own(LlamaForCausalLM):
        @property
        def loss_function(self):
            return ForCausalLMLoss

    model = Own(llama().config)
    with losses_in_chunks(model):
        assert model.loss_function is ForCausalLMLoss and "_loss_function" not in vars(model)
