"""What ties blocks to their run: the history of their updates and the base under it, not when that was written."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from zo_offload import Engine, MeZO
from zo_offload.cli import journal_tools
from zo_offload.errors import ConfigError, JournalError
from zo_offload.journal.format import Note
from zo_offload.journal.journal import Journal, StepRecord, read_journal
from zo_offload.kernels.records import Update
from zo_offload.tiers import DiskTier

ROWS = [{"input_ids": [3 + (7 * r + 5 * c) % 60 for c in range(8)]} for r in range(16)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", 0)


def make_base(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def begin(base: Path, run: Path, steps: int = 4, **settings: Any) -> None:
    settings = dict(offload="disk", fold_every=1, trainable=["layers.0", "layers.1"]) | settings
    with Engine(str(base), method=MeZO(lr=1e-3, batch_size=4), run_dir=run, **settings) as engine:
        engine.fit(ROWS, steps=steps)


def resumed(run: Path, steps: int = 8) -> str:
    """The digest of the weights after so many steps in all."""
    with Engine.resume(run) as engine:
        engine.fit(ROWS, steps=steps, batch_size=4)
        found = hashlib.sha256()
        for name, tensor in engine.weights():
            found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def test_frozen_blocks_of_a_run_on_another_base_are_refused(base: Path, tmp_path: Path) -> None:
    begin(base, tmp_path / "a")
    begin(make_base(tmp_path / "other", 1), tmp_path / "b")
    block = max((tmp_path / "a" / "blocks").glob("*.zob")).name  # the last layer is not trained
    shutil.copy(tmp_path / "b" / "blocks" / block, tmp_path / "a" / "blocks" / block)
    assert any("NOT OF THIS JOURNAL" in line for sound, line in journal_tools.check(tmp_path / "a") if not sound)
    with pytest.raises(JournalError, match="step 0 comes from another history .or is of another base"):
        resumed(tmp_path / "a")


def test_blocks_of_the_same_history_are_taken_whoever_wrote_them_and_when(base: Path, tmp_path: Path) -> None:
    begin(base, tmp_path / "a")
    begin(base, tmp_path / "b", steps=2)
    shutil.copytree(tmp_path / "b" / "blocks", tmp_path / "backup")
    for path in (tmp_path / "backup").glob("*.zob"):  # a run of its own that took the same two steps
        shutil.copy(path, tmp_path / "a" / "blocks")
    assert (tmp_path / "a" / "journal.zoj").read_bytes() != (tmp_path / "b" / "journal.zoj").read_bytes()
    begin(base, tmp_path / "whole", steps=8)
    assert resumed(tmp_path / "a") == resumed(tmp_path / "whole")


def test_blocks_of_another_seed_are_refused(base: Path, tmp_path: Path) -> None:
    begin(base, tmp_path / "a")
    begin(base, tmp_path / "b", seed=1)
    shutil.copy(tmp_path / "b" / "blocks" / "00001.zob", tmp_path / "a" / "blocks")
    with pytest.raises(JournalError, match="another history"):
        resumed(tmp_path / "a")


def test_a_block_that_was_not_bound_before_a_power_cut_is_made_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(base, tmp_path / "a")
    begin(base, tmp_path / "whole", steps=8)

    def power_cut(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DiskTier, "bind", power_cut)
    with pytest.raises(KeyboardInterrupt):
        begin(base, tmp_path / "b")
    monkeypatch.undo()
    block = max((tmp_path / "b" / "blocks").glob("*.zob"))
    shutil.copy(block, tmp_path / "a" / "blocks")
    assert resumed(tmp_path / "a") == resumed(tmp_path / "whole")


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_a_removed_lock_lets_nobody_in(base: Path, tmp_path: Path, offload: str) -> None:
    run = tmp_path / "run"
    with Engine(str(base), method=MeZO(lr=1e-3, batch_size=4), run_dir=run, offload=offload) as engine:
        engine.fit(ROWS, steps=2)
        (run / "lock").unlink()
        with pytest.raises(ConfigError, match="in use: another engine holds its journal.zoj"):
            resumed(run)
        with pytest.raises(ConfigError, match="in use"):
            journal_tools.cut(run, 1)
        engine.fit(ROWS, steps=3)
    with Engine.resume(run) as engine:
        assert engine.fit(ROWS, steps=4, batch_size=4).steps == 1


def test_a_refused_resume_gives_the_run_up_again(base: Path, tmp_path: Path) -> None:
    begin(base, tmp_path / "a")
    engine = Engine.resume(tmp_path / "a", seed=9)
    with pytest.raises(JournalError, match="seed"):
        engine.fit(ROWS, steps=5, batch_size=4)
    assert resumed(tmp_path / "a")  # while the refused engine is still there


# ---- the journal's own ---------------------------------------------------------------------------------------------


def test_notes_lie_between_steps_and_are_chained(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "a.zoj", {"seed": 1})
    journal.note({"begin": "x" * 100})
    for step in range(3):
        journal.append(StepRecord(step, (Update(step + 1, 0.5),), 1.0, 0.5, 1e-3))
    journal.note({"end": [1, "é"]})
    journal.close()
    data = (tmp_path / "a.zoj").read_bytes()
    contents = read_journal(data)
    assert contents.notes == [Note(0, {"begin": "x" * 100}), Note(3, {"end": [1, "é"]})]
    assert len(contents.steps) == 3 and contents.good == len(data)
    for cut in range(contents.ends[3], len(data)):
        found = read_journal(data[:cut])
        assert len(found.steps) == 3 and found.notes == contents.notes[:1] and found.good == contents.ends[3]
    again = Journal.open(tmp_path / "a.zoj")
    again.append(StepRecord(3, (), 1.0, 0.5, 1e-3, True))
    again.close()
    found = read_journal((tmp_path / "a.zoj").read_bytes())
    assert len(found.steps) == 4 and found.notes == contents.notes


def test_history_is_of_the_updates_and_not_of_when_they_were_written(tmp_path: Path) -> None:
    steps = [StepRecord(i, (Update(i + 1, 0.5, 1.0, i % 2 == 1),), 1.0, 0.1, 1e-6) for i in range(6)]
    one = Journal.create(tmp_path / "a", {"seed": 1, "created": "now"})
    two = Journal.create(tmp_path / "b", {"seed": 1, "created": "later"}, commit_s=3600)
    two.note({"about": "it"})
    for step in steps:
        one.append(step)
        one.make_durable(step.step + 1)
        two.append(step)
    assert one.chain(6) != two.chain(6) and one.history(6) == two.history(6)
    one.close()
    two.close()
    assert Journal.open(tmp_path / "a").history(6) == two.history(6) != two.history(5)
    other = Journal.create(tmp_path / "c", {"seed": 2})
    assert other.history(0) != one.history(0)
    other.close()
