"""Matchings and gossip: which of its neighbours a peer meets in a round."""

import random
from collections.abc import Mapping, Sequence

from fedkd.seeding import derive

STYLES = ("push", "pull", "push-pull")


def round_robin(peers: int, round: int) -> list[tuple[int, int]]:
    """The pairs (i, j), i < j, of a tournament's ``round``, counted from 1, by the circle method.

    Everyone meets everyone once in N−1 rounds, then it starts again; with an odd N in N rounds, in each of which
    one peer has a bye.

    Raises:
        ValueError: fewer than 2 peers, or a round below 1.

    >>> [round_robin(4, round) for round in (1, 2, 3)]
    [[(0, 3), (1, 2)], [(0, 2), (1, 3)], [(0, 1), (2, 3)]]
    """
    if peers < 2:
        raise ValueError(f"Expected argument `peers` to be at least 2, but got {peers}.")
    if round < 1:
        raise ValueError(f"Expected argument `round` to be at least 1, but got {round}.")
    # One peer stays in the middle, or an empty seat where N is odd; the others stand around it, and those who
    # stand opposite each other, seen from the one whom the middle meets, form the pairs.
    circle = peers - 1 + peers % 2
    first = (round - 1) % circle
    pairs = [(first, circle)] if circle < peers else []
    pairs += [((first + k) % circle, (first - k) % circle) for k in range(1, (circle + 1) // 2)]
    return sorted((min(pair), max(pair)) for pair in pairs)


def gossip_draw(neighbours: Sequence[int], fanout: int, *, seed: int, round: int, peer: int) -> tuple[int, ...]:
    """``fanout`` of the neighbours at random (all of them where there are fewer), sorted, none twice.

    Drawn from (seed, round, peer) alone: neither the order of ``neighbours`` nor that of the calls matters.

    Raises:
        ValueError: a fanout below 1.
    """
    if fanout < 1:
        raise ValueError(f"Expected argument `fanout` to be at least 1, but got {fanout}.")
    among = sorted(set(neighbours))
    stream = random.Random(derive(seed, "gossip", round, peer))
    return tuple(sorted(stream.sample(among, min(fanout, len(among)))))


def hears(style: str, draws: Mapping[int, Sequence[int]]) -> dict[int, tuple[int, ...]]:
    """Who hears whom, sorted, from whom each peer drew: ``{hearer: (heard, …)}`` for all peers that occur.

    ``push``: a peer is heard by those it drew; ``pull``: it hears them; ``push-pull``: both.

    Raises:
        ValueError: an unknown style.

    >>> hears("push", {0: [1], 1: [2], 2: [1]})
    {0: (), 1: (0, 2), 2: (1,)}
    """
    if style not in STYLES:
        raise ValueError(f"Expected argument `style` to be one of {list(STYLES)}, but got {style!r}.")
    heard: dict[int, set[int]] = {peer: set() for peer in sorted({*draws, *(d for ds in draws.values() for d in ds)})}
    for peer, drawn in draws.items():
        for other in drawn:
            if style != "push":
                heard[peer].add(other)
            if style != "pull":
                heard[other].add(peer)
    return {peer: tuple(sorted(others - {peer})) for peer, others in heard.items()}
