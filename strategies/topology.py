"""Topologies: which peers are neighbours, how well such a graph mixes, and its edges for drawing."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import networkx as nx  # here, so that it is read while the relay waits for the peers
import numpy as np
from numpy.typing import NDArray

from fedkd.errors import SettingError
from fedkd.seeding import derive
from fedkd.settings.rules import TOPOLOGIES

FIXED = ("complete", "ring", "torus", "star")
RANDOM = ("k-regular", "erdos-renyi", "small-world")
_DRAWS = 100

Neighbours = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TopologyStats:
    """What a run reports of its topology.

    ``degree_*`` count the peers that a peer hears in one round. ``diameter`` is in hops, over the edges of all
    rounds. ``spectral_gap`` is 1 − ‖W_τ…W_1 − 11ᵀ/N‖₂^(1/τ) of the mixing matrices of the τ rounds of a period
    (τ = 1 where nothing varies: then it is 1 − |λ₂|): 1 is the average after one period, 0 never.
    """

    degree_min: int
    degree_mean: float
    degree_max: int
    diameter: int
    spectral_gap: float


@dataclass(frozen=True)
class Topology:
    """Who can hear whom. ``hears[s][i]`` are the sorted neighbours of peer i in step s of a period.

    >>> ring = topology("ring", 5, seed=0)
    >>> ring.neighbours(0, round=1)
    (1, 4)
    >>> ring.mixing_matrix(round=1)[0].round(3)
    array([0.333, 0.333, 0.   , 0.   , 0.333])
    """

    name: str
    hears: tuple[Neighbours, ...]
    directed: bool = False

    @property
    def peers(self) -> int:
        """The number of peers."""
        return len(self.hears[0])

    def neighbours(self, peer: int, round: int) -> tuple[int, ...]:
        """The peers that ``peer`` can hear in ``round`` (from 1), sorted, without itself."""
        return self._step(round)[peer]

    def mixing_matrix(self, round: int) -> NDArray[np.float64]:
        """Metropolis–Hastings weights ``[N, N]``: W_ij = 1/(1 + max(d_i, d_j)) where i hears j, W_ii the remainder.

        Doubly stochastic. For `exponential`, where every degree is 1, these are the halves of its paper.
        Source: the Metropolis weights of Xiao, Boyd & Lall, IPSN 2005 [paper].
        """
        step = self._step(round)
        degree = np.array([len(heard) for heard in step])
        hearer = np.repeat(np.arange(self.peers), degree)
        heard = np.array([j for row in step for j in row])
        weights = np.zeros((self.peers, self.peers))
        weights[hearer, heard] = 1 / (1 + np.maximum(degree[hearer], degree[heard]))
        np.fill_diagonal(weights, 1 - weights.sum(axis=1))
        return weights

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Each edge once, over all rounds: (i, j) with i < j, or (heard, hearer) where the topology is directed."""
        pairs = ((j, i) for step in self.hears for i, row in enumerate(step) for j in row)
        return tuple(sorted({pair for pair in pairs if self.directed or pair[0] < pair[1]}))

    def stats(self) -> TopologyStats:
        """Degree, diameter and spectral gap (half a second for a thousand peers)."""
        degrees = [len(row) for step in self.hears for row in step]
        mixed = np.eye(self.peers)
        for step in range(len(self.hears)):
            mixed = self.mixing_matrix(step + 1) @ mixed
        distance = float(np.linalg.norm(mixed - 1 / self.peers, 2))
        return TopologyStats(
            degree_min=min(degrees),
            degree_mean=sum(degrees) / len(degrees),
            degree_max=max(degrees),
            diameter=self._diameter(),
            spectral_gap=max(0.0, 1 - distance ** (1 / len(self.hears))),
        )

    def _step(self, round: int) -> Neighbours:
        return self.hears[(round - 1) % len(self.hears)]

    def _diameter(self) -> int:
        """Hops until everyone has heard of everyone; a set of peers is the bits of one integer."""
        everyone = (1 << self.peers) - 1
        reached = [1 << i for i in range(self.peers)]
        hops = 0
        while any(bits != everyone for bits in reached):
            following = reached.copy()
            for heard, hearer in self.edges:
                following[hearer] |= reached[heard]
                if not self.directed:
                    following[heard] |= reached[hearer]
            reached, hops = following, hops + 1
        return hops


def topology(spec: str, peers: int, *, degree: int = 4, probability: float = 0.3, seed: int) -> Topology:
    """The topology that the setting ``topology`` names; connected, the same for the same arguments.

    Args:
        spec: ``complete``, ``ring``, ``star`` (around peer 0), ``torus`` (the grid nearest to a square, wrapped
            around), ``k-regular`` (random, every peer has ``degree`` neighbours), ``erdos-renyi`` (each edge with
            ``probability``), ``small-world`` (Watts & Strogatz: a ring of ``degree`` nearest neighbours, each
            edge rewired with ``probability``), ``exponential`` (directed, one neighbour a round: peer i hears
            i + 2^((round−1) mod ⌈log₂ N⌉), modulo N; one-peer graph of Ying et al., NeurIPS 2021 [paper]) or
            ``file:PATH`` (a line per edge, two peers counted from 0; ``#`` starts a comment).
        peers: how many peers, N ≥ 2.
        degree: the setting ``topology-degree``.
        probability: the setting ``topology-probability``.
        seed: the run's; random graphs are drawn again, up to 100 times, until one is connected.

    Raises:
        SettingError: an unknown name, or a graph that can't exist or can't be connected.
    """
    if peers < 2:
        raise SettingError("peers", peers, "at least 2 for a topology")
    if spec == "exponential":
        hops = [2**s for s in range((peers - 1).bit_length())]
        steps = tuple(tuple(((i + hop) % peers,) for i in range(peers)) for hop in hops)
        return Topology(spec, steps, directed=True)
    if spec.startswith("file:"):
        graph = _from_file(spec, peers)
    elif spec in FIXED:
        graph = _fixed(spec, peers)
    elif spec in RANDOM:
        graph = _random(spec, peers, degree=degree, probability=probability, seed=seed)
    else:
        raise SettingError("topology", spec, f"one of {list(TOPOLOGIES)} or file:PATH")
    return Topology(spec, (tuple(tuple(sorted(graph[i])) for i in range(peers)),))


def _fixed(spec: str, peers: int) -> "nx.Graph[int]":
    if spec == "complete":
        return nx.complete_graph(peers)
    if spec == "ring":
        return nx.cycle_graph(peers)
    if spec == "star":
        return nx.star_graph(peers - 1)
    rows = max(r for r in range(1, math.isqrt(peers) + 1) if peers % r == 0)
    if rows == 1:
        allowed = f"possible for {peers} peers (a torus has rows × columns of them, both above 1)"
        raise SettingError("topology", spec, allowed)
    grid = nx.grid_2d_graph(rows, peers // rows, periodic=True)
    return nx.convert_node_labels_to_integers(grid, ordering="sorted")


def _random(spec: str, peers: int, *, degree: int, probability: float, seed: int) -> "nx.Graph[int]":
    """The first connected one of a hundred drawn graphs."""
    if spec == "k-regular":
        if not 1 <= degree < peers or degree * peers % 2:
            allowed = f"from 1 to {peers - 1} for {peers} peers, with degree × peers even (k-regular)"
            raise SettingError("topology-degree", degree, allowed)
    elif not 0 <= probability <= 1:
        raise SettingError("topology-probability", probability, "from 0 to 1")
    if spec == "small-world" and (not 2 <= degree < peers or degree % 2):
        most = (peers - 1) // 2 * 2
        raise SettingError("topology-degree", degree, f"even, from 2 to {most}, for {peers} peers (small-world)")

    for draw in range(_DRAWS):
        stream = derive(seed, "topology", draw)
        if spec == "k-regular":
            graph = _regular(degree, peers, stream)
        elif spec == "erdos-renyi":
            graph = nx.gnp_random_graph(peers, probability, seed=stream)
        else:
            graph = nx.watts_strogatz_graph(peers, degree, probability, seed=stream)
        if nx.is_connected(graph):
            return graph
    if spec == "erdos-renyi":
        threshold = f"{math.log(peers) / peers:.2g}"
        allowed = f"enough to connect {peers} peers (around {threshold}; {_DRAWS} graphs were drawn)"
        raise SettingError("topology-probability", probability, allowed)
    allowed = f"enough to connect {peers} peers ({_DRAWS} graphs were drawn)"
    raise SettingError("topology-degree", degree, allowed)


def _regular(degree: int, peers: int, stream: int) -> "nx.Graph[int]":
    # The drawing slows down steeply with the degree; the complement of a random regular graph is one too.
    if degree <= peers // 2:
        return nx.random_regular_graph(degree, peers, seed=stream)
    return nx.complement(nx.random_regular_graph(peers - 1 - degree, peers, seed=stream))


def _from_file(spec: str, peers: int) -> "nx.Graph[int]":
    path = Path(spec.removeprefix("file:")).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError("topology", spec, f"file:PATH of a readable list of edges ({error})") from error
    graph = nx.empty_graph(peers)
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        ends = [int(word) for word in words if word.isascii() and word.isdigit() and len(word) < 10]
        if len(words) != 2 or len(ends) != 2 or max(ends) >= peers or ends[0] == ends[1]:
            allowed = f"a list of edges: line {number} should be two different peers from 0 to {peers - 1}"
            raise SettingError("topology", f"{spec}, {line.strip()[:80]}", allowed)
        graph.add_edge(*ends)
    if not nx.is_connected(graph):
        parts = sorted((sorted(part) for part in nx.connected_components(graph)), key=len)
        raise SettingError("topology", spec, f"connected, but peers {_few(parts[0])} have no path to the others")
    return graph


def _few(peers: list[int]) -> str:
    return ", ".join(map(str, peers[:10])) + (", …" if len(peers) > 10 else "")
