"""Tiny random models of many architectures, for tests that must hold for any of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

B, T, V = 2, 11, 97  # batch, tokens, vocabulary


@dataclass(frozen=True)
class Arch:
    """One architecture: how to build it and what to feed it."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Any]]
    """seed -> keyword arguments of the model."""
    functional: bool = True
    """torch.func.functional_call can be the reference: not for nn.RNN, which keeps a second list of its weights, nor
    for a module registered twice, which it leaves changed."""


def _ints(seed: int, *shape: int, low: int = 5, high: int = V) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def _floats(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lm_batch(seed: int) -> dict[str, Any]:
    ids = _ints(seed, B, T)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "use_cache": False}


def ids_batch(seed: int) -> dict[str, Any]:
    ids = _ints(seed, B, T)
    return {"input_ids": ids, "labels": ids}


def mlm_batch(seed: int) -> dict[str, Any]:
    return {k: v for k, v in lm_batch(seed).items() if k != "use_cache"}


def seq2seq_batch(seed: int) -> dict[str, Any]:
    return {"input_ids": _ints(seed, B, T), "labels": _ints(seed + 1000, B, T - 3), "use_cache": False}


def image_batch(seed: int) -> dict[str, Any]:
    return {"pixel_values": _floats(seed, B, 3, 16, 16), "labels": _ints(seed, B, low=0, high=3)}


def clip_batch(seed: int) -> dict[str, Any]:
    ids = _ints(seed, B, T, high=V - 1)
    ids[:, -1] = V - 1
    return {"input_ids": ids, "pixel_values": _floats(seed, B, 3, 16, 16), "return_loss": True}


def speech_batch(seed: int) -> dict[str, Any]:
    return {"input_features": _floats(seed, B, 8, 24), "labels": _ints(seed, B, 6), "use_cache": False}


def wave_batch(seed: int) -> dict[str, Any]:
    return {"input_values": _floats(seed, B, 400), "labels": _ints(seed, B, 4)}


_LM: dict[str, Any] = dict(
    vocab_size=V, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
    max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
GQA: dict[str, Any] = dict(_LM, num_key_value_heads=2)
HEAD: dict[str, Any] = dict(GQA, head_dim=8)
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]


def lm(config: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: tf.AutoModelForCausalLM.from_config(getattr(tf, config)(**options))


def _of(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(tf, model)(getattr(tf, config)(**options))


def _clip() -> nn.Module:
    text = dict(_LM, projection_dim=16, eos_token_id=V - 1)
    vision = dict(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


DEEPSEEK: dict[str, Any] = dict(
    _LM, num_key_value_heads=4, moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=2, n_group=2,
    topk_group=1, n_shared_experts=1, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
    qk_nope_head_dim=8, v_head_dim=8,
)  # fmt: skip

CAUSAL = [
    Arch("opt", lm("OPTConfig", vocab_size=V, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=40,
                    max_position_embeddings=32, word_embed_proj_dim=32), lm_batch),
    Arch("opt-projected", lm("OPTConfig", vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                              ffn_dim=40, max_position_embeddings=32, word_embed_proj_dim=16,
                              do_layer_norm_before=False), lm_batch),
    Arch("llama", lm("LlamaConfig", **GQA), lm_batch),
    Arch("llama-tied", lm("LlamaConfig", **GQA, tie_word_embeddings=True), lm_batch),
    Arch("qwen2", lm("Qwen2Config", **GQA), lm_batch),
    Arch("qwen3", lm("Qwen3Config", **HEAD), lm_batch),
    Arch("gpt2", lm("GPT2Config", vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=32), lm_batch),
    Arch("gpt_neo", lm("GPTNeoConfig", vocab_size=V, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=40,
                        attention_types=[[["global", "local"], 1]], max_position_embeddings=32), lm_batch),
    Arch("gpt_neox", lm("GPTNeoXConfig", **_LM), lm_batch),
    Arch("gpt_neox_japanese", lm("GPTNeoXJapaneseConfig", vocab_size=V, hidden_size=32, num_hidden_layers=3,
                                  num_attention_heads=4, max_position_embeddings=32), lm_batch),
    Arch("gptj", lm("GPTJConfig", vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=32, rotary_dim=4),
         lm_batch),
    Arch("bloom", lm("BloomConfig", vocab_size=V, hidden_size=32, n_layer=3, n_head=4), lm_batch),
    Arch("falcon", lm("FalconConfig", vocab_size=V, hidden_size=32, num_hidden_layers=3, num_attention_heads=4),
         lm_batch),
    Arch("mpt", lm("MptConfig", vocab_size=V, d_model=32, n_layers=2, n_heads=4, max_seq_len=32), lm_batch),
    Arch("codegen", lm("CodeGenConfig", vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=32, rotary_dim=4),
         lm_batch),
    Arch("phi", lm("PhiConfig", **_LM), lm_batch),
    Arch("phi3", lm("Phi3Config", **GQA), lm_batch),
    Arch("mistral", lm("MistralConfig", **HEAD, sliding_window=6), lm_batch),
    Arch("gemma", lm("GemmaConfig", **HEAD), lm_batch),
    Arch("gemma2", lm("Gemma2Config", **HEAD, sliding_window=6, query_pre_attn_scalar=8), lm_batch),
    Arch("gemma3", lm("Gemma3TextConfig", **HEAD, sliding_window=6, layer_types=LAYER_TYPES), lm_batch),
    Arch("stablelm", lm("StableLmConfig", **GQA), lm_batch),
    Arch("starcoder2", lm("Starcoder2Config", **GQA), lm_batch),
    Arch("olmo2", lm("Olmo2Config", **GQA), lm_batch),
    Arch("cohere", lm("CohereConfig", **GQA), lm_batch),
    Arch("granite", lm("GraniteConfig", **GQA), lm_batch),
    Arch("glm", lm("GlmConfig", **HEAD), lm_batch),
    Arch("smollm3", lm("SmolLM3Config", **GQA), lm_batch),
    Arch("biogpt", lm("BioGptConfig", **_LM), lm_batch),
    Arch("xglm", lm("XGLMConfig", vocab_size=V, d_model=32, num_layers=2, attention_heads=4, ffn_dim=40,
                     max_position_embeddings=32), lm_batch),
]  # fmt: skip

MOE = [
    Arch("mixtral", lm("MixtralConfig", **GQA, num_local_experts=4), lm_batch),
    Arch("qwen3_moe", lm("Qwen3MoeConfig", **HEAD, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2),
         lm_batch),
    Arch("qwen2_moe", lm("Qwen2MoeConfig", **GQA, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
                          shared_expert_intermediate_size=24), lm_batch),
    Arch("gpt_oss", lm("GptOssConfig", **dict(HEAD, num_local_experts=4, num_experts_per_tok=2, sliding_window=6,
                                               layer_types=LAYER_TYPES)), lm_batch),
    Arch("deepseek_v3", lm("DeepseekV3Config", **DEEPSEEK), lm_batch),
    Arch("olmoe", lm("OlmoeConfig", **GQA, num_experts=4, num_experts_per_tok=2), lm_batch),
    Arch("granitemoe", lm("GraniteMoeConfig", **GQA, num_local_experts=4), lm_batch),
    Arch("switch", _of("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", vocab_size=V,
                       d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, num_experts=4, expert_capacity=8,
                       num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0),
         seq2seq_batch),
]  # fmt: skip

STATE_SPACE = [
    Arch("mamba", lm("MambaConfig", vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4), ids_batch),
    Arch("mamba2", lm("Mamba2Config", vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8,
                       head_dim=8, n_groups=1, chunk_size=4), ids_batch),
    Arch("falcon_mamba", lm("FalconMambaConfig", vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4),
         ids_batch),
    Arch("jamba", lm("JambaConfig", **dict(GQA, num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1,
                                            expert_layer_period=2, expert_layer_offset=1, num_experts=4,
                                            mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False)), lm_batch),
    Arch("bamba", lm("BambaConfig", **dict(GQA, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8,
                                            mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=4)), lm_batch),
    Arch("rwkv", lm("RwkvConfig", vocab_size=V, hidden_size=32, num_hidden_layers=2, context_length=32), ids_batch),
    Arch("recurrent_gemma", lm("RecurrentGemmaConfig", **dict(GQA, lru_width=32, attention_window_size=8)),
         ids_batch),
]  # fmt: skip

ENCODERS = [
    Arch("bert", _of("BertForMaskedLM", "BertConfig", **_LM), mlm_batch),
    Arch("roberta", _of("RobertaForMaskedLM", "RobertaConfig", **_LM), mlm_batch),
    Arch("albert", _of("AlbertForMaskedLM", "AlbertConfig", **_LM, embedding_size=16), mlm_batch),
    Arch("distilbert", _of("DistilBertForMaskedLM", "DistilBertConfig", vocab_size=V, dim=32, n_layers=2, n_heads=4,
                           hidden_dim=40, max_position_embeddings=32), mlm_batch),
    Arch("electra", _of("ElectraForMaskedLM", "ElectraConfig", **_LM, embedding_size=16), mlm_batch),
    Arch("deberta_v2", _of("DebertaV2ForMaskedLM", "DebertaV2Config", **_LM, relative_attention=True,
                           pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True), mlm_batch),
    Arch("modernbert", _of("ModernBertForMaskedLM", "ModernBertConfig", **dict(_LM, cls_token_id=1, sep_token_id=2)),
         mlm_batch),
    Arch("mpnet", _of("MPNetForMaskedLM", "MPNetConfig", **_LM), mlm_batch),
]  # fmt: skip

_BART: dict[str, Any] = dict(
    vocab_size=V, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=32, decoder_start_token_id=2, pad_token_id=1,
    bos_token_id=0, eos_token_id=2,
)  # fmt: skip

ENCODER_DECODERS = [
    Arch("t5", _of("T5ForConditionalGeneration", "T5Config", vocab_size=V, d_model=32, d_kv=8, d_ff=40, num_layers=2,
                   num_heads=4, decoder_start_token_id=0), seq2seq_batch),
    Arch("bart", _of("BartForConditionalGeneration", "BartConfig", **_BART), seq2seq_batch),
    Arch("mbart", _of("MBartForConditionalGeneration", "MBartConfig", **_BART), seq2seq_batch),
    Arch("pegasus", _of("PegasusForConditionalGeneration", "PegasusConfig", **_BART), seq2seq_batch),
    Arch("m2m_100", _of("M2M100ForConditionalGeneration", "M2M100Config", **_BART), seq2seq_batch),
    Arch("whisper", _of("WhisperForConditionalGeneration", "WhisperConfig",
                        **dict(_BART, num_mel_bins=8, max_source_positions=12, max_target_positions=16)), speech_batch),
]  # fmt: skip

_IMAGE: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, image_size=16, patch_size=8,
    num_labels=3,
)  # fmt: skip

VISION_AND_SPEECH = [
    Arch("vit", _of("ViTForImageClassification", "ViTConfig", **_IMAGE), image_batch),
    Arch("dinov2", _of("Dinov2ForImageClassification", "Dinov2Config", **_IMAGE), image_batch),
    Arch("clip", _clip, clip_batch),
    Arch("convnext", _of("ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 16], depths=[2, 2],
                         num_stages=2, patch_size=2, num_labels=3), image_batch),
    Arch("swin", _of("SwinForImageClassification", "SwinConfig", image_size=16, patch_size=2, embed_dim=8,
                     depths=[2, 2],
                     num_heads=[2, 4], window_size=4, num_labels=3), image_batch),
    Arch("resnet", _of("ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16],
                       depths=[1, 2], layer_type="basic", num_labels=3), image_batch),
    Arch("wav2vec2", _of("Wav2Vec2ForCTC", "Wav2Vec2Config", vocab_size=V, hidden_size=32, num_hidden_layers=2,
                         num_attention_heads=4, intermediate_size=40, conv_dim=[16, 16], conv_stride=[4, 4],
                         conv_kernel=[8, 8], num_feat_extract_layers=2, num_conv_pos_embeddings=8,
                         num_conv_pos_embedding_groups=2), wave_batch),
]  # fmt: skip

# ---- plain torch: what transformers models do, one at a time ------------------------------------------------------


def vector_batch(seed: int) -> dict[str, Any]:
    return {"x": _floats(seed, B, T, 16)}


class Attention(nn.Module):
    """nn.MultiheadAttention reads its out_proj's weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, x, x)[0]
        return x


class Encoder(nn.Module):
    """nn.TransformerEncoderLayer hands all weights below it to one fused op (in eval mode)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2, enable_nested_tensor=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class Lstm(nn.Module):
    """nn.LSTM computes with a second list of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(16, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class _Lender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x @ self.inner.weight.t() + self.inner.bias)


class ReadsChild(nn.Module):
    """A child's weight is read and the child never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Lender() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class _Returner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.bias = nn.Linear(16, 16, bias=False), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> tuple[Tensor, nn.Parameter]:
        return self.proj(x), self.bias


class ReturnsParameter(nn.Module):
    """A module returns a Parameter and its parent computes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Returner() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y, bias = layer(x)
            x = torch.tanh(y + bias)
        return x


class _ViewMaker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self) -> Tensor:
        return self.weight.t()[:, :8]


class _ViewUser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return x @ w * self.scale


class ViewEscapes(nn.Module):
    """A view of a weight is made in one module and used in its sibling."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.user, self.head = _ViewMaker(), _ViewUser(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.user(x, self.maker()))


class _ViewCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        if not kept:
            kept.append(self.weight.t())
        return torch.tanh(x @ kept[0])


class ViewOutlivesCall(nn.Module):
    """A module called twice uses, in the second call, a view of its weight made in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.mid = _ViewCache(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        return self.cell(self.mid(self.cell(x, kept)), kept)


class _Borrower(nn.Module):
    def __init__(self, cell: nn.Linear) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.cell(x)) @ self.cell.weight


class Overlap(nn.Module):
    """A module runs by itself and within one that reads its weight: both own the weight, at times at once."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(16, 16)
        self.borrower = _Borrower(self.cell)

    def forward(self, x: Tensor) -> Tensor:
        return self.borrower(torch.tanh(self.cell(x)))


class Lists(nn.Module):
    """ParameterList and ParameterDict are modules that never run; a root parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.ws = nn.ParameterList(nn.Parameter(torch.randn(16, 16) / 4) for _ in range(3))
        self.extra = nn.ParameterDict({"shift": nn.Parameter(torch.randn(16))})
        self.gain = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        for w in self.ws:
            x = torch.tanh(x @ w + self.extra["shift"])
        return x * self.gain


class NestedTies(nn.Module):
    """One weight held at three depths, and one module registered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 16, bias=False)
        self.tower = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.Tanh()))
        self.head = nn.Linear(16, 16)
        self.head.weight = self.embed.weight
        self.tower[1][0].weight = self.embed.weight
        self.again = self.tower

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.tower(self.embed(x))))


class DirectForward(nn.Module):
    """Modules run through `.forward`, which no hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Lender() for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.forward(x)
        return self.head.forward(x)


class Routed(nn.Module):
    """Each row goes through an expert that its values choose: lanes meet different modules, in different orders."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 16)
        for chosen in self.gate(rows).sum(0).argsort().tolist()[:3]:
            rows = rows + self.experts[chosen](rows)
        return rows


class EarlyExit(nn.Module):
    """Leaves after a number of layers that depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if x.mean().item() > 0.01:
                break
        return x


class OldWeightNorm(nn.Module):
    """A pre-hook of torch's own computes the weight from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.weight_norm(nn.Linear(16, 16))
        self.b = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Rows(nn.Module):
    """Plain embeddings, with and without padding, called by keyword, tied to a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(V, 16, padding_idx=7)
        self.places = nn.Embedding(T, 16)
        self.bag = nn.EmbeddingBag(V, 16)
        self.head = nn.Linear(16, V, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(input=ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.head(x + self.bag(ids)[:, None])


PLAIN = [
    *(Arch(cls.__name__, cls, vector_batch) for cls in (
        Attention, Encoder, ReadsChild, ReturnsParameter, ViewEscapes, ViewOutlivesCall, Lists,
        DirectForward, Routed, EarlyExit, OldWeightNorm)),
    Arch("NestedTies", NestedTies, vector_batch, functional=False),
    Arch("Overlap", Overlap, vector_batch, functional=False),
    Arch("Lstm", Lstm, vector_batch, functional=False),
    Arch("Rows", Rows, lambda seed: {"ids": _ints(seed, B, T, low=0)}),
]  # fmt: skip

TRANSFORMERS = CAUSAL + MOE + STATE_SPACE + ENCODERS + ENCODER_DECODERS + VISION_AND_SPEECH
ALL = TRANSFORMERS + PLAIN
ARCH = {arch.name: arch for arch in ALL}


def build(arch: Arch) -> nn.Module:
    """The model in eval mode, the same each time, with no parameter left at zero or one."""
    torch.manual_seed(sum(map(ord, arch.name)))
    model = arch.build().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model
