"""Block files without a run: shapes, contents, and a tier that holds version 0."""

from __future__ import annotations

import torch

from zo_offload.tiers.block_file import FileShape
from zo_offload.tiers.disk import DiskTier

SHAPES = {
    "all trained": FileShape(0, 20480, 20480, ((0, 20480),)),
    "parts, odd sizes": FileShape(0, 20480, 20480, ((64, 999), (4160, 7001), (16384, 4096))),
    "two regions": FileShape(0, 24576, 16384, ((0, 9000), (12288, 8192))),
}


def content(shape, version):
    """The block's bytes at a version: frozen bytes the same in all."""
    g = torch.Generator().manual_seed(1)
    data = torch.randint(0, 256, (shape.nbytes,), dtype=torch.uint8, generator=g)
    g.manual_seed(100 + version)
    for offset, length in shape.spans:
        data[offset : offset + length] = torch.randint(0, 256, (length,), dtype=torch.uint8, generator=g)
    return data


def fetched(tier, shape, block=0):
    out = torch.empty(shape.nbytes, dtype=torch.uint8)
    tier.fetch(block, out)
    return out


class Alone:
    """Files without a run: nothing is waited for (before_write), and no base is there to rebuild from (base)."""

    def __init__(self, before_write=lambda version: None, base=None):
        self.before_write, self.rebuild, self.rebuilds = before_write, base, base is not None

    def history(self, version):
        return 0


def started(directory, shape, origin=None):
    """A tier that holds version 0, sealed."""
    tier = DiskTier.create(directory, [shape], origin or Alone())
    tier.flush(0, content(shape, 0), ((0, shape.nbytes),), 0)
    tier.seal(0)
    return tier
