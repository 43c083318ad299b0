"""The main job in one process: what a run exchanges, leaves behind and refuses."""

import json
import math

import numpy as np
import pytest
from federation import SMALL, federate, local_grid
from flwr.app import ConfigRecord
from safetensors.numpy import load_file

from fedkd.errors import FedkdError
from fedkd.settings.config import RunConfig
from fedkd.wire.messages import wire_bytes
from strategies.relay.roster import RosterError
from strategies.relay.rounds import RelayError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return federate(tmp_path_factory.mktemp("main"), controls="isolated,pooled", pictures=True)


def test_one_message_per_peer_and_round(run):
    rounds = [message.content.config_records["mail"]["round"] for message in run.grid.sent]
    kinds = [message.content.config_records["mail"]["kind"] for message in run.grid.sent]

    assert kinds == ["introduce"] * 3 + ["start"] * 3 + ["learn"] * 6 + ["isolated"] * 3 + ["pooled"]
    assert rounds[6:12] == [1, 1, 1, 2, 2, 2]


def test_every_peer_hears_all_the_others(run):
    for row in run.rows():
        others = {"peer-0", "peer-1", "peer-2"} - {row["peer"]}
        assert set(row["teachers"]) == (others if row["round"] else set())


def assert_only_knowledge_and_small_facts_travel(run, shapes):
    """Every message is read: no array is of another shape, and nothing else has room for weights or samples."""
    for message in run.grid.sent + run.grid.replies:
        for name, record in message.content.array_records.items():
            assert name == "knowledge" or name.startswith("letter.")
            assert {key: array.numpy().shape for key, array in record.items()} == shapes
        for record in (*message.content.config_records.values(), *message.content.metric_records.values()):
            assert sum(len(str(value)) for value in record.values()) < 4000  # the smallest model has 13,706 parameters
            assert not any(isinstance(value, bytes) for value in record.values())


def test_nothing_leaves_a_peer_but_logits_on_the_proxy_set_and_a_few_numbers(run):
    assert_only_knowledge_and_small_facts_travel(run, {"logits": (SMALL["proxy-size"], 10)})


@pytest.mark.parametrize(
    ("settings", "features"),
    [
        ({"strategy": "pairwise"}, {}),
        ({"strategy": "gossip"}, {}),
        ({"strategy": "gossip", "mode": "async"}, {}),
        ({"method": "infoflow", "flow_dimensions": 5}, {f"flow.{layer}": (60, 5) for layer in range(3)}),
    ],
)
def test_nothing_more_leaves_a_peer_under_the_other_server_free_strategies(tmp_path, settings, features):
    run = federate(tmp_path, **settings)

    assert_only_knowledge_and_small_facts_travel(run, {"logits": (60, 10), **features})


def test_knowledge_is_what_the_saved_model_says_about_the_proxy_set(run):
    """The letters of the last round are the logits of the state on disk: measured, not made up."""
    import torch

    from clients.data import PeerConfig, open_site
    from fedkd import models

    state_root = run.folder.parent / "state"
    config = RunConfig.from_mapping(run.settings)
    peer_config = PeerConfig("peer-0", 0, 3, state_root / "peer-0", state_root)
    site = open_site(config, peer_config, torch.device("cpu"))
    model = models.build("mlp", input_shape=(1, 8, 8), num_classes=10, seed=0)
    state = load_file(next((state_root / "peer-0").rglob("round-000002.safetensors")))
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    learned = [m for m in run.grid.replies if "knowledge" in m.content and m.content["answer"]["peer"] == "peer-0"]

    sent = learned[-1].content["knowledge"]["logits"].numpy()

    expected = model.eval()(site.commons.proxy_inputs).detach().numpy()
    np.testing.assert_allclose(sent, expected, rtol=1e-5, atol=1e-5)


def test_bytes_in_the_results_are_those_of_the_messages(run):
    for row in run.rows():
        sent = [m for m in run.grid.sent if m.content["mail"]["kind"] in ("start", "learn")]
        replies = [m for m in run.grid.replies if "knowledge" in m.content]
        index = 3 * row["round"] + int(row["peer"][-1])
        assert row["bytes_down"] == wire_bytes(sent[index].content)
        assert row["bytes_up"] == wire_bytes(replies[index].content) >= 60 * 10 * 4


def test_results_are_complete_and_readable(run):
    keys = "round peer model teachers test_accuracy own_accuracy test_loss ece kd_loss bytes_up bytes_down seconds"
    rows = run.rows()
    summary = run.summary()
    config = json.loads((run.folder / "config.json").read_text())

    assert len(rows) == 9 and set(keys.split()) <= rows[0].keys()
    assert all(0 <= row["test_accuracy"] <= 1 and 0 <= row["ece"] <= 1 for row in rows)
    assert all(row["kd_loss"] is None if row["round"] == 0 else row["kd_loss"] >= 0 for row in rows)
    assert config["settings"]["proxy-size"] == 60 and config["environment"]["versions"]["flwr"]
    assert [peer["after"] for peer in summary["peers"]] == [row["test_accuracy"] for row in rows[-3:]]
    assert [peer["before"] for peer in summary["peers"]] == [row["test_accuracy"] for row in rows[:3]]
    assert summary["totals"]["bytes_up"] == sum(row["bytes_up"] for row in rows)
    assert (run.folder / "accuracy.png").read_bytes()[:4] == b"\x89PNG"


def test_by_default_labels_and_knowledge_share_every_step_at_equal_weights(tmp_path, run):
    said = federate(tmp_path, schedule="mixed", divergence="kl", kd_weight=0.5)

    assert said.timeless_rows() == run.timeless_rows()
    assert {(row["kd_weight"], row["local_loss"]) for row in run.rows() if row["round"]} == {(0.5, None)}


def test_peers_take_turns_where_no_more_than_that_is_asked_for(tmp_path):
    rows = federate(tmp_path, schedule="alternate").rows()[3:]

    assert all(row["kd_weight"] == 1 and row["kd_loss"] > 0 and row["local_loss"] > 0 for row in rows)


def test_controls_start_where_the_peers_started(run):
    summary = run.summary()

    assert summary["isolated_by_round"][0] == pytest.approx(summary["mean"]["before"])
    assert len(summary["isolated_by_round"]) == 3
    assert math.isfinite(summary["pooled"])


def test_same_seed_same_numbers_and_another_seed_others(tmp_path, run):
    again = federate(tmp_path / "again")
    other = federate(tmp_path / "other", seed=1)

    assert again.timeless_rows() == run.timeless_rows()
    assert other.timeless_rows() != run.timeless_rows()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"robust": "eigentrust", "proxy_per_round": 30, "participation": 0.7, "rounds": 5, "seed": 2},
        {"robust": "agreement", "proxy_per_round": 30},
        {"regime": "partitioned", "proxy_per_round": 30, "rounds": 5, "participation": 0.7, "seed": 2},
    ],
)
def test_a_peer_that_moved_to_a_cold_process_gives_the_same_numbers(tmp_path, settings, monkeypatch):
    """The truth is on disk: forgetting every warm model, and what it said last, changes nothing."""
    import clients.warm

    run = federate(tmp_path / "warm", **settings)

    class Forgetful(dict):
        def __setitem__(self, key, value):
            pass

    monkeypatch.setattr(clients.warm, "_kept", Forgetful())

    assert federate(tmp_path / "cold", **settings).timeless_rows() == run.timeless_rows()


def test_a_different_proxy_set_is_refused_by_name(tmp_path):
    grid = local_grid(tmp_path)

    def other_fingerprint(partition, message):
        reply = grid.answer(partition, message)
        if partition == 1:
            reply.content["facts"] = ConfigRecord({**reply.content["facts"], "fingerprint": "feed"})
        return reply

    grid.fault = other_fingerprint

    with pytest.raises(RosterError, match="peer-1's proxy set feed differ"):
        federate(tmp_path, grid=grid)


def test_other_code_is_refused_by_name(tmp_path):
    grid = local_grid(tmp_path)

    def other_source(partition, message):
        reply = grid.answer(partition, message)
        reply.content["facts"] = ConfigRecord({**reply.content["facts"], "source": "0ld", "source-root": "elsewhere"})
        return reply

    grid.fault = other_source

    with pytest.raises(RosterError, match="peer-0 runs other code than the relay: 0ld from elsewhere"):
        federate(tmp_path, grid=grid)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"divergence": "telepathy"}, "`divergence`.*js.*'telepathy'"),
        ({"dataset": "npz:nowhere.npz"}, "`dataset`.*nowhere.npz"),
        ({"proxy_size": 10**6}, "`proxy-size`"),
        ({"partition": "classes", "classes_per_peer": 11}, "`classes-per-peer`.*10"),
        ({"models": "resnet21"}, "`models`.*resnet20.*'resnet21'"),
        ({"checkpoints": "nowhere.pt"}, "`checkpoints`.*nowhere.pt"),
        ({"codec": "morse"}, "`codec`.*fp16.*'morse'"),
        ({"device": "cuda:99"}, "`device`"),
    ],
)
def test_a_wrong_setting_stops_the_run_before_any_training(tmp_path, settings, complaint):
    grid = local_grid(tmp_path, 2)

    with pytest.raises(FedkdError, match=complaint):
        federate(tmp_path, grid=grid, **settings)

    assert {message.content["mail"]["kind"] for message in grid.sent} <= {"introduce"}
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_a_round_goes_on_without_a_peer_that_errs(tmp_path):
    grid = local_grid(tmp_path)

    def fails_once(partition, message):
        mail = message.content["mail"]
        if partition == 1 and mail["kind"] == "learn" and mail["round"] == 1:
            raise RuntimeError("out of memory")
        return None

    grid.fault = fails_once

    rows = federate(tmp_path, grid=grid).rows()

    failed = next(row for row in rows if row["round"] == 1 and row["peer"] == "peer-1")
    assert "out of memory" in failed["error"] and failed["test_accuracy"] is None
    assert all(row["error"] == "" for row in rows if row is not failed)
    assert "peer-1" in rows[-3]["teachers"]  # its last knowledge still serves


def test_a_run_in_which_no_peer_can_start_says_why(tmp_path):
    grid = local_grid(tmp_path)

    def broken(partition, message):
        if message.content["mail"]["kind"] == "start":
            raise RuntimeError("out of memory")
        return None

    grid.fault = broken

    with pytest.raises(RelayError, match=r"round 0: 0 of 3 peers answered.*out of memory"):
        federate(tmp_path, grid=grid)
