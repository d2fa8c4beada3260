"""On a GPU: lanes of the CPU's architecture list. Two steps, resident and streamed, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from archs import ALL, Arch, build
from torch.utils._pytree import tree_leaves

from zo_offload import Engine, MeZO


def squares(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """A loss for whatever a model returns: the mean squares of all its floating point tensors."""
    found = [leaf for leaf in tree_leaves(model(**batch)) if torch.is_tensor(leaf) and leaf.is_floating_point()]
    return torch.stack([leaf.float().square().mean() for leaf in found]).sum()


def losses(arch: Arch, device: str, offload: str, **settings: Any) -> list[float]:
    batch = arch.batch(0)
    with Engine(
        build(arch), method=MeZO(lr=1e-3), objective=squares, device=device, offload=offload, example=batch, **settings
    ) as engine:
        return [engine.step(batch).loss for _ in range(2)]


@pytest.mark.parametrize("arch", ALL, ids=lambda arch: arch.name)
def test_an_architecture_streams_as_it_runs_resident(arch):
    assert losses(arch, "cuda", "none") == losses(arch, "cuda", "host", num_slots=2)
