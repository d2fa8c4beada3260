"""On a GPU: the loss in chunks has the bits of transformers' own, and takes little memory beside the logits."""

from __future__ import annotations

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from zo_offload.modules import chunked_loss
from zo_offload.modules.chunked_loss import causal_lm_loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("vocabulary", [97, 1024, 1027, 32_000, 50_272, 50_257])
def test_chunks_give_the_bits_of_the_whole(vocabulary, dtype, monkeypatch):
    draw = torch.Generator(device="cuda").manual_seed(0)
    logits = (torch.randn(2, 301, vocabulary, device="cuda", generator=draw) * 5).to(dtype)
    labels = torch.randint(0, vocabulary, (2, 301), device="cuda", generator=draw)
    some = labels.masked_fill(torch.rand(2, 301, device="cuda", generator=draw) < 0.4, -100)
    for chunk_bytes in (1, 4 * vocabulary * 36, 4 * vocabulary * 256):
        monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", chunk_bytes)
        for wanted in (labels, some, some.cpu()):
            for items in (None, torch.tensor(77)):
                whole = ForCausalLMLoss(logits, wanted, vocabulary, items)
                assert torch.equal(causal_lm_loss(logits, wanted, vocabulary, items), whole)


def test_two_chunks_are_all_that_is_held_beside_the_logits():
    logits = torch.randn(1, 2048, 50_272, device="cuda", dtype=torch.bfloat16)
    labels = torch.zeros(1, 2048, device="cuda", dtype=torch.int64)
    causal_lm_loss(logits, labels, 50_272)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    causal_lm_loss(logits, labels, 50_272)
    assert torch.cuda.max_memory_allocated() - before < 2.2 * chunked_loss.CHUNK_BYTES
