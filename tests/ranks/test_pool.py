"""A run that others join and leave: the bits of one process whoever comes, dies, stops or cheats; nobody hangs."""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import time
from types import SimpleNamespace

import pytest

from support.fake_cuda import FakeBackend, FakeCudaDevice
from support.on_device import put_in_place
from support.pool import TOKEN, Party, digest, free_port, instead_of_computing
from support.ranks import FORK
from support.training import METHOD, batches
from support.zoo.small import tiny_opt
from zo_offload import FZOO, Conservative, Engine, Pool, __version__
from zo_offload.cli import main
from zo_offload.cli.journal_tools import cut
from zo_offload.cli.pool_tools import roster
from zo_offload.errors import ConfigError, RankError
from zo_offload.journal.format import StepRecord, histories, load_journal
from zo_offload.kernels.records import Update
from zo_offload.ranks.decided import heard, told
from zo_offload.ranks.desk import AHEAD
from zo_offload.ranks.keeper import Keeper
from zo_offload.ranks.line import Lost, dialled, over, parse, served
from zo_offload.ranks.pace import FIRST_PATIENCE_S, Patience, lanes_of, weighted
from zo_offload.ranks.sealed import Sealed, Unsealed

STEPS = 12
RUN = dict(method=FZOO(lr=1e-3, directions=3, batch_size=4), storage="int8+8", offload="host", block_numel=4000)
FIT = dict(steps=STEPS, micro_batches=2)


def make():
    return tiny_opt(layers=2)


def alone(**settings):
    with Engine(make(), **{**RUN, **settings}) as engine:
        losses = engine.fit(batches(), **FIT).losses
        return {"losses": losses, "weights": digest(engine)}


@pytest.fixture(scope="module")
def one_process():
    return alone()


@pytest.fixture
def party(tmp_path):
    party = Party(tmp_path, make, RUN, FIT)
    yield party
    party.end()


def is_step(number):
    return lambda told: told[0] == "step" and told[1] >= number


def slowly(seconds):
    return lambda record: time.sleep(seconds)


def comes(engine, event):
    """Tells when it is about to lease lanes; takes its time to compute them, so that others find some too."""
    share = engine.ranks.share

    def shares(*args):
        event.set()
        return share(*args)

    engine.ranks.share = shares
    instead_of_computing(engine, lambda compute: [time.sleep(0.05), compute()][1])


def test_whoever_comes_late_leaves_or_is_alone_all_end_on_the_bits_of_one_process(party, one_process):
    """A member from the beginning, one that leaves by a signal, and one that comes late, on another tier."""
    takes_part = [FORK.Event() for _ in range(3)]

    def waits(record):
        time.sleep(0.05)
        if record.step in (1, 5):
            assert all(event.wait(30) for event in takes_part[: 2 if record.step == 1 else 3])

    keeper = party.keeper(each_step=waits)
    first, leaver = (party.member(before=lambda engine, e=e: comes(engine, e)) for e in takes_part[:2])
    leaver.until(is_step(2))
    leaver.send(signal.SIGTERM)
    keeper.until(is_step(4))
    late = party.member(
        before=lambda engine: comes(engine, takes_part[2]), offload="disk", run_dir=party.run_dir.parent / "mine",
        num_slots=2,
    )  # fmt: skip
    assert "Stopped: stopped by SIGTERM after" in (text := leaver.error()) and "the run goes on at" in text
    found = [process.value() for process in (keeper, first, late)]
    assert [one["weights"] for one in found] == [one_process["weights"]] * 3
    assert found[0]["losses"] == one_process["losses"]
    assert all(one["lanes"] > 0 for one in found), "each computed some"
    assert late.told[0][1] < 8000, "what a late one is told is some kilobytes"
    assert late.end["value"]["steps"] < STEPS
    assert max(keys for kind, _, keys in keeper.told[1:]) < 150


def test_lanes_of_one_that_is_killed_in_mid_step_are_taken_over(party, one_process):
    joined = FORK.Event()

    def dies(engine):
        def do(compute):
            joined.set()
            if engine.log.version >= 3:
                signal.raise_signal(signal.SIGKILL)  # it has leased them
            return compute()

        instead_of_computing(engine, do)

    def waits(record):
        time.sleep(0.1)
        assert record.step not in (0, 2) or joined.wait(30)

    keeper = party.keeper(patience=0.5, each_step=waits)
    member = party.member(before=dies)
    assert member.result() == {}
    assert keeper.value() == {**one_process, "lanes": keeper.end["value"]["lanes"]}


def test_one_that_was_stopped_finds_its_lanes_done_and_catches_up(party, one_process):
    keeper = party.keeper(patience=0.5, each_step=slowly(0.05))
    member = party.member()
    member.until(is_step(1))
    member.send(signal.SIGSTOP)
    keeper.until(is_step(6))
    member.send(signal.SIGCONT)
    assert member.value()["weights"] == keeper.value()["weights"] == one_process["weights"]


def holds_at(step):
    """The keeper takes this step and no other: it is killed meanwhile. Before it, steps leave time to join."""
    return lambda record: time.sleep(60 if record.step == step else 0.05)


def test_a_keeper_that_was_killed_goes_on_and_its_members_come_back_by_themselves(party, one_process):
    back = FORK.Event()
    keeper = party.keeper(each_step=holds_at(6))
    member = party.member(each_step=lambda record: record.step > 6 and back.set())
    member.until(is_step(6))
    keeper.send(signal.SIGKILL)
    assert keeper.result() == {}
    # it takes a step alone, and no more until the member is there: it would be at the run's end first
    again = party.keeper(resumes=True, each_step=lambda record: back.wait(60))
    assert again.value()["weights"] == member.value()["weights"] == one_process["weights"]
    first = member.until(lambda told: told[0] == "step")[1]
    assert member.end["value"]["steps"] == STEPS - first and first <= 6, "it kept its weights"


def test_a_member_whose_steps_the_keeper_lost_is_told_to_join_anew(party, one_process):
    keeper = party.keeper(each_step=holds_at(6))
    member = party.member()
    member.until(is_step(6))
    keeper.send(signal.SIGKILL)
    keeper.result()
    left = 5 - AHEAD
    cut(party.run_dir, left)  # as a power cut on its host does
    there = FORK.Event()
    # before it takes the lost steps again, which would be the member's own, the member has to come: it then lacks more
    # than AHEAD of the member's seven steps, whether it has taken one or not
    again = party.keeper(resumes=True, each_step=lambda record: record.step > left or there.wait(60))
    assert "steps of another history than the run" in (text := member.error()) and "Join again" in text
    there.set()
    assert again.value()["weights"] == one_process["weights"]


def test_another_host_with_an_older_copy_of_the_journal_is_the_keeper_from_then_on(party, one_process):
    """Its last steps are lost with the first keeper: a member that has them waits until they are taken again."""
    there = free_port()
    keeper = party.keeper(each_step=holds_at(6))
    member = party.member(address=f"{party.address},127.0.0.1:{there}")
    member.until(is_step(6))
    keeper.send(signal.SIGKILL)
    keeper.result()
    copy = party.run_dir.parent / "copy"
    copy.mkdir()
    for name in ("config.json", "journal.zoj"):
        shutil.copy(party.run_dir / name, copy)
    cut(copy, 5)
    party.run_dir, party.port = copy, there
    again = party.keeper(resumes=True, each_step=lambda record: time.sleep(3.0 if record.step == 5 else 0.0))
    assert again.value()["weights"] == member.value()["weights"] == one_process["weights"]
    assert member.end["value"]["steps"] == STEPS - member.until(lambda told: told[0] == "step")[1]


def test_a_run_is_saved_by_a_member_with_the_history_that_it_has(party, one_process, tmp_path):
    keeper = party.keeper(each_step=holds_at(6))

    def saves(tell):
        with Engine.join(party.address, make(), token=TOKEN, wait=0.5) as engine:
            with pytest.raises(ConfigError, match="has not begun"):
                engine.save_run(tmp_path / "saved")
            with pytest.raises(RankError, match="is gone"):
                engine.fit(batches(), callback=lambda record: tell(("step", record.step)))
            engine.save_run(tmp_path / "saved")
            with pytest.raises(ConfigError, match="holds a run"):
                engine.save_run(tmp_path / "saved")
            return engine.log.version

    member = party.start(saves)
    member.until(is_step(6))
    keeper.send(signal.SIGKILL)
    assert member.value() == 7
    found, wanted = (load_journal(path / "journal.zoj") for path in (tmp_path / "saved", party.run_dir))
    assert found.steps == wanted.steps and found.header == wanted.header
    assert [*histories(found.header, found.steps)] == [*histories(wanted.header, wanted.steps)]
    assert [note for note in found.notes if "data" in note.values] == wanted.notes
    with Engine.resume(tmp_path / "saved", make()) as engine:
        engine.fit(batches())
        assert digest(engine) == one_process["weights"]


def test_members_end_with_the_keepers_error_or_when_it_stays_away(party):
    there = FORK.Event()

    def fails(record):
        if record.step == 3:
            assert there.wait(60)
            raise KeyError("not mine")

    keeper, member = party.keeper(each_step=fails), party.member(before=lambda engine: comes(engine, there))
    assert keeper.error() == "KeyError: 'not mine'"
    assert member.error().endswith("failed after 4 steps: KeyError: 'not mine'")
    assert "is gone" in party.member(wait=0.5).error() and time.monotonic()


def other_model():
    model = make()
    model.model.decoder.layers[0].fc1.weight.data[0, 0] += 1e-3
    return model


def test_who_is_unlike_is_refused_by_name(party):
    keeper = party.keeper(each_step=slowly(0.3))
    keeper.until(is_step(0))
    other_data = [{**batch, "labels": batch["labels"].roll(1, 0)} for batch in batches()]
    base, token, data = party.member(make=other_model), party.member(token="of another"), party.member(data=other_data)
    assert "base: the journal has" in base.error()
    assert "does not let this member in: its token is not the keeper's" in token.error()
    assert "data.digest: the journal has" in data.error()
    with pytest.raises(Exception, match="lacks this token's seal"):
        list(roster(party.address, "of another"))
    lines = list(roster(party.address, TOKEN))
    assert "lanes are late after" in lines[0] and "(keeper)" in lines[1]


def test_one_that_sends_other_numbers_is_found_and_what_it_did_is_cut(party, one_process):
    joined = FORK.Event()

    def cheats(engine):
        def do(compute):
            joined.set()
            return [loss * (1.1 + 0.01 * i) for i, loss in enumerate(compute())]

        instead_of_computing(engine, do)

    class Later(random.Random):
        """Chooses no lane in the first steps."""

        steps = 0

        def random(self):
            self.steps += 1
            return 0.0 if self.steps > 1 else 1.0

    def waits(record):
        time.sleep(0.1)
        assert record.step != 1 or joined.wait(30)

    keeper = party.keeper(
        audit=0.1, each_step=waits,
        before=lambda engine: setattr(engine.ranks, "_chosen", Later()),
    )  # fmt: skip
    member = party.member(before=cheats)
    assert "has put this member (1) out: lane" in member.error()
    assert keeper.value()["weights"] != one_process["weights"], "it sent some before it was found"
    warning = next(note.values["warning"] for note in load_journal(party.run_dir / "journal.zoj").notes[1:])
    first = int(warning.split("--to ")[1].split("`")[0])
    assert first <= 2 and "was put out" in warning
    cut(party.run_dir, first)
    assert party.keeper(resumes=True).value() == {**one_process, "lanes": (STEPS - first) * 8}


@pytest.mark.parametrize("way", [
    dict(method=Conservative(lr=1e-3, batch_size=4)), dict(method=METHOD, storage="bf16+16", fold_every=3),
], ids=["a second visit in each step", "fold every 3"])  # fmt: skip
def test_any_method_has_the_bits_of_one_process(way, party):
    party.settings = {**RUN, **way}
    keeper, member = party.keeper(each_step=slowly(0.05), audit=1.0, tolerance=0.0), party.member()
    found = alone(**way)
    assert member.value()["weights"] == keeper.value()["weights"] == found["weights"]
    assert member.end["value"]["lanes"] > 0


def test_on_a_gpu_whose_losses_come_late_each_step_waits_for_the_losses_of_others(party, one_process, monkeypatch):
    """Both are on a stand-in for a GPU, whose streams run late."""
    device = FakeCudaDevice(FakeBackend(0))
    put_in_place(monkeypatch, device)
    party.settings = {**RUN, "device": "cuda", "compute": "fp32"}
    keeper = party.keeper(each_step=slowly(0.05))
    member = party.member(device="cuda")
    assert keeper.value()["weights"] == member.value()["weights"] == one_process["weights"]


# ---- the command line ------------------------------------------------------------------------------------------------


def test_the_commands_serve_join_and_tell_who_is_there(party, tmp_path, capfd):
    make().save_pretrained(tmp_path / "base")
    with open(tmp_path / "train.jsonl", "w") as file:
        for batch in batches(8):
            file.writelines(json.dumps({"input_ids": row.tolist()}) + "\n" for row in batch["input_ids"])
    fit = ["fit", tmp_path / "base", "--data", tmp_path / "train.jsonl", "--method", "fzoo", "--batch-size", 4,
           "--directions", 3, "--lr", "1e-3", "--steps", 20, "--quiet"]  # fmt: skip
    words = [*fit, "--run-dir", tmp_path / "run", "--serve", party.address]
    keeper = party.start(lambda tell: main([str(word) for word in words]))
    token = tmp_path / "run" / "token"
    join = ["join", party.address, str(tmp_path / "base"), "--token-file", str(token), "--quiet", "--wait", "20"]
    until = time.monotonic() + 30
    while not token.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert token.stat().st_mode & 0o077 == 0
    member = party.start(lambda tell: main(join))
    assert main(["ranks", party.address, "--token-file", str(token)]) == 0
    assert keeper.value() == member.value() == 0
    assert main([str(word) for word in [*fit, "--run-dir", tmp_path / "one"]]) == 0
    one, several = (load_journal(tmp_path / name / "journal.zoj").steps for name in ("one", "run"))
    assert [record.updates for record in one] == [record.updates for record in several]
    out = capfd.readouterr().out
    assert f"serving at {party.address}, with the token in" in out and "(keeper)" in out
    assert f"steps with the keeper at {party.address}, to step 20" in out
    assert main([*join[:2], str(tmp_path / "base"), "--wait", "0.2", "--token-file", str(token)]) == 2
    assert main(["join", party.address, str(tmp_path / "base")]) == 2
    assert main([str(word) for word in [*fit, "--serve", party.address]]) == 2
    err = capfd.readouterr().err
    assert "is gone" in err and "--token-file is missing" in err and "--serve needs --run-dir" in err


def test_a_member_takes_the_run_over_when_its_keeper_is_gone(party, tmp_path, capfd):
    """The other member finds it at its second address; the journal is that of one process."""
    make().save_pretrained(tmp_path / "base")
    rows = [{"input_ids": row.tolist()} for batch in batches(8) for row in batch["input_ids"]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "token").write_text(TOKEN)
    # enough steps for the other member to come while the one that took over is not at the end
    base, data, fit = tmp_path / "base", tmp_path / "train.jsonl", dict(steps=200, batch_size=4)

    def keeps(tell):
        ranks = Pool(address=party.address, token=TOKEN)
        with Engine(base, method=RUN["method"], offload="host", run_dir=tmp_path / "run", ranks=ranks) as engine:
            engine.fit(data, **fit, callback=lambda record: [tell(("step", record.step)), holds_at(4)(record)])

    second = f"127.0.0.1:{free_port()}"
    join = ["join", f"{party.address},{second}", base, "--token-file", tmp_path / "token", "--quiet"]
    more = [["--take-over", second, "--wait", 1, "--run-dir", tmp_path / "mine", "--offload", "disk"], ["--wait", 60]]
    keeper = party.start(keeps)
    keeper.until(is_step(0))
    members = [party.start(lambda tell, words=words: main([str(w) for w in (*join, *words)])) for words in more]
    keeper.until(is_step(4))
    until = time.monotonic() + 30
    while len(list(roster(party.address, TOKEN))) < 4 and time.monotonic() < until:
        time.sleep(0.1)
    keeper.send(signal.SIGKILL)
    assert [member.value() for member in members] == [0, 0]
    with Engine(base, method=RUN["method"], offload="host", run_dir=tmp_path / "one") as engine:
        engine.fit(data, **fit)
    one, mine = (load_journal(tmp_path / name / "journal.zoj") for name in ("one", "mine"))
    assert [record.updates for record in mine.steps] == [record.updates for record in one.steps]
    assert main([str(word) for word in [*join, "--take-over", second]]) == 2
    out, err = capfd.readouterr()
    assert "this member takes the run over" in out and f"serving at {second}" in out
    assert "--take-over needs --run-dir" in err


# ---- without engines -------------------------------------------------------------------------------------------------


def test_who_is_silent_is_lost_in_time():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        address, began = f"127.0.0.1:{silent.getsockname()[1]}", time.monotonic()
        with pytest.raises(Lost, match="cannot be reached"):
            dialled(address, silent_s=0.5).get("era")
        assert time.monotonic() - began < 3
    with pytest.raises(Lost, match="nobody answers"):
        dialled(address)


def test_a_value_without_the_seal_is_no_value():
    store, port = served("127.0.0.1:0")
    mine, other = (Sealed(over(store, "here"), token, "era") for token in ("ours, of us", "a strangers"))
    mine.put("a", {"x": [1, 2]})
    assert mine.get("a") == {"x": [1, 2]} and mine.get("none") is None
    other.put("b", {"x": 1})
    mine.line.set("c", mine.line.get("a"))  # under another name
    for name in ("b", "c"):
        with pytest.raises(Unsealed, match="lacks this token's seal"):
            mine.get(name)
    with pytest.raises(Unsealed):
        Sealed(mine.line, "ours, of us", "a later era").get("a")
    mine.first({"a": {"x": 3}, "d": {"x": 4}})
    assert mine.get_all(["a", "d"]) == [{"x": [1, 2]}, {"x": 4}] and isinstance(mine.get_all(["b"])[0], Unsealed)
    long = {"text": random.Random(0).randbytes(6_000_000).hex()}
    names = mine.send("long", long)
    assert len(names) > 2 and mine.receive("long") == long and mine.receive("long") is None
    assert mine.line.size() == 4
    with pytest.raises(ConfigError, match="cannot be listened at"):
        served(f"127.0.0.1:{port}")
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        parse("somewhere")


def test_what_a_member_makes_up_does_not_end_the_keeper():
    """Whoever has the token may write anything: it is no loss, or not this step's, and is computed again."""
    keeper = Keeper(Pool(address="127.0.0.1:0", token=TOKEN, audit=0.0))
    try:
        keeper._journal = SimpleNamespace(steps=[], note=lambda values: None)
        stranger = Sealed(over(keeper._store, "here"), TOKEN, keeper.room.era)
        keeper.about({"batch": "1"})
        keeper._tell_state(0)
        right = {"batch": "1"}
        rows = [[1, 2], {"by": "1"}, {"loss": "nan of it", "by": "1"}, {"loss": 7, "by": [1]},
                {"loss": "0x1p1", "by": "2", "about": {"batch": "2"}}, {"loss": "nan", "by": "3", "about": right},
                {"loss": "0x1p0", "by": "4", "about": right}]  # fmt: skip
        for cell, row in enumerate(rows):
            stranger.put(f"0.0/{cell}", row)
        assert keeper.share(0, len(rows), lambda cells: [1.0] * len(cells)) == [1.0] * len(rows)
        assert set(keeper._out) == {"2", "3"} and "batch: the keeper has '1', it '2'" in keeper._out["2"]
        keeper._desk._names |= {"5": "made up"}
        stranger.put("member/5", {"step": 0, "seconds": "long", "spent": float("nan"), "rate": [1], "audit": {"a": 1}})
        stranger.put("door/0", {"version": __version__, "steps": "many", "history": 1})
        stranger.line.add("door", 1)
        until = time.monotonic() + 10
        while not (keeper._desk.rows() and stranger.line.has(["door/0/no"])) and time.monotonic() < until:
            keeper._desk._journal = keeper._journal
            time.sleep(0.01)
        assert keeper._desk.rows() == {"5": {"step": 0, "audit": None}}
        keeper.publish(StepRecord(0, (), 1.0, 0.0, 1e-3), "0" * 16)
    finally:
        keeper.leave()


def test_a_keeper_is_not_one_of_several_that_a_launcher_starts(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start the keeper alone"):
        Engine(make(), **RUN, ranks=Pool(address="127.0.0.1:0", token=TOKEN))


def test_a_record_is_told_to_the_last_bit():
    updates = (Update(2**63, 1.5 * 2**-20, 0.75, False), Update(7, -0.0, begins=False))
    for record in (
        StepRecord(3, updates, 0.1 + 0.2, float("inf"), 1e-320, scalars=(5.1, float("-inf"))),
        StepRecord(4, (), 1.0, 2.0, 3.0, True, 2**32 - 1, True),
    ):
        assert heard(json.loads(json.dumps(told(record)))) == record


def test_shares_follow_the_time_that_passes_take():
    assert lanes_of(8, {}, "0") == 8 and lanes_of(8, {"0": 1.0}, "new") == 4
    assert [lanes_of(8, {"0": 1.0, "1": 1.0, "2": 1.0}, m) for m in "012"] == [3, 3, 3] and lanes_of(2, {}, "0") == 2
    even = {"0": 1.0, "1": 1.0}
    assert weighted(even, {"0": 2.0}) == weighted(even, {"0": 2.0, "1": 2.0}) == even
    changed = weighted(even, {"0": 1.0, "1": 4.0})
    assert lanes_of(16, changed, "0") > 8 > lanes_of(16, changed, "1")
    for _ in range(50):
        changed = weighted(changed, {"0": 1.0, "1": 100.0})
    assert lanes_of(64, changed, "1") == 1


def test_patience_is_learnt_from_what_passes_took():
    patience = Patience()
    assert patience.seconds == FIRST_PATIENCE_S
    for seconds in (5.0, 5.0, 5.0, 6.0):
        patience.see(seconds)
    assert patience.seconds == 18.0
    for _ in range(100):
        patience.see(0.001)
    assert patience.seconds == 2.0 and Patience(0.5).seconds == 0.5


@pytest.mark.parametrize("wrong", [
    dict(address="here"), dict(token="short"), dict(audit=1.5), dict(tolerance=-1), dict(patience=0),
])  # fmt: skip
def test_settings_of_a_pool_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError):
        Pool(**{"address": "127.0.0.1:0", "token": TOKEN, **wrong})


def test_a_pool_needs_a_run_directory_and_members_keep_to_the_runs_settings(tmp_path):
    pool = Pool(address="127.0.0.1:0", token=TOKEN)
    with Engine(make(), **RUN, ranks=pool) as engine, pytest.raises(ConfigError, match="give it a run_dir"):
        engine.fit(batches(), **FIT)
    with pytest.raises(ConfigError, match="storage: a member takes what the run has"):
        Engine.join("127.0.0.1:1", make(), token=TOKEN, storage="fp32")
    with pytest.raises(RankError, match="is gone"):
        Engine.join("127.0.0.1:1", make(), token=TOKEN, wait=0.1)
