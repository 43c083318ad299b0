"""Topologies: which peers are neighbours, how well such a graph mixes, and its edges for drawing."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedkd.errors import SettingError
from fedkd.seeding import derive

if TYPE_CHECKING:
    from networkx import Graph

NAMES = ("complete", "ring", "torus", "star", "k-regular", "erdos-renyi", "small-world", "exponential")
_DRAWS = 100

Neighbours = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TopologyStats:
    """What a run reports of its topology.

    ``degree_*`` count the peers that a peer hears in one round; ``diameter`` is in hops, over the edges of all rounds;
    ``spectral_gap`` is 1 − ‖W_τ…W_1 − 11ᵀ/N‖₂^(1/τ) of the mixing matrices W of the τ rounds of a period (τ = 1 where
    nothing varies: then 1 − |λ₂|): 1 mixes at once, 0 never.
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
        Source: Xiao, Boyd & Kim, J. Parallel Distrib. Comput. 2007, eq. 8 [paper].
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
        # Rounding leaves 1e-16 where the average is exact, whose τ-th root would be far from 0.
        per_round = distance ** (1 / len(self.hears)) if distance > 1e-12 else 0.0
        return TopologyStats(
            degree_min=min(degrees),
            degree_mean=sum(degrees) / len(degrees),
            degree_max=max(degrees),
            diameter=self._diameter(),
            spectral_gap=max(0.0, 1 - per_round),
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


def topology(
    spec: str, peers: int, *, degree: int = 4, probability: float = 0.3, seed: int
) -> Topology:
    """The topology that the setting ``topology`` names; connected, the same for the same arguments.

    Args:
        spec: ``complete``, ``ring``, ``star`` (around peer 0), ``torus`` (the grid nearest to a square, wrapped around),
            ``k-regular`` (random, every peer has ``degree`` neighbours), ``erdos-renyi`` (each edge with
            ``probability``), ``small-world`` (Watts & Strogatz: a ring of ``degree`` nearest neighbours, each edge
            rewired with ``probability``), ``exponential`` (directed, one neighbour a round: peer i hears
            i + 2^((round−1) mod ⌈log₂ N⌉); Ying et al., NeurIPS 2021, eq. 6 [paper]) or ``file:PATH`` (a line per
            edge, two peers counted from 0; ``#`` starts a comment).
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
        hops = [2**s % peers for s in range(math.ceil(math.log2(peers)))]
        steps = tuple(tuple(((i + hop) % peers,) for i in range(peers)) for hop in hops)
        return Topology(spec, steps, directed=True)
    if spec.startswith("file:"):
        graph = _from_file(spec, peers)
    elif spec in _FIXED:
        graph = _FIXED[spec](peers)
    elif spec in NAMES:
        graph = _random(spec, peers, degree=degree, probability=probability, seed=seed)
    else:
        raise SettingError("topology", spec, f"one of {list(NAMES)} or file:PATH")
    return Topology(spec, (tuple(tuple(sorted(graph[i])) for i in range(peers)),))


def _torus(peers: int) -> "Graph[int]":
    import networkx as nx

    rows = max(r for r in range(1, math.isqrt(peers) + 1) if peers % r == 0)
    if rows == 1:
        raise SettingError("topology", "torus", f"one for {peers} peers (a torus needs rows × columns, both above 1)")
    grid = nx.grid_2d_graph(rows, peers // rows, periodic=True)
    return nx.convert_node_labels_to_integers(grid, ordering="sorted")
