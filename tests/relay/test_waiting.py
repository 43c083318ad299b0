"""How long a run waits for its peers: on a clock of its own, with nodes that come when the test says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from witness import Clock

from fedkd.settings.config import RunConfig
from strategies.relay.introductions import _settled_nodes, _wait_for_newcomers
from strategies.relay.rounds import RelayError

TIMEOUT = 50.0


class Arrivals:
    """A post whose nodes come at given seconds."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.began = clock, seconds, clock.now

    def nodes(self):
        return [node for node, second in enumerate(self.seconds) if self.passed >= second]

    @property
    def passed(self):
        return self.clock.now - self.began


@pytest.fixture
def arrivals(monkeypatch):
    clock = Clock(monkeypatch)
    return lambda *seconds: Arrivals(clock, seconds)


def config(peers):
    return RunConfig(peers=peers, round_timeout=TIMEOUT)


@pytest.mark.parametrize(
    ("seconds", "peers", "found", "least", "most"),
    [
        ((0, 0, 0), 3, 3, 0, 0.01),  # enough: nobody is waited for
        ((0, 0, 0, 0), 3, 4, 0, 0.01),
        ((0, 0), 5, 2, 0.01, 1),  # fewer, and no more come: they will share
        ((3, 3), 5, 2, 3, 4),  # none yet is not few
        ((0, 0.04, 0.08, 0.12, 0.16), 5, 5, 0.1, 1),  # they are still coming
        ((), 5, 0, TIMEOUT, TIMEOUT + 1),
    ],
)
def test_a_simulations_nodes_are_counted_once_no_more_come(arrivals, seconds, peers, found, least, most):
    post = arrivals(*seconds)

    assert _settled_nodes(post, config(peers)) == found
    assert least <= post.passed <= most


@pytest.mark.parametrize(
    ("seconds", "met", "missing", "found", "least", "most"),
    [
        ((0, 1, 2), set(), 3, {0, 1, 2}, 2, 3),  # as many as are missing, at once when the last is there
        ((0, 1, 2), {0}, 1, {1}, 1, 2),
        ((0, 0, 0, 0), {0}, 2, {1, 2, 3}, 0, 0.01),  # of whom one is too many
    ],
)
def test_as_many_newcomers_are_waited_for_as_are_missing(arrivals, seconds, met, missing, found, least, most):
    post = arrivals(*seconds)

    assert _wait_for_newcomers(post, config(3), met, missing) == found
    assert least <= post.passed <= most


@given(late=st.floats(1.5, 5))
def test_where_only_peers_know_how_many_they_are_the_first_are_asked_and_others_waited_for_longer(late):
    with pytest.MonkeyPatch.context() as monkeypatch:
        clock = Clock(monkeypatch)
        first = Arrivals(clock, (0, 0, late))
        assert _wait_for_newcomers(first, config(0), set(), 0) == {0, 1}
        asked = first.passed
        more = Arrivals(clock, (0, 0, 0, 0.3))
        assert _wait_for_newcomers(more, config(0), {0, 1}, 0) == {2, 3}

    assert 0 < asked < 1 < more.passed < 3


@pytest.mark.parametrize(("peers", "seconds", "lack"), [(4, (0, 0), "2 more"), (0, (), "at least 1 more")])
def test_whoever_does_not_come_in_time_ends_the_run_and_is_counted(arrivals, peers, seconds, lack):
    post = arrivals(*seconds)

    with pytest.raises(RelayError, match=f"^{len(seconds)} nodes connected in time .*, but {lack} is needed"):
        _wait_for_newcomers(post, config(peers), set(), peers)
    assert TIMEOUT <= post.passed < TIMEOUT + 1


def test_those_who_still_come_when_time_is_up_are_waited_for_where_nobody_said_how_many_there_are(arrivals):
    post = arrivals(0, 0.5, 1.2, 1.9)

    assert _wait_for_newcomers(post, RunConfig(round_timeout=1.0), {0}, 0) == {1, 2, 3}
    assert 2.5 < post.passed < 4
