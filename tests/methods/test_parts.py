"""Steps that leave parts of a model out: not perturbed, not updated, not written back; the same bits everywhere."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.compare import assert_same
from support.fake_cuda import DelayedCpuDevice, FakeBackend, FakeCudaDevice
from support.training import batches, in_words, placed, resident, stored_weights, train
from support.zoo.small import tiny_llama, tiny_opt
from zo_offload import NSPSA, ConfigError, Engine, LeZO, MeZO
from zo_offload.cli import main
from zo_offload.kernels.device_updates import UpdateTable
from zo_offload.kernels.records import Gain, Smallest, Update
from zo_offload.numerics.updates import Parts, UpdateLog, with_folds
from zo_offload.replay import replayed
from zo_offload.run.late import LateLog
from zo_offload.stream import emitter

METHOD = LeZO(lr=1e-3, eps=1e-2, sparsity=0.6, weight_decay=0.1, batch_size=4)


@dataclass(frozen=True, kw_only=True)
class All(NSPSA):
    """Every seam at once: parts of its own, several noises, masks and gains."""

    def part(self, name: str) -> str | None:
        return "heads" if "self_attn" in name else "rest" if "mlp" in name else None

    def trained_parts(self, run_seed: int, step: int, parts: Any) -> Any:
        return [["heads"], [], ["rest"], ["heads", "rest"], []][step % 5]

    def mask(self, run_seed: int, name: str, shape: torch.Size) -> Smallest | None:
        return Smallest(0.5) if "proj" in name else None

    def gain(self, name: str, shape: torch.Size) -> Gain:
        return Gain(2.0, 0.25) if "q_proj" in name else Gain()


EVERY = All(lr=1e-2, eps=1e-2, directions=2, weight_decay=0.1, batch_size=4)


def llama():
    return tiny_llama(3)


WAYS = [
    dict(offload="host", num_slots=2), dict(offload="disk", order="lane"),
    dict(offload="disk", device_memory=250_000),
]  # fmt: skip


@pytest.mark.parametrize(
    "method, storage",
    [(METHOD, "bf16"), (METHOD, "int8+8"), (EVERY, "bf16+16")],
    ids=["lezo bf16", "lezo int8+8", "every seam"],
)
def test_a_run_is_the_same_everywhere_after_a_resume_and_in_a_replay(method, storage, tmp_path, use):
    rounding = "nearest" if storage == "bf16+16" else "stochastic"
    fixed = dict(storage=storage, rounding=rounding, method=method, fold_every=2)
    given = {} if method.own() else {"method": type(method)}
    never = resident(llama, 5, **fixed)
    for way in WAYS:
        assert_same(never, train(llama(), 5, **fixed, **placed(way, tmp_path / in_words(way))), in_words(way))
    run_dir, longer = tmp_path / in_words(WAYS[1]) / "run", resident(llama, 7, **fixed)
    with Engine.resume(run_dir, llama(), **given) as engine:
        rest = engine.fit(batches(), steps=7).losses
        assert_same(longer, (longer[0][:5] + rest, stored_weights(engine)))
    with replayed(llama(), run_dir, **given) as engine:
        assert_same(longer[1], stored_weights(engine))
    for device in (DelayedCpuDevice(1), FakeCudaDevice(FakeBackend())):
        use(device)
        assert_same(never, train(llama(), 5, **fixed, offload="host", num_slots=2))


def test_what_a_step_leaves_out_keeps_its_bits_and_is_one_tensor_for_all_lanes(monkeypatch):
    served: list[tuple[str, int]] = []
    one, run = emitter.Emitter.emit_one, emitter.Emitter._call

    def alone(self, part, window, slot, writes, lanes, outs, rows):
        served.append((part.piece.name, len(outs)))
        one(self, part, window, slot, writes, lanes, outs, rows)

    def together(share, slot, ready, told, mark):
        served.extend((part.piece.name, len(lanes)) for part, (_, lanes, _, _) in zip(share.parts, told, strict=True))
        run(share, slot, ready, told, mark)

    monkeypatch.setattr(emitter.Emitter, "emit_one", alone)
    monkeypatch.setattr(emitter.Emitter, "_call", staticmethod(together))
    with Engine(llama(), method=METHOD, storage="fp32", fold_every=1) as engine:
        parts, before = engine.active.opened.prepared.parts, stored_weights(engine)
        assert parts.names == [f"model.layers.{i}" for i in range(3)]
        for step, batch in enumerate(batches(4)):
            served.clear()
            engine.step(batch)
            after, chosen = stored_weights(engine), parts.chosen(step)
            assert len(chosen) == 1
            for name, w in after.items():
                trains = parts.of.get(name) is None or parts.of[name] in chosen
                assert torch.equal(w, before[name]) != trains, name
                assert all(n == (2 if trains else 1) for found, n in served if found == name), name
            before = after


@pytest.mark.parametrize("offload", ["host", "disk"])
def test_what_a_step_leaves_out_is_not_written_back(offload, tmp_path):
    more = dict(offload=offload, num_slots=2, storage="bf16+16", fold_every=1, trainable="model.layers")
    more |= dict(run_dir=tmp_path / "run") if offload == "disk" else {}
    with Engine(llama(), method=METHOD, **more) as engine:
        flushed = engine.fit(batches(), steps=9).flush_bytes
        blocks = sum(engine.layout.block_bytes[b] for b in engine.layout.written)
        assert 0 < flushed <= 9 * blocks / 3 + blocks
    with Engine(llama(), method=MeZO(batch_size=4), **more | {"run_dir": tmp_path / "all"}) as engine:
        assert engine.fit(batches(), steps=9).flush_bytes >= 2.5 * flushed


def test_parts_of_the_log_are_what_the_device_has():
    """Random steps, chosen parts and folds: the log's list, and the records in device memory less those of nothing."""
    chance = random.Random(4)
    for _ in range(30):
        every, picks = chance.choice([1, 2, 3]), [chance.sample("abc", chance.randrange(4)) for _ in range(12)]
        parts = Parts({}, lambda step, picks=picks: frozenset(picks[step]))
        log, late = (
            UpdateLog(parts=parts),
            LateLog(UpdateLog(parts=parts), UpdateTable(torch.device("cpu"), parts="abc")),
        )
        versions = [0]
        for step in range(12):
            given = [Update(2 * step + i, 0.5, 0.75, begins=not i) for i in range(chance.choice([0, 1, 2]))]
            for one in (log, late):
                one.append(with_folds(given, step, every))
            versions.append(log.folded)
        for version in set(versions):
            for part in (None, *"abc"):
                ours = log.since(version, True, 1.0, part)
                theirs = late.since(version, True, 1.0, part).read()
                assert [u for u in theirs if u.coeff or u.fold] == [replace(u, begins=t.begins) for u, t in zip(
                    ours, [t for t in theirs if t.coeff or t.fold], strict=True)]  # fmt: skip
                assert log.lacks(version, part) == late.lacks(version, part)
                if not log.lacks(version, part):
                    assert not any(u.fold for u in ours)
                elif part is not None and any(u.coeff for u in ours[:1]):
                    assert any(u.fold for u in ours)


def test_layers_are_what_a_model_numbers():
    lezo = LeZO()
    assert lezo.part("model.layers.11.mlp.experts.3.up.weight") == "model.layers.11"
    assert lezo.part("transformer.h.0.attn.c_attn.bias") == "transformer.h.0"
    assert lezo.part("model.embed_tokens.weight") is None and lezo.part("0") is None
    layers = [f"layers.{i}" for i in range(40)]
    drawn = [lezo.trained_parts(5, step, layers) for step in range(200)]
    assert all(len(set(found)) == 10 for found in drawn)
    assert {len([1 for found in drawn if layer in found]) > 20 for layer in layers} == {True}
    assert lezo.trained_parts(5, 3, layers) == drawn[3] != lezo.trained_parts(6, 3, layers)


def test_a_model_without_layers_to_choose_among_is_refused():
    with pytest.raises(ConfigError, match=r"there are none\. Use mezo"):
        Engine(torch.nn.Sequential(torch.nn.Linear(2, 2))[0], method=METHOD, example={"input": torch.ones(1, 2)})
    with pytest.raises(ConfigError, match=r"there is only model\.layers\.1"):
        Engine(llama(), method=METHOD, trainable="model.layers.1")
    with pytest.raises(ConfigError, match="sparsity=1"):
        LeZO(sparsity=1.0)


def test_from_the_command_line(tmp_path: Path, capsys: Any) -> None:
    base, rows = tmp_path / "base", tmp_path / "rows.jsonl"
    tiny_opt().save_pretrained(base)
    rows.write_text("".join(json.dumps({"input_ids": [5 + i, 6, 7]}) + "\n" for i in range(8)))
    run = ["--data", str(rows), "--steps", "2", "--batch-size", "2", "--run-dir", str(tmp_path / "a")]
    assert main(["fit", str(base), *run, "--method", "lezo", "--sparsity", "0.5", "--offload", "disk"]) == 0
    assert main(["fit", str(tmp_path / "a"), "--resume", "--steps", "4"]) == 0
    assert main(["replay", str(base), str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 0
    assert main(["journal", "check", str(tmp_path / "a")]) == 0
    assert "step 4 sound" in capsys.readouterr().out


def test_adapters_of_layers_that_steps_leave_out_are_kept_with_the_run(tmp_path):
    """They stay on the device in one block: what a step left out of it is brought along."""
    pytest.importorskip("peft", reason="the package peft makes the adapters")
    tiny_opt(layers=3).save_pretrained(tmp_path / "base")
    settings = dict(method=replace(METHOD, sparsity=0.7), adapter="r=2", fold_every=2)
    with Engine(tmp_path / "base", offload="none", **settings) as engine:
        losses, want = [engine.step(batch).loss for batch in batches(6)], stored_weights(engine)
    run = tmp_path / "run"
    with Engine(tmp_path / "base", offload="host", run_dir=run, snapshot_steps=1, **settings) as engine:
        got = [engine.step(batch).loss for batch in batches(6)[:3]]
    with Engine.resume(run, snapshot_steps=1) as engine:
        got += [engine.step(batch).loss for batch in batches(6)[3:]]
        assert_same((losses, want), (got, stored_weights(engine)))
