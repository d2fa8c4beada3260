"""A journal as a file that rebuilds weights, and the tools that read, check and cut it."""

from __future__ import annotations

import csv
import io
import json
import shutil
import struct

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.compare import assert_same
from support.training import METHOD, ROWS, stored_weights
from support.training import fit_rows as fit
from support.zoo.small import tiny_opt
from zo_offload import ConfigError, Engine, JournalError, MeZO
from zo_offload.cli import main
from zo_offload.journal.journal import RECORD_BYTES, read_journal
from zo_offload.replay import replay, replayed
from zo_offload.tiers.disk import DATA, load_shapes

STEPS = 9


def make_run(folder, **settings):
    """base/, run/ of STEPS steps and want/, its export."""
    tiny_opt().save_pretrained(folder / "base", max_shard_size="20KB")
    settings = {"method": METHOD, "offload": "disk", **settings}
    with Engine(str(folder / "base"), run_dir=folder / "run", **settings) as engine:
        fit(engine, steps=STEPS)
        engine.save_pretrained(folder / "want")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("replay"), storage="bf16", snapshot_steps=2)


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run that a test may break."""
    return shutil.copytree(made / "run", tmp_path / "run")


def weights(path):
    return dict(AutoModelForCausalLM.from_pretrained(path, dtype="auto").named_parameters())


def assert_equal(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def call(*args):
    return main([str(arg) for arg in args])


# ---- replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(storage="bf16"),
        dict(storage="bf16", rounding="stochastic", fold_every=3),
        dict(storage="fp16", trainable="layers.*.self_attn", fold_every=1),
        dict(storage="bf16", method=MeZO(lr=1e-3, distribution="rademacher", rounds=7, weight_decay=0.1)),
        dict(trainable=lambda name, parameter: "fc1" in name),
    ],
)
def test_base_and_journal_give_the_run_bit_for_bit(settings, tmp_path):
    make_run(tmp_path, **settings)
    shutil.copy(tmp_path / "run" / "journal.zoj", tmp_path / "alone.zoj")
    replay(tmp_path / "base", tmp_path / "alone.zoj", tmp_path / "out")
    assert_equal(tmp_path / "out", tmp_path / "want")


@pytest.mark.parametrize("to", [0, 1, 4, 6])
def test_any_step_can_be_had(made, to, tmp_path):
    with Engine(str(made / "base"), method=METHOD, storage="bf16") as engine:
        if to:
            fit(engine, steps=to)
        engine.save_pretrained(tmp_path / "want")
        with replayed(made / "base", made / "run", to=to) as other:
            assert_same(stored_weights(engine), stored_weights(other))
    assert call("replay", made / "base", made / "run", "--to", to, "--out", tmp_path / "out") == 0
    assert_equal(tmp_path / "out", tmp_path / "want")


def test_a_replayed_engine_evaluates_and_does_not_train(made):
    with Engine.resume(made / "run") as engine:
        want = engine.evaluate(ROWS[:6], batch_size=2)
    with replayed(made / "base", made / "run" / "journal.zoj") as engine:
        assert engine.evaluate(ROWS[:6], batch_size=2) == want
        with pytest.raises(ConfigError, match="does not train"):
            fit(engine, steps=30)


def test_replay_holds_two_blocks_not_the_model(made, monkeypatch):
    held = []
    from zo_offload.devices import CpuDevice

    real = CpuDevice.alloc
    monkeypatch.setattr(CpuDevice, "alloc", lambda self, n: held.append(n) or real(self, n))
    with replayed(made / "base", made / "run") as engine:
        for _ in engine.weights():
            pass
        biggest = max(engine.layout.block_bytes)
        assert sum(held) <= 4 * biggest < engine.layout.total_bytes
        assert [n for n in held if n > biggest] == []


def test_another_base_is_refused_and_nothing_is_written(made, tmp_path):
    model = tiny_opt()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(JournalError, match=r"base weights are not the run's: '.*' has digest"):
        replay(tmp_path / "other", made / "run", tmp_path / "out")
    model = tiny_opt()
    model.model.decoder.layers[1].fc1.weight.data[3, 4] += 1  # in no sample: found once all of the base was read
    model.save_pretrained(tmp_path / "other2")
    with pytest.raises(JournalError, match=r"base: the journal has '[0-9a-f]{16}', this engine"):
        replay(tmp_path / "other2", made / "run", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "other2"]


def test_steps_that_are_not_there_are_refused(made, tmp_path, capsys):
    assert call("replay", made / "base", made / "run", "--to", 10, "--out", tmp_path / "out") == 2
    assert "step 10 was requested" in capsys.readouterr().err
    assert call("replay", made / "base", tmp_path / "none.zoj", "--out", tmp_path / "out") == 2
    assert "none.zoj does not exist" in capsys.readouterr().err


def test_a_header_cannot_switch_on_what_a_file_must_not(made, tmp_path):
    """A journal from somewhere else names settings; code execution is not one of them, nor unknown ones."""
    from zo_offload.journal.journal import pack_header

    contents = read_journal((made / "run" / "journal.zoj").read_bytes())
    for bad in ({"trust_remote_code": True}, {"exec": "1"}):
        header = {**contents.header, "settings": {**contents.header["settings"], **bad}}
        (tmp_path / "x.zoj").write_bytes(pack_header(header))
        with pytest.raises(JournalError, match="settings that this version does not know"):
            replayed(made / "base", tmp_path / "x.zoj")


# ---- journal show, check, cut, csv -----------------------------------------------------------------------------------


def test_show_says_what_the_run_is(made, capsys):
    assert call("journal", "show", made / "run", "--last", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    size = (made / "run" / "journal.zoj").stat().st_size
    assert lines[0].endswith(f"journal.zoj: {STEPS} steps (0 skipped), {size} bytes")
    assert [line.split()[1] for line in lines[-3:]] == ["6", "7", "8"]
    assert any(line.split()[0] == "base" for line in lines)


def test_csv_has_a_row_an_update(made, capsys):
    assert call("journal", "csv", made / "run") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    records = read_journal((made / "run" / "journal.zoj").read_bytes()).steps
    assert [float(row["loss"]) for row in rows] == [r.loss for r in records]
    assert [int(row["seed"]) for row in rows] == [r.updates[0].seed for r in records]


def test_check_names_what_is_damaged(run, capsys):
    assert call("journal", "check", run) == 0
    text = capsys.readouterr().out
    assert f"{STEPS} steps are sound" in text and text.count("block ") == len(load_shapes(run / "blocks"))
    path = run / "blocks" / "00003.zob"
    data = bytearray(path.read_bytes())
    data[DATA + 9] ^= 1
    data[-9] ^= 1
    path.write_bytes(data)
    assert call("journal", "check", run) == 1
    (bad,) = [line for line in capsys.readouterr().out.splitlines() if "NOT SOUND" in line]
    assert "block     3" in bad and "DAMAGED" in bad
    journal = run / "journal.zoj"
    data = bytearray(journal.read_bytes())
    data[-3 * RECORD_BYTES] ^= 1
    journal.write_bytes(data)
    call("journal", "check", run)
    assert "NOT SOUND" in capsys.readouterr().out


def test_a_cut_run_goes_on_from_there(made, run, capsys):
    shutil.copytree(made / "base", run.parent / "base")
    before = (run / "journal.zoj").read_bytes()
    with pytest.raises(ConfigError, match="holds 9 that can be read"):
        from zo_offload.cli.journal_tools import cut

        cut(run, 10)
    assert call("journal", "cut", run, "--to", 5) == 0
    assert "journal.zoj.before-cut-0" in capsys.readouterr().out
    assert (run / "journal.zoj.before-cut-0").read_bytes() == before
    with Engine.resume(run) as engine:
        engine.active.start()
        assert engine.log.version == 5
        fit(engine, steps=STEPS)
        engine.save_pretrained(run.parent / "out")
    assert_equal(run.parent / "out", made / "want")


def test_a_damaged_journal_can_be_cut_before_the_damage(made, run):
    journal = run / "journal.zoj"
    data = bytearray(journal.read_bytes())
    at = len(data) - (STEPS - 3) * RECORD_BYTES  # step 3, which later records say was durable
    data[at + 20] ^= 1
    journal.write_bytes(data)
    with pytest.raises(JournalError, match=r"record 3 at byte \d+ fails .* 5 records follow it.*journal cut"):
        Engine.resume(run).active.start()
    assert call("journal", "cut", run, "--to", 3) == 0
    with Engine.resume(run) as engine:
        fit(engine, steps=STEPS)
        engine.save_pretrained(run.parent / "out")
    assert_equal(run.parent / "out", made / "want")


def test_a_journal_that_lost_steps_is_refused_not_gone_on_with(run):
    """Cut by hand: the blocks hold more than the journal does."""
    journal = run / "journal.zoj"
    journal.write_bytes(journal.read_bytes()[: -6 * RECORD_BYTES])
    with pytest.raises(JournalError, match=r"block \d+ has \d steps folded in, the journal holds 3.*journal cut"):
        Engine.resume(run).active.start()


def test_blocks_of_another_history_are_refused(made, run, tmp_path):
    with Engine(
        str(made / "base"), method=METHOD, storage="bf16", offload="disk", run_dir=tmp_path / "b", seed=1
    ) as engine:
        fit(engine, steps=STEPS)
    shutil.copy(tmp_path / "b" / "blocks" / "00002.zob", run / "blocks")
    with pytest.raises(JournalError, match=r"block 2 at step \d comes from another history"):
        Engine.resume(run).active.start()


@pytest.mark.parametrize("text", ["", "[", "[[1]]", "[[1, 2, []]]", "[[8, 8, [[4, 9]]]]", "[[8, 8, [[-1, 2]]]]", "{}1"])
def test_forged_shapes_are_refused(text, run, capsys):
    (run / "blocks" / "shapes.json").write_text(text)
    assert call("journal", "check", run) == 2
    assert "shapes.json" in capsys.readouterr().err


def test_every_record_is_64_bytes_and_the_file_says_what_it_is(made):
    data = (made / "run" / "journal.zoj").read_bytes()
    length = struct.unpack_from("<I", data, 4)[0]
    header = json.loads(data[8 : 8 + length])
    records = [data[at : at + RECORD_BYTES] for at in range(12 + length, len(data), RECORD_BYTES)]
    steps = [record for record in records if not struct.unpack_from("<I", record, 48)[0] & 16]  # the others are notes
    assert len(steps) == STEPS and len(records[-1]) == RECORD_BYTES
    assert [struct.unpack_from("<Q", record)[0] for record in steps] == list(range(STEPS))
    assert {"base", "plan", "layout", "method", "noise", "storage", "fold_every", "versions"} <= header.keys()
