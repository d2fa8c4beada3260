"""An export takes its place whole, over an earlier one too, and never a run's or a base's; of PEFT the adapter."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from support.zoo.models import LLAMA, ZOO
from zo_offload import Engine, MeZO
from zo_offload.checkpoint import publish
from zo_offload.checkpoint.checkpoint import save_pretrained
from zo_offload.cli import main
from zo_offload.errors import CheckpointError, ConfigError

BATCH = {"input_ids": torch.arange(3, 21).reshape(2, 9), "labels": torch.arange(3, 21).reshape(2, 9)}
SHARD = 20_000


pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture
def base(tmp_path):
    ZOO["llama"].build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_killed_exports_leave_the_old_one_the_new_one_or_a_loud_failure():
    """The harness in its small version: it forks, so in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.export_kills", "--every", "47", "--random", "2", "--readers", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["wrong"] for r in results] == [0, 0, 0] and results[0]["kills"] > 10
    by_case = results[0]["by_case"]
    assert not {"loud", "mixture"} & {*by_case["nothing"], *by_case["file"]}, "directories change places in one move"


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "file-by-file"])
def test_what_an_earlier_export_wrote_goes_and_what_is_the_users_stays(base, tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(publish, "_exchange", lambda one, other: False)
    (base / "tokenizer.json").write_text("{}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("x")
    target = tmp_path / "out"
    with Engine(base, method=MeZO(), offload="none") as engine:
        engine.save_pretrained(target, max_shard_bytes=SHARD)
    assert "tokenizer.json" in names(target)
    (target / "mine.log").write_text("precious")
    inode = (target / "mine.log").stat().st_ino
    model = ZOO["llama"].build(seed=1)
    with Engine(model, method=MeZO(), offload="none") as engine:
        engine.save_pretrained(target, overwrite=True)
    assert names(target) == {"config.json", "generation_config.json", "model.safetensors", "mine.log"}
    assert (target / "mine.log").stat().st_ino == inode and names(tmp_path) == {"base", "out"}
    again = transformers.AutoModelForCausalLM.from_pretrained(target)
    want = ZOO["llama"].build(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), want.parameters(), strict=True))


def test_shards_of_two_exports_never_have_the_same_name(base, tmp_path):
    with Engine(base, method=MeZO(), offload="none") as engine:
        seen: list[set[str]] = []
        for _ in range(3):
            engine.save_pretrained(tmp_path / "out", max_shard_bytes=SHARD, overwrite=True)
            seen.append({path.name for path in (tmp_path / "out").glob("*.safetensors")})
    assert not seen[0] & seen[1] and not seen[1] & seen[2] and len(seen[2]) > 1


def test_an_export_through_a_symlink_replaces_what_it_points_to(base, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with Engine(base, method=MeZO(), offload="none") as engine:
        for _ in range(2):
            files = engine.save_pretrained(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink() and all(file.is_file() for file in files)
    assert "config.json" in names(tmp_path / "disk")


def test_only_what_a_killed_export_left_is_removed(base, tmp_path):
    left, other, similar = (
        tmp_path / f".out.{end}" for end in ("zo-export-0123abcd", "zo-export-mine", "partial-0123abcd")
    )
    for folder in (left, other, similar, tmp_path / ".out2.zo-export-0123abcd"):
        folder.mkdir()
        (folder / "shard").write_text("x")
    with Engine(base, method=MeZO(), offload="none") as engine, publish.workplace(tmp_path / "out") as busy:
        engine.save_pretrained(tmp_path / "out")
        assert busy.is_dir(), "another export is writing there"
    assert names(tmp_path) == {"base", "out", other.name, similar.name, ".out2.zo-export-0123abcd"}


@pytest.mark.parametrize("began", [True, False], ids=["with-a-journal", "not-yet"])
def test_an_export_never_lands_in_a_run(base, tmp_path, capsys, began):
    run = tmp_path / "run"
    with Engine(base, method=MeZO(), offload="disk", run_dir=run) as engine:
        engine.step(BATCH)
        if not began:
            (run / "journal.zoj").rename(tmp_path / "kept")
        for target in (run, run / "blocks", run / ".." / "run"):
            with pytest.raises(CheckpointError, match="is a run's directory, which an export would destroy"):
                engine.save_pretrained(target, overwrite=True)
        if not began:
            (tmp_path / "kept").rename(run / "journal.zoj")
        engine.save_pretrained(run / "tuned")  # a folder of its own in there harms nothing
    assert main(["replay", str(base), str(run), "--out", str(run), "--overwrite"]) == 2
    assert "a run's directory" in capsys.readouterr().err
    with Engine.resume(run) as engine:
        assert engine.step(BATCH).step == 1


def test_a_run_is_no_checkpoint(base, tmp_path, capsys):
    with Engine(base, method=MeZO(), offload="disk", run_dir=tmp_path / "run") as engine:
        engine.step(BATCH)
    with pytest.raises(CheckpointError, match=r"is a run, not a checkpoint.*Engine\.resume"):
        Engine(tmp_path / "run")


def test_an_export_never_replaces_its_own_base(base, tmp_path):
    (tmp_path / "link").symlink_to(base)
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    with Engine(base, method=MeZO(), offload="none") as engine:
        for target in (base, tmp_path / "link"):
            with pytest.raises(CheckpointError, match="the checkpoint this model is read from"):
                engine.save_pretrained(target, overwrite=True)
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "file-by-file"])
def test_the_message_of_a_failed_export_is_true(base, tmp_path, monkeypatch, exchange):
    target = tmp_path / "out"
    with Engine(base, method=MeZO(), offload="none") as engine:
        engine.save_pretrained(target)
        before = {p.name: p.read_bytes() for p in target.iterdir()}
        full = OSError(errno.ENOSPC, "No space left on device")
        real = os.replace
        if exchange:
            monkeypatch.setattr(publish, "_exchange", lambda one, other: (_ for _ in ()).throw(full))
        else:
            monkeypatch.setattr(publish, "_exchange", lambda one, other: False)
            monkeypatch.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(full))
        said = "what was there is as it was" if exchange else "The one that was there is gone"
        with pytest.raises(CheckpointError, match=said):
            engine.save_pretrained(target, overwrite=True)
        monkeypatch.setattr(os, "replace", real)
    after = {p.name: p.read_bytes() for p in target.iterdir()}
    assert (after == before) == exchange and names(tmp_path) == {"base", "out"}
    if not exchange:
        with pytest.raises((OSError, ValueError)):
            transformers.AutoModelForCausalLM.from_pretrained(target)


def test_names_in_the_metadata_of_weights_reach_nothing_outside(tmp_path):
    model = ZOO["llama"].build()
    save_pretrained(tmp_path / "out", model=model)
    (tmp_path / "secret").write_text("x")
    weights = tmp_path / "out" / "model.safetensors"
    from safetensors.torch import save_file

    files = json.dumps(["../secret", "/etc/passwd", 5, "..", "config.json"])
    save_file(load_file(weights), weights, metadata={"format": "pt", "producer": "zo_offload", "files": files})
    save_pretrained(tmp_path / "out", model=model, overwrite=True)
    assert (tmp_path / "secret").read_text() == "x"


# ---- PEFT -----------------------------------------------------------------------------------------------------------

KINDS = {
    "lora": lambda m: peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "bias": lambda m: peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM"),
    "embedding": lambda m: peft.LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM"),
    "whole-head": lambda m: peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    ),
    "prompt": lambda m: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": lambda m: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    "prefix": lambda m: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "ia3": lambda m: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_exported_as_peft_would_save_it(tmp_path, kind):
    torch.manual_seed(0)
    model = peft.get_peft_model(ZOO["llama"].build(), KINDS[kind](None)).eval()
    with Engine(model, method=MeZO(lr=1e-2), offload="none", trainable="requires_grad") as engine:
        engine.step(BATCH)
        want = engine.run(BATCH).logits.clone()
        engine.save_pretrained(tmp_path / "ours")
        engine.save_pretrained(tmp_path / "ours", overwrite=True)
        engine.restore().save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert names(tmp_path / "ours") == names(tmp_path / "theirs") and names(tmp_path) == {"ours", "theirs"}
    again = peft.PeftModel.from_pretrained(ZOO["llama"].build(), tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(again(**BATCH).logits, want)


def test_an_adapter_reads_nothing_of_its_base(tmp_path, monkeypatch):
    model = peft.get_peft_model(ZOO["llama"].build(), KINDS["lora"](None))
    with Engine(model, method=MeZO(lr=1e-2), offload="disk", run_dir=tmp_path / "run", trainable="requires_grad") as e:
        e.step(BATCH)
        read: list[str] = []
        real = e.active.streamer.reader.read_into
        monkeypatch.setattr(
            e.active.streamer.reader, "read_into", lambda name, *rest: (read.append(name), real(name, *rest))
        )
        e.save_pretrained(tmp_path / "out")
        exported = list(read)  # the module gets all of its weights back after this
    assert exported and all("lora_" in name for name in exported)


def test_a_whole_model_of_which_more_than_the_adapter_is_trained_is_not_exported_as_one(tmp_path, caplog):
    model = peft.get_peft_model(ZOO["llama"].build(), KINDS["lora"](None))
    with caplog.at_level(logging.WARNING), Engine(model, method=MeZO(), offload="none", trainable="*") as engine:
        assert "save_pretrained will refuse" in caplog.text
        engine.step(BATCH)
        with pytest.raises(ConfigError, match=r"\d+ trained parameters .* are its base's.*requires_grad.*restore\(\)"):
            engine.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_in_the_place_of_an_adapter_is_not_read_with_it(base, tmp_path):
    model = peft.get_peft_model(ZOO["llama"].build(), KINDS["lora"](None))
    with Engine(model, method=MeZO(), offload="none", trainable="requires_grad") as engine:
        engine.save_pretrained(tmp_path / "out")
    with Engine(base, method=MeZO(), offload="none") as engine:
        engine.save_pretrained(tmp_path / "out", overwrite=True)
    assert not any("adapter" in name for name in names(tmp_path / "out"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.vocab_size == LLAMA["vocab_size"]


def test_an_export_as_fp8_is_what_transformers_and_we_read(tmp_path):
    """Half the bytes, each value within the format's error, and the same logits from both readers."""
    tiny = ZOO["llama"]
    options = dict(hidden_size=128, intermediate_size=256, head_dim=64)
    model = replace(tiny, options=tiny.options | options).build(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    run, out = tmp_path / "run", tmp_path / "out"
    with Engine(tmp_path / "base", method=MeZO(lr=1e-3, batch_size=2), offload="disk", run_dir=run) as engine:
        engine.fit([BATCH], steps=1)
        trained = dict(engine.weights())
    assert main(["export", str(run), "--out", str(out), "--as", "fp8", "--max-shard", "100KB"]) == 0
    files = [load_file(path) for path in out.glob("*.safetensors")]
    stored = {name: tensor for file in files for name, tensor in file.items()}
    narrow = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert len(files) > 2 and sum(name.split(".")[-2] == "down_proj" for name in narrow) == 2
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    for name, weight in loaded.named_parameters():
        if name not in narrow:
            assert torch.equal(weight, trained[name]), name
            continue
        scale = stored[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert torch.equal(weight, (stored[name].float() * scale).bfloat16()), name
        error = (weight.float() - trained[name].float()).abs()
        assert bool((error <= trained[name].float().abs() * 2.0**-4 * 1.05 + scale * 2.0**-9).all()), name
    with Engine(out, storage="kept", trainable="*norm*") as engine:
        assert {fmt.name for name, fmt in engine.layout.formats.items() if name in narrow} == {"fp8f"}
    with Engine(out, offload="none") as engine, torch.no_grad():
        assert torch.equal(engine.run(BATCH).logits, loaded.float()(**BATCH).logits)
    with Engine(tmp_path / "base", adapter="r=2") as engine:
        with pytest.raises(ConfigError, match="an adapter is not exported as fp8; with merge"):
            engine.save_pretrained(tmp_path / "adapter", scheme="fp8")
        engine.save_pretrained(tmp_path / "merged", scheme="fp8", merge=True)
    with Engine(ZOO["mixtral"].build()) as engine, pytest.raises(ConfigError, match="stacked experts: not supported"):
        engine.save_pretrained(tmp_path / "experts", scheme="fp8")
    assert not (tmp_path / "experts").exists() and not (tmp_path / "adapter").exists()
    assert torch.float8_e4m3fn in {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()}
