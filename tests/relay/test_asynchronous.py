"""Without a barrier: who gets mail when, on a clock of its own and peers whose answers the test decides."""

import math
import types
from collections import defaultdict

import pytest
from witness import Clock

from fedkd.results.folder import Row
from fedkd.settings.config import RunConfig
from strategies.relay.asynchronous import Asynchronous


class Desk:
    """A relay and its post in one: ``answers(peer, round)`` says after how many seconds it comes, and its status."""

    def __init__(self, clock, peers, answers, **settings):
        self.clock, self.answers = clock, answers
        self.config = RunConfig(strategy="gossip", mode="async", **settings)
        self.members = [types.SimpleNamespace(index=i, node=10 + i, name=f"peer-{i}") for i in range(peers)]
        self.ledger = types.SimpleNamespace(mailbox=types.SimpleNamespace(updates=0))
        self.post, self.space = self, math.inf
        self.under_way, self.sent, self.written, self.late = {}, defaultdict(list), [], []
        self.recalled, self.began = 0, clock.now

    def busy(self):
        return set(self.under_way)

    def room(self):
        return self.space - len(self.under_way)

    def send(self, mails):
        for node, round in mails.items():
            assert node not in self.under_way
            seconds, status = self.answers(node - 10, round)
            self.under_way[node] = (self.clock.now + seconds, round, status)
            self.sent[node - 10].append(self.clock.now - self.began)

    def round_mail(self, m, round):
        return round

    def next(self, deadline):
        due = min((when for when, *_ in self.under_way.values()), default=math.inf)
        if due > deadline:
            self.clock.now = max(self.clock.now, deadline) if self.under_way else self.clock.now
            return []
        self.clock.now = max(self.clock.now, due)
        came = [node for node, (when, *_) in self.under_way.items() if when <= self.clock.now]
        return [self._receipt(node) for node in came]

    def _receipt(self, node):
        _, round, status = self.under_way.pop(node)
        return types.SimpleNamespace(node=node, mail=types.SimpleNamespace(round=round), status=status, bytes_up=7)

    def recall(self):
        self.recalled += 1

    def member(self, receipt):
        return self.members[receipt.node - 10]

    def accept(self, receipt):
        return Row(receipt.mail.round, f"peer-{receipt.node - 10}", "mlp", [], status=receipt.status)

    def accept_late(self, receipt, *, bytes_up):
        self.late.append((receipt.node, bytes_up))

    def record(self, rows):
        self.written.append(list(rows))


@pytest.fixture
def desk(monkeypatch):
    clock = Clock(monkeypatch)

    def run(peers, answers, **settings):
        made = Desk(clock, peers, answers, **settings)
        made.said = []
        Asynchronous(made, say=made.said.append).run()
        made.took = clock.now - made.began
        return made

    return run


def test_a_peer_that_errs_is_left_alone_for_a_second_then_two_then_four_and_never_longer_than_a_minute(desk):
    made = desk(2, lambda peer, round: (0.0, "error") if peer else (100.0, "ok"), updates=9, max_seconds=400.0)

    waited = [later - earlier for earlier, later in zip(made.sent[1], made.sent[1][1:], strict=False)]
    assert waited[:6] == pytest.approx([1, 2, 4, 8, 16, 32], abs=0.01)
    assert max(waited) == pytest.approx(60, abs=0.01)


def test_whoever_answers_well_again_has_not_failed(desk):
    status = iter(["error", "error", "ok", "error"] + ["ok"] * 99)
    made = desk(1, lambda peer, round: (5.0, next(status)), updates=3)

    waited = [later - earlier - 5 for earlier, later in zip(made.sent[0], made.sent[0][1:], strict=False)]
    assert waited == pytest.approx([1, 2, 0, 1, 0], abs=0.01)


def test_all_may_rest_at_once_and_go_on_when_the_first_may(desk):
    answers = {0: [(0, "error"), (0, "ok"), (100, "ok")], 1: [(0, "error"), (0, "error"), (0, "ok")]}
    made = desk(2, lambda peer, round: answers[peer][round - 1], updates=3)

    assert made.sent[0] == pytest.approx([0, 1, 1], abs=0.01) and made.sent[1] == pytest.approx([0, 1, 3], abs=0.01)
    assert made.took == pytest.approx(101, abs=0.01)


def test_no_more_mail_is_sent_than_answers_are_wanted_and_rows_are_written_a_fleet_at_a_time(desk):
    made = desk(3, lambda peer, round: (1.0 + peer, "ok"), updates=7)

    assert sum(map(len, made.sent.values())) == 7 == made.ledger.mailbox.updates
    assert [len(rows) for rows in made.written] == [3, 3, 1] and made.recalled == 1
    assert [row.round for rows in made.written for row in rows if row.peer == "peer-0"] == [1, 2, 3]


def test_one_that_hangs_is_given_up_after_a_rounds_time_and_its_answer_is_asked_of_another(desk):
    made = desk(3, lambda peer, round: (math.inf if peer == 2 else 1.0, "ok"), updates=6, round_timeout=30.0)

    assert made.ledger.mailbox.updates == 6 and len(made.sent[2]) == 1
    assert 30 < made.took < 40


def test_a_run_in_which_nobody_answers_ends(desk):
    made = desk(2, lambda peer, round: (math.inf, "ok"), updates=6, round_timeout=30.0)

    assert made.said == ["no peer answered within 30 s: the run ends here"] and made.written == []
    assert made.took == pytest.approx(30, abs=0.1)


def test_time_is_up_at_the_second_that_was_said(desk):
    made = desk(2, lambda peer, round: (3.0, "ok"), updates=99, max_seconds=10.0)

    assert made.took == pytest.approx(10, abs=0.1) and made.ledger.mailbox.updates == 6


def test_an_answer_to_the_start_goes_into_the_row_of_the_start(desk):
    made = desk(1, lambda peer, round: (1.0, "ok"), updates=1)
    late = types.SimpleNamespace(node=10, mail=types.SimpleNamespace(round=0), bytes_up=7)
    Asynchronous(made, say=print)._take(late)

    assert made.late == [(10, 7)] and made.ledger.mailbox.updates == 1
