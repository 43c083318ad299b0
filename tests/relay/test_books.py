"""What the relay writes down, on a post and a folder that the test makes up: no peer, no Flower."""

import math
import types

import numpy as np
import pytest

from fedkd.results.folder import RunFolder
from fedkd.settings.config import RunConfig
from fedkd.wire.messages import Answer, Mail
from strategies.averaged import Averaged
from strategies.relay.ledger import Ledger
from strategies.relay.post import Receipt
from strategies.relay.roster import Member
from strategies.relay.rounds import Relay, _measured, _named

CONFIG = RunConfig(peers=2, proxy_size=2, rounds=3, round_timeout=7.0)


class Desk:
    """A post that answers at once."""

    def __init__(self, up=0, down=0):
        self.bytes_up, self.bytes_down, self.kinds = up, down, []

    def busy(self):
        return set()

    def owed(self, node, round):
        return 0

    def send(self, mails, *, rounds=1):
        self.mails = dict(mails)

    def receive(self, awaited, *, deadline):
        for node in awaited:
            self.bytes_up, self.bytes_down = self.bytes_up + 3, self.bytes_down + 5
            self.kinds.append((self.mails[node].kind, self.mails[node].round))
            yield receipt(node, self.mails[node].round, kind=self.mails[node].kind)


def receipt(node, round, *, kind="learn", up=3, refused="", **metrics):
    answer = Answer(f"peer-{node}", round, {"refused": refused}, metrics, {}, {"logits": np.zeros((2, 2), np.float32)})
    return Receipt(node, Mail(kind, round, {}), answer, up, 5)


def relay(folder, *, post=None, resume=False, **settings):
    config = RunConfig(**{**vars(CONFIG), **settings})
    members = [
        Member(
            i, f"peer-{i}", i, "mlp", 1, 2, ("a", "b"), fingerprint="f", proxy_shape=(9, 4), expected=2, simulated=True
        )
        for i in range(2)
    ]
    strategy = Averaged(config, 2, 2)
    return Relay(
        post or Desk(), members, config, strategy, RunFolder(folder), run="r", say=lambda line: None, resume=resume
    )


def test_bytes_of_the_parts_of_a_resumed_run_add_up(tmp_path):
    made = relay(tmp_path, post=Desk(up=100, down=200))  # what was sent before the rounds, as introductions
    made.run()
    rounds = CONFIG.rounds + 1
    assert (made.ledger.bytes_up, made.ledger.bytes_down) == (2 * 3 * rounds, 2 * 5 * rounds)

    again = relay(tmp_path, post=Desk(up=1000, down=2000), resume=True, rounds=5)
    again.run()

    assert [round for _, round in again.post.kinds] == [4, 4, 5, 5]
    assert (again.ledger.bytes_up, again.ledger.bytes_down) == (2 * 3 * (rounds + 2), 2 * 5 * (rounds + 2))
    assert Ledger.load(tmp_path).bytes_down == again.ledger.bytes_down


def test_without_a_barrier_there_is_one_round_the_start(tmp_path):
    made = relay(tmp_path, strategy="gossip", mode="async")
    made.run()

    assert made.post.kinds == [("start", 0), ("start", 0)] and made.ledger.round == 0


@pytest.mark.parametrize(("refused", "said"), [("", ", but later"), ("peer-1: torn", "; later: peer-1: torn")])
def test_a_late_answer_goes_into_its_own_rounds_line_and_is_charged_where_it_came(tmp_path, refused, said):
    made = relay(tmp_path)
    made.run()
    row = made.rows[-1]

    made.accept_late(receipt(1, 2, up=9, refused=refused, test_accuracy=0.5))
    (late,) = made.late
    assert (late.status, late.bytes_up, late.error) == ("late", 0, f"no answer within 7 s{said}")
    made.record(())

    (found,) = [row for row in made.rows if (row.peer, row.round) == ("peer-1", 2)]
    assert (found.status, found.bytes_up, found.test_accuracy) == ("late", 3, 0.5)
    made.accept_late(receipt(1, 3, up=9), bytes_up=9)
    made.record(())
    assert made.rows[-1].bytes_up == row.bytes_up + 9 and made.last_round(made.members[1]) == 3


def test_a_peer_that_is_late_for_a_round_has_had_its_mail(tmp_path):
    made = relay(tmp_path)
    made.accept_late(receipt(0, 2))

    assert made.last_round(made.members[0]) == 2 and made.last_round(made.members[1]) == 0


def test_many_names_are_cut_and_what_is_cut_is_counted():
    names = [f"p{i}" for i in range(14)]

    assert _named(names[:12]) == ", ".join(names[:12])
    assert _named(names) == ", ".join(names[:12]) + " and 2 more"


def test_what_cannot_have_been_measured_is_no_number():
    told = {
        "test_accuracy": 1.0,
        "own_accuracy": 1.01,
        "ece": -0.1,
        "test_loss": 1e12 - 0.5,
        "kd_loss": 1e12,
        "brier": 0.2,
    }
    found = _measured(Answer("a", 1, {}, {**told, "refused_letters": 3.0, "made-up": 1.0}))

    assert found["test_accuracy"] == 1 and found["brier"] == 0.2 and found["test_loss"] == 1e12 - 0.5
    assert all(math.isnan(found[name]) for name in ("own_accuracy", "ece", "kd_loss"))
    assert found["refused_letters"] == 3 and "made-up" not in found
    for impossible in (-1.0, 1e6):
        assert _measured(Answer("a", 1, {}, {"refused_letters": impossible}))["refused_letters"] == 0


def test_a_window_grows_by_one_where_nothing_is_heard_and_halves_to_whole_mails():
    from strategies.relay.window import Window

    made = Window(5)
    made.nothing_heard()
    assert made.size == 6
    made.heard(0.1)
    assert made.size == 12
    made.size = 15
    for size in (7, 3, 2, 2):
        made.heard(1.1)
        assert made.size == size
    made.heard(0.3)
    made.heard(1.0)
    assert made.size == 2
    boundless = Window.unbounded()
    boundless.heard(9.0)
    assert boundless.size == math.inf


def test_introductions_are_waited_for_as_long_as_a_round(monkeypatch):
    from witness import Clock

    from strategies.relay import introductions

    clock, deadlines = Clock(monkeypatch), []
    post = types.SimpleNamespace(
        send=lambda mails: None, receive=lambda mails, *, deadline: deadlines.append(deadline - clock.now) or []
    )
    with pytest.raises(introductions.RelayError, match=r"^no introduction in time"):
        introductions._introductions(post, CONFIG, [4], Mail("introduce", 0, {}), known=())

    assert deadlines == [pytest.approx(CONFIG.round_timeout, abs=0.01)]


def test_what_is_left_of_trials_goes_by_those_of_this_run(monkeypatch):
    """Two of five are finished already; after the first of the others, of ten seconds, two are to come."""
    from witness import Clock

    from strategies.relay import trials

    clock, said = Clock(monkeypatch), []

    def attempt(trial, run):
        clock.now += 10
        return ""

    monkeypatch.setattr(trials, "_attempt", attempt)
    monkeypatch.setattr(trials, "_result", lambda trial: "well")
    five = [types.SimpleNamespace(name=f"t{i}", finished=lambda i=i: i < 2) for i in range(5)]
    trials.run_trials(five, lambda trial: None, say=said.append)

    assert said[0] == "2 of 5 trials are finished already"
    assert said[1:] == [
        "trial 3/5  t2  well  10.0 s  ~20 s left",
        "trial 4/5  t3  well  10.0 s  ~10 s left",
        "trial 5/5  t4  well  10.0 s",
    ]
