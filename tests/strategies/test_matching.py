import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.errors import SettingError
from fedkd.settings.config import RunConfig
from strategies.gossip import Gossip
from strategies.matching import gossip_draw, hears, round_robin
from strategies.pairwise import Pairwise
from strategies.strategy import Strategy


@given(peers=st.integers(2, 60), round=st.integers(1, 1000))
def test_a_round_is_a_matching(peers: int, round: int) -> None:
    pairs = round_robin(peers, round)
    met = [peer for pair in pairs for peer in pair]
    assert len(met) == len(set(met))
    assert set(met) <= set(range(peers))
    assert len(pairs) == peers // 2  # one bye where the number is odd
    assert all(i < j for i, j in pairs) and pairs == sorted(pairs)


@given(peers=st.integers(2, 60), first=st.integers(1, 200))
def test_everyone_meets_everyone_once_in_a_tournament(peers: int, first: int) -> None:
    rounds = peers - 1 if peers % 2 == 0 else peers
    met = [pair for round in range(first, first + rounds) for pair in round_robin(peers, round)]
    assert sorted(met) == [(i, j) for i in range(peers) for j in range(i + 1, peers)]
    assert round_robin(peers, first) == round_robin(peers, first + rounds)


@given(half=st.integers(1, 30))
def test_every_peer_has_one_bye_in_an_odd_tournament(half: int) -> None:
    peers = 2 * half + 1
    byes = []
    for round in range(1, peers + 1):
        byes += set(range(peers)) - {peer for pair in round_robin(peers, round) for peer in pair}
    assert sorted(byes) == list(range(peers))


@pytest.mark.parametrize(("peers", "round", "word"), [(1, 1, "peers"), (0, 1, "peers"), (4, 0, "round")])
def test_impossible_tournaments_are_refused(peers: int, round: int, word: str) -> None:
    with pytest.raises(ValueError, match=f"`{word}`"):
        round_robin(peers, round)


@given(
    neighbours=st.lists(st.integers(0, 99), max_size=20, unique=True),
    fanout=st.integers(1, 25),
    seed=st.integers(0, 2**40),
    round=st.integers(0, 500),
    shuffle=st.randoms(use_true_random=False),
)
def test_a_draw_depends_on_seed_round_and_peer_alone(
    neighbours: list[int], fanout: int, seed: int, round: int, shuffle: random.Random
) -> None:
    drawn = gossip_draw(neighbours, fanout, seed=seed, round=round, peer=7)
    gossip_draw(neighbours, fanout, seed=seed, round=round, peer=8)
    shuffle.shuffle(neighbours)
    assert drawn == gossip_draw(neighbours, fanout, seed=seed, round=round, peer=7)
    assert len(drawn) == min(fanout, len(neighbours))
    assert set(drawn) <= set(neighbours) and list(drawn) == sorted(set(drawn))


def test_draws_differ_between_seeds_rounds_and_peers() -> None:
    usual = {"seed": 0, "round": 1, "peer": 2}
    others = [usual] + [usual | {key: value} for key in usual for value in (3, 4, 5)]
    assert len({gossip_draw(range(1000), 3, **other) for other in others}) == len(others)


def test_every_neighbour_is_drawn_equally_often() -> None:
    rounds, neighbours, fanout = 4000, 10, 3
    counts = [0] * neighbours
    for round in range(rounds):
        for other in gossip_draw(range(neighbours), fanout, seed=1, round=round, peer=0):
            counts[other] += 1
    mean = rounds * fanout / neighbours
    deviation = math.sqrt(rounds * (fanout / neighbours) * (1 - fanout / neighbours))
    assert all(abs(count - mean) < 4 * deviation for count in counts)


def test_a_fanout_of_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="`fanout`"):
        gossip_draw([1, 2], 0, seed=0, round=1, peer=0)


DRAWS = st.dictionaries(st.integers(0, 9), st.lists(st.integers(0, 9), max_size=4), max_size=10)


@given(draws=DRAWS)
def test_push_is_pull_the_other_way_and_push_pull_is_both(draws: dict[int, list[int]]) -> None:
    def arrows(style: str) -> set[tuple[int, int]]:
        return {(peer, other) for peer, heard in hears(style, draws).items() for other in heard}

    assert arrows("pull") == {(i, j) for i, drawn in draws.items() for j in drawn if i != j}
    assert arrows("push") == {(j, i) for i, j in arrows("pull")}
    assert arrows("push-pull") == arrows("push") | arrows("pull")
    for style in ("push", "pull", "push-pull"):
        heard = hears(style, draws)
        assert set(heard) >= set(draws)
        assert all(list(others) == sorted(set(others)) for others in heard.values())


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match="`style`"):
        hears("shout", {0: [1]})


def rounds_until_everyone_heard_of_everyone(peers: int, fanout: int, seed: int) -> int:
    """Push-pull on a complete graph; what is heard in a round was known when it began."""
    everyone = frozenset(range(peers))
    known = [frozenset({peer}) for peer in range(peers)]
    for round in range(1, 1000):
        draws = {
            peer: gossip_draw(sorted(everyone - {peer}), fanout, seed=seed, round=round, peer=peer)
            for peer in range(peers)
        }
        heard = hears("push-pull", draws)
        known = [known[peer].union(*(known[other] for other in heard[peer])) for peer in range(peers)]
        if all(one == everyone for one in known):
            return round
    raise AssertionError("never")


@pytest.mark.parametrize("fanout", [1, 2])
@pytest.mark.parametrize("peers", [2, 4, 8, 16, 32, 64, 128])
def test_gossip_reaches_everyone_in_logarithmic_time(peers: int, fanout: int) -> None:
    """Seeds 0 to 19: within log2(N) + 4 rounds; one rumour takes log3(N) + O(log log N) (Karp et al., FOCS 2000)."""
    slowest = max(rounds_until_everyone_heard_of_everyone(peers, fanout, seed) for seed in range(20))
    assert slowest <= math.log2(peers) + 4


def strategy(kind: type[Strategy], peers: int, **settings: str | int) -> Strategy:
    changed = {name.replace("_", "-"): value for name, value in settings.items()}
    return kind(RunConfig.from_mapping({"strategy": kind.__name__.lower(), **changed}), peers, 10)


@given(peers=st.integers(2, 9), fanout=st.integers(1, 4), seed=st.integers(0, 99), round=st.integers(1, 50))
def test_gossip_draws_among_neighbours_and_the_styles_are_three_readings_of_one_draw(
    peers: int, fanout: int, seed: int, round: int
) -> None:
    def arrows(**settings: str | int) -> set[tuple[int, int]]:
        made = strategy(Gossip, peers, fanout=fanout, seed=seed, topology="ring", **settings)
        for _ in range(2):  # whoever asks first
            found = {(peer, other) for peer in reversed(range(peers)) for other in made.teachers(peer, round)}
        assert all(other in made.neighbours(peer, round) for peer, other in found)
        return found

    pulled = arrows(gossip_style="pull")

    neighbours = 1 if peers == 2 else 2
    assert len(pulled) == peers * min(fanout, neighbours)
    assert arrows(gossip_style="push") == {(other, peer) for peer, other in pulled}
    assert arrows(gossip_style="push-pull") == pulled | {(other, peer) for peer, other in pulled}
    assert arrows(mode="async", updates=9) == pulled


@given(peers=st.integers(2, 9), round=st.integers(1, 30))
def test_in_a_tournament_partners_hear_each_other_and_without_one_every_neighbour_is_heard(
    peers: int, round: int
) -> None:
    tournament = strategy(Pairwise, peers, matching="round-robin")
    heard = [list(tournament.teachers(peer, round)) for peer in range(peers)]
    assert {(i, j) for i, others in enumerate(heard) for j in others} == {
        pair for i, j in round_robin(peers, round) for pair in ((i, j), (j, i))
    }

    ring = strategy(Pairwise, peers, topology="ring")
    assert all(tuple(ring.teachers(peer, round)) == ring.neighbours(peer, round) for peer in range(peers))


def test_one_peer_alone_meets_nobody_and_a_tournament_needs_that_everyone_may_meet() -> None:
    assert list(strategy(Pairwise, 1, matching="round-robin").teachers(0, 1)) == []
    assert list(strategy(Gossip, 1).teachers(0, 1)) == []
    with pytest.raises(SettingError, match=r"`topology`.*complete"):
        strategy(Pairwise, 4, matching="round-robin", topology="ring")
