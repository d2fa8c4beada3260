"""What ranks tell each other, without engines: threads of this process that meet in a store in memory."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from zo_offload.errors import ConfigError, RankError
from zo_offload.ranks import team as teams
from zo_offload.ranks.agree import of_ranks, unlike
from zo_offload.ranks.alone import Alone
from zo_offload.ranks.exchange import StoreExchange
from zo_offload.ranks.find import Group, find
from zo_offload.ranks.team import Team
from zo_offload.system.signals import StopRequest


def on_threads(world, body, **options):
    """What body(team) returned, or raised, on each of so many ranks."""
    store, found = dist.HashStore(), [None] * world

    def run(rank):
        try:
            found[rank] = body(Team(StoreExchange(store, rank, world), **options))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank hangs"
    return found


def test_rows_come_in_rank_order_whoever_is_first():
    def body(team):
        time.sleep(0.02 * (team.world - team.rank))
        return [row["n"] for row in team.gather("somewhere", {"n": team.rank})], team.local_rank, team.local_world

    assert on_threads(3, body) == [([0, 1, 2], rank, 3) for rank in range(3)]


def test_losses_are_gathered_in_the_order_of_one_process_to_the_last_bit():
    losses = [0.1 + 0.2, float("inf"), 1e-320, -0.0, 3.0, 2**53 + 1.0, 5.1]

    def body(team):
        return team.losses(0, [losses[i] for i in team.cells(len(losses))])

    assert [[x.hex() for x in found] for found in on_threads(3, body)] == [[x.hex() for x in losses]] * 3


def test_a_loss_that_is_no_number_travels():
    assert all(found[1] != found[1] for found in on_threads(2, lambda team: team.losses(0, [float("nan")])))


def test_all_count_the_same_turns_after_errors_that_were_caught():
    def body(team):
        told = []
        for n in range(4):
            try:
                with team.together(f"try {n}"):
                    if n == 2 or team.rank == n:
                        raise KeyError(f"{n} of {team.rank}")
                    team.gather(f"inside {n}", {})
            except (KeyError, RankError) as error:
                told.append(f"{type(error).__name__} {error}")
        return told, [row["n"] for row in team.gather("after", {"n": team.rank})]

    first, other = on_threads(2, body)
    assert first[1] == other[1] == [0, 1]
    assert first[0] == ["KeyError '0 of 0'", "RankError rank 0 of 2: rank 1 failed: KeyError: '1 of 1'",
                        "KeyError '2 of 0'"]  # fmt: skip
    assert other[0][0] == "RankError rank 1 of 2: rank 0 failed: KeyError: '0 of 0'"


def test_ranks_at_different_places_say_who_is_where():
    for error in on_threads(3, lambda team: team.gather("step 4" if team.rank == 1 else "step 5", {})):
        assert "they are at: ranks 0 and 2 have 'step 5', rank 1 has 'step 4'" in str(error)


def test_a_rank_that_closes_is_not_waited_for():
    def body(team):
        if team.rank == 1:
            team.leave()
            return team.leave()
        return team.gather("step 1", {})

    assert "rank 1 failed: it closed its engine" in str(on_threads(2, body)[0])


def test_a_closed_engine_takes_part_in_nothing():
    def body(team):
        team.leave()
        team.gather("step 1", {})

    assert all(isinstance(error, ConfigError) for error in on_threads(2, body))


def test_one_that_never_comes_is_told_after_the_patience():
    def body(team):
        if team.rank == 0:
            team.gather("step 1", {})

    error = on_threads(2, body, patience=0.7)[0]
    assert "rank 1 did not come to 'step 1' within" in str(error) and "process" in str(error)


def test_one_that_makes_no_engine_is_told_too():
    with pytest.raises(RankError, match="rank 1 did not come to 'meeting'.*do all make an engine"):
        Team(StoreExchange(dist.HashStore(), 0, 2), patience=0.6)


def test_patience_grows_with_what_was_seen(monkeypatch):
    monkeypatch.setattr(teams, "LEAST_PATIENCE_S", 0.1)

    def body(team):
        for n in range(3):
            time.sleep(0.3 if team.rank else 0)
            team.gather(f"step {n}", {})
        if team.rank:
            return time.sleep(2)
        began = time.monotonic()
        with pytest.raises(RankError):
            team.gather("step 3", {})
        return time.monotonic() - began

    monkeypatch.setattr(teams, "TIMES_SEEN", 4.0)
    monkeypatch.setattr(teams, "MEETING_S", 30.0)
    assert 1.0 < on_threads(2, body)[0] < 2.6


def test_what_two_ranks_have_of_one_block_at_one_version_is_compared():
    def body(team, version=5):
        team.about({"batch": "b"}, ["memory", 2, "layers.1", version + (team.rank == 0), f"{team.rank}"])
        return team.losses(7, [1.0])

    assert "block 2 (layers.1)" in str(on_threads(3, body)[0])
    assert on_threads(2, body) == [[1.0, 1.0]] * 2, "at unlike versions nothing can be said"


def test_a_stop_is_agreed_on_in_a_turn_and_seen_while_an_evaluation_is_shared():
    def body(team):
        stop = StopRequest()
        team.heed(stop)
        if team.rank == 1:
            stop.signum = 15
        before = team.stopped_by()
        team.losses(0, [0.0])
        return before, team.stopped_by()

    assert on_threads(2, body) == [(None, 15)] * 2

    def evaluation(team):
        stop = StopRequest()
        team.heed(stop)
        done = {}
        for item in range(team.rank, 200, team.world):
            if team.is_stopping():
                break
            done[item] = item
            if team.rank == 1 and item > 20:
                stop.signum = 2
            time.sleep(0.005)
        return team.split("evaluation", done), team.stopped_by(), len(done) < 60

    assert on_threads(2, evaluation) == [(None, 2, True)] * 2
    assert on_threads(3, lambda team: team.split("it", {team.rank: "x"})) == [{0: "x", 1: "x", 2: "x"}] * 3


def test_rows_that_all_have_read_are_dropped():
    store = dist.HashStore()

    def run(rank):
        team = Team(StoreExchange(store, rank, 2))
        for n in range(50):
            team.losses(n, [0.0] * 10)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert store.num_keys() <= 4


def test_alone_is_a_team_of_one():
    team = Alone()
    with team.together("here"):
        assert team.losses(0, [1.5]) == [1.5] and list(team.cells(3)) == [0, 1, 2]
        assert team.gather("here", {"a": 1}) == [{"a": 1}] and team.first("here", lambda: 2) == 2
        assert team.split("here", {0: 1}) == {0: 1} and team.stopped_by() is None and not team.is_stopping()
    team.leave()


def test_differences_are_named_by_path_and_rank():
    values = [{"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, {"a": {"b": 1, "c": 2, "d": None}}]
    assert list(unlike(values)) == ["a.c: ranks 0 and 2 have 2, rank 1 has 3"]
    assert list(unlike([{"x": 1}, {"x": True}])) and not list(unlike([{"x": float("nan")}] * 2))
    assert of_ranks([3]) == "rank 3" and of_ranks([0, 1, 4]) == "ranks 0, 1 and 4"


@pytest.mark.parametrize("wrong", ["all", 3, Group])
def test_what_is_no_choice_of_ranks_is_refused(wrong):
    with pytest.raises(ConfigError, match="ranks="):
        find(wrong)


@pytest.mark.parametrize("variables,what", [
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"), ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 with WORLD_SIZE=2"),
])  # fmt: skip
def test_launchers_variables_that_make_no_sense_are_refused(variables, what, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=what):
        find("auto")


def test_patience_is_a_number_of_seconds():
    with pytest.raises(ConfigError, match="patience=0"):
        Group(patience=0)
