"""Whose threads the native kernels should compute on: the fused pass between matmuls, on torch's threads or its own.

    python -m benchmarks.threads [--repeats 60]

One JSON line. A layer's work as a step does it: two products of 128 tokens with one matrix, then a fused pass over a
matrix of that size (fp32, one update, two lanes), twelve matrices in turn. Both ways alternate within one process;
times are medians of milliseconds a matrix, `fused_ratio` is own / torch's.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from typing import Any

import torch

from benchmarks.common import about, emit, quantile
from zo_offload.formats import get_format
from zo_offload.kernels import native
from zo_offload.kernels.records import Perturbation, Update
from zo_offload.numerics.fused import fused_pass
from zo_offload.numerics.noise import NoiseSpec

ROWS, COLUMNS, TOKENS, MATRICES = 768, 3072, 128, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60)
    options = parser.parse_args()
    library = native.library()
    if library is None or library.threads != "torch's":
        raise SystemExit(f"there is one way only: {native.describe()}")
    handle = ctypes.CDLL(str(library.path))
    numel, fmt = ROWS * COLUMNS, get_format("fp32")
    stored = [torch.zeros(fmt.nbytes(numel), dtype=torch.uint8) for _ in range(MATRICES)]
    outs = [torch.zeros(ROWS, COLUMNS) for _ in range(2)]
    x = torch.randn(TOKENS, COLUMNS)
    lanes = [Perturbation(7, 2.0**-10), Perturbation(7, -(2.0**-10))]
    times: dict[str, list[tuple[float, float]]] = {"own": [], "torch": []}
    for _ in range(options.repeats):
        for way, found in times.items():
            if way == "own":
                handle.zo_cpu_share_threads(None, None)
            else:
                native.share_threads(handle)
            products = fused = 0.0
            for block in stored:
                start = time.perf_counter()
                for out in outs:
                    x @ out.t()
                between = time.perf_counter()
                fused_pass(
                    block, fmt, param_id=3, numel=numel, updates=[Update(5, 2.0**-20)], noise=NoiseSpec("gaussian"),
                    perturbations=lanes, outs=outs,
                )  # fmt: skip
                products, fused = products + between - start, fused + time.perf_counter() - between
            found.append((1e3 * fused / MATRICES, 1e3 * products / MATRICES))
    result: dict[str, Any] = {"n": options.repeats, "threads": torch.get_num_threads()}
    for way, found in times.items():
        for name, column in (("fused_ms", 0), ("products_ms", 1)):
            result[f"{way}_{name}"] = round(quantile([row[column] for row in found], 0.5), 3)
    result["fused_ratio"] = round(result["own_fused_ms"] / result["torch_fused_ms"], 3)
    emit(result, about("threads"))


if __name__ == "__main__":
    main()
