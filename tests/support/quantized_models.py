"""Writers of quantized checkpoints, from the published layouts and one tensor at a time, plain and slow.

Each makes of a weight the tensors that files hold and, by the scheme's formula on whole tensors, the weight that they
stand for. What libraries write is in tests/data/quantized.safetensors.
"""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def words(codes, bits):
    """int [rows, n] codes below 2 ** bits -> int32 [rows, n * bits / 32], a little-endian stream in each row."""
    ones = (codes.unsqueeze(-1) >> torch.arange(bits) & 1).flatten(1).view(codes.shape[0], -1, 32)
    return (ones * (2 ** torch.arange(32))).sum(-1).to(torch.int64).bitwise_and(0xFFFFFFFF).to(torch.int32)


def fp8_blocks(name, w, scale_dtype=torch.float32):
    rows, width = w.shape
    tall, wide = -(-rows // 128), -(-width // 128)
    full = torch.zeros(tall * 128, wide * 128)
    full[:rows, :width] = w.float()
    scale = (full.view(tall, 128, wide, 128).abs().amax((1, 3)).clamp(min=1e-9) / 448).to(scale_dtype)
    each = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :width]
    codes = (w.float() / each).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale}, (codes.float() * each).to(torch.bfloat16)


def fp8_channels(name, w):
    """compressed-tensors: a scale in bf16 for each row."""
    scale = (w.float().abs().amax(1, keepdim=True).clamp(min=1e-9) / 448).bfloat16()
    codes = (w.float() / scale.float()).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale": scale}, codes.bfloat16() * scale


def int8_channels(name, w):
    """compressed-tensors, symmetric."""
    scale = (w.float().abs().amax(1, keepdim=True).clamp(min=1e-9) / 127.5).bfloat16()
    codes = (w.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {name: codes, f"{name}_scale": scale}, codes.bfloat16() * scale


def gptq(name, w, bits=4, group=16, order=True):
    """Asymmetric, with inputs in groups by a random order, version 1."""
    module, (outputs, inputs) = name.removesuffix(".weight"), w.shape
    index = torch.arange(inputs) // group
    if order:
        index = index[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
    groups = -(-inputs // group)
    scale, zero = torch.empty(outputs, groups), torch.empty(outputs, groups)
    for g in range(groups):
        part = w[:, index == g].float()
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scale[:, g] = ((high - low) / (2**bits - 1)).half().float()
        zero[:, g] = (-low / scale[:, g]).round().clamp(1, 2**bits - 1)
    codes = (w.float() / scale[:, index] + zero[:, index]).round().clamp(0, 2**bits - 1)
    stored = {
        f"{module}.qweight": words(codes.long(), bits).T,
        f"{module}.qzeros": words((zero - 1).T.long(), bits),
        f"{module}.scales": scale.T.half(),
        f"{module}.g_idx": index.int(),
    }
    return stored, (scale[:, index] * (codes - zero[:, index])).half()


def awq(name, w, group=16):
    module, (outputs, inputs) = name.removesuffix(".weight"), w.shape
    grouped = w.float().view(outputs, -1, group)
    low, high = grouped.amin(2), grouped.amax(2)
    scale = ((high - low) / 15).clamp(min=1e-5).half().float()
    zero = (-low / scale).round().clamp(0, 15)
    codes = ((grouped / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # the output in nibble p

    def packed(values):  # [rows, outputs]
        return words(values.view(values.shape[0], -1, 8)[:, :, order].reshape(values.shape[0], -1).long(), 4)

    stored = {
        f"{module}.qweight": packed(codes.view(outputs, inputs).T),
        f"{module}.qzeros": packed(zero.T),
        f"{module}.scales": scale.T.half(),
    }
    return stored, ((codes - zero[..., None]) * scale[..., None]).view(outputs, inputs).half()


def pack_quantized(name, w, group=16):
    """compressed-tensors, int4, symmetric, scales in bf16."""
    outputs, inputs = w.shape
    grouped = w.float().view(outputs, -1, group)
    scale = (grouped.abs().amax(2) / 7.5).clamp(min=1e-6).bfloat16()
    codes = (grouped / scale.float()[..., None]).round().clamp(-8, 7)
    packed = torch.nn.functional.pad(codes.view(outputs, inputs) + 8, (0, -inputs % 8)).long()
    stored = {
        f"{name}_packed": words(packed, 4), f"{name}_scale": scale, f"{name}_shape": torch.tensor([outputs, inputs])
    }  # fmt: skip
    return stored, (codes * scale.float()[..., None]).view(outputs, inputs).bfloat16()


def nvfp4(name, w):
    """Model Optimizer's."""
    outputs, inputs = w.shape
    grouped = w.float().view(outputs, -1, 16)
    whole = w.float().abs().max() / (6 * 448)
    scale = (grouped.abs().amax(2) / (6 * whole)).to(torch.float8_e4m3fn)
    each = (scale.float() * whole)[..., None]
    magnitude = (grouped.abs() / each.clamp(min=1e-30)).unsqueeze(-1)
    codes = ((magnitude - E2M1).abs().argmin(-1) | (grouped < 0).long() << 3).view(outputs, inputs)
    values = torch.cat([E2M1, -E2M1])[codes].view(outputs, -1, 16)
    stored = {
        name: (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), f"{name}_scale": scale, f"{name}_scale_2": whole,
        f"{name.removesuffix('weight')}input_scale": torch.tensor(1.0),
    }  # fmt: skip
    return stored, (values * each).view(outputs, inputs).bfloat16()


NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
TWELFTHS = torch.tensor([0.0, 0.0052083335, 0.6666667, 1.0, 0.33333334, 0.5, 0.16666667, 0.25])
FP4 = torch.cat([TWELFTHS, -TWELFTHS])


def nf4(name, w, block=64, kind="nf4"):
    """bitsandbytes, not nested; a block may span rows, and the last is short."""
    table = {"nf4": NF4, "fp4": FP4}[kind].clone()
    flat, n = w.float().reshape(-1), w.numel()
    padded = torch.nn.functional.pad(flat, (0, -n % block)).view(-1, block)
    largest = padded.abs().amax(1)
    codes = ((padded / largest.clamp(min=1e-30)[:, None]).unsqueeze(-1) - table).abs().argmin(-1)
    values = (table[codes] * largest[:, None]).view(-1)[:n].view(w.shape)
    codes = torch.nn.functional.pad(codes.view(-1)[:n], (0, n % 2))
    state = json.dumps({"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(w.shape)})
    stored = {
        name: (codes[::2] << 4 | codes[1::2]).to(torch.uint8).view(-1, 1),
        f"{name}.absmax": largest, f"{name}.quant_map": table,
        f"{name}.quant_state.bitsandbytes__{kind}": torch.tensor(list(state.encode()), dtype=torch.uint8),
    }  # fmt: skip
    return stored, values.bfloat16()


def int8_rows(name, w):
    """bitsandbytes' LLM.int8."""
    largest = w.float().abs().amax(1)
    codes = (w.float() * (127 / largest)[:, None]).round().to(torch.int8)
    stored = {
        name: codes, name.replace("weight", "SCB"): largest,
        name.replace("weight", "weight_format"): torch.tensor(0, dtype=torch.uint8),
    }  # fmt: skip
    return stored, (codes.float() * largest[:, None] * 7.874015718698502e-3).bfloat16()


def mxfp4(name, w):
    """gpt-oss: w [experts, inputs, outputs]."""
    turned = w.float().transpose(1, 2).contiguous()
    blocks = turned.view(*turned.shape[:2], -1, 32)
    exponent = (blocks.abs().amax(-1).clamp(min=1e-20).log2().floor() - 2 + 127).clamp(1, 254)
    each = torch.exp2(exponent - 127)[..., None]
    codes = ((blocks.abs() / each).unsqueeze(-1) - E2M1).abs().argmin(-1) | (blocks < 0).long() << 3
    values = (torch.cat([E2M1, -E2M1])[codes] * each).view(turned.shape).transpose(1, 2)
    stored = {
        f"{name}_blocks": (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8),
        f"{name}_scales": exponent.to(torch.uint8),
    }  # fmt: skip
    return stored, values.contiguous().bfloat16()


def channels(layout, kind):
    """compressed-tensors' settings for 8 bits with a scale for each row."""
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


CT_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
WRITERS = {
    "fp8": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}),
    "compressed-tensors": (pack_quantized, {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": CT_INT4}},
    }),
    "fp8 channels": (fp8_channels, channels("float-quantized", "float")),
    "int8 channels": (int8_channels, channels("int-quantized", "int")),
    "nvfp4": (nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}),
    "nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "fp4": (partial(nf4, kind="fp4"), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "int8": (int8_rows, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4"}),
}  # fmt: skip
"""Scheme -> writer, and quantization_config."""


def quantize_checkpoint(source: Path, target: Path, scheme: str, plain: Path, writer=None) -> dict[str, torch.Tensor]:
    """A checkpoint of one file with its linear layers quantized (mxfp4: its stacked experts), into `target`; and the
    same decoded by the writer's own formula, with no trace of a scheme, into `plain`. The decoded weights by name."""
    usual, settings = WRITERS[scheme]
    writer = writer or usual
    if (group := getattr(writer, "keywords", {}).get("group")) is not None:
        settings = json.loads(json.dumps(settings).replace('"group_size": 16', f'"group_size": {group}'))
    tensors = load_file(source / "model.safetensors")
    stored, decoded = {}, {}
    for name, w in tensors.items():
        is_linear = re.search(r"(proj|\.w[123])\.weight$", name) and w.dim() == 2
        if is_linear if scheme != "mxfp4" else w.dim() == 3:
            parts, decoded[name] = writer(name, w)
            stored |= {part: t.contiguous() for part, t in parts.items()}
        else:
            stored[name] = w
    for folder, content in ((target, stored), (plain, tensors | decoded)):
        shutil.copytree(source, folder)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return decoded


# ---- GGUF ------------------------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where the float16 scales of a block are, of the types that the package gguf does not write."""


def any_blocks(w, kind):
    """Random blocks of such a type in the place of a weight, of a weight's usual size."""
    import gguf

    numel, nbytes = gguf.GGML_QUANT_SIZES[kind]
    rows, blocks = w.shape[0], w.shape[1] // numel
    raw = torch.randint(256, (rows, blocks, nbytes), generator=torch.Generator().manual_seed(rows), dtype=torch.uint8)
    small = torch.rand(rows, blocks, 2, generator=torch.Generator().manual_seed(blocks)) * 1e-4
    for place, at in enumerate(HALVES[kind.name]):
        raw[:, :, at : at + 2] = small[:, :, place : place + 1].half().view(torch.uint8)
    return raw.view(rows, -1).numpy()


def write_gguf(path: Path, model, arch: str, kinds: dict[str, str], default: str, parts: int = 1) -> None:
    """A model of Llama's kind as llama.cpp's converter writes it, through the package gguf. kinds: type by the end of a
    tensor's name there. With a tokenizer of letters."""
    import gguf

    config, tensors = model.config, model.state_dict()
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=-(-len(tensors) // parts) if parts > 1 else 0)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama" if arch == "llama" else "gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(chr(33 + i) for i in range(config.vocab_size - 4)), "AB"])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([2, 3, 3] + [1] * (config.vocab_size - 3))
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, w in tensors.items():
        *_, layer, inner = [None, *name.removeprefix("model.layers.").split(".", 1)]
        where = f"blk.{layer}." if name.startswith("model.layers.") else ""
        module, _, last = (inner if where else name).rpartition(".")
        short = GGUF_NAMES[module]
        if arch == "llama" and short in heads:
            w = w.view(heads[short], 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)
        kind = gguf.GGMLQuantizationType[kinds.get(short, default) if w.dim() > 1 else "F32"]
        raw = any_blocks(w, kind) if kind.name in HALVES else gguf.quantize(w.float().numpy(), kind)
        writer.add_tensor(f"{where}{short}.{last}", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
