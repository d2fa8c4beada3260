"""On a GPU: lanes of the CPU's architecture list. Two steps, resident and streamed, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

from support.training import squares
from support.zoo.archs import ALL, Arch, build
from zo_offload import Engine, MeZO


def losses(arch: Arch, device: str, offload: str, **settings: Any) -> list[float]:
    batch = arch.batch(0)
    with Engine(
        build(arch), method=MeZO(lr=1e-3), objective=squares, device=device, offload=offload, example=batch, **settings
    ) as engine:
        return [engine.step(batch).loss for _ in range(2)]


@pytest.mark.parametrize("arch", ALL, ids=lambda arch: arch.name)
def test_an_architecture_streams_as_it_runs_resident(arch):
    assert losses(arch, "cuda", "none") == losses(arch, "cuda", "host", num_slots=2)
