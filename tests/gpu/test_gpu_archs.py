"""On a GPU: lanes of the CPU's architecture list. One step, resident and streamed, bit for bit."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ZOO

from zo_offload import Engine, MeZO


@pytest.mark.parametrize("name", ZOO)
def test_an_architecture_streams_as_it_runs_resident(name):
    tiny = ZOO[name]
    inputs = tiny.inputs()

    def objective(model, batch):
        output = model(**batch)
        return (
            next(v for v in output.to_tuple() if torch.is_tensor(v) and v.is_floating_point()).float().square().mean()
        )

    losses = []
    for offload in ("none", "host"):
        with Engine(
            tiny.build(), method=MeZO(lr=1e-3), objective=objective, device="cuda", offload=offload, example=inputs
        ) as engine:  # fmt: skip
            losses.append([engine.step(inputs).loss for _ in range(2)])
    assert losses[0] == losses[1]
