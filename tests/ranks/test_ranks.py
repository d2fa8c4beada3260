"""Several ranks train one run: the bits of one process for any number of them, and nobody is left waiting."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from support.compare import assert_same
from support.fake_cuda import FakeBackend, FakeCudaDevice
from support.on_device import put_in_place
from support.ranks import Ranks, errors_on_ranks, on_ranks
from support.training import METHOD, batches, stored_weights
from support.zoo.small import tiny_llama, tiny_opt
from zo_offload import FZOO, MEAZO, NSPSA, QZO, Conservative, Engine, MeZO, SignSGD
from zo_offload.data.losses import model_loss
from zo_offload.journal.format import load_journal
from zo_offload.ranks.alone import cells
from zo_offload.ranks.find import Group
from zo_offload.replay import replayed
from zo_offload.system.signals import StopRequest

STEPS = 3


def digest(engine):
    """Of all stored weights."""
    found = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(stored_weights(engine).items()):
        found.update(name.encode() + weight.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def uneven(n=12, rows=5):
    """Batches whose rows have labels of different counts: parts of a batch weigh differently."""
    made = batches(n, rows=rows)
    for i, batch in enumerate(made):
        labels = batch["labels"].clone()
        for row in range(rows):
            labels[row, : (row + i) % 5] = -100
        batch["labels"] = labels
    return made


def with_dropout():
    model = tiny_opt(layers=2)
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.2
    return model


WAYS = {
    "mezo, two parts, host": dict(method=METHOD, storage="bf16", offload="host", micro=2),
    "mezo, one part: some ranks idle": dict(method=METHOD, storage="fp32", offload="none", micro=1),
    "mezo, disk, split storage": dict(method=METHOD, storage="int8+8", offload="disk", micro=3),
    "fzoo, a rank may have the unperturbed lane alone": dict(
        method=FZOO(lr=1e-3, directions=3, batch_size=4), storage="int8+8", offload="host", micro=2
    ),
    "n-spsa, llama, fold every 3": dict(
        method=NSPSA(lr=1e-3, directions=2, batch_size=4), storage="bf16+16", offload="host", micro=2, fold_every=3,
        make=tiny_llama,
    ),
    "sign": dict(method=SignSGD(lr=1e-4, batch_size=4), storage="fp32", offload="host", micro=2),
    "qzo on scales": dict(method=QZO(lr=1e-3, batch_size=4), storage="int4", offload="host", micro=2),
    "a second visit in each step": dict(
        method=Conservative(lr=1e-3, batch_size=4), storage="fp32", offload="host", micro=2
    ),
    "remembers earlier steps": dict(method=MEAZO(lr=1e-3, batch_size=4), storage="bf16", offload="host", micro=2),
    "dropout": dict(method=METHOD, storage="fp32", offload="host", micro=3, mode="train", make=with_dropout),
}  # fmt: skip


def train_way(way, folder):
    """Losses, an evaluation and the weights' digest."""
    way = {"make": lambda: tiny_opt(layers=2), "block_numel": 4000, **way}
    make, micro = way.pop("make"), way.pop("micro")
    if way["offload"] == "disk":
        way["run_dir"] = folder / "run"
    with Engine(make(), **way) as engine:
        result = engine.fit(uneven(), steps=STEPS, micro_batches=micro, eval_data=uneven(2, rows=3))
        return {"losses": result.losses, "evals": result.evals, "weights": digest(engine)}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return {name: train_way(dict(way), tmp_path_factory.mktemp("one")) for name, way in WAYS.items()}


@pytest.mark.parametrize("world,names", [(2, list(WAYS)[::2]), (3, list(WAYS)), (4, list(WAYS)[1::2])])
def test_any_number_of_ranks_has_the_bits_of_one_process(world, names, one_process, tmp_path):
    def body(rank):
        return {name: train_way(dict(WAYS[name]), tmp_path / str(i)) for i, name in enumerate(names)}

    for rank, found in enumerate(on_ranks(world, body)):
        assert_same(found, {name: one_process[name] for name in names}, f"rank {rank}")


def test_losses_that_the_host_reads_late_are_shared_too(one_process, monkeypatch, tmp_path):
    """On a stand-in for a GPU, whose streams run late: a step is settled after the next one's launch."""
    names = list(WAYS)[:4:3]

    def body(rank):
        device = put_in_place(monkeypatch, FakeCudaDevice(FakeBackend(rank)))
        found = {name: train_way({**WAYS[name], "device": "cuda"}, tmp_path) for name in names}
        return found, device.late, device.backend.races

    for found, late, races in on_ranks(2, body):
        assert late and races == []
        assert_same(found, {name: one_process[name] for name in names})


@pytest.mark.parametrize("count,world", [(8, 3), (2, 3), (4, 4), (1, 2), (7, 2)])
def test_cells_are_consecutive_as_equal_as_can_be_and_rank_0_always_has_some(count, world):
    found = [cells(count, rank, world) for rank in range(world)]
    assert [i for part in found for i in part] == list(range(count))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert len(found[0]) > 0


# ---- run directories -------------------------------------------------------------------------------------------------

RUN = dict(method=METHOD, storage="int8+8", offload="disk", block_numel=4000, snapshot_minutes=None)
FIT = dict(eval_data=batches(3), eval_every=4, micro_batches=3)


def fit_to(steps, run_dir, kill=None):
    """Begin a run, or go on with the one that is there, to `steps` steps; kill: (rank, after which step)."""
    there = (run_dir / "journal.zoj").exists()

    def body(rank):
        def after(record):
            if kill == (rank, record.step):
                os.kill(os.getpid(), signal.SIGKILL)

        model = tiny_opt(layers=2)
        with Engine.resume(run_dir, model) if there else Engine(model, **RUN, run_dir=run_dir) as engine:
            result = engine.fit(batches(20), steps=steps, callback=after, **FIT)
            return {"weights": digest(engine), "evals": result.evals, "version": engine.log.version}

    return body


def told_by(run_dir):
    """What a journal says, without when it was written."""
    contents = load_journal(run_dir / "journal.zoj")
    header = {key: value for key, value in contents.header.items() if key != "created"}
    return json.dumps(header, sort_keys=True), contents.steps, contents.notes


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("one") / "run"
    return {**fit_to(8, run_dir)(0), "journal": told_by(run_dir), "metrics": evals_in(run_dir)}


def evals_in(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if any(key.startswith("eval_") for key in line)]


def test_a_run_goes_on_with_any_other_number_of_ranks(one_run, tmp_path):
    run_dir = tmp_path / "run"
    on_ranks(2, fit_to(2, run_dir))
    assert [p.name for p in (run_dir / "ranks").iterdir()] == ["1"]
    assert not list((run_dir / "ranks").rglob("journal.zoj")), "one run has one journal"
    fit_to(3, run_dir)(0)
    on_ranks(3, fit_to(5, run_dir))
    found = on_ranks(2, fit_to(8, run_dir))
    for rank in found:
        assert rank["weights"] == one_run["weights"]
        assert [values for values in rank["evals"] if values["step"] % 4 == 0] == one_run["evals"]
    assert told_by(run_dir) == one_run["journal"]
    assert evals_in(run_dir)[-1] == one_run["metrics"][-1]
    with replayed(tiny_opt(layers=2), run_dir) as engine:
        assert digest(engine) == one_run["weights"]


@pytest.mark.parametrize("victim", [0, 1])
def test_after_a_rank_was_killed_the_others_end_by_name_and_the_run_goes_on(victim, one_run, tmp_path):
    run_dir = tmp_path / "run"
    found = errors_on_ranks(3, fit_to(8, run_dir, kill=(victim, 3)))
    for rank, error in enumerate(found):
        if rank != victim:
            assert f"RankError: rank {rank} of 3: rank {victim} died" in error
    assert found[victim] == "killed"
    assert 4 <= len(load_journal(run_dir / "journal.zoj").steps) <= 5
    for rank in on_ranks(2, fit_to(8, run_dir)):
        assert rank["weights"] == one_run["weights"]
    assert told_by(run_dir)[1] == one_run["journal"][1]


def test_blocks_of_a_rank_that_know_more_than_the_journal_are_given_up(one_run, tmp_path):
    from zo_offload.cli.journal_tools import cut

    run_dir = tmp_path / "run"
    on_ranks(2, fit_to(6, run_dir))
    cut(run_dir, 3)
    for rank in on_ranks(2, fit_to(8, run_dir)):
        assert rank["weights"] == one_run["weights"]


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def fit(rank, data=None, model=None, steps=STEPS, callback=None, ranks="auto", **settings):
    settings = {"method": METHOD, "offload": "host", "block_numel": 4000, **settings}
    with Engine(tiny_opt(layers=2) if model is None else model, ranks=ranks, **settings) as engine:
        return engine.fit(batches() if data is None else data, steps=steps, callback=callback).losses


def with_another_bit():
    model = tiny_opt(layers=2)
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight[3, 4] += 2.0**-20
    return model


class Unknown:
    """Batches of which nothing is known before they come."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


UNLIKE = {
    "method.lr": lambda rank: fit(rank, method=MeZO(lr=1e-3 if rank else 2e-3)),
    "seed: rank 0 has 0, rank 1 has 7": lambda rank: fit(rank, seed=7 * rank),
    "run.base": lambda rank: fit(rank, model=with_another_bit() if rank else None),
    "run.storage": lambda rank: fit(rank, storage="bf16" if rank else "fp32"),
    "data.digest": lambda rank: fit(rank, data=batches(6 + rank)),
    "steps: rank 0 has 2, rank 1 has 3": lambda rank: fit(rank, steps=2 + rank),
    "without a DistributedSampler": lambda rank: fit(rank, data=Unknown(batches()[rank:])),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_unlike_ranks_are_refused_by_name_on_all(name):
    for rank, error in enumerate(errors_on_ranks(2, UNLIKE[name])):
        assert error.startswith(f"RankError: rank {rank} of 2: ranks differ") and name in error, error


def raising(rank, where):
    def after(record):
        if record.step == 1 and rank == 1 and where == "callback":
            raise OSError("the disk of somebody else")

    def objective(model, batch):
        objective.calls += 1
        if rank == 1 and where == "objective" and objective.calls > 2:
            raise ZeroDivisionError("nothing to divide")
        return model_loss(model, batch)

    objective.calls = 0
    with Engine(tiny_opt(layers=2), method=METHOD, offload="host", objective=objective) as engine:
        engine.fit(batches(), steps=STEPS, callback=after)


@pytest.mark.parametrize("where,what", [
    ("callback", "OSError: the disk of somebody else"), ("objective", "ZeroDivisionError: nothing to divide"),
])  # fmt: skip
def test_an_error_on_one_rank_ends_all_with_its_message(where, what):
    found = errors_on_ranks(3, lambda rank: raising(rank, where))
    assert found == [f"RankError: rank {r} of 3: rank 1 failed: {what}" if r != 1 else what for r in range(3)]


def test_after_an_error_that_was_caught_the_ranks_can_go_on_together():
    def body(rank):
        bad = [{**batch} for batch in batches()]
        del bad[2]["input_ids"]
        with Engine(tiny_opt(layers=2), method=METHOD, offload="host") as engine:
            try:
                engine.fit(Unknown(bad), steps=STEPS)
            except Exception:
                assert engine.log.version == 2
            return engine.fit(Unknown(batches()), steps=STEPS).losses, digest(engine)

    found = on_ranks(2, body)
    assert found[0] == found[1]


def stopped(rank, steps, who, evaluates=False):
    def after(record):
        if record.step == 3 and rank == who:
            os.kill(os.getpid(), signal.SIGTERM)

    with Engine(tiny_opt(layers=2), method=METHOD, offload="host") as engine:
        try:
            eval_data = batches(4) if evaluates else False
            engine.fit(batches(), steps=steps, callback=after, eval_data=eval_data, eval_every=4)
        except KeyboardInterrupt as stop:
            return str(stop), engine.log.version, digest(engine), engine.evals


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(evaluates):
    found = on_ranks(3, lambda rank: stopped(rank, 40, who=1, evaluates=evaluates))
    assert found[0] == found[1] == found[2]
    text, version, _, evals = found[0]
    assert "SIGTERM" in text and version == (4 if evaluates else 5) and evals == []


def test_a_bit_that_flips_on_one_rank_is_found_by_block():
    def body(rank):
        def after(record):
            if rank == 1 and record.step == 1:
                engine.active.session.tier.slabs[3][100] ^= 4

        with Engine(tiny_opt(layers=2), method=METHOD, offload="host", block_numel=4000, num_slots=2) as engine:
            engine.fit(batches(), steps=60, callback=after)

    for rank, error in enumerate(errors_on_ranks(2, body)):
        assert error.startswith(f"RankError: rank {rank} of 2: block 3 (") and "not the same on all ranks" in error


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_not_waited_for_without_end():
    def body(rank):
        return fit(rank, steps=400, ranks=Group(patience=2))

    ranks = Ranks(2, body)
    time.sleep(3)
    os.kill(ranks.pids[1], signal.SIGSTOP)  # before its first step, if this machine is that slow
    found = []
    try:
        assert ranks._pipes[0].poll(20)
    finally:
        os.kill(ranks.pids[1], signal.SIGCONT)
        found = ranks.results()
    assert "rank 1 did not come to '" in found[0]["error"] and "patience" in found[0]["error"]


def test_ranks_that_do_not_make_the_same_calls_are_told_where_they_are():
    def body(rank):
        with Engine(tiny_opt(layers=2), method=METHOD, offload="host") as engine:
            return engine.step(batches()[0]) if rank else engine.fit(batches(), steps=2)

    for error in errors_on_ranks(2, body):
        assert "do not make the same calls" in error and "rank 0 has 'fit'" in error, error


# ---- how they are launched -------------------------------------------------------------------------------------------


def test_a_process_group_of_the_callers_is_found():
    def body(rank):
        dist.init_process_group("gloo", timeout=timedelta(seconds=30))
        try:
            return fit(rank, steps=2)
        finally:
            dist.destroy_process_group()

    assert on_ranks(2, body) == [fit(0, steps=2)] * 2


def test_ranks_that_a_launcher_starts_again_do_not_read_what_those_before_have_left(one_run, tmp_path):
    run_dir = tmp_path / "run"
    before = Ranks(2, fit_to(8, run_dir, kill=(1, 3)))
    assert before.results()[1] is None
    for rank in Ranks(2, fit_to(8, run_dir), again=before).results():
        assert rank["value"]["weights"] == one_run["weights"]


def test_the_rank_that_keeps_the_store_waits_for_the_others_at_its_end():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def body(rank):
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
        with Engine(tiny_opt(layers=2), method=METHOD, offload="host") as engine:
            losses = engine.fit(batches(), steps=2).losses
            if rank == 1:
                time.sleep(1)
        return losses

    assert on_ranks(2, body) == [fit(0, steps=2)] * 2


def test_a_launchers_echo_of_a_signal_is_not_a_second_one():
    stop = StopRequest(echo_s=0.2)
    for _ in range(3):
        stop.handle(signal.SIGINT, None)
    assert stop.signum == signal.SIGINT and not stop.at_once
    time.sleep(0.25)
    stop.handle(signal.SIGINT, None)
    assert stop.at_once


# ---- beside training -------------------------------------------------------------------------------------------------


def test_nobody_is_waited_for_in_what_only_rank_0_does(tmp_path):
    def body(rank):
        with Engine(tiny_opt(layers=2), method=METHOD, offload="host") as engine:
            early = engine.evaluate(batches(2)) if rank == 0 else None
            engine.fit(batches(), steps=3)
            if rank == 0:
                engine.save_pretrained(tmp_path / "out")
                return early, engine.evaluate(batches(2)), engine.generate({"input_ids": torch.ones(1, 3).long()})
            return None, engine.save_pretrained(tmp_path / "out"), digest(engine)

    first, other = on_ranks(2, body)
    assert first[0] is not None and other[1] == []
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_alone_is_what_ranks_none_means_whatever_launched_the_process():
    def body(rank):
        return fit(rank, ranks=None, seed=rank, steps=2)

    found = on_ranks(2, body)
    assert found[0] != found[1]


def test_what_auto_leaves_open_is_decided_for_all_ranks(monkeypatch, tmp_path):
    """The host's memory is shared by its ranks, and if one has to stream from disk all do."""
    need = sum(p.numel() * 4 for p in tiny_opt(layers=2).parameters())

    def body(rank):
        monkeypatch.setattr("zo_offload.run.prepare.available_bytes", lambda: (5 if rank else 100) * need)
        with Engine(tiny_opt(layers=2), method=METHOD, run_dir=tmp_path / "run") as engine:
            return engine.offload

    assert [body(0), body(1)] == ["none", "none"]
    assert on_ranks(2, body) == ["none", "none"]
    assert on_ranks(3, body) == ["disk", "disk", "disk"]
