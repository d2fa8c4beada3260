"""Writes tests/data/quantized.safetensors: a small weight in each scheme, stored and decoded by the library of record.

    python -m tests.support.record_quantized

It needs compressed-tensors, bitsandbytes, auto-round and gguf; the tests need only what it wrote. A case `c` has
tensors `c/stored/...` as they would be in a checkpoint and `c/expected/...` as the library decodes them, and in the
file's metadata its settings, the model's dtype and the library's version.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

FILE = Path(__file__).resolve().parent.parent / "data" / "quantized.safetensors"
IN, OUT = 128, 64


class Cases:
    def __init__(self):
        self.tensors, self.metadata = {}, {}

    def add(self, case, library, settings, stored, expected, dtype="bfloat16"):
        """stored, expected: by name"""
        self.tensors |= {f"{case}/stored/{name}": t.detach().clone().contiguous() for name, t in stored.items()}
        self.tensors |= {f"{case}/expected/{name}": t.detach().clone().contiguous() for name, t in expected.items()}
        version = importlib.metadata.version(library)
        self.metadata[case] = json.dumps({"library": f"{library} {version}", "settings": settings, "dtype": dtype})


def weight(seed=0, out=OUT, inputs=IN, dtype=torch.float32):
    return (torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def compressed_tensors(cases):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    def case(name, layout, w, scale, zero=None, extra=None, **arguments):
        args = QuantizationArgs(**arguments)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=layout)
        given = {"weight": w, "weight_scale": scale, **(extra or {})}
        if zero is not None:
            given["weight_zero_point"] = zero
        compressor = BaseCompressor.get_value_from_registry(layout)
        stored = {k: v for k, v in compressor.compress(given, scheme).items() if v is not None}
        decoded = compressor.decompress(dict(stored), scheme)["weight"]
        group = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}
        settings = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}
        cases.add(f"ct-{name}", "compressed-tensors", settings,
                  {f"m.{k}": v for k, v in stored.items()}, {"m.weight": decoded}, str(w.dtype)[6:])  # fmt: skip

    def qparams(w, size, **arguments):
        grouped = w.float().view(w.shape[0], -1, size)
        args = QuantizationArgs(**arguments)
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        return scale.to(w.dtype), zero.to(torch.int8)

    for bits, size, symmetric, dtype in (
        (4, 32, True, torch.bfloat16), (4, 32, False, torch.float16), (4, 128, True, torch.float16),
        (8, 64, True, torch.bfloat16), (8, 32, False, torch.bfloat16), (3, 32, False, torch.bfloat16),
        (4, 128, False, torch.bfloat16),
    ):  # fmt: skip
        w = weight(bits, dtype=dtype)
        arguments = dict(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=size)
        scale, zero = qparams(w, size, **arguments)
        kind = f"int{bits}-g{size}-{'sym' if symmetric else 'asym'}-{str(dtype)[6:]}"
        case(kind, "pack-quantized", w, scale, None if symmetric else zero, **arguments)
    w = weight(5, dtype=torch.bfloat16)
    channel = dict(num_bits=4, type="int", symmetric=True, strategy="channel")
    case("int4-channel", "pack-quantized", w, qparams(w, IN, **channel)[0], **channel)
    channel = dict(num_bits=8, type="int", symmetric=True, strategy="channel")
    case("int8-channel", "int-quantized", w, qparams(w, IN, **channel)[0], **channel)
    largest = w.float().abs()
    fp8 = dict(num_bits=8, type="float", symmetric=True)
    case(
        "fp8-channel",
        "float-quantized",
        w,
        (largest.amax(1, keepdim=True) / 448).to(w.dtype),
        strategy="channel",
        **fp8,
    )
    case("fp8-tensor", "float-quantized", w, (largest.max() / 448).to(w.dtype).view(1), strategy="tensor", **fp8)
    big = weight(6, 200, 320, torch.bfloat16)
    tiles = torch.nn.functional.pad(big.float().abs(), (0, 64, 0, 56)).view(2, 128, 3, 128).amax((1, 3))
    case(
        "fp8-block",
        "float-quantized",
        big,
        (tiles / 448).to(w.dtype),
        strategy="block",
        block_structure=[128, 128],
        **fp8,
    )
    grouped = w.float().abs().view(OUT, -1, 16).amax(-1)
    whole = (448 * 6 / largest.max()).view(1)
    nv = dict(num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16)
    scale = (whole * grouped / 6).to(torch.float8_e4m3fn).to(torch.bfloat16)
    case("nvfp4", "nvfp4-pack-quantized", w, scale, extra={"weight_global_scale": whole}, **nv)
    blocks = w.float().abs().view(OUT, -1, 32).amax(-1)
    powers = torch.exp2(torch.floor(torch.log2(blocks)) - 2).to(torch.bfloat16)
    mx = dict(num_bits=4, type="float", symmetric=True, strategy="group", group_size=32, scale_dtype=torch.uint8)
    case("mxfp4", "mxfp4-pack-quantized", w, powers, **mx)


def bitsandbytes(cases):
    import bitsandbytes.functional as F

    for kind, size, nested, dtype in (
        ("nf4", 64, True, torch.bfloat16), ("nf4", 64, False, torch.float16), ("nf4", 128, False, torch.float32),
        ("fp4", 64, True, torch.bfloat16), ("fp4", 64, False, torch.float32),
    ):  # fmt: skip
        w = weight(7, dtype=dtype)
        codes, state = F.quantize_4bit(w, blocksize=size, quant_type=kind, compress_statistics=nested)
        packed = {f"m.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
        name = f"bnb-{kind}-b{size}{'-nested' if nested else ''}-{str(dtype)[6:]}"
        settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
        cases.add(name, "bitsandbytes", settings, {"m.weight": codes, **packed},
                  {"m.weight": F.dequantize_4bit(codes, state)}, str(dtype)[6:])  # fmt: skip
    codes, scale, _ = F.int8_vectorwise_quant(weight(8, dtype=torch.float16))
    stored = {"m.weight": codes, "m.SCB": scale, "m.weight_format": torch.tensor(0, dtype=torch.uint8)}
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    expected = F.int8_vectorwise_dequant(codes, scale)
    cases.add("bnb-int8", "bitsandbytes", settings, stored, {"m.weight": expected}, "float32")


def auto_round(cases):
    from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    def linear(w):
        layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
        layer.weight.data = w
        return layer

    def grid(w, bits, size, symmetric):
        grouped = w.view(w.shape[0], -1, size)
        if symmetric:
            return (2 * grouped.abs().amax(-1) / (2**bits - 1)).half(), None
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).half()
        return scale, torch.round(-low / scale.float()).clamp(1, 2**bits - 1)

    for bits, size, symmetric, version in (
        (4, 32, True, 1), (4, 128, False, 1), (4, 64, False, 2), (8, 32, True, 1), (8, 32, False, 2), (2, 32, False, 1),
        (3, 32, False, 1), (3, 32, True, 2),
    ):  # fmt: skip
        w = weight(9 + bits)
        scale, zero = grid(w, bits, size, symmetric)
        maker = qlinear_torch_zp if version == 1 else qlinear_torch
        layer = maker.QuantLinear(bits, size, IN, OUT, bias=False)
        layer.device = "cpu"
        layer.pack(linear(w), scale.float(), 2 ** (bits - 1) if symmetric else zero, None, device="cpu")
        stored = {f"m.{part}": getattr(layer, part) for part in ("qweight", "qzeros", "scales")}
        expected = layer(torch.eye(IN, dtype=torch.float16)).T
        settings = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric, "desc_act": False,
                    "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}  # fmt: skip
        name = f"gptq-{bits}-g{size}-{'sym' if symmetric else 'asym'}-v{version}"
        cases.add(name, "auto-round", settings, stored, {"m.weight": expected}, "float16")
    w = weight(20)
    scale, zero = grid(w, 4, 32, False)
    layer = WQLinear_GEMM.from_linear(
        linear(w), 4, 32, scales=scale.t().contiguous(), zeros=zero.t().contiguous(), device="cpu"
    )
    stored = {f"m.{part}": getattr(layer, part) for part in ("qweight", "qzeros", "scales")}
    expected = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, 32).T
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    cases.add("awq-g32", "auto-round", settings, stored, {"m.weight": expected}, "float16")


def gguf_blocks(cases):
    """Random bytes of every type, with scales that are finite, and gguf's own decoding."""
    import gguf
    import numpy as np

    random = np.random.default_rng(0)
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4"):
        code = gguf.GGMLQuantizationType[kind]
        numel, nbytes = gguf.GGML_QUANT_SIZES[code]
        raw = random.integers(0, 256, (8, nbytes), dtype=np.uint8)
        halves = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2),
                  "Q6_K": (208,), "MXFP4": ()}  # fmt: skip
        for at in halves.get(kind, (0,)):
            raw[:, at : at + 2] = random.normal(0, 0.01, (8, 1)).astype(np.float16).view(np.uint8)
        if kind == "MXFP4":
            raw[:, 0] = random.integers(110, 130, 8)
        expected = gguf.dequantize(raw, code).reshape(8, numel)
        cases.add(f"gguf-{kind}", "gguf", {"type": int(code)}, {"blocks": torch.from_numpy(raw)},
                  {"blocks": torch.from_numpy(expected)}, "float32")  # fmt: skip


if __name__ == "__main__":
    cases = Cases()
    for library in (compressed_tensors, bitsandbytes, auto_round, gguf_blocks):
        library(cases)
    save_file(cases.tensors, FILE, metadata=cases.metadata)
    print(f"{FILE}: {len(cases.metadata)} cases, {FILE.stat().st_size} bytes")
