"""Rounds that close: with late, silent, erring, hostile and absent peers."""

import math

import numpy as np
import pytest
from federation import federate, local_grid
from flwr.app import Array, ArrayRecord, ConfigRecord

from fedkd.wire.messages import wire_bytes
from strategies.relay.rounds import RelayError

PEERS = 4


def answer_two_rounds_late(grid):
    """Let peer 1's answer to round 1 arrive in round 3."""
    held = []

    def late(partition, message):
        mail = message.content["mail"]
        if partition == 1 and mail["kind"] == "learn" and mail["round"] == 1:
            held.append((message, grid.answer(partition, message)))
            return grid.nothing
        if held and partition == 0 and mail["round"] == 3:
            grid.replies.append(held[0][1])
            grid.deliver(*held.pop())
        return None

    grid.fault = late


def test_participation_draws_some_peers_and_the_others_are_absent(tmp_path):
    run = federate(tmp_path, PEERS, participation=0.5, rounds=4)

    for round in range(1, 5):
        rows = [row for row in run.rows() if row["round"] == round]
        assert sorted(row["status"] for row in rows) == ["absent", "absent", "ok", "ok"]


def test_old_knowledge_weighs_less_and_then_nothing(tmp_path):
    """Peer 1 errs from round 1 on; its knowledge of round 0 serves, halved each round, until max-staleness."""
    grid = local_grid(tmp_path, 3)

    def mute(partition, message):
        if partition == 1 and message.content["mail"]["kind"] == "learn":
            raise RuntimeError("gone")

    grid.fault = mute
    with pytest.raises(RelayError, match="peer-1 never trained: Flower error 2: gone"):
        federate(tmp_path, 3, grid=grid, rounds=5, max_staleness=2)

    weights = {}
    for message in grid.sent:
        mail, senders = message.content["mail"], message.content["senders"]
        if mail["kind"] == "learn" and message.metadata.dst_node_id == next(iter(grid.get_node_ids())):
            weights[mail["round"]] = dict(zip(senders["names"], senders["weights"], strict=True)).get("peer-1")
    assert weights == {1: 1.0, 2: 0.5, 3: 0.25, 4: None, 5: None}


def test_a_round_closes_at_its_deadline_and_a_silent_peer_rejoins(tmp_path):
    grid = local_grid(tmp_path, 3)
    answer_two_rounds_late(grid)
    run = federate(tmp_path, 3, grid=grid, rounds=5, round_timeout=0.5)

    status = {row["round"]: row["status"] for row in run.rows() if row["peer"] == "peer-1"}
    assert status[1] == status[2] == "late" and status[4] == status[5] == "ok"
    assert run.summary()["peers"][1]["failures"]["late"] >= 2


def test_too_few_answers_stop_the_run_with_the_reason(tmp_path):
    grid = local_grid(tmp_path, 3)

    def broken(partition, message):
        if partition and message.content["mail"]["round"] == 2:
            raise RuntimeError("power cut")

    grid.fault = broken
    with pytest.raises(RelayError, match=r"round 2: 1 of 3 peers answered, `min-answers` is 2: .*power cut"):
        federate(tmp_path, 3, grid=grid, min_answers=2)


def bad_knowledge(kind, good):
    if kind == "nan":
        return {"logits": np.full_like(good, math.nan)}
    if kind == "shape":
        return {"logits": good[:-1]}
    if kind == "dtype":
        return {"logits": good.astype(np.float64)}
    if kind == "name":
        return {"weights": good}
    return {"logits": np.zeros((10**6, 10), dtype=np.float32)}


@pytest.mark.parametrize("kind", ["nan", "shape", "dtype", "name", "large", "round", "peer"])
def test_hostile_knowledge_is_refused_by_name_counted_and_costs_nothing_else(tmp_path, kind):
    grid = local_grid(tmp_path, 3)

    def hostile(partition, message):
        mail = message.content["mail"]
        if partition != 2 or mail["kind"] != "learn" or mail["round"] != 1:
            return None
        reply = grid.answer(partition, message)
        if kind in ("round", "peer"):
            forged = {"round": 7} if kind == "round" else {"peer": "peer-0"}
            reply.content["answer"] = ConfigRecord({**reply.content["answer"], **forged})
        else:
            good = reply.content["knowledge"]["logits"].numpy()
            spoiled = bad_knowledge(kind, good)
            reply.content["knowledge"] = ArrayRecord({name: Array(array) for name, array in spoiled.items()})
        return reply

    grid.fault = hostile
    run = federate(tmp_path, 3, grid=grid, rounds=3)

    bad = next(row for row in run.rows() if row["peer"] == "peer-2" and row["round"] == 1)
    assert bad["status"] in ("refused", "error") and bad["error"]
    assert all(row["status"] == "ok" for row in run.rows() if row is not bad and row["peer"] != "peer-2")
    assert sum(run.summary()["peers"][2]["failures"].values()) == 1
    assert all(np.isfinite(row["kd_loss"]) for row in run.rows() if row["round"] and row["status"] == "ok")


def test_a_peer_refuses_a_bad_letter_by_its_senders_name(tmp_path):
    """The relay could be the liar: the peer checks again."""
    grid = local_grid(tmp_path, 3)

    def spoil(partition, message):
        if partition == 0 and message.content["mail"]["kind"] == "learn":
            message.content["letter.0"] = ArrayRecord({"logits": Array(np.full((60, 10), np.inf, dtype=np.float32))})

    grid.fault = spoil
    run = federate(tmp_path, 3, grid=grid, rounds=1)

    row = next(row for row in run.rows() if row["peer"] == "peer-0" and row["round"] == 1)
    assert row["refused_letters"] == 1 and row["error"].startswith("peer-1: ") and row["status"] == "ok"


def test_a_peer_that_starts_late_has_its_control_too(tmp_path):
    grid = local_grid(tmp_path, 3)

    def fails_to_start(partition, message):
        if partition == 1 and message.content["mail"]["kind"] == "start" and message.content["mail"]["round"] == 0:
            raise RuntimeError("not yet")

    grid.fault = fails_to_start
    run = federate(tmp_path, 3, grid=grid, controls="isolated", rounds=3)

    assert all(peer["isolated"] is not None for peer in run.summary()["peers"])
    assert "peer-1" in run.rows()[-3]["teachers"]


def test_a_node_that_flower_does_not_reach_costs_its_own_row_only(tmp_path):
    grid = local_grid(tmp_path, 3)
    push = grid.push_messages

    def gone(messages):
        messages = list(messages)
        lost = [m for m in messages if m.metadata.dst_node_id == 1007 and m.content["mail"]["round"] == 1]
        return push([m for m in messages if m not in lost])

    grid.push_messages = gone
    run = federate(tmp_path, 3, grid=grid, rounds=3)

    problems = [(row["peer"], row["round"], row["error"]) for row in run.rows() if row["status"] != "ok"]
    assert problems == [("peer-1", 1, "Flower did not take the message")]


def test_bytes_of_late_and_silent_peers_are_counted_once(tmp_path):
    grid = local_grid(tmp_path, 3)
    answer_two_rounds_late(grid)
    run = federate(tmp_path, 3, grid=grid, rounds=4, round_timeout=0.5)

    rows, totals = run.rows(), run.summary()["totals"]
    assert totals["bytes_down"] == sum(wire_bytes(m.content) for m in grid.sent) == sum(r["bytes_down"] for r in rows)
    assert totals["bytes_up"] == sum(wire_bytes(m.content) for m in grid.replies) == sum(r["bytes_up"] for r in rows)
