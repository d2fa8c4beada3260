"""Paper-size models by name, as configs without weights: for `zo-offload plan opt-175b` and the benchmarks."""

from __future__ import annotations

from typing import Any

from .. import hf
from ..errors import CheckpointError

# layers, hidden, heads of OPT (Zhang et al. 2022, table 1); ffn is 4 x hidden, vocabulary 50272, 2048 positions.
OPT_SHAPES: dict[str, tuple[int, int, int]] = {
    "opt-125m": (12, 768, 12),
    "opt-1.3b": (24, 2048, 32),
    "opt-2.7b": (32, 2560, 32),
    "opt-6.7b": (32, 4096, 32),
    "opt-13b": (40, 5120, 40),
    "opt-30b": (48, 7168, 56),
    "opt-66b": (64, 9216, 72),
    "opt-175b": (96, 12288, 96),
}


def opt_config(name: str) -> Any:
    """transformers' OPTConfig of that size. Raises CheckpointError naming the sizes there are."""
    if name.lower() not in OPT_SHAPES:
        raise CheckpointError(f"{name!r} is not a known size; there are {', '.join(OPT_SHAPES)}")
    layers, hidden, heads = OPT_SHAPES[name.lower()]
    return hf.OPTConfig(
        num_hidden_layers=layers, hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=4 * hidden,
        num_attention_heads=heads, vocab_size=50272, max_position_embeddings=2048, architectures=["OPTForCausalLM"],
    )  # fmt: skip
