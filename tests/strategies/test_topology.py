import re
import subprocess
import sys
from functools import reduce
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.errors import SettingError
from fedkd.settings.config import RunConfig
from fedkd.settings.rules import TOPOLOGIES
from strategies.topology import Topology, topology

SIZES = [6, 10, 16]
EVERY = pytest.mark.parametrize(("name", "peers"), [(name, peers) for name in TOPOLOGIES for peers in SIZES])


def union(found: Topology) -> "nx.Graph[int]":
    return (nx.DiGraph if found.directed else nx.Graph)(found.edges)


def expected_graph(name: str, peers: int) -> "nx.Graph[int]":
    rows = {6: (2, 3), 10: (2, 5), 16: (4, 4)}[peers]
    return {
        "complete": nx.complete_graph(peers),
        "ring": nx.cycle_graph(peers),
        "star": nx.star_graph(peers - 1),
        "torus": nx.grid_2d_graph(*rows, periodic=True),
    }[name]


@EVERY
def test_everyone_can_reach_everyone_and_nobody_hears_itself(name: str, peers: int) -> None:
    found = topology(name, peers, seed=0)
    graph = union(found)
    assert sorted(graph) == list(range(peers))
    assert nx.is_strongly_connected(graph) if found.directed else nx.is_connected(graph)
    for round in range(1, 9):
        for peer in range(peers):
            heard = found.neighbours(peer, round)
            assert peer not in heard
            assert list(heard) == sorted(set(heard)) and set(heard) <= set(range(peers))


@EVERY
def test_neighbours_hear_each_other_unless_directed(name: str, peers: int) -> None:
    found = topology(name, peers, seed=0)
    if not found.directed:
        pairs = {(i, j) for i in range(peers) for j in found.neighbours(i, 1)}
        assert pairs == {(j, i) for i, j in pairs}
        assert pairs == {*found.edges, *((j, i) for i, j in found.edges)}


@EVERY
def test_mixing_matrices_are_doubly_stochastic_and_follow_the_neighbours(name: str, peers: int) -> None:
    found = topology(name, peers, seed=0)
    for round in range(1, 6):
        weights = found.mixing_matrix(round)
        np.testing.assert_allclose(weights.sum(axis=0), 1)
        np.testing.assert_allclose(weights.sum(axis=1), 1)
        assert (weights >= -1e-12).all()
        off = weights - np.diag(np.diag(weights))
        for peer in range(peers):
            assert tuple(np.flatnonzero(off[peer])) == found.neighbours(peer, round)


@given(
    name=st.sampled_from(["k-regular", "erdos-renyi", "small-world"]),
    peers=st.integers(6, 40),
    probability=st.floats(0.4, 1.0),
    seed=st.integers(0, 2**31),
)
def test_random_topologies_depend_on_the_seed_alone(name: str, peers: int, probability: float, seed: int) -> None:
    found = topology(name, peers, probability=probability, seed=seed)
    again = topology(name, peers, probability=probability, seed=seed)
    assert found == again
    np.testing.assert_allclose(found.mixing_matrix(1).sum(axis=0), 1)


@pytest.mark.parametrize("name", ["k-regular", "erdos-renyi", "small-world"])
def test_another_seed_is_another_graph(name: str) -> None:
    assert len({topology(name, 30, seed=seed).edges for seed in range(5)}) == 5


@pytest.mark.parametrize("name", ["complete", "ring", "torus", "star"])
@pytest.mark.parametrize("peers", SIZES)
def test_named_graphs_are_what_their_name_says(name: str, peers: int) -> None:
    assert nx.is_isomorphic(union(topology(name, peers, seed=0)), expected_graph(name, peers))


@pytest.mark.parametrize(("degree", "peers"), [(1, 2), (2, 9), (3, 10), (4, 9), (7, 10), (8, 9), (9, 10)])
def test_k_regular_peers_have_k_neighbours(degree: int, peers: int) -> None:
    found = topology("k-regular", peers, degree=degree, seed=3)
    assert {len(found.neighbours(peer, 1)) for peer in range(peers)} == {degree}


def test_small_world_goes_from_a_lattice_to_a_random_graph() -> None:
    lattice = topology("small-world", 20, degree=4, probability=0.0, seed=1)
    assert all(lattice.neighbours(i, 1) == tuple(sorted((i + d) % 20 for d in (-2, -1, 1, 2))) for i in range(20))
    assert topology("small-world", 20, degree=4, probability=0.5, seed=1).edges != lattice.edges


@pytest.mark.parametrize("peers", [2, 4, 8, 32])
def test_exponential_averages_exactly_in_one_period_of_a_power_of_two(peers: int) -> None:
    found = topology("exponential", peers, seed=0)
    period = peers.bit_length() - 1
    for start in (1, 2, 7):
        mixed = np.eye(peers)
        for round in range(start, start + period):
            mixed = found.mixing_matrix(round) @ mixed
        np.testing.assert_allclose(mixed, 1 / peers, atol=1e-15)
    assert found.stats().spectral_gap == pytest.approx(1)


@pytest.mark.parametrize("peers", [2, 3, 5, 8, 13])
def test_exponential_is_one_peer_each_way_and_varies(peers: int) -> None:
    found = topology("exponential", peers, seed=0)
    for round in range(1, 10):
        heard = [found.neighbours(peer, round) for peer in range(peers)]
        assert sorted(heard) == [(peer,) for peer in range(peers)]
    assert (found.neighbours(0, 1) != found.neighbours(0, 2)) == (peers > 2)
    arrows = {(found.neighbours(i, round)[0], i) for i in range(peers) for round in range(1, 10)}
    assert set(found.edges) == arrows


@EVERY
def test_stats_agree_with_an_independent_calculation(name: str, peers: int) -> None:
    found = topology(name, peers, seed=0)
    stats = found.stats()
    graph = union(found)
    assert stats.diameter == nx.diameter(graph)
    if not found.directed:
        degrees = [degree for _, degree in graph.degree]
        assert (stats.degree_min, stats.degree_max) == (min(degrees), max(degrees))
        assert stats.degree_mean == pytest.approx(2 * len(found.edges) / peers)
        sizes = np.sort(np.abs(np.linalg.eigvals(found.mixing_matrix(1))))
        assert stats.spectral_gap == pytest.approx(1 - sizes[-2], abs=1e-7)


def test_the_spectral_gap_of_a_ring_is_the_textbook_one() -> None:
    gap = topology("ring", 12, seed=0).stats().spectral_gap
    assert gap == pytest.approx(2 / 3 * (1 - np.cos(2 * np.pi / 12)))
    assert topology("complete", 12, seed=0).stats().spectral_gap == pytest.approx(1)


@pytest.mark.parametrize(
    ("spec", "peers", "options", "key"),
    [
        ("circle", 5, {}, "topology"),
        ("", 5, {}, "topology"),
        ("ring", 1, {}, "peers"),
        ("torus", 7, {}, "topology"),
        ("torus", 2, {}, "topology"),
        ("k-regular", 5, {"degree": 3}, "topology-degree"),
        ("k-regular", 4, {"degree": 4}, "topology-degree"),
        ("k-regular", 4, {"degree": 0}, "topology-degree"),
        ("k-regular", 6, {"degree": 1}, "topology-degree"),
        ("small-world", 6, {"degree": 3}, "topology-degree"),
        ("small-world", 4, {"degree": 4}, "topology-degree"),
        ("small-world", 9, {"probability": -0.1}, "topology-probability"),
        ("erdos-renyi", 9, {"probability": 1.1}, "topology-probability"),
        ("erdos-renyi", 9, {"probability": float("nan")}, "topology-probability"),
        ("erdos-renyi", 50, {"probability": 0.001}, "topology-probability"),
    ],
)  # fmt: skip
def test_impossible_or_disconnected_topologies_are_refused_by_key(
    spec: str, peers: int, options: dict[str, float], key: str
) -> None:
    with pytest.raises(SettingError, match=f"setting `{key}`"):
        topology(spec, peers, seed=0, **options)  # type: ignore[arg-type]


def test_a_file_of_edges(tmp_path: Path) -> None:
    path = tmp_path / "sites.txt"
    path.write_text("# two hospitals and a clinic\n0 1\n\n1 2  # twice, either way\n2 1\n", encoding="utf-8")
    found = topology(f"file:{path}", 3, seed=0)
    assert found.edges == ((0, 1), (1, 2))
    assert found.neighbours(1, 1) == (0, 2)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("0 1\n1 3\n", "line 2"),
        ("0 1\n1 1\n", "line 2"),
        ("0 1 2\n", "line 1"),
        ("0 one\n", "line 1"),
        ("0 -1\n", "line 1"),
        ("0 ²\n", "line 1"),
        (f"0 {'9' * 5000}\n", "line 1"),
        ("0 1\n", "peers 2 have no path"),
        ("", "no path"),
    ],
)
def test_a_file_that_is_no_topology_is_refused_with_the_place(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "sites.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SettingError, match=f"(?s)`topology`.*{word}"):
        topology(f"file:{path}", 3, seed=0)


def test_a_file_that_can_not_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("absent", "binary", "."):
        with pytest.raises(SettingError, match="`topology`"):
            topology(f"file:{tmp_path / name}", 3, seed=0)


def test_a_thousand_peers_look_up_their_neighbours_without_a_search() -> None:
    found = topology("k-regular", 1000, seed=0)
    assert found.stats().diameter >= 6  # (1 + 4 + 12 + …) first covers a thousand at six hops
    assert len(found.neighbours(999, 10**9)) == 4


def test_importing_costs_no_torch() -> None:
    check = "import sys, strategies.topology, strategies.matching; print({'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["k-regular", "small-world"])
@pytest.mark.parametrize("peers", [4, 5, 9, 10])
def test_every_degree_that_a_refusal_allows_works_and_no_other(name: str, peers: int) -> None:
    works, said = set(), set()
    for degree in range(-1, peers + 2):
        try:
            found = topology(name, peers, degree=degree, probability=0.0, seed=0)
        except SettingError as error:
            if "graphs were drawn" in str(error):
                assert degree == 1  # pairs that nothing connects
            else:
                said.add(tuple(map(int, re.findall(r"from (\d+) to (\d+)", str(error))[0])))
        else:
            works.add(degree)
            assert {len(found.neighbours(peer, 1)) for peer in range(peers)} == {degree}
    ((least, most),) = said
    even = name == "small-world" or peers % 2 == 1
    assert works == {degree for degree in range(least, most + 1) if degree > 1 and not (even and degree % 2)}


def test_a_torus_has_the_sides_nearest_to_a_square_and_wraps_around() -> None:
    found = topology("torus", 24, seed=0)  # 4 rows of 6
    steps = {(a - b) % 24 for a in range(24) for b in found.neighbours(a, 1)}
    assert nx.is_isomorphic(union(found), nx.grid_2d_graph(4, 6, periodic=True))
    assert {len(found.neighbours(peer, 1)) for peer in range(24)} == {4} and {6, 18} <= steps
    with pytest.raises(SettingError, match="possible for 13 peers"):
        topology("torus", 13, seed=0)


def test_the_most_probable_edges_make_everyone_a_neighbour_and_a_probability_is_named_that_connects() -> None:
    assert topology("erdos-renyi", 7, probability=1.0, seed=0).edges == topology("complete", 7, seed=0).edges
    with pytest.raises(SettingError) as refused:
        topology("erdos-renyi", 40, probability=0.0, seed=0)
    around = float(re.findall(r"around ([\d.]+)", str(refused.value))[0])
    assert topology("erdos-renyi", 40, probability=around, seed=0).stats().diameter < 40
    with pytest.raises(SettingError):
        topology("erdos-renyi", 40, probability=around / 10, seed=0)  # far below it no graph is connected


def test_left_out_degree_and_probability_are_the_settings() -> None:
    config = RunConfig()
    for name in ("k-regular", "small-world", "erdos-renyi"):
        usual = topology(name, 30, degree=config.topology_degree, probability=config.topology_probability, seed=2)
        assert topology(name, 30, seed=2) == usual


def test_of_many_peers_without_a_path_some_are_named_and_of_a_long_line_its_beginning(tmp_path: Path) -> None:
    def refusal(text: str, peers: int) -> str:
        (tmp_path / "sites.txt").write_text(text, encoding="utf-8")
        with pytest.raises(SettingError) as refused:
            topology(f"file:{tmp_path / 'sites.txt'}", peers, seed=0)
        return str(refused.value)

    apart = "".join(f"{i} {i + 1}\n" for i in range(24) if i != 10)  # 0 to 10 and 11 to 24
    assert "peers 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, … have" in refusal(apart, 25)
    assert "peers 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 have" in refusal(apart.replace("9 10\n", "10 11\n"), 25)
    long = "0 " + "1" * 400
    assert long[:40] in (said := refusal(long, 3)) and long not in said
    assert "peers 1 have no path" in refusal("# 0 1\n0 2 # 0 1\n", 3)


def test_a_graph_that_does_not_mix_has_no_gap_and_one_that_mixes_at_once_the_whole() -> None:
    pair = topology("complete", 2, seed=0)
    assert pair.stats().spectral_gap == pytest.approx(1) and pair.edges == ((0, 1),)
    for name, peers in [("ring", 50), ("star", 9), ("exponential", 6), ("exponential", 33)]:
        found = topology(name, peers, seed=0)
        gap, period = found.stats().spectral_gap, (peers - 1).bit_length() if found.directed else 1
        mixed = reduce(np.matmul, (found.mixing_matrix(round) for round in range(period, 0, -1)))
        values = np.random.default_rng(0).standard_normal(peers)
        values -= values.mean()
        contraction = np.linalg.norm(mixed @ values) / np.linalg.norm(values)
        assert 0 <= gap < 1 and contraction <= (1 - gap) ** period + 1e-12  # the bound, one period long
        worst = np.linalg.svd(mixed - 1 / peers)[2][0]
        assert np.linalg.norm(mixed @ worst) == pytest.approx((1 - gap) ** period, abs=1e-9)


def test_degrees_are_those_of_one_round() -> None:
    stats = topology("star", 9, seed=0).stats()
    assert (stats.degree_min, stats.degree_max, stats.degree_mean) == (1, 8, 16 / 9)
    stats = topology("exponential", 9, seed=0).stats()
    assert (stats.degree_min, stats.degree_max, stats.degree_mean) == (1, 1, 1)


@pytest.mark.parametrize("peers", [2, 3, 8, 11])
def test_the_hops_of_the_exponential_graph_double_from_one_and_begin_again(peers: int) -> None:
    """i hears i + 2^((t−1) mod ⌈log₂ N⌉): Ying et al., NeurIPS 2021 [paper]."""
    found = topology("exponential", peers, seed=0)
    hop = 1
    for round in range(1, 12):
        assert found.neighbours(peers - 1, round) == ((peers - 1 + hop) % peers,)
        hop = 1 if 2 * hop >= peers else 2 * hop
