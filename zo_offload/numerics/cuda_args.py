"""What a launch of the CUDA kernels is given: csrc/cuda_kernels.h's structs, the names of kernels, and their blocks.

A launch takes the passes of up to `PARTS` parameters of one format. Its one argument is a struct that the driver copies
when the launch is enqueued, so no table in device memory has to be made, uploaded or kept alive until the GPU has read
it. Prepared launches (`on_gpu.py`) pack it once and rewrite what changes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from ..formats import FORMATS, KEPT, get_format
from ..kernels import native
from ..kernels.distributions import all_kinds, row
from ..kernels.records import LANE

THREADS = 256
PARTS, LANES = 8, 32
"""The most passes of a launch, and lanes of all of them."""
KERNELS = {fmt.code: fmt.kernel for fmt in (*FORMATS.values(), *KEPT.values(), get_format("mxfp4_across_8"))}
"""The names of a storage format's kernels, by its code."""

_TAIL = struct.Struct("<QiIII")  # total_rows, last_fold, first_lane, first_block, end_block
PART_BYTES = native.PASS_BYTES + _TAIL.size
ARGS_BYTES = PARTS * PART_BYTES + LANES * LANE.size
LANES_AT = PARTS * PART_BYTES
"""Where a launch's lanes begin in its struct."""
_NO_PART = bytes(native.PASS_BYTES) + _TAIL.pack(0, -1, 0, 0, 0xFFFFFFFF)
_NOISE = struct.Struct("<QQQQII")
NOISE_BYTES = _NOISE.size
ABI = native.ABI_VERSION << 16 | native.LAYOUT_VERSION << 12 | ARGS_BYTES


def pack_part(
    *, num_lanes: int, last_fold: int, total_rows: int, first_lane: int, first_block: int, end_block: int, **fields: Any
) -> bytes:
    """struct zo_cuda_part: `native.pack_pass` of the fields, then fields for GPUs only. All addresses are device
    memory."""
    tail = _TAIL.pack(total_rows, last_fold, first_lane, first_block, end_block)
    return native.pack_pass(num_lanes=num_lanes, **fields) + tail


def pack_args(parts: Sequence[bytes], lanes: Sequence[tuple[int, int, float, int]]) -> bytes:
    """struct zo_cuda_args. lanes: (seed, address, scale, format code) as in `records.LANE`, part after part."""
    listed = b"".join([*parts, *[_NO_PART] * (PARTS - len(parts)), *(LANE.pack(*lane) for lane in lanes)])
    return listed.ljust(ARGS_BYTES, b"\0")


def pack_noise(out: int, numel: int, offset: int, seed: int, param_id: int, rounds: int) -> bytes:
    """struct zo_cuda_noise_args."""
    return _NOISE.pack(out, numel, offset, seed, param_id, rounds)


def tiles(distribution: str, numel: int, offset: int, num_rows: int = 0) -> int:
    """The number of warps of a pass, each of which computes a tile. ConfigError if the kernels cannot count them."""
    size = row(distribution).warp
    if size is None:
        raise ConfigError(f"distribution={distribution!r}: the CUDA kernels do not make it; train on the CPU")
    count = num_rows * (numel // size + 2) if num_rows else -(-(offset + numel) // size) - offset // size
    if count >= 1 << 31:
        raise ConfigError(f"{count} tiles of {size} elements: a pass on a GPU has fewer than 2**31, cut it into pieces")
    return count


def blocks_of(warps: Sequence[int], most: int) -> list[int]:
    """Each part's last block + 1, from its number of warps. most: blocks of a launch; above that every part gets its
    share of them, and its warps compute several tiles."""
    wanted = [max(1, -(-count // (THREADS // 32))) for count in warps]
    total, end = sum(wanted), 0
    ends = []
    for blocks in wanted:
        end += blocks if total <= most else max(1, blocks * most // total)
        ends.append(end)
    return ends


def pass_kernel(code: int, distribution: str, target_scales: bool = False) -> str:
    """The kernel of a fused pass over values of the format with that code."""
    return f"zo_{'scales' if target_scales else 'pass'}_{KERNELS[code]}_{distribution}"


def part_of(kernel: str) -> str:
    """The storage format of a kernel; "" if it has none."""
    _, what, rest = kernel.split("_", 2)
    return rest.rpartition("_")[0] if what in ("pass", "scales") else ""


def noise_kernel(distribution: str) -> str:
    return f"zo_noise_{distribution}"


def kernel_names() -> set[str]:
    """The names of all kernels of an image."""
    kinds = [kind.name for kind in all_kinds() if kind.warp is not None]
    passes = {pass_kernel(code, kind) for code in KERNELS for kind in kinds}
    passes |= {pass_kernel(fmt.code, kind, True) for fmt in FORMATS.values() if fmt.trains_scales for kind in kinds}
    return passes | {noise_kernel(kind) for kind in kinds} | {"zo_gaussian_table", "zo_cuda_abi"}
