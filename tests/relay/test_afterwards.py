"""What comes when nobody waits for it any more: no number is lost, and none is put in another's place."""

import pytest
from federation import federate, local_grid
from local_grid import LocalGrid
from witness import Clock

SMALL = {"models": "mlp", "pretrain_epochs": 1, "proxy_size": 64, "round_timeout": 8.0, "batch_size": 64}
ALONE = {**SMALL, "schedule": "alternate", "distill_epochs": 0, "controls": "isolated"}  # a peer is its own control
ASYNC = {"strategy": "gossip", "mode": "async", "rounds": 3}


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def holding_back(grid, **delays):
    """Have answers arrive with others: both as (kind, peer, round)."""
    until, held = dict(delays.values()), {}

    def fault(partition, message):
        mail = message.content["mail"]
        this = (mail["kind"], partition, mail["round"])
        for other in [other for other in held if until[other] == this]:
            grid.deliver(*held.pop(other))
        if this in until:
            held[this] = message, grid.answer(partition, message)
            return grid.nothing
        return None

    grid.fault = fault
    return grid


def test_a_control_that_answers_when_it_has_been_given_up_changes_no_round(tmp_path, clock):
    settings = {**SMALL, "rounds": 2, "controls": "isolated,pooled", "pooled_model": "mlp"}
    prompt = federate(tmp_path / "prompt", 2, **settings)
    grid = holding_back(local_grid(tmp_path, 2), late=(("isolated", 1, 2), ("pooled", 0, 2)))
    run = federate(tmp_path / "late", 2, grid=grid, **settings)

    assert run.timeless_rows() == prompt.timeless_rows()
    after = [[peer["after"] for peer in one.summary()["peers"]] for one in (run, prompt)]
    assert after[0] == after[1] and run.summary()["peers"][1]["isolated"] is None
    assert run.summary()["totals"]["bytes_up"] == prompt.summary()["totals"]["bytes_up"]


def test_the_control_of_a_peer_that_ends_its_last_round_late_does_that_round_too(tmp_path, clock):
    grid = holding_back(local_grid(tmp_path, 2), late=(("learn", 1, 3), ("isolated", 0, 5)))
    run = federate(tmp_path, 2, grid=grid, **{**ALONE, **ASYNC, "updates": 7})

    assert [row["round"] for row in run.rows() if row["peer"] == "peer-1"] == [0, 1, 2, 3]
    assert all(peer["after"] == peer["isolated"] for peer in run.summary()["peers"])


def test_a_start_that_is_late_where_there_are_no_rounds_has_the_row_of_the_start(tmp_path, clock):
    grid = holding_back(local_grid(tmp_path, 2), late=(("start", 1, 0), ("learn", 0, 2)))
    run = federate(tmp_path, 2, grid=grid, **{**SMALL, **ASYNC, "updates": 6})

    rows = {(row["round"], row["peer"]): row for row in run.rows()}
    assert len(rows) == len(run.rows())
    assert rows[0, "peer-1"]["status"] == "late" and rows[0, "peer-1"]["test_accuracy"] is not None
    assert sum(row["status"] == "ok" and row["round"] > 0 for row in run.rows()) == 6
    assert sum(row["bytes_up"] for row in run.rows()) == run.summary()["totals"]["bytes_up"]


def test_every_row_says_of_which_run_it_is_a_late_one_too(tmp_path, clock):
    grid = holding_back(local_grid(tmp_path, 2), late=(("learn", 1, 1), ("learn", 0, 2)))
    run = federate(tmp_path, 2, grid=grid, **{**SMALL, "rounds": 3})

    assert [row["status"] for row in run.rows() if row["peer"] == "peer-1"] == ["ok", "late", "late", "ok"]
    assert {row["run"] for row in run.rows()} == {run.summary()["run"]}


def test_a_node_too_many_that_introduces_itself_late_ends_no_run(tmp_path, clock):
    grid = holding_back(local_grid(tmp_path, 3), late=(("introduce", 2, 0), ("start", 0, 0)))
    run = federate(tmp_path, 3, grid=grid, seats=2, **{**SMALL, "rounds": 1})

    assert [row["status"] for row in run.rows()] == ["ok"] * 4


def test_a_control_that_begins_late_has_the_time_of_its_own_rounds(tmp_path, clock, monkeypatch):
    """As between real sites, where a message lives as long as its answer may take."""
    monkeypatch.delattr(LocalGrid, "state")
    delays = {"first": (("learn", 0, 1), ("learn", 1, 6)), "last": (("learn", 1, 7), ("isolated", 0, 3))}
    grid = holding_back(local_grid(tmp_path, 2), **delays)
    run = federate(tmp_path, 2, grid=grid, seats=2, **{**ALONE, **ASYNC, "updates": 9})

    lives = {(m.content["mail"]["kind"], m.content["mail"]["round"]): m.metadata.ttl for m in grid.sent}
    round = lives["learn", 1]
    assert (lives["isolated", 3], lives["isolated", 7]) == (3 * round, 7 * round)
    assert all(peer["after"] == peer["isolated"] for peer in run.summary()["peers"])
