"""Every class that transformers' auto classes name, as a tiny random model with a batch of inputs for it.

Sizes are made small by the names of the fields that hold them, in configs inside of configs too; whatever cannot be
built so, or does not run on the inputs that its forward asks for by name, is no part of the zoo.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB, TOKENS, IMAGE = 99, 11, 32
LARGEST = 3_000_000
"""Parameters that a model may have."""

_SMALL: dict[str, int] = dict.fromkeys(
    "hidden_size d_model n_embd dim emb_dim embed_dim width encoder_hidden_size decoder_hidden_size mlp_dim hidden_dim "
    "projection_dim embedding_size char_embed_dim conv_dim lru_width text_embed_dim word_embed_proj_dim "
    "vision_hidden_size embed_proj_dim encoder_embed_dim decoder_embed_dim output_dim d_embed".split(), 32
)  # fmt: skip
_SMALL |= dict.fromkeys(
    "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner dim_feedforward moe_intermediate_size "
    "shared_expert_intermediate_size feed_forward_size expert_ffn_hidden_size linear_units dense_intermediate_size "
    "mlp_hidden_size decoder_intermediate_size encoder_intermediate_size ffn_hidden_size".split(), 40
)  # fmt: skip
_SMALL |= dict.fromkeys(
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers depth num_blocks decoder_depth encoder_num_hidden_layers decoder_num_hidden_layers".split(), 2
)  # fmt: skip
_SMALL |= dict.fromkeys(
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_key_value_heads attention_heads num_decoder_attention_heads decoder_num_attention_heads "
    "encoder_num_attention_heads num_kv_heads".split(), 4
)  # fmt: skip
_SMALL |= dict.fromkeys(
    "vocab_size text_vocab_size decoder_vocab_size src_vocab_size tgt_vocab_size audio_vocab_size "
    "vocab_size_per_layer_input".split(), VOCAB,
)  # fmt: skip
_SMALL |= dict.fromkeys(
    "max_position_embeddings n_positions max_seq_len max_sequence_length max_source_positions max_target_positions "
    "n_ctx context_length max_seq_length seq_length max_2d_position_embeddings".split(), 64
)  # fmt: skip
_SMALL |= dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), 4)
_SMALL |= dict.fromkeys("num_experts_per_tok moe_topk moe_k".split(), 2)
_SMALL |= dict(
    head_dim=8, d_kv=8, image_size=IMAGE, patch_size=8, num_channels=3, state_size=8, num_mel_bins=16, kv_lora_rank=16,
    q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_group=2, topk_group=1, rotary_dim=4,
    num_queries=8, num_query_tokens=8, sliding_window=8, attention_window=8, num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    type_vocab_size=4, num_labels=3, num_codebooks=2, codebook_size=32, num_feature_levels=1, qk_head_dim=16,
    backbone_hidden_size=32, num_decoder_blocks=2, max_relative_position=8, window_size=4, chunk_size=4,
    num_hash_functions=2, num_buckets=16, mamba_d_state=8, mamba_n_heads=8, mamba_d_head=8, mamba_chunk_size=4,
    mamba_n_groups=1, conv_kernel_size=3, relative_attention_num_buckets=8, position_buckets=8, vision_feature_layer=-1,
    hidden_size_per_layer_input=8, num_kv_shared_layers=0, global_head_dim=8, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, moe_layer_start_index=0,
)  # fmt: skip
_DROPPED = ("torch_dtype", "dtype", "id2label", "label2id", "transformers_version", "architectures", "_name_or_path")


@lru_cache(maxsize=1)
def classes() -> dict[str, str]:
    """Name of the zoo -> model type: "task/Class", each class under the first task that names it."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    tasks = [n for n in dir(modeling_auto) if n.startswith("MODEL_FOR_") and n.endswith("_MAPPING_NAMES")]
    for task in [*sorted(tasks), "MODEL_MAPPING_NAMES"]:
        short = task.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES").lower().replace("_", "-")
        for model_type, named in getattr(modeling_auto, task).items():
            for cls in (named,) if isinstance(named, str) else tuple(named):
                if cls not in seen:
                    seen.add(cls)
                    found[f"{short}/{cls}"] = model_type
    return found


class Unbuildable(Exception):
    """No tiny model of the class runs."""


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model in eval mode, no parameter at zero or one, and a batch. Always the same. Raises Unbuildable."""
    cls = getattr(transformers, name.partition("/")[2], None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        raise Unbuildable("transformers has no such class here")
    errors = []
    for more in ({}, {"frames_first": 1}, {"num_hidden_layers": 4}, {"patch_size": 4}):
        try:
            config = _small(CONFIG_MAPPING[classes()[name]], more)
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(config).parameters())
            if size > LARGEST:
                raise Unbuildable(f"{size:,} parameters")
            torch.manual_seed(0)
            model = cls(config).eval()
            with torch.no_grad():
                for p in model.parameters():
                    if p.dtype.is_floating_point:
                        p.add_(torch.randn_like(p) * 0.02)
            batch = _inputs(model, config, "frames_first" in more)
            with torch.no_grad():
                model(**batch)
            torch.manual_seed(0)
            fresh = cls(config).eval()
            fresh.load_state_dict(model.state_dict())
            return fresh, batch
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    raise Unbuildable(errors[0])


def _small(cls: type[PretrainedConfig], more: dict[str, int]) -> PretrainedConfig:
    return cls(**_fields(cls(), more))


def _fields(config: PretrainedConfig, more: dict[str, int]) -> dict[str, Any]:
    """The config's fields with small sizes."""
    found: dict[str, Any] = {}
    parts = set(getattr(config, "sub_configs", {}))
    for name, value in config.to_dict().items():
        if name in _DROPPED:
            continue
        small = {**_SMALL, **more}.get(name)
        if name in parts and isinstance(getattr(config, name, None), PretrainedConfig):
            part = getattr(config, name)
            found[name] = {"model_type": part.model_type, **_fields(part, more)}
        elif small is not None and type(value) is int:
            found[name] = min(small, value) if name not in ("vocab_size", "image_size") else small
        elif isinstance(value, (list, tuple)) and value and type(value[0]) is int:
            found[name] = _short(name, list(value))
        elif name.endswith("_token_id") or name.endswith("_token_index"):
            found[name] = min(value, VOCAB - 1) if type(value) is int else value
    if hasattr(config, "out_indices"):
        found |= {"out_indices": [1], "out_features": None}
    for name in ("layer_types", "layers_block_type", "block_types", "attention_types", "mlp_layer_types"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, (list, tuple)) and kinds and isinstance(kinds[0], str):
            layers = found.get("num_hidden_layers", 2)
            some = list(dict.fromkeys(kinds))[:layers]
            found[name] = (some * layers)[:layers]
    return found


def _short(name: str, values: list[int]) -> list[int]:
    if name in ("depths", "num_layers", "layer_depths", "blocks_per_stage"):
        return [1] * len(values)
    if "size" in name or "dim" in name or "channels" in name or "width" in name:
        return [min(v, 16 * (1 + (i > 0))) for i, v in enumerate(values)] if max(values) > 64 else values
    if "heads" in name:
        return [min(v, 2) for v in values]
    return values


def _inputs(model: nn.Module, config: PretrainedConfig, frames_first: bool) -> dict[str, Any]:
    asked = inspect.signature(model.forward).parameters
    draw = torch.Generator().manual_seed(0)
    text, vision, audio = (_part(config, kind) for kind in ("text", "vision", "audio"))
    vocab = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", VOCAB) or VOCAB

    def ids(*shape: int) -> Tensor:
        return torch.randint(5, max(6, min(vocab, VOCAB) - 5), shape, generator=draw)

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    size, channels = getattr(vision, "image_size", IMAGE), getattr(vision, "num_channels", 3)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    mels = next((getattr(audio, n) for n in ("num_mel_bins", "feature_size", "input_dim") if hasattr(audio, n)), 16)
    found: dict[str, Any] = {}
    if "input_ids" in asked:
        found["input_ids"] = ids(2, TOKENS)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in asked:
        found["decoder_input_ids"] = ids(2, TOKENS - 4)
    if "attention_mask" in asked and "input_ids" in asked:
        found["attention_mask"] = torch.ones(2, TOKENS, dtype=torch.long)
    pixels, both = asked.get("pixel_values"), "clip" in config.model_type or "siglip" in config.model_type
    if pixels is not None and ("input_ids" not in asked or pixels.default is inspect.Parameter.empty or both):
        found["pixel_values"] = floats(2, channels, height, width)
    if "input_values" in asked:
        found["input_values"] = floats(2, 64, mels) if frames_first else floats(2, 4000)
    if "input_features" in asked and "input_ids" not in asked:
        frames = 2 * getattr(audio, "max_source_positions", 20)
        mels = getattr(audio, "feature_projection_input_dim", mels)
        found["input_features"] = floats(2, frames, mels) if frames_first else floats(2, mels, frames)
    if "bbox" in asked:
        found["bbox"] = torch.zeros(2, TOKENS, 4, dtype=torch.long)
    if "past_values" in asked:
        raise Unbuildable("time series")
    if not found:
        raise Unbuildable(f"no input is made for {sorted(asked)[:6]}")
    return found


def _part(config: PretrainedConfig, kind: str) -> PretrainedConfig:
    found = getattr(config, f"{kind}_config", None)
    return found if isinstance(found, PretrainedConfig) else config
