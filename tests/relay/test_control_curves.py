"""What a control's answer says, round by round, and how it stands beside its peer."""

import math
from dataclasses import asdict, fields
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.results.folder import Measures, Row
from fedkd.settings.config import RunConfig
from fedkd.wire.messages import Answer, Mail
from strategies.relay.controls import Curve, _answers, _by_round, _curve, _peer_summary
from strategies.relay.post import Receipt
from strategies.relay.roster import Member

NAMES = [field.name for field in fields(Measures)]
ROUNDS = st.sets(st.integers(1, 9)).map(lambda later: [0, *sorted(later)])


def answer(rounds, accuracies, *, last=9, **changed):
    series = {"round": [float(round) for round in rounds], **{name: [0.5] * len(rounds) for name in NAMES}}
    series["test_accuracy"] = list(accuracies)
    series |= changed
    return Answer("north", last, series={name: values for name, values in series.items() if values is not None})


@given(ROUNDS, st.data())
def test_a_curve_stands_where_it_was_last_measured_until_it_is_measured_again(rounds, data):
    accuracies = data.draw(st.lists(st.floats(0, 1), min_size=len(rounds), max_size=len(rounds)))

    curve = _curve(answer(rounds, accuracies))

    assert curve is not None and list(curve.rounds) == rounds
    for round in range(11):
        last = max(index for index, measured in enumerate(rounds) if measured <= round)
        assert curve.at(round).test_accuracy == accuracies[last]
    assert all(math.isnan(value) for value in asdict(curve.at(-1)).values())
    assert all(math.isnan(value) for value in asdict(Curve().at(5)).values())


@pytest.mark.parametrize(
    ("rounds", "accuracies", "changed"),
    [
        ([], [], {}),
        ([1, 2], [0.5, 0.5], {}),
        ([0, 0], [0.5, 0.5], {}),
        ([0, 2, 1], [0.5] * 3, {}),
        ([0, 1.5], [0.5, 0.5], {}),
        ([0, 10], [0.5, 0.5], {}),
        ([0, math.nan], [0.5, 0.5], {}),
        ([0, 1], [0.5], {}),
        ([0, 1], [0.5, 1.001], {}),
        ([0, 1], [-0.001, 0.5], {}),
        ([0, 1], [0.5, math.nan], {}),
        ([0, 1], [0.5, 0.5], {"ece": None}),
        ([0, 1], [0.5, 0.5], {"ece": [0.5]}),
        ([0, 1], [0.5, 0.5], {"colour": [0.5, 0.5]}),
        ([0, 1], [0.5, 0.5], {"round": None}),
    ],
)
def test_what_is_no_curve_of_what_can_be_is_none(rounds, accuracies, changed):
    assert _curve(answer([0, 1], [0.0, 1.0])) is not None
    assert _curve(answer([0, 9], [0.0, 1.0])) is not None
    assert _curve(answer(rounds, accuracies, **changed)) is None


@pytest.mark.parametrize(("name", "value", "believed"), [
    ("ece", 1.0, True), ("ece", 1.001, False), ("own_accuracy", -0.001, False), ("own_accuracy", 0.0, True),
    ("brier", 1.5, True), ("test_loss", 1e300, False), ("test_loss", -3.0, True), ("test_loss", math.inf, False),
])  # fmt: skip
def test_a_measure_that_cannot_be_costs_itself_alone(name, value, believed):
    curve = _curve(answer([0, 1], [0.25, 0.75], **{name: [0.5, value]}))

    found = getattr(curve.at(1), name)
    assert (found == value) if believed else math.isnan(found)
    assert curve.at(1).test_accuracy == 0.75 and getattr(curve.at(0), name) == 0.5


@given(st.lists(ROUNDS, max_size=3), st.integers(0, 9), st.integers(1, 4))
def test_the_mean_of_controls_is_over_all_of_them_in_every_round_that_is_measured(each, last, every):
    curves = [_curve(answer(rounds, [(i + round) / 20 for round in rounds])) for i, rounds in enumerate(each)]
    config = RunConfig.from_mapping({"rounds": last, "eval-every": every})

    found = _by_round(curves, config)

    if not each:
        assert found == []
        return
    assert len(found) == max(last, *(max(rounds) for rounds in each), 0) + 1
    for round, value in enumerate(found):
        stands = [(i + max(r for r in rounds if r <= round)) / 20 for i, rounds in enumerate(each)]
        measured = round % every == 0 or round == last
        assert value == pytest.approx(sum(stands) / len(stands)) if measured else math.isnan(value)


def test_without_rounds_the_controls_curve_ends_with_the_last_that_trained():
    config = RunConfig.from_mapping({"strategy": "gossip", "mode": "async", "updates": 9, "rounds": 8})

    assert len(_by_round([_curve(answer([0, 2], [0.5, 0.5])), _curve(answer([0, 3], [0.5, 0.5]))], config)) == 4


def row(round, accuracy=math.nan, **numbers):
    return Row(round, "north", "mlp", [], test_accuracy=accuracy, own_accuracy=accuracy / 2, **numbers)


MEMBER = Member(1, "north", 0, "mlp", 10, 20, ("a", "b"), "f", (9, 4), 1, True, held_out=4)


def test_a_peer_stands_beside_its_control_at_the_round_in_which_it_was_last_measured():
    rows = [row(0, 0.2), row(1, 0.3, temperature=2.0), row(2, 0.6, kd_weight=0.5, samples_seen=7.0)]
    rows.append(row(3, status="late"))
    control = _curve(answer([0, 1, 2, 3], [0.1, 0.3, 0.4, 0.9]))

    shown = _curve(answer([0, 1, 3], [0.1, 0.7, 0.8]))

    found = _peer_summary(rows, MEMBER, control, shown)

    assert (found.before, found.after, found.own_before, found.own_after) == (0.2, 0.6, 0.1, 0.3)
    assert (found.isolated, found.isolated_measures, found.channel) == (0.4, control.found[2], 0.7)
    assert (found.temperature, found.kd_weight, found.samples_seen) == (2.0, 0.5, 7.0)
    assert (found.failures, found.samples, found.held_out, found.parameters) == ({"late": 1}, 20, 4, 10)


def test_of_a_peer_that_was_never_measured_nothing_is_said():
    curve = _curve(answer([0, 1], [0.5, 0.5]))
    found = _peer_summary([row(0, status="error"), row(1, status="error")], MEMBER, curve, curve)

    nothing = ("before", "after", "own_after", "isolated", "channel", "temperature")
    assert all(math.isnan(getattr(found, name)) for name in nothing)
    assert found.failures == {"error": 2}


class Counter:
    """Notes until when it is waited for, and hands out what it was given, a minute after each look."""

    def __init__(self, clock, receipts=()):
        self.clock, self.receipts, self.deadlines, self.sent, self.recalled = clock, list(receipts), [], [], False

    def send(self, mails, *, rounds=1):
        self.sent.append((dict(mails), rounds))

    def next(self, *, deadline):
        self.deadlines.append(deadline)
        self.clock.now += 60.0
        return [self.receipts.pop(0)] if self.receipts else []

    def recall(self):
        self.recalled = True


def exchange(monkeypatch, mails, *, peers=1, receipts=(), ready=()):
    """Send a control's mails, a round's time being 100 seconds; return the post office and what came."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("strategies.relay.controls.time", SimpleNamespace(monotonic=lambda: clock.now))
    post, late = Counter(clock, receipts), []
    relay = SimpleNamespace(
        config=SimpleNamespace(round_timeout=100.0), post=post, ready=lambda: list(ready),
        accept_late=lambda receipt, *, bytes_up: late.append((receipt.node, bytes_up)),
    )  # fmt: skip
    members = [SimpleNamespace(node=node) for node in mails]

    def make(of):
        return {m.node: mails.get(m.node, Mail("isolated", 5, {})) for m in of}

    found = list(_answers(relay, make, members, "isolated", lambda line: pytest.fail(line), peers=peers))
    return post, found, late


def isolated(round):
    return Mail("isolated", round, {})


@pytest.mark.parametrize(
    ("rounds", "peers", "seconds"), [([3], 1, 300), ([2, 7], 1, 700), ([3], 4, 1200), ([0], 1, 100), ([0, 0], 3, 300)]
)
def test_a_control_has_the_time_that_the_rounds_it_repeats_had_together(monkeypatch, rounds, peers, seconds):
    post, found, _ = exchange(monkeypatch, {node: isolated(round) for node, round in enumerate(rounds)}, peers=peers)

    assert post.deadlines == [seconds] and found == [] and post.recalled
    assert [allowed for _, allowed in post.sent] == [seconds / 100]


def test_where_nobody_is_free_nobody_is_waited_for(monkeypatch):
    post, found, _ = exchange(monkeypatch, {})

    assert post.deadlines == [] and found == []


def test_what_is_late_from_a_round_is_kept_and_its_sender_has_its_control_too_with_as_much_time(monkeypatch):
    late = Receipt(2, Mail("learn", 4, {}), Answer("c", 4), 7, 9)
    stranger = Receipt(3, Mail("learn", 4, {}), None, 5, 9)
    receipts = [
        stranger,
        late,
        Receipt(0, isolated(5), Answer("a", 5), 0, 0),
        Receipt(2, isolated(5), Answer("c", 5), 0, 0),
    ]

    post, found, kept = exchange(
        monkeypatch, {0: isolated(5)}, receipts=receipts, ready=[SimpleNamespace(node=2), SimpleNamespace(node=0)]
    )

    assert kept == [(3, 5), (2, 7)] and [receipt.node for receipt in found] == [0, 2]
    assert [set(mails) for mails, _ in post.sent if mails] == [{0}, {2}]
    # From a stranger's answer nobody gains time; the late peer's mail went out at second 120.
    assert post.deadlines == [500, 500, 620, 620]
