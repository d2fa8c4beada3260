"""One block's checksum per step, in turn: ranks compare it, since their weights are never sent.

Equal steps on an equal base give equal bytes (promises 1 and 4 of docs/architecture.md), on any tier and device. So
checksums that differ at one version show a fault of memory or arithmetic that no loss would show. A block in memory is
summed in place, some megabytes at a time; a block that streams from disk has its checksum in its file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..plan.layout import Layout
from ..stream.window import BlockWindow
from ..tiers import DiskTier, Tier
from ..tiers.checksum import CHUNK_BYTES, checksum

PART_BYTES = 1024 * CHUNK_BYTES  # bytes copied at a time


def audit(step: int, names: Sequence[str], layout: Layout, tier: Tier, window: BlockWindow) -> list[Any] | None:
    """(place, block, its name, version, checksum) of this step's block, between steps; None if it is not at rest. Two
    checksums can be compared if the four values before them are equal."""
    block = step % len(names)
    if window.is_in_memory(block):
        nbytes, total, versions = layout.block_bytes[block], 0, set()
        for start in range(0, nbytes, PART_BYTES):
            part = torch.empty(min(PART_BYTES, nbytes - start), dtype=torch.uint8, device="cpu")
            versions.add(window.copy_block(block, part, start))
            total += checksum(part, start)
        version, where = versions.pop() if len(versions) == 1 else -1, "memory"
    elif isinstance(tier, DiskTier) and (headers := tier.headers(block)):
        version, total, where = headers[0][1].version, sum(headers[0][1].sums), "file"
    else:
        return None
    return None if version < 0 else [where, block, names[block], version, f"{total % (1 << 64):016x}"]
