"""Tiny models of many architectures with random weights, and inputs for them. No file, no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB = 96
TEXT = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
LLAMA = dict(TEXT, intermediate_size=48, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
BERT = dict(TEXT, intermediate_size=48)
BART = dict(
    vocab_size=VOCAB, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, pad_token_id=0,
    decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
)  # fmt: skip
MOE = dict(LLAMA, num_experts_per_tok=2, moe_intermediate_size=24)


def tokens(**more: Tensor) -> dict[str, Tensor]:
    ids = torch.arange(3, 21).reshape(2, 9)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def seq2seq() -> dict[str, Tensor]:
    return tokens(decoder_input_ids=torch.arange(2, 12).reshape(2, 5))


@dataclass(frozen=True)
class Tiny:
    model: str
    config: str
    options: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]] = tokens

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> transformers.PreTrainedModel:
        """The model, random but not at its initial values: norms and biases are moved off one and zero."""
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**self.options)
        model = getattr(transformers, self.model)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
            for name, buffer in model.named_buffers():
                if buffer.is_floating_point() and name in model.state_dict():
                    buffer.add_(torch.rand_like(buffer))
        return model.to(dtype)


ZOO: dict[str, Tiny] = {
    "llama": Tiny("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama-tied": Tiny("LlamaForCausalLM", "LlamaConfig", dict(LLAMA, tie_word_embeddings=True)),
    "qwen3": Tiny("Qwen3ForCausalLM", "Qwen3Config", dict(LLAMA, head_dim=8, tie_word_embeddings=True)),
    "opt": Tiny("OPTForCausalLM", "OPTConfig", dict(TEXT, ffn_dim=48, word_embed_proj_dim=32)),
    "gpt2": Tiny(
        "GPT2LMHeadModel", "GPT2Config",
        dict(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    ),
    "gpt-neox": Tiny("GPTNeoXForCausalLM", "GPTNeoXConfig", BERT),
    "mixtral": Tiny("MixtralForCausalLM", "MixtralConfig", dict(LLAMA, num_local_experts=12, num_experts_per_tok=2)),
    "qwen3-moe": Tiny("Qwen3MoeForCausalLM", "Qwen3MoeConfig", dict(MOE, num_experts=4, head_dim=8)),
    "gpt-oss": Tiny(
        "GptOssForCausalLM",
        "GptOssConfig",
        dict(LLAMA, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8),
    ),
    "deepseek-v3": Tiny(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        dict(
            MOE, num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1,
            kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_shared_experts=1,
        ),
    ),
    "hrm-text": Tiny("HrmTextForCausalLM", "HrmTextConfig", dict(LLAMA, head_dim=8)),
    "gemma3": Tiny("Gemma3ForCausalLM", "Gemma3TextConfig", dict(LLAMA, head_dim=8, sliding_window=8)),
    "mamba": Tiny(
        "MambaForCausalLM", "MambaConfig",
        dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8),
    ),
    "bert": Tiny("BertForSequenceClassification", "BertConfig", BERT),
    "bert-pretraining": Tiny("BertForPreTraining", "BertConfig", BERT),
    "roberta": Tiny("RobertaForMaskedLM", "RobertaConfig", BERT),
    "t5": Tiny(
        "T5ForConditionalGeneration",
        "T5Config",
        dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0),
        seq2seq,
    ),
    "bart": Tiny("BartForConditionalGeneration", "BartConfig", BART, seq2seq),
    "whisper": Tiny(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        dict(BART, num_mel_bins=8, max_source_positions=12, max_target_positions=16, suppress_tokens=[1]),
        lambda: {"input_features": torch.randn(2, 8, 24), "decoder_input_ids": torch.arange(2, 10).reshape(2, 4)},
    ),
    "vit": Tiny(
        "ViTForImageClassification",
        "ViTConfig",
        dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16,
            patch_size=8,
        ),
        lambda: {"pixel_values": torch.randn(2, 3, 16, 16)},
    ),
    "resnet": Tiny(
        "ResNetForImageClassification",
        "ResNetConfig",
        dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
    ),
    "llava": Tiny(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        dict(
            text_config=dict(LLAMA, model_type="llama"),
            vision_config=dict(
                model_type="clip_vision_model", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=48, image_size=16, patch_size=8, projection_dim=32,
            ),
            image_token_index=VOCAB - 1,
        ),
    ),
}  # fmt: skip


def save_tiny_llama(folder: Path, layers: int) -> Path:
    """A checkpoint of a tied Llama with 64 tokens, to begin runs on; the same at every call."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
