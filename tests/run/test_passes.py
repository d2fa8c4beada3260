"""Passes: which weights a lane sees, and how often they are made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from support.zoo.models import ZOO
from zo_offload import FZOO, Engine, MeZO
from zo_offload.devices import cpu
from zo_offload.errors import PlanError
from zo_offload.kernels.records import STILL


def batch() -> dict[str, Any]:
    ids = torch.arange(3, 21).reshape(2, 9)
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("storage", ["int8+8", "bf16+16"])
def test_a_lane_of_a_step_that_is_not_perturbed_sees_the_same_weights_alone_as_beside_others(storage: str) -> None:
    """It is no evaluation, which sees the masters: its loss is compared with those of perturbed lanes."""
    method = FZOO(lr=1e-2, directions=3, batch_size=2)
    with Engine(ZOO["llama"].build(), method=method, storage=storage, offload="host") as engine:
        engine.step(batch())
        passes = engine.active.start().passes
        perturbations = method.perturbations(0, 1)
        assert perturbations[0] == STILL
        beside = passes.losses(batch(), perturbations, 1, step=1, late=False)[0]
        assert passes.losses(batch(), [STILL], 1, step=1, late=False) == [beside]
        exact = engine.evaluate([batch()])["loss"]
        assert exact == float(engine.run(batch()).loss) and exact != beside


def counted(engine: Engine) -> Counter[tuple[str, int]]:
    """(parameter, different copies made of it) -> how often, from now on."""
    emits: Counter[tuple[str, int]] = Counter()
    streamer = engine.active.start().streamer
    emit = streamer.emit

    def count(owner: Any, perturbations: Any, *args: Any, **how: Any) -> Any:
        scratch = emit(owner, perturbations, *args, **how)
        for name, copies in zip(owner.params, zip(*scratch, strict=True), strict=True):
            emits[name, len({id(weights) for weights in copies})] += 1
        return scratch

    streamer.emit = count  # type: ignore[method-assign]
    return emits


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_what_does_not_train_is_made_once_for_all_lanes(storage: str, micro_batches: int) -> None:
    method = FZOO(lr=1e-3, directions=8, batch_size=2)
    with Engine(ZOO["llama"].build(), method=method, trainable="model.layers.1", storage=storage) as engine:
        engine.step(batch(), micro_batches=micro_batches)  # watched
        emits = counted(engine)
        engine.step(batch(), micro_batches=micro_batches)
    assert emits, "nothing was counted"
    for (name, copies), times in emits.items():
        assert (copies, times) == ((9 if name.startswith("model.layers.1.") else 1), 1), name


def test_what_does_not_train_is_the_same_in_every_order_and_with_rows_and_cut_weights(tmp_path: Any) -> None:
    settings = dict(method=MeZO(lr=1e-2, batch_size=2), trainable="model.layers.1.self_attn", block_numel=700)
    losses = []
    for more in (
        dict(order="module"), dict(order="block"), dict(order="lane"),
        dict(offload="disk", run_dir=tmp_path / "run", num_slots=2),
    ):  # fmt: skip
        with Engine(ZOO["llama"].build(), **settings, **more) as engine:  # type: ignore[arg-type]
            losses.append([engine.step(batch(), micro_batches=2).loss for _ in range(3)])
    assert all(row == losses[0] for row in losses) and len(set(losses[0])) == 3


@pytest.mark.parametrize("example", [None, {"x": torch.ones(2, 4)}], ids=["untraced", "traced"])
def test_a_forward_that_runs_nothing_of_what_trains_is_refused_at_the_first_step(example: Any) -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.used(x).mean()}

    rows = {"x": torch.ones(2, 4)}
    with Engine(Two(), method=MeZO(batch_size=2), trainable="other", example=example) as engine:
        for _ in range(2):
            with pytest.raises(PlanError, match=r"none of the modules that hold what trains \(2 parameters"):
                engine.step(rows)
        assert engine.log.version == 0
        assert set(engine.evaluate([rows], batch_size=2)) == {"loss"}, "an evaluation needs nothing that trains"


@pytest.mark.parametrize("offload", ["none", "host", "disk"])
@pytest.mark.parametrize("grows, trims", [(0, [0, 0]), (20 << 20, [0, 3]), (40 << 20, [1, 6])])
def test_what_the_allocator_keeps_is_given_back_once_the_process_has_grown(
    monkeypatch: Any, tmp_path: Path, offload: Any, grows: int, trims: list[int]
) -> None:
    """By 32 MB where blocks stream from files, within a pass too, as a model of many layers has many visits. Beside a
    model in memory by an eighth, and after a pass: its steps would pay for what the next one takes again."""
    files, how = offload == "disk", dict(offload=offload, num_slots=2, block_numel=4096)
    run_dir = tmp_path / "run" if files else None
    with Engine(ZOO["llama"].build(), method=MeZO(), run_dir=run_dir, **how) as engine:
        engine.step(batch())
        size, found, device = [1 << 30], list[int](), engine.active.start().passes.device
        monkeypatch.setattr(cpu, "private_bytes", lambda: size[0])
        monkeypatch.setattr(device, "trim", lambda: found.append(1))
        device._tidied = 1 << 30
        for _ in range(6):
            size[0] += grows
            device.tidy(files)
        assert len(found) == trims[files]
        asked, tidy = list[bool](), device.tidy
        monkeypatch.setattr(device, "tidy", lambda streams: (asked.append(streams), tidy(streams)))
        engine.step(batch())
        assert asked == [files] * (len(engine.plan.visits) if files else 1)
