"""What each storage format costs and keeps: bytes, error, speed of encoding and decoding, and what updates leave in it.

    python -m benchmarks.formats [--quick] [--only codec|kept] > formats.jsonl
    python -m benchmarks.formats --exhaustive [--part 3/8]

One JSON line a result on standard output, the same as tables on standard error. One thread throughout.

codec   `encode_gb_per_s`, `decode_gb_per_s`: bytes of float32 read or written a second, `share_of_memcpy` of what a
        torch copy in the same run does with as many bytes (both counting float32 and stored bytes moved). Encoding is
        `encode_values` as a checkpoint meets it, fresh memory included. Errors of weights from N(0, 0.02), relative;
        of a split format the lanes' error (`rms_error`) and the master's.
kept    400 steps w <- w - c_k z_k, c_k from N(0, c), written back every K steps. `kept` is the projection of the change
        that the stored weights show on the change of a float32 run, `noise` what differs from it, relative: kept 1 and
        noise 0 is float32 training. Of a split format the master's.
--exhaustive compares every float32 with torch's casts (bf16, fp16, and fp8 inside its range) and every float32 up
        to 3.39e38 with itself through bf16+16. Some minutes; --part does one of so many equal pieces.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import about, quantile
from benchmarks.kernels import repeat
from zo_offload.formats import FORMATS, Format, decode_values, encode_values, get_format
from zo_offload.kernels.records import Perturbation, Rounding, Update
from zo_offload.numerics.fused import fused_pass
from zo_offload.numerics.noise import NoiseSpec

NAMES = list(FORMATS)
STEPS = 400


def codec(numel: int, seconds: float) -> Iterator[dict[str, Any]]:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0)) * 0.02
    out, source = torch.zeros(numel), torch.zeros(numel)
    for name in NAMES:
        fmt = get_format(name)
        stored, residual = encode_values(values, fmt, threads=1)
        encode = _median(lambda fmt=fmt: encode_values(values, fmt, threads=1), seconds)
        decode = _median(lambda fmt=fmt, stored=stored: _decode(stored, fmt, out), seconds)
        copy = min(repeat(lambda: _ignore(out.copy_(source)), seconds))
        copied = 8 * numel / copy / 1e9
        moved = 4 * numel + stored.numel()
        error = (_decode(stored, fmt, out) - values).double()
        result = {
            "case": "codec", "format": name, "numel": numel, "bytes_per_parameter": round(stored.numel() / numel, 4),
            "residual_bytes": fmt.residual_bytes, "rms_error": float(error.norm() / values.norm()),
            "max_error_of_largest": float(error.abs().max() / values.abs().max()),
            "encode_gb_per_s": round(4 * numel / encode / 1e9, 2),
            "encode_share_of_memcpy": round((moved + fmt.residual_bytes * numel) / encode / 1e9 / copied, 3),
            "decode_gb_per_s": round(4 * numel / decode / 1e9, 2),
            "decode_share_of_memcpy": round(moved / decode / 1e9 / copied, 3), "memcpy_gb_per_s": round(copied, 2),
        }  # fmt: skip
        if residual is not None:
            master = decode_values(stored, residual, fmt, numel)
            result["master_rms_error"] = float((master - values).double().norm() / values.double().norm())
        yield result


def _median(work: Callable[[], object], seconds: float) -> float:
    return quantile(repeat(lambda: _ignore(work()), seconds), 0.5)


def _ignore(_: object) -> None:
    return None


def _decode(stored: Tensor, fmt: Format, out: Tensor) -> Tensor:
    fused_pass(stored, fmt, param_id=0, numel=out.numel(), noise=NoiseSpec(), perturbations=[Perturbation(0, 0.0)],
               outs=[out], threads=1)  # fmt: skip
    return out


def kept(numel: int, every: list[int]) -> Iterator[dict[str, Any]]:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(1)) * 0.02
    for size in (1e-6, 1e-5, 1e-4):
        draws = torch.randn(STEPS, generator=torch.Generator().manual_seed(2)) * size
        want = trained(values, "fp32", draws, 1, "nearest")[1].double()
        for name in NAMES:
            if name == "fp32" or not get_format(name).trains:
                continue
            for k in every:
                for rounding in ("nearest", "stochastic"):
                    before, after = trained(values, name, draws, k, rounding)
                    change, target = after.double() - before.double(), want - values.double()
                    yield {
                        "case": "kept", "format": name, "update": size, "fold_every": k, "rounding": rounding,
                        "steps": STEPS, "numel": numel,
                        "kept": float(change @ target / (target @ target)),
                        "noise": float((change - target).norm() / target.norm()),
                        "equals_fp32": bool(torch.equal(after.double(), want)),
                    }  # fmt: skip


def trained(values: Tensor, name: str, draws: Tensor, every: int, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """Values as first stored, and after the steps; masters, of a split format."""
    fmt, n, spec = get_format(name), values.numel(), NoiseSpec()
    stored, residual = encode_values(values, fmt, threads=1)
    before = decode_values(stored, residual, fmt, n, threads=1)
    updates = [Update(k, float(c), fold=(k + 1) % every == 0) for k, c in enumerate(draws)]
    for start in range(0, STEPS, every):
        fused_pass(stored, fmt, param_id=3, numel=n, updates=updates[start : start + every], rounding=rounding,
                   noise=spec, residual=residual, threads=1)  # fmt: skip
    return before, decode_values(stored, residual, fmt, n, threads=1)


def exhaustive(part: int, parts: int) -> Iterator[dict[str, Any]]:
    """Counts of codes that differ from torch's, over every float32 the comparison is defined for."""
    casts = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
    differ = dict.fromkeys(("bf16", "fp16", *casts, "bf16+16"), 0)
    tried = dict.fromkeys(differ, 0)
    chunk = 127 << 17
    first, last = (-(1 << 31) + (k << 32) // parts for k in (part - 1, part))
    for start in range(first, last, chunk):
        words = torch.arange(start, min(start + chunk, last), dtype=torch.int64).to(torch.int32)
        x = words.view(torch.float32)
        real = ~x.isnan()
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            out = torch.empty(x.numel(), dtype=dtype)
            fused_pass(x.view(torch.uint8), get_format("fp32"), param_id=0, numel=x.numel(), noise=NoiseSpec(),
                       perturbations=[Perturbation(0, 0.0)], outs=[out])  # fmt: skip
            wrong = (out.view(torch.int16) != x.to(dtype).view(torch.int16)) & real
            differ[name] += int(wrong.sum())
            tried[name] += int(real.sum())
        finite = torch.where(words & 0x7FFFFFFF < 0x7F7F8000, x, 0.0)  # the coarse plane of larger ones is infinite
        there_and_back = decode_values(*encode_values(finite, get_format("bf16+16"), threads=2)[:2],
                                       get_format("bf16+16"), x.numel())  # fmt: skip
        differ["bf16+16"] += int((there_and_back.view(torch.int32) != finite.view(torch.int32)).sum())
        tried["bf16+16"] += int((words & 0x7FFFFFFF < 0x7F7F8000).sum())
        for name, dtype in casts.items():
            _compare_fp8(x, name, dtype, differ, tried)
    for name in differ:
        yield {
            "case": "exhaustive", "format": name, "part": f"{part}/{parts}", "values": tried[name],
            "differ": differ[name],
        }  # fmt: skip


def _compare_fp8(x: Tensor, name: str, dtype: torch.dtype, differ: dict[str, int], tried: dict[str, int]) -> None:
    """127 values a group; its first is the format's largest, so that the scale is 1 and codes are torch's own."""
    largest = torch.finfo(dtype).max
    inside = x.abs() <= largest
    if not bool(inside.any()):
        return
    values = torch.where(inside, x, 0.0)
    values = torch.nn.functional.pad(values, (0, -values.numel() % 127)).view(-1, 127)
    groups = torch.cat([torch.full((len(values), 1), largest), values], 1)
    codes = encode_values(groups, get_format(name), threads=2)[0][: groups.numel()].view(-1, 128)[:, 1:]
    differ[name] += int((codes != values.to(dtype).view(torch.uint8)).sum())
    tried[name] += int(inside.sum())


def tables(results: list[dict[str, Any]]) -> str:
    lines: list[str] = []
    rows = [r for r in results if r["case"] == "codec"]
    if rows:
        lines.append(
            f"{'format':10} {'B/param':>8} {'+held':>5} {'rms error':>10} {'master':>9} {'encode':>14} {'decode':>14}"
        )
        for r in rows:
            master = f"{r['master_rms_error']:.1e}" if "master_rms_error" in r else ""
            lines.append(
                f"{r['format']:10} {r['bytes_per_parameter']:8.4f} {r['residual_bytes']:5} {r['rms_error']:10.5f} "
                f"{master:>9} {r['encode_gb_per_s']:6.2f} ({r['encode_share_of_memcpy']:4.0%}) "
                f"{r['decode_gb_per_s']:7.2f} ({r['decode_share_of_memcpy']:4.0%})"
            )
        lines.append("encode, decode: GB of float32 a second on one core, and the share of memcpy's bytes moved\n")
    found = {(r["format"], r["fold_every"], r["rounding"], r["update"]): r for r in results if r["case"] == "kept"}
    if found:
        sizes = sorted({key[3] for key in found})
        lines.append(f"{'kept / noise after 400 steps':32}" + "".join(f"{f'c = {size:g}':>18}" for size in sizes))
        for key in dict.fromkeys(key[:3] for key in found):
            name, every, rounding = key
            cells = [found[(*key, size)] for size in sizes]
            numbers = "".join(f"{c['kept']:9.3f} / {c['noise']:<6.3g}" for c in cells)
            lines.append(f"{name:10} K={every:<3} {rounding:14}" + numbers)
    lines += [f"{r['format']}: {r['differ']} of {r['values']} differ" for r in results if r["case"] == "exhaustive"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, some seconds")
    parser.add_argument("--only", choices=("codec", "kept"))
    parser.add_argument("--exhaustive", action="store_true", help="every float32, instead")
    parser.add_argument("--part", default="1/1", help="of the exhaustive comparison")
    options = parser.parse_args()
    torch.set_num_threads(2 if options.exhaustive else 1)
    common, results = about("formats"), []
    parts: list[Iterator[dict[str, Any]]] = []
    if options.exhaustive:
        part, of = (int(x) for x in options.part.split("/"))
        parts = [exhaustive(part, of)]
    else:
        if options.only != "kept":
            parts.append(codec(1 << 20 if options.quick else 1 << 24, 0.1 if options.quick else 0.5))
        if options.only != "codec":
            parts.append(kept(1 << 13 if options.quick else 1 << 18, [1, 8] if options.quick else [1, 8, 16]))
    for results_of in parts:
        for result in results_of:
            results.append(result)
            print(json.dumps(common | result), flush=True)
    print(tables(results), file=sys.stderr)


if __name__ == "__main__":
    main()
