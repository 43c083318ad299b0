"""The channel control: what peers would be whose teachers were the proxy set's true labels."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from federation import federate, local_grid
from local_grid import LocalGrid
from test_control_law import run
from witness import Clock, Witness

import clients.data
from clients.data import proxy_subset
from clients.learner import Heard
from clients.peer import Peer
from fedkd.data.proxy import split_proxy
from fedkd.results.folder import share_of_channel
from fedkd.training.distillation import label_logits, toward_labels

ALL = "isolated,pooled,channel"
SKEWED = {"partition": "dirichlet", "partition_alpha": 0.3, "proxy_size": 100, "pooled_model": "mlp"}


@pytest.fixture
def told_the_truth(monkeypatch):
    """Peers that hear the true labels wherever they hear anything."""
    begin = Peer.__init__

    def begun(peer, *args, **kwargs):
        begin(peer, *args, **kwargs)
        peer.hearing.hear = partial(heard, peer, peer.hearing.hear)

    def heard(peer, hear, mail, memo):
        found, refused = hear(mail, memo)
        if found is None:
            return found, refused
        config, labels = peer.config, peer.site.commons.proxy_labels
        shown = labels[proxy_subset(config, mail.round, labels.device)]
        said = {
            "divergence": toward_labels(config).divergence,
            "temperature": memo.get("temperature", config.temperature),
        }
        return Heard(label_logits(shown, peer.classes, **said).unsqueeze(0), torch.ones(1)), refused

    monkeypatch.setattr(Peer, "__init__", begun)


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"schedule": "alternate", "local_epochs": 2, "divergence": "js"},
        {
            "regime": "dml",
            "temperature": 4.0,
            "t2_scaling": True,
            "divergence": "reverse_kl",
            "eval_every": 2,
            "teacher_temperature": 1.0,  # here and below: labels that were sharpened differ in their last bits
        },
        {"regime": "partitioned", "kd_warm_up": 3, "proxy_per_round": 32},
        {"match_gradients": True, "divergence": "td", "robust": "median", "weighing": "uniform"},
        # Of three one hears nobody.
        {"strategy": "pairwise", "matching": "round-robin", "divergence": "cakd", "teacher_temperature": 1.0},
        {"regime": "tuned", "tune_temperatures": "1", "tune_weights": "0.5,1", "schedule": "mixed"},
        {"logit_adjustment": 1.0, "vacant_classes": 0.5, "logit_suppression": 0.01, "schedule": "alternate"},
        {"augment": "crop-flip", "augment_proxy": "crop-flip", "label_smoothing": 0.1, "gradient_clip": 0.5},
        {
            "augment": "crop-flip",
            "augment_proxy": "crop-flip",
            "schedule": "alternate",
            "learning_rate_schedule": "cosine",
            "learning_rate_over": "run",
            "learning_rate_warm_up": 0.2,
        },
        {"strategy": "gossip", "mode": "async", "updates": 14, "rounds": 2},
    ],
)
def test_of_a_peer_that_is_told_the_truth_it_is_the_peer_itself(tmp_path_factory, monkeypatch, told_the_truth, way):
    """Late, lost and refused answers, rounds without a teacher: the control does what its peer did, bit by bit."""
    Clock(monkeypatch)
    fates = {(0, 2): "unheard", (1, 1): "late 3", (2, 3): "refused", (2, 1): "errs"} if "mode" not in way else {}
    finished, _ = run(tmp_path_factory, Witness(monkeypatch), fates, **way)

    rows, summary = finished.rows(), finished.summary()
    assert any(row["kd_loss"] is not None for row in rows)
    for peer in summary["peers"]:
        assert peer["channel"] == peer["after"], peer
    assert any(peer["channel"] != peer["isolated"] for peer in summary["peers"])
    last = finished.settings["rounds"]
    if not fates:
        return
    means = {
        t: sum(row["test_accuracy"] for row in rows if row["round"] == t) / 3
        for t in (0, last)
        if all(row["test_accuracy"] is not None for row in rows if row["round"] == t)
    }
    assert means and {t: summary["channel_by_round"][t] for t in means} == pytest.approx(means)


def test_of_a_resumed_run_too(tmp_path_factory, monkeypatch, told_the_truth):
    Clock(monkeypatch)
    finished, _ = run(tmp_path_factory, Witness(monkeypatch), {(1, 2): "late 2"}, killed_at=10)

    assert all(peer["channel"] == peer["after"] for peer in finished.summary()["peers"])


def test_rows_are_the_same_without_it_and_its_numbers_stand_in_the_summary(tmp_path, capsys):
    plain = federate(tmp_path / "plain", 3, rounds=3, **SKEWED)
    finished = federate(tmp_path / "all", 3, rounds=3, **SKEWED, controls=ALL)
    said, printed = finished.summary(), capsys.readouterr().out

    assert finished.timeless_rows() == plain.timeless_rows()
    peers = said["peers"]
    assert said["channel"] == pytest.approx(sum(peer["channel"] for peer in peers) / 3)
    assert len(said["channel_by_round"]) == 4 and said["channel_by_round"][-1] == pytest.approx(said["channel"])
    assert said["channel_by_round"][0] == pytest.approx(said["mean"]["before"])
    assert said["channel"] > said["isolated"]  # a hundred labels of all classes
    expected = (said["mean"]["after"] - said["isolated"]) / (said["channel"] - said["isolated"])
    assert said["share_of_channel"] == pytest.approx(expected)
    assert "true labels" in printed and f"the exchange brought {100 * expected:.0f} %" in printed
    assert plain.summary()["channel"] is None and plain.summary()["share_of_channel"] is None


def _read_anew():
    for cached in (clients.data._raw, clients.data._commons):
        cached.cache_clear()


def test_nothing_but_the_control_knows_the_labels(tmp_path, monkeypatch):
    taught = {**SKEWED, "distill_epochs": 8, "rounds": 3}
    truth = federate(tmp_path / "truth", 3, **taught, controls=ALL)

    def lied(*arguments, **how):
        proxy, remaining = split_proxy(*arguments, **how)
        return replace(proxy, labels=proxy.labels.roll(1)), remaining

    monkeypatch.setattr(clients.data, "split_proxy", lied)
    _read_anew()
    try:
        lie = federate(tmp_path / "lie", 3, **taught, controls=ALL)
    finally:
        _read_anew()

    def rest(run):
        said = run.summary()
        peers = [{k: v for k, v in peer.items() if k != "channel"} for peer in said.pop("peers")]
        moving = ("run", "totals", "round_seconds", "channel", "channel_by_round", "share_of_channel")
        return peers, {name: value for name, value in said.items() if name not in moving}

    assert truth.timeless_rows() == lie.timeless_rows() and rest(truth) == rest(lie)
    assert lie.summary()["channel"] < truth.summary()["channel"] - 0.1


def lines(printed):
    return [line for line in printed.splitlines() if line.startswith("control channel")]


def test_it_is_left_out_with_a_line_where_there_is_no_distillation(tmp_path, capsys):
    finished = federate(tmp_path, 2, strategy="fedavg", fedavg_model="mlp", rounds=1, controls="isolated,channel")

    assert lines(capsys.readouterr().out) == [
        "control channel: left out, since federated averaging has no rounds of distillation"
    ]
    assert finished.summary()["channel"] is None and finished.summary()["isolated"] is not None


def other_classes():
    """The digits with names of their own: nobody says which of the peers' classes these are."""
    from fedkd.data.sources import load_source

    return replace(load_source("digits", data_dir=None), classes=tuple(f"digit {n}" for n in range(10)))


def same_classes():
    from fedkd.data.sources import load_source

    return load_source("digits", data_dir=None)


def test_it_is_left_out_with_a_line_where_the_labels_are_not_known(tmp_path, capsys):
    finished = federate(tmp_path / "a", 3, proxy="test_channel:other_classes", rounds=1, controls="channel")
    assert lines(capsys.readouterr().out) == [
        "control channel: left out, since the labels of the proxy set are not known, or its classes are not the peers'"
    ]
    assert finished.summary()["channel"] is None

    known = federate(tmp_path / "b", 3, proxy="test_channel:same_classes", rounds=1, controls="channel")
    assert lines(capsys.readouterr().out) == [] and known.summary()["channel"] > 0.1
    assert known.timeless_rows() == finished.timeless_rows()


def unnamed():
    """The digits' images and labels as arrays, of which nobody says what the labels mean."""
    found = same_classes()
    return tuple(
        part for half in (found.train, found.test) for part in (half.inputs[:, 0].numpy(), half.labels.numpy())
    )


def test_numbers_that_nobody_has_named_are_no_labels_of_another_source(tmp_path, capsys):
    finished = federate(tmp_path / "a", 2, proxy="test_channel:unnamed", rounds=1, controls="channel")
    (line,) = lines(capsys.readouterr().out)
    assert "are not known" in line and finished.summary()["channel"] is None

    both = {"dataset": "test_channel:unnamed", "proxy": "test_channel:unnamed"}
    assert federate(tmp_path / "b", 2, **both, rounds=1, controls="channel").summary()["channel"] > 0.1


def test_it_is_left_out_with_a_line_where_teachers_add_up(tmp_path, capsys):
    summed = {"strategy": "pairwise", "reduction": "sum", "rounds": 1}
    finished = federate(tmp_path, 2, controls="isolated,channel", **summed)

    why = "a sum of divergences weighs by the number of teachers, and true labels are one"
    assert lines(capsys.readouterr().out) == [f"control channel: left out, since {why}"]
    assert finished.summary()["channel"] is None and finished.summary()["isolated"] > 0.1


def test_it_is_left_out_with_a_line_among_real_peers(tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(LocalGrid, "state")
    grid = local_grid(tmp_path, 2)
    finished = federate(tmp_path, 2, grid=grid, seats=2, rounds=1, controls="isolated,channel")

    assert lines(capsys.readouterr().out) == [
        "control channel: left out, since real peers learn no labels of the proxy set"
    ]
    assert "channel" not in {message.content["mail"]["kind"] for message in grid.sent}
    assert finished.summary()["channel"] is None and finished.summary()["isolated"] is not None


def test_a_peer_without_a_result_is_named(tmp_path, capsys):
    grid = local_grid(tmp_path, 2)

    def broken(partition, message):
        if message.content["mail"]["kind"] == "channel" and partition == 1:
            raise RuntimeError("out of order")

    grid.fault = broken
    skewed = {"partition": "dirichlet", "partition_alpha": 0.2}
    finished = federate(tmp_path, 2, grid=grid, rounds=1, controls="isolated,channel", **skewed)

    (line,) = lines(capsys.readouterr().out)
    assert line.startswith("control channel: no result from peer-1: ") and "out of order" in line
    said = finished.summary()
    one, other = said["peers"]
    assert one["channel"] == said["channel"] and other["channel"] is None
    expected = share_of_channel(one["after"], one["isolated"], one["channel"])
    assert said["share_of_channel"] == (expected if math.isfinite(expected) else None)
    assert one["channel"] > one["isolated"]  # else there were nothing to tell


def test_a_share_needs_all_three_numbers_and_a_channel_that_carries_something():
    assert share_of_channel(0.5, 0.6, 0.8) == pytest.approx(-0.5)
    assert share_of_channel(0.9, 0.6, 0.8) == pytest.approx(1.5)
    missing = float("nan")
    for numbers in ((missing, 0.6, 0.8), (0.5, missing, 0.8), (0.5, 0.6, missing), (0.5, 0.6, 0.6), (0.5, 0.6, 0.4)):
        found = share_of_channel(*numbers)
        assert found != found and json.dumps(found) == "NaN"
