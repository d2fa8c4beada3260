"""The two models that most runs of the engine train: OPT, with tied embeddings, and Llama, without."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

VOCAB = 211


def tiny_opt(layers=4, dtype=torch.float32, *, vocab=VOCAB, hidden=32):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, ffn_dim=2 * hidden,
        num_attention_heads=hidden // 8, max_position_embeddings=2 * hidden, word_embed_proj_dim=hidden,
    )  # fmt: skip
    return OPTForCausalLM(config).to(dtype).eval()


def tiny_llama(layers=3, dtype=torch.float32):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=layers, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


class LoRA(nn.Module):
    """x -> W x + B A x, W frozen: an adapter written plainly."""

    def __init__(self, inner, rank=4):
        super().__init__()
        self.inner = inner
        self.a = nn.Parameter(torch.randn(rank, inner.in_features) / 8)
        self.b = nn.Parameter(torch.zeros(inner.out_features, rank))

    def forward(self, x):
        return self.inner(x) + x @ self.a.T @ self.b.T


def with_adapters(model):
    """The model, frozen, with an adapter at each layer's q_proj."""
    torch.manual_seed(4)
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LoRA(layer.self_attn.q_proj)
    return model
