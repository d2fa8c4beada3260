"""A model's config as the values of a GGUF file, under llama.cpp's keys.

What a file says is read back by transformers before weights are written, and compared with the config: a setting that
numbers depend on and that GGUF has no key for is an error that names it.
"""

from __future__ import annotations

import logging
import math
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError

_log = logging.getLogger(__name__)

ARCHES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen2_moe": "qwen2moe", "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe", "phi3": "phi3", "starcoder2": "starcoder2", "nemotron": "nemotron", "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}  # fmt: skip
"""transformers' model type -> GGUF's architecture, of the models that are exported."""

_WHOLE = (
    ("context_length", ("max_position_embeddings",)), ("embedding_length", ("hidden_size",)),
    ("block_count", ("num_hidden_layers",)), ("feed_forward_length", ("intermediate_size",)),
    ("attention.head_count", ("num_attention_heads",)), ("attention.head_count_kv", ("num_key_value_heads",)),
    ("attention.key_length", ("head_dim",)), ("attention.value_length", ("head_dim",)), ("vocab_size", ("vocab_size",)),
    ("expert_count", ("num_experts",)), ("expert_used_count", ("num_experts_per_tok",)),
    ("expert_feed_forward_length", ("moe_intermediate_size",)),
    ("expert_shared_feed_forward_length", ("shared_expert_intermediate_size",)),
)  # fmt: skip
_REAL = (
    ("attention.layer_norm_rms_epsilon", ("rms_norm_eps", "norm_eps")),
    ("attention.layer_norm_epsilon", ("norm_epsilon", "norm_eps")),
    ("attn_logit_softcapping", ("attn_logit_softcapping",)), ("final_logit_softcapping", ("final_logit_softcapping",)),
)  # fmt: skip
"""GGUF's keys, after the architecture, and the first of transformers' settings that a config has."""
_WINDOWED = ("gemma2", "gemma3", "phi3")
"""Architectures whose sliding window llama.cpp reads."""
_SCALINGS = ("default", "linear", "yarn", "llama3")
_ASIDE = re.compile(
    r"_.*|.*_token_id|.*(dropout|drop|pdrop)|architectures|(torch_)?dtype|transformers_version|initializer_range|"
    r"use_cache|pretraining_tp|id2label|label2id|problem_type|output_.*|return_dict|chunk_size_feed_forward|"
    r"router_aux_loss_coef|name_or_path|tokenizer_class|model_type|cache_implementation|task_specific_params"
)
"""Settings that the logits of a forward do not depend on, or that are compared by others (the class)."""
_UNSET: tuple[Any, ...] = (None, False, 0, 0.0, "", [], {})


def arch_of(config: Any) -> str:
    """GGUF's architecture of a config. ConfigError: none that is exported."""
    kind = str(getattr(config, "model_type", ""))
    if kind not in ARCHES:
        raise ConfigError(
            f"a model of type {kind or type(config).__name__!r} is not exported as gguf; those of type "
            f"{', '.join(ARCHES)} are. As safetensors (without --as) any model is"
        )
    return ARCHES[kind]


def add_config(writer: Any, config: Any, name: str) -> set[str]:
    """Add a config's values to gguf's writer; returns the settings that they say. ConfigError: a rotary scaling that
    has no keys."""
    arch, told = writer.arch, {"rope_parameters", "rope_theta"}
    scale = getattr(config, "query_pre_attn_scalar", head_dim(config))
    if scale != head_dim(config):
        raise ConfigError(
            f"query_pre_attn_scalar={scale} has no place in GGUF's {arch!r}: llama.cpp takes head_dim, which is "
            f"{head_dim(config)}. Export it as safetensors (without --as)"
        )
    writer.add_string("general.type", "model")
    if name and name != "mistral":  # a name that transformers takes for an architecture, which it then cannot read
        writer.add_string("general.name", name)
    for keys, add in ((_WHOLE, writer.add_uint32), (_REAL, writer.add_float32)):
        for key, settings in keys:
            found = next((s for s in settings if getattr(config, s, None) is not None), None)
            if found is not None:
                add(f"{arch}.{key}", getattr(config, found))
                told.add(found)
    if arch in _WINDOWED and getattr(config, "sliding_window", None) is not None:
        writer.add_uint32(f"{arch}.attention.sliding_window", config.sliding_window)
        told.add("sliding_window")
    rope = _rope(config)
    width = head_dim(config)
    writer.add_uint32(f"{arch}.rope.dimension_count", int(width * float(rope.get("partial_rotary_factor") or 1)))
    writer.add_float32(f"{arch}.rope.freq_base", float(rope["rope_theta"]))
    kind = str(rope.get("rope_type", "default"))
    if kind not in _SCALINGS:
        raise ConfigError(f"rotary scaling of type {kind!r} has no place in GGUF here; {', '.join(_SCALINGS)} have")
    if kind in ("linear", "yarn"):
        writer.add_string(f"{arch}.rope.scaling.type", kind)
        writer.add_float32(f"{arch}.rope.scaling.factor", float(rope["factor"]))
        if (length := rope.get("original_max_position_embeddings")) is not None:
            writer.add_uint32(f"{arch}.rope.scaling.original_context_length", int(length))
    return told


def rope_factors(config: Any) -> Tensor | None:
    """What llama.cpp divides the rotary frequencies by, float32 [head_dim / 2], for a scaling as of Llama 3.1; else
    None."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    size, length = head_dim(config), float(rope["original_max_position_embeddings"])
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    even = torch.arange(0, size, 2, dtype=torch.float64, device="cpu")
    waves = 2 * math.pi * float(rope["rope_theta"]) ** (even / size)
    smooth = ((length / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> Mapping[str, Any]:
    """The rotary settings, of full attention where layers have several."""
    found = getattr(config, "rope_parameters", None) or {}
    rope = found.get("full_attention", found)
    if "rope_theta" not in rope:
        raise ConfigError(f"{type(config).__name__} has no rope_theta, which GGUF's models of its kind have")
    return dict(rope)


def check_config(config: Any, found: Any, told: set[str], path: Path) -> None:
    """Compare a config with what transformers reads in a file. ConfigError: a setting that the file does not say. Those
    that it says, and that transformers does not read, are logged. told: the settings that the file says."""
    differing = dict(_differences(config.to_dict(), found.to_dict()))
    lost = {name: both for name, both in differing.items() if name not in told}
    if lost:
        name, (own, read) = next(iter(lost.items()))
        raise ConfigError(
            f"a {type(config).__name__} with {name}={own!r:.100} has no place in GGUF's {ARCHES[config.model_type]!r}: "
            f"read again it is {read!r:.100}. Export it as safetensors (without --as)"
        )
    if differing:
        _log.warning(
            "%s says %s under llama.cpp's keys, which transformers does not read: there, pass "
            "config=AutoConfig.from_pretrained(DIRECTORY), of the config.json beside it",
            path.name, ", ".join(differing),
        )  # fmt: skip


def _differences(own: Mapping[str, Any], read: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in {**own, **read}:
        if _ASIDE.fullmatch(name):
            continue
        one, other = own.get(name), read.get(name)
        if (name not in own or name not in read) and one in _UNSET and other in _UNSET:
            continue
        if not _equal(one, other):
            yield name, (one, other)


def _equal(one: Any, other: Any) -> bool:
    """Whether values are equal, numbers as float32, which GGUF has."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return all(_equal(one.get(key), other.get(key)) for key in {**one, **other})
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return _narrow(one) == _narrow(other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def _narrow(value: float) -> float:
    found: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return found
