"""compute="auto": bf16 where this CPU is measured to be faster with it; decided once, and part of the run's record."""

import json
import warnings

import pytest
import torch

from support.compare import assert_same
from support.zoo.models import ZOO
from zo_offload import Engine, MeZO
from zo_offload.cli import main
from zo_offload.errors import ConfigError
from zo_offload.run import compute

pytestmark = pytest.mark.usefixtures("quiet_transformers")

IDS = torch.arange(3, 21).reshape(2, 9)
BATCH = {"input_ids": IDS, "labels": IDS}


@pytest.fixture
def base(tmp_path):
    ZOO["llama"].build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def measured(monkeypatch, *gains):
    monkeypatch.setattr(compute, "bf16_gains", lambda threads: dict(zip(("32", "256"), gains, strict=True)))


def never(threads):
    raise AssertionError("measured again")


def test_the_faster_dtype_is_named_in_the_record_and_not_measured_again(base, tmp_path, monkeypatch):
    measured(monkeypatch, 1.9, 3.2)
    kept = tmp_path / "run"
    with Engine(base, method=MeZO(lr=1e-3), compute="auto", storage="fp32", run_dir=kept) as engine:
        assert engine.config.compute == "bf16" and "3.2 times as fast at 256 tokens" in engine.decided[0]
        losses = engine.step(BATCH).loss
    monkeypatch.setattr(compute, "bf16_gains", never)
    with Engine(base, method=MeZO(lr=1e-3), compute="bf16", storage="fp32") as engine:
        assert_same(engine.step(BATCH).loss, losses)
        after = engine.step(BATCH).loss
        assert not engine.decided
    with Engine.resume(kept) as engine:
        assert engine.config.compute == "bf16"
        assert_same(engine.step(BATCH).loss, after)


@pytest.mark.parametrize("gains", [(0.3, 0.4), (0.9, 3.0), (1.1, 1.1)], ids=["emulated", "short batches", "noise"])
def test_what_is_not_clearly_faster_at_each_length_is_not_taken(base, monkeypatch, capsys, gains):
    measured(monkeypatch, *gains)
    assert main(["plan", str(base), "--compute", "auto"]) == 0
    assert "compute auto takes fp32: a layer in bf16 is" in capsys.readouterr().out


def test_fit_prints_what_was_taken(base, tmp_path, monkeypatch, capsys):
    measured(monkeypatch, 2.0, 2.0)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input_ids": [3, 4, 5], "labels": [3, 4, 5]}) + "\n")
    words = ["--data", str(tmp_path / "rows.jsonl"), "--steps", "1", "--compute", "auto", "--quiet"]
    assert main(["fit", str(base), *words]) == 0
    assert "compute auto takes bf16" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16"])
def test_a_module_in_memory_has_its_own_dtypes(dtype):
    with pytest.raises(ConfigError, match=r"checkpoint's directory.*here float32.*module\.to"):
        Engine(ZOO["llama"].build(), compute=dtype)
    Engine(ZOO["llama"].build(), compute="fp32").close()


def test_a_loss_of_16_bits_is_told_once(base, tmp_path):
    """Heads on classes leave it in the forward's dtype; those on a vocabulary compute it in float32."""
    ZOO["bert"].build().save_pretrained(tmp_path / "bert")
    batch = {"input_ids": IDS, "labels": torch.tensor([0, 1])}
    for dtype, count in (("bf16", 1), ("fp16", 1), ("fp32", 0)):
        with warnings.catch_warnings(record=True) as told, Engine(tmp_path / "bert", compute=dtype) as engine:
            warnings.simplefilter("always")
            for _ in range(2):
                engine.step(batch)
        assert len([w for w in told if "digits: lanes differ by less" in str(w.message)]) == count
    with warnings.catch_warnings(), Engine(base, compute="bf16") as engine:
        warnings.simplefilter("error")
        engine.step(BATCH)


def test_a_layer_is_measured_in_both():
    gains = compute.bf16_gains(torch.get_num_threads())
    assert gains.keys() == {"32", "256"} and all(0 < gain < 100 for gain in gains.values())
