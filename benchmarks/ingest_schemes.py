"""Huge weights in the layout of each quantization scheme, for `benchmarks.ingest`.

Names, dtypes and shapes are those of the tensors that a library would write. Codes are random, scales small numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from zo_offload.formats.four_bits import NF4_VALUES
from zo_offload.formats.kept import FP4_VALUES

GROUP = 128


@dataclass(frozen=True)
class Part:
    """A tensor in a file; `tile` is repeated in it, and has its dtype."""

    shape: tuple[int, ...]
    tile: Tensor


Parts = dict[str, Part]


def _random(seed: int = 0) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(256, ((1 << 20) + 64,), dtype=torch.uint8, generator=chance)


_CODES = _random()


def _words() -> Tensor:
    return _CODES.view(torch.int32)


def _small(dtype: torch.dtype, powers: bool = False) -> Tensor:
    values = torch.rand(4099, generator=torch.Generator().manual_seed(1)) * 0.01 + 0.001
    return (torch.exp2(values.log2().round()) if powers else values).to(dtype)


def _floats() -> Tensor:
    """float8_e4m3fn without NaN."""
    return torch.where(_CODES & 0x7F == 0x7F, 0, _CODES).view(torch.float8_e4m3fn)


def plain(shape: tuple[int, ...]) -> Part:
    noise = torch.randn((1 << 20) + 7, generator=torch.Generator().manual_seed(0)) * 0.02
    return Part(shape, noise.bfloat16())


def _gptq(name: str, out: int, into: int) -> Parts:
    module, groups = name.removesuffix(".weight"), into // GROUP
    return {
        f"{module}.qweight": Part((into // 8, out), _words()), f"{module}.qzeros": Part((groups, out // 8), _words()),
        f"{module}.scales": Part((groups, out), _small(torch.float16)),
    }  # fmt: skip


def _awq(name: str, out: int, into: int) -> Parts:
    return {**_gptq(name, out, into), f"{name.removesuffix('.weight')}.qweight": Part((into, out // 8), _words())}


def _packed(name: str, out: int, into: int) -> Parts:
    return {
        f"{name}_packed": Part((out, into // 8), _words()),
        f"{name}_scale": Part((out, into // GROUP), _small(torch.bfloat16)),
        f"{name}_shape": Part((2,), torch.tensor([out, into])),
    }


def _int8(name: str, out: int, into: int) -> Parts:
    return {name: Part((out, into), _CODES.view(torch.int8)), f"{name}_scale": Part((out, 1), _small(torch.bfloat16))}


def _fp8(powers: bool) -> Callable[[str, int, int], Parts]:
    def parts(name: str, out: int, into: int) -> Parts:
        grid = (-(-out // 128), -(-into // 128))
        return {
            name: Part((out, into), _floats()), f"{name}_scale_inv": Part(grid, _small(torch.float32, powers))
        }  # fmt: skip

    return parts


def _mxfp4(name: str, out: int, into: int) -> Parts:
    return {
        f"{name}_packed": Part((out, into // 2), _CODES),
        f"{name}_scale": Part((out, into // 32), (_CODES & 7) + 117),
    }


def _nvfp4(name: str, out: int, into: int) -> Parts:
    scales = (_floats().view(torch.uint8) & 0x7F).view(torch.float8_e4m3fn)
    return {
        f"{name}_packed": Part((out, into // 2), _CODES),
        f"{name}_scale": Part((out, into // 16), scales),
        f"{name}_global_scale": Part((1,), torch.tensor([700.0])),
    }


def _four_bits(kind: str, nested: bool) -> Callable[[str, int, int], Parts]:
    def parts(name: str, out: int, into: int) -> Parts:
        table = torch.tensor(NF4_VALUES if kind == "nf4" else FP4_VALUES, dtype=torch.float32)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [out, into]}
        blocks = out * into // 64
        found = {
            name: Part((out * into // 2, 1), _CODES), f"{name}.quant_map": Part((16,), table),
            f"{name}.absmax": Part((blocks,), _CODES if nested else _small(torch.float32)),
        }  # fmt: skip
        if nested:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.02}
            found[f"{name}.nested_absmax"] = Part((blocks // 256,), _small(torch.float32))
            found[f"{name}.nested_quant_map"] = Part((256,), torch.linspace(-1, 1, 256))
        said = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return {**found, f"{name}.quant_state.bitsandbytes__{kind}": Part(tuple(said.shape), said)}

    return parts


def _rows(name: str, out: int, into: int) -> Parts:
    codes = torch.where(_CODES == 128, 0, _CODES).view(torch.int8)
    return {name: Part((out, into), codes), name.replace("weight", "SCB"): Part((out,), _small(torch.float32))}


def _experts(name: str, experts: int, into: int, out: int) -> Parts:
    return {
        f"{name}_blocks": Part((experts, out, into // 32, 16), _CODES),
        f"{name}_scales": Part((experts, out, into // 32), (_CODES & 7) + 117),
    }


def _weights(bits: int, kind: str, strategy: str, size: int | None = None) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "group_size": size}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


_BNB = {"quant_method": "bitsandbytes"}
_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
SCHEMES: Mapping[str, tuple[Callable[..., Parts], dict[str, Any]]] = {
    "gptq": (_gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False}),
    "awq": (_awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "ct-int4": (_packed, _weights(4, "int", "group", GROUP)),
    "ct-int8": (_int8, _weights(8, "int", "channel")),
    "fp8": (_fp8(False), _BLOCKS),
    "fp8-powers": (_fp8(True), _BLOCKS),
    "ct-mxfp4": (_mxfp4, _weights(4, "float", "group", 32)),
    "ct-nvfp4": (_nvfp4, _weights(4, "float", "tensor_group", 16)),
    "bnb-nf4": (_four_bits("nf4", False), _BNB),
    "bnb-fp4-nested": (_four_bits("fp4", True), _BNB),
    "bnb-int8": (_rows, _BNB),
    "gpt-oss": (_experts, {"quant_method": "mxfp4"}),
}
"""Case -> the tensors of a weight's name and sizes, and quantization_config."""

GGUF = {"gguf-q4_k": ("Q4_K", (0, 2)), "gguf-q6_k": ("Q6_K", (208,))}
"""Case -> GGUF's type, and where its blocks have a float16 scale."""
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(path: Path, case: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """A Phi-3 as a GGUF file whose projections of the MLP are of the case's type; the tensors' bytes."""
    import gguf

    kind = gguf.GGMLQuantizationType[GGUF[case][0]]
    numel, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = _CODES[: len(_CODES) // nbytes * nbytes].clone().view(-1, nbytes)
    for at in GGUF[case][1]:
        blocks[:, at : at + 2] = _small(torch.float16)[: len(blocks)].repeat(4)[: len(blocks), None].view(torch.uint8)
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_block_count(1)
    tiles = []
    for name, shape in shapes.items():
        module, _, last = name.rpartition(".")
        inner = module.removeprefix("model.layers.0.")
        whole = f"{'' if inner == module else 'blk.0.'}{_GGUF_NAMES[inner]}.{last}"
        big = "mlp." in name
        tile = blocks if big else plain(shape).tile.float() if len(shape) == 1 else plain(shape).tile.half()
        size = math.prod(shape) // numel * nbytes if big else math.prod(shape) * tile.element_size()
        raw = kind if big else gguf.GGMLQuantizationType["F32" if len(shape) == 1 else "F16"]
        bytes_of = gguf.quant_shape_to_byte_shape(shape, raw) if big else shape
        writer.add_tensor_info(whole, bytes_of, np.dtype(np.uint8 if big else np.float16), size, raw_dtype=raw)
        tiles.append((tile, size))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "ab") as file:
        for tile, size in tiles:
            file.write(b"\0" * (-file.tell() % 32))
            repeat(file, tile, size)
    return sum(size for _, size in tiles)


def repeat(file: BinaryIO, tile: Tensor, nbytes: int) -> None:
    """A tile's bytes again and again."""
    raw = tile.contiguous().view(torch.uint8).numpy().tobytes()
    while nbytes:
        nbytes -= file.write(raw[:nbytes])
