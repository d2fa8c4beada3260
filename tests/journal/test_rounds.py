"""Rounds of FedKSeed: clients' local steps leave no trace, and their mean is a step like any other, in few bytes."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from dataclasses import replace
from hashlib import blake2b

import numpy as np
import pytest
import torch
from torch import nn

from support.compare import assert_same
from support.fake_cuda import FakeBackend, FakeCudaDevice
from support.on_device import put_in_place
from support.training import ROWS, batches, squares, stored_weights
from support.zoo.small import tiny_opt
from zo_offload import ConfigError, DivergenceError, Engine, JournalError, MeZO, Round, SeedPool
from zo_offload.cli import main
from zo_offload.journal.format import histories, load_journal
from zo_offload.kernels.float32 import fma
from zo_offload.numerics.noise import assign_param_ids, noise, step_seed
from zo_offload.replay import replayed

METHOD = SeedPool(lr=1e-2, pool=7, batch_size=4)
LOCAL, ROUNDS = 5, 2
DATA = {"ann": (batches()[:7], 30), "bob": (batches()[7:12], 10)}
"""By client: batches, and rows."""


def model():
    return tiny_opt(layers=1)


def engine(run_dir, **settings):
    settings = {"method": METHOD, "storage": "fp32", "offload": "host", "block_numel": 4000, **settings}
    return Engine(model(), run_dir=run_dir, **settings)


def rounds_of(engine, steps=LOCAL):
    return [engine.train_round(data, client=client, steps=steps, rows=rows) for client, (data, rows) in DATA.items()]


def plain():
    """The same in memory, one client, step, parameter and seed after another; weights in float32, sums in float64."""
    net = model()
    named = dict(net.named_parameters())
    ids, w = assign_param_ids(list(named)), {name: p.detach().clone() for name, p in named.items()}

    def plus(weights, scale, k):
        """weights + float32(scale) * noise k of the pool."""
        found = {}
        for name, of in weights.items():
            z = noise(METHOD.noise, step_seed(0, k, 1 << 20), ids[name], of.numel()).numpy()
            found[name] = torch.from_numpy(fma(np.float32(scale), z, of.reshape(-1).numpy())).view(of.shape)
        return found

    def loss(weights, batch):
        for name, p in named.items():
            p.data = weights[name]
        with torch.no_grad():
            return float(net(**batch).loss)

    for done in range(ROUNDS):
        total = np.zeros(METHOD.pool)
        for client, (data, rows) in sorted(DATA.items()):
            drawn = int.from_bytes(blake2b(f"{client}\n{done}".encode(), digest_size=8).digest(), "little")
            own, sums = w, np.zeros(METHOD.pool)
            for i in range(LOCAL):
                k, batch = step_seed(drawn, done + i, 1 << 21) % METHOD.pool, data[(done * LOCAL + i) % len(data)]
                eps = float(np.float32(METHOD.eps))
                grad = (loss(plus(own, eps, k), batch) - loss(plus(own, -eps, k), batch)) / (2 * eps)
                own = plus(own, -np.float32(METHOD.lr * grad), k)
                sums[k] += float(np.float32(METHOD.lr * grad))
            total += rows * sums.astype(np.float32).astype(np.float64)
        for k, mean in enumerate((total / 40).astype(np.float32)):
            w = plus(w, -mean, k) if mean else w
    return w


@pytest.fixture(scope="module")
def by_hand():
    return plain()


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_two_rounds_are_a_plain_loop_and_local_steps_leave_no_trace(offload, tmp_path, by_hand):
    with engine(tmp_path / "run", offload=offload) as run:
        for done in range(ROUNDS):
            run.active.start()
            before, journal = stored_weights(run), (tmp_path / "run" / "journal.zoj").read_bytes()
            found = rounds_of(run)
            assert_same(stored_weights(run), before)
            assert (tmp_path / "run" / "journal.zoj").read_bytes() == journal and run.log.version == done
            assert rounds_of(run) == found, "a client may do it again"
            record = run.take_rounds(reversed(found))
            assert record.step == done and 0 < len(record.updates) <= METHOD.pool
        assert_same(stored_weights(run), by_hand)
    with replayed(model(), tmp_path / "run") as again:
        assert_same(stored_weights(again), by_hand)


def test_on_a_gpu_whose_losses_come_late_it_is_the_same(tmp_path, by_hand, monkeypatch):
    put_in_place(monkeypatch, FakeCudaDevice(FakeBackend(0)))
    with engine(tmp_path / "run", device="cuda", compute="fp32") as run:
        for _ in range(ROUNDS):
            run.take_rounds(rounds_of(run))
        assert_same(stored_weights(run), by_hand)


def test_steps_and_rounds_alternate_in_any_tier_after_a_resume_and_in_a_replay(tmp_path):
    """With folds that a round does not wait for, in a format that rounds."""
    found = {}
    for offload in ("host", "disk"):
        way = {"offload": offload, "storage": "int8+8", "fold_every": 4}
        with engine(tmp_path / offload, **way) as run:
            run.fit(batches(), steps=3)
            run.take_rounds(rounds_of(run, 2))
            run.fit(steps=6, train_data=batches())
        with Engine.resume(tmp_path / offload, model(), offload=offload) as run:
            run.take_rounds(rounds_of(run, 2))
            run.fit(batches(), steps=9)
            found[offload] = stored_weights(run)
    assert_same(found["disk"], found["host"])
    with replayed(model(), tmp_path / "disk") as again:
        assert_same(stored_weights(again), found["host"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_local_steps_that_are_interrupted_leave_no_trace(error, tmp_path):
    with engine(tmp_path / "run", storage="int8+8") as run:
        run.fit(batches(), steps=1)
        before, whole = stored_weights(run), rounds_of(run)

        def fails(record):
            if record.step == 3:
                raise error("now")

        with pytest.raises(error, match="now"):
            run.train_round(DATA["ann"][0], client="ann", steps=LOCAL, rows=30, callback=fails)
        assert_same(stored_weights(run), before)
        assert rounds_of(run) == whole
        run.take_rounds(whole)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.layer = nn.Linear(8, 5)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("storage", ["fp32", "bf16+16"])
def test_a_round_of_4096_seeds_is_under_18_kilobytes_and_one_step(storage, tmp_path):
    """Also in blocks on disk, whose updates are applied in one visit."""
    data, method = [{"x": torch.randn(4, 8)}], SeedPool(lr=1e-3, pool=4096, batch_size=4)
    sums = np.random.default_rng(0).standard_normal(4096).astype(np.float32) / 64
    with Engine(Small(), objective=squares, method=method, run_dir=tmp_path / "run", storage=storage, offload="disk",
                example=data[0]) as run:  # fmt: skip
        local = run.train_round(data, client="c" * 64, steps=3, rows=(1 << 29) - 1)
        full = replace(local, sums=tuple(sums.tolist()))
        before = stored_weights(run)
        assert local.save(tmp_path / "sparse.zor") < 1600 + 3 * 4
        assert full.save(tmp_path / "full.zor") < 18_000 and Round.mean([full]).save(tmp_path / "mean.zor") < 18_000
        assert len(run.take_rounds([tmp_path / "full.zor"]).updates) == 4096
        after = stored_weights(run)
    ids = assign_param_ids(list(before))
    for name, w in before.items() if storage == "fp32" else ():
        moved = w.reshape(-1).numpy()
        for k, number in enumerate(sums):
            z = noise(method.noise, step_seed(0, k, 1 << 20), ids[name], w.numel()).numpy()
            moved = fma(-number, z, moved)
        assert_same(after[name], torch.from_numpy(moved).view(w.shape))
    with replayed(Small(), tmp_path / "run", objective=squares, example=data[0]) as again:
        assert_same(stored_weights(again), after)


# ---- what does not fit is refused by name ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run after one round, and two clients' rounds for its next step."""
    folder = tmp_path_factory.mktemp("rounds")
    with engine(folder / "run") as run:
        run.take_rounds(rounds_of(run, 1))
        return folder / "run", rounds_of(run)


def changed(found, **part):
    return replace(found, run={**found.run, **part})


@pytest.mark.parametrize("what, do", [
    (r"client 'ann', round after 1 steps: it is of another run; base: the journal has '\w+', the round '0'",
     lambda a, b: [b, changed(a, base="0")]),
    ("method.pool: the journal has 7, the round 9", lambda a, b: [changed(a, method={**a.run["method"], "pool": 9})]),
    ("method.lr: the journal has 0.01, the round 1",
     lambda a, b: [changed(a, method={**a.run["method"], "lr": 1.0}), b]),
    ("seed: the journal has 0, the round 1", lambda a, b: [changed(a, seed=1)]),
    ("round after 0 steps: the run has 1 steps now; it was merged already", lambda a, b: [replace(a, step=0)]),
    ("round after 2 steps: the run has 1 steps now; merge those before", lambda a, b: [a, replace(b, step=2)]),
    ("began at other weights", lambda a, b: [a, replace(b, history="0" * 16)]),
    ("client 'ann', round after 1 steps is there twice", lambda a, b: [a, b, replace(a, rows=3)]),
    ("the mean of 2 clients, round after 1 steps is taken alone", lambda a, b: [Round.mean([a, b]), a]),
    ("a mean of no rounds", lambda a, b: []),
    ("its sum for seed 2 is nan", lambda a, b: [replace(a, sums=(0.0, 1.0, float("nan"), *a.sums[3:]))]),
    ("its sum for seed 0 is 0.1, expected a finite float32", lambda a, b: [replace(a, sums=(0.1, *a.sums[1:]))]),
    ("its loss is inf", lambda a, b: [replace(a, loss=float("inf"))]),
    ("rows=0, its weight", lambda a, b: [replace(a, rows=0)]),
    ("expected a name of 1 to 64", lambda a, b: [replace(a, client="")]),
])  # fmt: skip
def test_a_round_that_is_not_of_this_step_is_refused_by_name(what, do, begun):
    run_dir, found = begun
    before = (run_dir / "journal.zoj").read_bytes()
    with pytest.raises((ConfigError, JournalError), match=what):
        Round.merge(run_dir, do(*found))
    assert (run_dir / "journal.zoj").read_bytes() == before


def test_a_damaged_file_is_refused_whatever_byte_it_is(begun, tmp_path):
    path, found = tmp_path / "a.zor", begun[1][0]
    found.save(path)
    assert Round.load(path) == found
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(JournalError, match=r"a.zor (fails its checksum|is not a round's file)"):
            Round.load(path)
        path.write_bytes(data[:at])
        with pytest.raises(JournalError, match=r"a.zor (fails its checksum|is not a round's file)"):
            Round.load(path)
    with pytest.raises(JournalError, match="cannot be read"):
        Round.load(tmp_path / "none.zor")


def forged(found, data=b"", **fields):
    """A file with another text or other bits, and a sound checksum."""
    whole = found.pack()
    end = 8 + struct.unpack_from("<I", whole, 4)[0]
    text = json.dumps({**json.loads(whole[8:end]), **fields}).encode()
    body = b"ZOR1" + struct.pack("<I", len(text)) + text + (data or whole[end:-4])
    return body + struct.pack("<I", zlib.crc32(body))


@pytest.mark.parametrize("what, fields", [
    ("its step is -1", dict(step=-1)), ("its step is True", dict(step=True)), ("its client is 3", dict(client=3)),
    ("its run is 'x'|string indices", dict(run="x")), ("its loss is None", dict(loss=None)),
    ("are not those of a pool of 7", dict(data=b"\xff" + bytes(28))),
    ("are not those of a pool of 7", dict(data=b"\x7f" + bytes(24))),
    ("seed 1 is inf", dict(data=b"\x02" + struct.pack("<f", float("inf")))),
])  # fmt: skip
def test_a_file_that_somebody_made_up_is_refused(what, fields, begun, tmp_path):
    (tmp_path / "a.zor").write_bytes(forged(begun[1][0], **fields))
    with pytest.raises(JournalError, match=what):
        Round.load(tmp_path / "a.zor")


def test_what_a_round_cannot_be_trained_with_is_refused(tmp_path):
    data = DATA["ann"][0]
    for what, run_dir, method in (
        ("needs --method seed-pool, the run's is 'mezo'", tmp_path / "mezo", MeZO()),
        ("schedule='linear'", tmp_path / "linear", replace(METHOD, schedule="linear")),
        ("needs a run_dir", None, METHOD),
    ):
        with engine(run_dir, method=method) as run, pytest.raises(ConfigError, match=what):
            run.train_round(data, client="a", steps=1, rows=1)
    with engine(tmp_path / "run", method=replace(METHOD, on_nonfinite="skip")) as run:
        with pytest.raises(ConfigError, match="expected whole numbers"):
            run.train_round(data, client="a", steps=0)
        with pytest.raises(ConfigError, match="rows"):
            run.train_round(iter(data), client="a", steps=1)
        with pytest.raises(ConfigError, match="is in use"):
            Round.merge(tmp_path / "run", [run.train_round(data, client="a", steps=1, rows=1)])
        nan = [{**data[0], "labels": torch.full_like(data[0]["labels"], -100)}]
        with pytest.raises(DivergenceError, match="none of 2 local steps had finite losses"):
            run.train_round(nan, client="a", steps=2, rows=1)


# ---- the command line ------------------------------------------------------------------------------------------------


def test_a_server_and_two_clients_end_on_the_same_weights_by_commands_alone(tmp_path, capsys):
    """Each client has the base, its data and a copy of the journal; files of rounds go there and back."""
    model().save_pretrained(tmp_path / "base")
    server, clients = tmp_path / "server", {"ann": ROWS[:10], "bob": ROWS[10:]}

    def does(*words):
        return main([str(word) for word in words])

    assert does("round", "start", tmp_path / "base", "--run-dir", server, "--pool", 16, "--lr", "1e-2",
                "--storage", "int8+8", "--fold-every", 3) == 0  # fmt: skip
    for client, rows in clients.items():
        (tmp_path / client).mkdir()
        for name in ("config.json", "journal.zoj"):
            shutil.copy(server / name, tmp_path / client)
        (tmp_path / f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):
        for client, offload in zip(clients, ("disk", "host"), strict=True):
            assert does("round", "train", tmp_path / client, "--data", tmp_path / f"{client}.jsonl", "--client", client,
                        "--steps", 3, "--batch-size", 4, "--offload", offload,
                        "--out", tmp_path / f"{client}.zor") == 0  # fmt: skip
        files = [tmp_path / f"{client}.zor" for client in clients]
        assert does("round", "merge", server, *files, "--out", tmp_path / "mean.zor") == 0
        assert all(does("round", "merge", tmp_path / client, tmp_path / "mean.zor") == 0 for client in clients)
    found = [load_journal(tmp_path / name / "journal.zoj") for name in ("server", *clients)]
    assert len({tuple(histories(one.header, one.steps)) for one in found}) == 1
    with Engine.resume(tmp_path / "ann") as run, replayed(tmp_path / "base", server) as again:
        assert_same(stored_weights(run), stored_weights(again))
        assert run.log.version == 2 and (tmp_path / "ann" / "blocks").is_dir()
    assert does("round", "show", tmp_path / "mean.zor") == 0
    assert does("round", "merge", server, *files) == 2
    assert does("round", "merge", server, files[0], files[0]) == 2
    assert does("round", "train", server, "--data", "x") == 2
    assert does("round", "train", server, "--data", "x", "--client", "a", "--steps", 1, "--out", server) == 2
    assert does("round", "show", tmp_path / "mean.zor", "more") == 2
    assert does("round", "start", tmp_path / "base") == 2
    out, err = capsys.readouterr()
    assert "the mean of 2 clients, round after 1 steps: 6 local steps, loss 5." in out and ", 18 rows, " in out
    assert "it was merged already" in err and "--client is missing" in err and "--run-dir is missing" in err
    assert "expected a new file" in err and "left over: more" in err
