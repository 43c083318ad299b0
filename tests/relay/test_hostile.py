"""What a hostile or broken peer can do to a run: be refused by its name, and nothing else."""

import json
import math
import warnings

import numpy as np
import pytest
from federation import federate, local_grid
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord

from fedkd.results.folder import PeerSummary, Row, Summary
from fedkd.results.picture import accuracy_png, topology_png
from fedkd.wire.codecs import BadKnowledge, codec
from fedkd.wire.messages import Answer
from fedkd.wire.sealing import Keys, Sealer, pack
from strategies.relay import introductions
from strategies.relay.console import closing_line, round_line, summary_table
from strategies.relay.roster import RosterError
from strategies.relay.rounds import RelayError
from strategies.relay.sealed import most_sealed

MARKUP = ["[/x]", "[bold", ":smile:", r"$\frac$", "$", r"\$", "_hidden", "x" * 2000]
IMPOSSIBLE = [1e308, -1e308, -1.0, math.inf, -math.inf, math.nan]


def tampered(grid, change, *, kind, peer=1, round=None):
    """Have one peer change what it would have answered."""

    def fault(partition, message):
        mail = message.content["mail"]
        if partition != peer or mail["kind"] != kind or round not in (None, mail["round"]):
            return None
        reply = grid.answer(partition, message)
        change(reply.content)
        return reply

    grid.fault = fault
    return grid


def facts(**changes):
    changes = {name.replace("_", "-"): value for name, value in changes.items()}
    return lambda content: content.update({"facts": ConfigRecord({**content["facts"], **changes})})


def metrics(**changes):
    return lambda content: content.update({"metrics": MetricRecord({**content["metrics"], **changes})})


def without_metric(name):
    def change(content):
        content["metrics"] = MetricRecord({key: value for key, value in content["metrics"].items() if key != name})

    return change


def curve(**values):
    """Replace an isolated control's curve: right but for what is given."""
    right = {name: [0.5, 0.5] for name in ("test_accuracy", "own_accuracy", "test_loss", "ece", "brier")}
    return series(**{"round": [0.0, 1.0], **right, **values})


def series(**values):
    return lambda content: content.update({"series": MetricRecord(values)})


def knowledge(change):
    def spoil(content):
        arrays = change({name: array.numpy() for name, array in content["knowledge"].items()})
        content["knowledge"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})

    return spoil


def statuses(run, round):
    return {row["peer"]: row["status"] for row in run.rows() if row["round"] == round}


def test_an_array_whose_header_is_no_numpy_header_costs_its_sender_the_round(tmp_path):
    def spoil(content):
        data = b"\x93NUMPY\x01\x00" + (4).to_bytes(2, "little") + b'"""\n'
        content["knowledge"] = ArrayRecord({"logits": Array(dtype="x", shape=(1,), stype="x", data=data)})

    run = federate(tmp_path, 3, grid=tampered(local_grid(tmp_path, 3), spoil, kind="learn", round=1))

    assert statuses(run, 1) == {"peer-0": "ok", "peer-1": "error", "peer-2": "ok"}
    assert statuses(run, 2)["peer-1"] == "ok"


FEDAVG = {"strategy": "fedavg", "fedavg_model": "mlp", "rounds": 2}


@pytest.mark.parametrize(
    "spoil",
    [metrics(samples=value) for value in (math.nan, math.inf, 0.0, -150.0, 1e300, 10.0**9 + 1, 7.5)]
    + [without_metric("samples")],
)
def test_fedavg_refuses_a_peer_whose_samples_are_no_number_of_samples(tmp_path, spoil):
    run = federate(tmp_path, 3, grid=tampered(local_grid(tmp_path, 3), spoil, kind="start"), **FEDAVG)

    row = next(row for row in run.rows() if row["peer"] == "peer-1" and row["round"] == 0)
    assert row["status"] == "refused" and "`samples`" in row["error"]
    assert statuses(run, 1)["peer-0"] == statuses(run, 2)["peer-0"] == "ok"
    assert all(math.isfinite(row["test_accuracy"]) for row in run.rows() if row["peer"] != "peer-1")


def renamed(arrays):
    return {f"other.{name}": array for name, array in arrays.items()}


def broadcasting(arrays):
    first = next(iter(arrays))
    return {**arrays, first: arrays[first][:1]}


def one_more(arrays):
    return {**arrays, "more": np.zeros(3, np.float32)}


@pytest.mark.parametrize("change", [renamed, broadcasting, one_more])
@pytest.mark.parametrize("peer", [0, 1])
def test_fedavg_averages_what_fits_most_peers_and_refuses_the_rest(tmp_path, change, peer):
    run = federate(tmp_path, 3, grid=tampered(local_grid(tmp_path, 3), knowledge(change), kind="start", peer=peer),
                   **FEDAVG)  # fmt: skip

    average = next(m.content["letter.0"] for m in run.grid.sent if m.content["mail"]["round"] == 1)
    came = [m.content for m in run.grid.replies if "knowledge" in m.content and m.content["answer"]["round"] == 0]
    fitting = [content for content in came if content["answer"]["peer"] != f"peer-{peer}"]
    samples = [content["metrics"]["samples"] for content in fitting]
    for name, array in average.items():
        weights = np.stack([content["knowledge"][name].numpy() for content in fitting])
        np.testing.assert_allclose(array.numpy(), np.average(weights, axis=0, weights=samples), atol=1e-6)
    assert [name for name, status in statuses(run, 0).items() if status == "refused"] == [f"peer-{peer}"]
    assert set(statuses(run, 2).values()) == {"ok"}


@pytest.mark.parametrize("change", [renamed, broadcasting, one_more])
def test_fedavg_refuses_by_name_what_does_not_fit_its_average(tmp_path, change):
    run = federate(tmp_path, 3, grid=tampered(local_grid(tmp_path, 3), knowledge(change), kind="learn", round=1),
                   **FEDAVG)  # fmt: skip

    assert statuses(run, 1) == {"peer-0": "ok", "peer-1": "refused", "peer-2": "ok"}
    assert set(statuses(run, 2).values()) == {"ok"}


@pytest.mark.parametrize(
    "spoil",
    [
        series(),
        series(test_accuracy=[0.5, 0.5]),
        series(confidence=[0.5, 0.5]),
        curve(round=[]),
        curve(round=[1.0, 0.0]),
        curve(round=[0.0, 0.0]),
        curve(round=[0.0, 0.5]),
        curve(round=[0.0, 2.0]),
        curve(round=[0.0, 1.0, 1.0]),
        curve(test_accuracy=[0.5]),
        curve(test_accuracy=[0.5] * 4),
        curve(test_accuracy=[0.5, 1.001]),
        curve(test_accuracy=[-0.001, 0.5]),
        curve(test_accuracy=[0.5, 1e308]),
        curve(test_accuracy=[0.5, math.nan]),
        lambda content: content.update({"answer": ConfigRecord({**content["answer"], "error": "no"})}),
    ],
)
def test_an_isolated_control_without_a_curve_costs_its_own_number_only(tmp_path, spoil, capsys):
    grid = tampered(local_grid(tmp_path, 3), spoil, kind="isolated")

    run = federate(tmp_path, 3, grid=grid, controls="isolated", rounds=1)

    assert "control isolated: no result from peer-1" in capsys.readouterr().out
    own = [peer["isolated"] for peer in run.summary()["peers"]]
    assert own[1] is None and run.summary()["isolated"] == pytest.approx((own[0] + own[2]) / 2)
    assert len(run.summary()["isolated_by_round"]) == 2


def test_what_a_control_cannot_have_measured_is_left_out_of_it(tmp_path):
    grid = tampered(local_grid(tmp_path, 3), curve(ece=[0.5, 2.0], test_loss=[1.0, 1e300]), kind="isolated")

    found = federate(tmp_path, 3, grid=grid, controls="isolated", rounds=1).summary()["peers"][1]["isolated_measures"]

    assert found == {"test_accuracy": 0.5, "own_accuracy": 0.5, "test_loss": None, "ece": None, "brier": 0.5}


@pytest.mark.parametrize(
    "spoil", [without_metric("test_accuracy")] + [metrics(test_accuracy=value) for value in (7.0, 1.001, -0.001)]
)
def test_a_pooled_control_without_an_accuracy_is_said_to_have_no_result(tmp_path, spoil, capsys):
    grid = tampered(local_grid(tmp_path, 2), spoil, kind="pooled", peer=0)

    run = federate(tmp_path, 2, grid=grid, controls="pooled", rounds=1)

    assert "control pooled: no result" in capsys.readouterr().out
    assert run.summary()["pooled"] is None and run.summary()["mean"]["after"] is not None


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_worst_and_the_best_accuracy_of_a_control_are_possible(tmp_path, value):
    grid = tampered(local_grid(tmp_path, 2), curve(test_accuracy=[1 - value, value]), kind="isolated")
    run = federate(tmp_path / "isolated", 2, grid=grid, controls="isolated", rounds=1)
    assert run.summary()["peers"][1]["isolated"] == value

    grid = tampered(local_grid(tmp_path, 2), metrics(test_accuracy=value), kind="pooled", peer=0)
    assert federate(tmp_path / "pooled", 2, grid=grid, controls="pooled", rounds=1).summary()["pooled"] == value


def test_a_link_that_breaks_in_a_control_does_not_cost_the_summary(tmp_path, capsys):
    grid = local_grid(tmp_path, 2)
    push = grid.push_messages

    def broken(messages):
        messages = list(messages)
        if messages[0].content["mail"]["kind"] in ("isolated", "pooled"):
            raise ConnectionError("the link has gone")
        return push(messages)

    grid.push_messages = broken
    run = federate(tmp_path, 2, grid=grid, controls="isolated,pooled", rounds=1)

    said = capsys.readouterr().out
    assert said.count("the link has gone") == 2
    assert run.summary()["mean"]["after"] is not None and run.summary()["isolated"] is None


@pytest.mark.parametrize(("name", "value"), list(zip(MARKUP, [0.5, *IMPOSSIBLE, 2.0], strict=True)))
def test_nothing_that_a_peer_says_stops_the_printing_and_drawing(tmp_path, name, value):
    rows = [Row(r, name, name, [], test_accuracy=value, error=name) for r in range(3)]
    rows += [Row(r, "peer-1", "mlp", [], test_accuracy=0.25) for r in range(3)]
    peers = [
        PeerSummary(name, name, 1, 1, value, value, value, value, isolated=value),
        PeerSummary("peer-1", "mlp", 1, 1, 0.25, 0.5, 0.25, 0.5),
    ]
    totals = {"rounds": 2, "bytes_up": 1, "bytes_down": 1, "seconds": 1.0}
    summary = Summary(peers, value, [value] * 3, pooled=value, pooled_model=name, totals=totals)

    lines = round_line(1, 2, rows[:1] + rows[3:4], [1.0, 1.0]).splitlines()
    assert "max 25.0%" in lines[0] or value == 0.5
    assert lines[1].startswith(f"{name[:400]}: ") or len(name) > 400
    assert len(lines) == 2 and len(lines[1]) <= 500
    table = summary_table(summary)
    assert name[:3] in table and max(map(len, table.splitlines())) <= 120
    assert len(closing_line(summary)) < 200
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accuracy_png(tmp_path / "accuracy.png", rows, summary, title=name)
        topology_png(tmp_path / "topology.png", [(0, 1)], [value, 0.5], title=name)
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["[/x]", r"$\frac$"])
def test_a_run_with_a_model_of_any_name_ends(tmp_path, name, capsys):
    grid = tampered(local_grid(tmp_path, 2), facts(model=name), kind="introduce")
    federate(tmp_path, 2, grid=grid, rounds=1, pictures=True)

    assert name in capsys.readouterr().out.split("test accuracy")[1]


@pytest.mark.parametrize("value", IMPOSSIBLE)
def test_an_accuracy_that_cannot_be_is_not_drawn(tmp_path, value):
    grid = tampered(local_grid(tmp_path, 3), metrics(test_accuracy=value), kind="learn")

    run = federate(tmp_path, 3, grid=grid, rounds=1, pictures=True)

    assert set(statuses(run, 1).values()) == {"ok"}
    assert (run.folder / "accuracy.png").exists() and (run.folder / "topology.png").exists()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"index": 999}, "peer-1 has 999"),
        ({"index": 3}, r"indices 0 to 2 .*peer-1 has 3"),
        ({"index": -1}, "peer-1 .*`index`"),
        ({"index": "1"}, "peer-1 .*`index`"),
        ({"index": 2}, "share the index 2.*peer-1.*peer-2"),
        ({"samples": -5}, "peer-1 .*`samples`"),
        ({"parameters": "many"}, "peer-1 .*`parameters`"),
        ({"parameters": 2**62}, "peer-1 .*`parameters`"),
        ({"peers": -1}, "peer-1 .*`peers`"),
        ({"classes": "[{}]"}, "peer-1 .*`classes`"),
        ({"classes": "{}"}, "peer-1 .*`classes`"),
        ({"classes": "[]"}, "peer-1 .*`classes`"),
        ({"classes": '"abcdefghij"'}, "peer-1 .*`classes`"),
        ({"classes": "["}, "peer-1 "),
        ({"classes": "[" * 900_000}, "peer-1 .*`classes`"),
        ({"classes": json.dumps(["x" * 500_000])}, "peer-1's classes"),
    ],
)
def test_an_introduction_that_cannot_be_stops_the_run_before_training_and_names_the_peer(tmp_path, change, complaint):
    grid = tampered(local_grid(tmp_path, 3), facts(**change), kind="introduce")

    with pytest.raises(RosterError, match=complaint) as stopped:
        federate(tmp_path, 3, grid=grid)

    assert len(str(stopped.value)) < 2000
    assert {message.content["mail"]["kind"] for message in grid.sent} == {"introduce"}


def test_an_introduction_without_a_fact_is_refused_by_its_name(tmp_path):
    def spoil(content):
        content["facts"] = ConfigRecord({key: value for key, value in content["facts"].items() if key != "fingerprint"})

    with pytest.raises(RosterError, match="peer-1 introduced itself without 'fingerprint'"):
        federate(tmp_path, 3, grid=tampered(local_grid(tmp_path, 3), spoil, kind="introduce"))


@pytest.mark.parametrize("key", ["", "zz" * 32, "00" * 32, "01" + "00" * 31, "ab" * 31, "ab" * 33])
def test_a_key_that_nobody_can_seal_for_is_refused_at_the_introduction(tmp_path, key):
    grid = tampered(local_grid(tmp_path, 3), facts(public_key=key), kind="introduce")

    with pytest.raises(RosterError, match=r"peer-1 .*`public-key`"):
        federate(tmp_path, 3, grid=grid, sealed=True)

    assert {message.content["mail"]["kind"] for message in grid.sent} == {"introduce"}


@pytest.mark.parametrize("said", [10**9, 1, 0])
@pytest.mark.parametrize("early", [False, True])
def test_a_peer_that_miscounts_the_others_makes_nobody_wait(tmp_path, monkeypatch, said, early):
    """Early: it is the first to connect, and alone for a while."""
    monkeypatch.setattr(introductions, "_NODE_WAIT", 0.001)
    grid = tampered(local_grid(tmp_path, 3), facts(peers=said), kind="introduce", peer=0)
    everyone = list(grid.get_node_ids())
    if early and said > 1:
        grid.get_node_ids = lambda: everyone if grid.sent else everyone[:1]

    run = federate(tmp_path, 3, grid=grid, rounds=1, round_timeout=60.0)

    assert statuses(run, 1) == dict.fromkeys(("peer-0", "peer-1", "peer-2"), "ok")


def test_a_run_whose_nodes_are_all_spare_says_so(tmp_path):
    spare = {0: {"partition-id": 3, "num-partitions": 2}}

    with pytest.raises(RosterError, match=r"no peer takes part.*`partition-id`"):
        federate(tmp_path, 1, grid=local_grid(tmp_path, 1, node_config=spare))


def test_a_run_whose_peers_do_not_come_says_how_many_are_missing(tmp_path):
    first_of_three = {0: {"num-partitions": 3}}

    with pytest.raises(RelayError, match=r"1 nodes connected in time \(`round-timeout`\), but 2 more"):
        federate(tmp_path, 1, grid=local_grid(tmp_path, 1, node_config=first_of_three), round_timeout=0.3)


def unreadable(content):
    content["answer"] = ConfigRecord({"peer": "", "round": 0, "error": ""})


@pytest.mark.parametrize("how", ["silent", "error", "unreadable"])
@pytest.mark.slow
def test_a_node_too_many_that_says_nothing_of_use_is_left_out(tmp_path, how):
    grid = local_grid(tmp_path, 4, node_config={i: {"num-partitions": 3} for i in range(4)})
    broken(grid, how, node=3)

    run = federate(tmp_path, 4, grid=grid, rounds=1, round_timeout=2.0)

    assert statuses(run, 1) == dict.fromkeys(("peer-0", "peer-1", "peer-2"), "ok")


@pytest.mark.parametrize(
    ("how", "reason"), [("silent", "no introduction in time"), ("error", "burnt down"), ("unreadable", "`peer`")]
)
@pytest.mark.slow
def test_a_run_does_not_begin_around_a_gap(tmp_path, how, reason):
    grid = local_grid(tmp_path, 3)
    broken(grid, how, node=1)

    with pytest.raises(RelayError, match=reason):
        federate(tmp_path, 3, grid=grid, round_timeout=2.0, min_answers=2)

    assert {message.content["mail"]["kind"] for message in grid.sent} == {"introduce"}


def broken(grid, how, *, node):
    def burn(partition, message):
        if partition == node:
            raise RuntimeError("burnt down")

    if how == "silent":
        grid.silent = {node}
    elif how == "error":
        grid.fault = burn
    else:
        tampered(grid, unreadable, kind="introduce", peer=node)


def test_floods_do_not_reach_the_disk(tmp_path):
    def flood(content):
        facts(refused="x" * 5_000_000)(content)
        metrics(seconds=math.inf, refused_letters=math.nan)(content)

    run = federate(tmp_path, 3, grid=tampered(local_grid(tmp_path, 3), flood, kind="learn", round=1))

    assert (run.folder / "rounds.jsonl").stat().st_size < 50_000


def test_a_flood_of_numbers_is_refused(tmp_path):
    run = federate(
        tmp_path, 3, grid=tampered(local_grid(tmp_path, 3), series(accuracy=[1.0] * 10**5), kind="learn", round=1)
    )

    assert statuses(run, 1) == {"peer-0": "ok", "peer-1": "error", "peer-2": "ok"}
    reliability = run.folder / "reliability.jsonl"
    assert reliability.stat().st_size < 50_000


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: {**arrays, "sealed": np.zeros(10**6, np.uint8)},
        lambda arrays: {**arrays, "wraps": np.zeros((3, 10**5), np.uint8)},
        lambda arrays: {**arrays, "wraps": arrays["wraps"][:2]},
        lambda arrays: {**arrays, "more": np.zeros(10, np.uint8)},
        lambda arrays: {"wraps": arrays["wraps"]},
    ],
)
def test_sealed_mail_is_no_larger_than_its_knowledge_can_be(tmp_path, change):
    grid = tampered(local_grid(tmp_path, 3), knowledge(change), kind="learn", round=1)

    run = federate(tmp_path, 3, grid=grid, sealed=True)

    assert statuses(run, 1) == {"peer-0": "ok", "peer-1": "refused", "peer-2": "ok"}
    assert all("peer-1" not in row["error"] for row in run.rows() if row["peer"] != "peer-1")


@pytest.mark.parametrize("spec", ["fp32", "fp16", "int8", "topk:2", "fp32+zstd", "topk:2+zstd"])
@pytest.mark.parametrize("shape", [(1, 3), (60, 10), (500, 100)])
@pytest.mark.parametrize("layers", [0, 3])
def test_whatever_honest_peers_seal_is_within_the_bound(spec, shape, layers):
    logits = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    arrays = codec(spec).encode(logits)
    arrays |= {f"flow.{i}": np.ones((shape[0], 16), np.float16) for i in range(layers)}
    payload, _ = Sealer(Keys.generate(), "a", "run").seal_for(pack(arrays), to={}, round=1)

    most = most_sealed(codec(spec), shape, layers=layers, dimensions=16)
    assert len(payload) <= most <= 1.05 * len(payload) + 4000 + (0 if "zstd" not in spec else logits.nbytes)


def test_features_that_were_not_asked_for_are_refused(tmp_path):
    more = knowledge(lambda arrays: arrays | {f"flow.{i}": np.zeros((60, 4), np.float16) for i in range(4)})

    plain = federate(tmp_path / "a", 3, grid=tampered(local_grid(tmp_path / "a", 3), more, kind="learn", round=1))
    flow = federate(
        tmp_path / "b", 3, grid=tampered(local_grid(tmp_path / "b", 3), more, kind="learn", round=1),
        method="infoflow", flow_dimensions=8,
    )  # fmt: skip

    for run in (plain, flow):
        assert statuses(run, 1) == {"peer-0": "ok", "peer-1": "refused", "peer-2": "ok"}


def test_a_refusal_names_what_was_expected():
    from fedkd.settings.config import RunConfig
    from strategies.fedavg import FedAvg

    strategy = FedAvg(RunConfig(strategy="fedavg"), peers=3, classes=10)
    good = {"a": np.zeros(3, np.float32)}

    strategy.check(Answer("peer-0", 0, metrics={"samples": 7.0}, arrays=good))
    for arrays in ({}, {"a": np.zeros(3)}, {"a": np.full(3, np.nan, np.float32)}):
        with pytest.raises(BadKnowledge, match="expected weights"):
            strategy.check(Answer("peer-0", 0, metrics={"samples": 7.0}, arrays=arrays))
