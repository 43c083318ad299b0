"""Partitions: laws that hold for every split, and what each scheme promises."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.data import partition as module
from fedkd.data.partition import SCHEMES, partition
from fedkd.errors import SettingError


def labelled(samples=600, classes=10, seed=0):
    return np.random.default_rng(seed).integers(0, classes, samples)


def held_classes(labels, share):
    return set(labels[share].tolist())


def skew(labels, shares):
    """Mean total-variation distance between a peer's label distribution and the whole set's."""
    whole = np.bincount(labels, minlength=10) / len(labels)
    return np.mean([np.abs(np.bincount(labels[s], minlength=10) / len(s) - whole).sum() / 2 for s in shares])


@settings(max_examples=40, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    peers=st.integers(1, 8),
    classes=st.integers(3, 12),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_partition_is_disjoint_sorted_and_repeatable(scheme, peers, classes, seed):
    labels = labelled(400, classes)

    shares = partition(labels, peers, scheme, seed=seed, alpha=1.0, min_samples=1)

    again = partition(labels, peers, scheme, seed=seed, alpha=1.0, min_samples=1)
    assert len(shares) == peers
    assert all(np.array_equal(a, b) for a, b in zip(shares, again, strict=True))
    assert all(share.dtype == np.int64 and (np.diff(share) > 0).all() for share in shares)
    dealt = np.concatenate(shares)
    assert len(np.unique(dealt)) == len(dealt)
    if scheme != "classes" or peers * 2 >= classes:
        assert np.array_equal(np.sort(dealt), np.arange(len(labels)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_seed_gives_another_partition(scheme):
    labels = labelled()
    first, second = (partition(labels, 4, scheme, seed=seed) for seed in (0, 1))

    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_iid_shares_are_equal_and_look_like_the_whole():
    labels = np.sort(labelled(2000))

    shares = partition(labels, 7, "iid", seed=0)

    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert skew(labels, shares) < 0.1


def test_small_alpha_is_more_skewed_than_large():
    labels = labelled(3000)
    skews = [
        np.mean([skew(labels, partition(labels, 5, "dirichlet", alpha=alpha, seed=seed)) for seed in range(5)])
        for alpha in (0.1, 1.0, 100.0)
    ]

    assert skews[0] > skews[1] + 0.1 > skews[2] + 0.2


@pytest.mark.parametrize("seed", range(5))
def test_strong_skew_still_gives_every_peer_enough(seed):
    shares = partition(labelled(1100), 10, "dirichlet", alpha=0.03, min_samples=15, seed=seed)

    assert min(len(share) for share in shares) >= 15


@pytest.mark.parametrize(("peers", "per_peer"), [(5, 2), (6, 2), (3, 4), (7, 3), (2, 10), (12, 1)])
def test_classes_per_peer_are_exact_and_no_class_is_left_out(peers, per_peer):
    labels = labelled()

    shares = partition(labels, peers, "classes", classes_per_peer=per_peer, seed=3)

    hands = [held_classes(labels, share) for share in shares]
    assert all(len(hand) == per_peer for hand in hands)
    assert set().union(*hands) == set(range(10))
    holders = [sum(label in hand for hand in hands) for label in range(10)]
    assert max(holders) - min(holders) <= 1


def test_disjoint_classes_where_the_numbers_allow_it():
    labels = labelled()

    shares = partition(labels, 5, "classes", classes_per_peer=2, seed=0)

    assert all(not held_classes(labels, a) & held_classes(labels, b) for a, b in combinations(shares, 2))


def test_classes_left_out_only_when_nobody_can_hold_them():
    labels = labelled()

    shares = partition(labels, 3, "classes", classes_per_peer=2, seed=0)

    held = set().union(*(held_classes(labels, share) for share in shares))
    assert len(held) == 6
    assert np.array_equal(np.sort(np.concatenate(shares)), np.flatnonzero(np.isin(labels, list(held))))


@pytest.mark.parametrize(("peers", "shared"), [(3, 2), (6, 4), (8, 2)])
def test_overlap_is_a_common_core_and_own_classes(peers, shared):
    labels = labelled()

    shares = partition(labels, peers, "overlap", shared_classes=shared, seed=0)

    hands = [held_classes(labels, share) for share in shares]
    core = set.intersection(*hands)
    assert len(core) == shared
    assert all(a & b == core for a, b in combinations(hands, 2))
    assert all(hand > core for hand in hands)


def test_overlap_with_more_peers_than_classes_still_gives_everyone_an_own_class():
    labels = labelled(900, classes=4)

    hands = [held_classes(labels, s) for s in partition(labels, 9, "overlap", shared_classes=2, seed=0)]

    assert len(set.intersection(*hands)) == 2
    assert all(len(hand) == 3 for hand in hands)


def test_quantity_differs_in_amount_but_not_in_kind():
    labels = np.sort(labelled(4200))

    shares = partition(labels, 6, "quantity", seed=0)

    sizes = np.array([len(share) for share in shares])
    assert np.allclose(sizes / sizes[0], np.arange(1, 7), rtol=0.05)
    assert skew(labels, shares[1:]) < 0.1


# --- mistakes ---


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"scheme": "random"}, "partition"),
        ({"scheme": "dirichlet", "alpha": 0.0}, "partition-alpha"),
        ({"scheme": "dirichlet", "alpha": -1.0}, "partition-alpha"),
        ({"scheme": "dirichlet", "alpha": float("nan")}, "partition-alpha"),
        ({"scheme": "dirichlet", "alpha": float("inf")}, "partition-alpha"),
        ({"scheme": "dirichlet", "alpha": 1e-4, "min_samples": 149}, "partition-alpha"),
        ({"scheme": "classes", "classes_per_peer": 0}, "classes-per-peer"),
        ({"scheme": "classes", "classes_per_peer": 11}, "classes-per-peer"),
        ({"scheme": "overlap", "shared_classes": 0}, "shared-classes"),
        ({"scheme": "overlap", "shared_classes": 10}, "shared-classes"),
        *(({"scheme": scheme, "peers": 61}, "partition") for scheme in SCHEMES),
        ({"scheme": "quantity", "peers": 20}, "partition"),
        ({"scheme": "classes", "peers": 59, "classes_per_peer": 10}, "partition"),
    ],
)
def test_wrong_settings_are_named(arguments, key):
    with pytest.raises(SettingError) as caught:
        partition(labelled(), **{"peers": 4, "seed": 0, **arguments})

    assert caught.value.key == key
    assert str(caught.value).count("\n") == 0


def test_settings_of_other_schemes_are_not_looked_at():
    labels = labelled(classes=2)

    assert len(partition(labels, 4, "iid", seed=0, alpha=-1.0, classes_per_peer=9, shared_classes=2)) == 4


@pytest.mark.parametrize(("labels", "peers"), [(np.zeros((4, 2), dtype=int), 2), (labelled(), 0)])
def test_wrong_arguments_are_value_errors(labels, peers):
    with pytest.raises(ValueError, match="Expected"):
        partition(labels, peers, "iid", seed=0)


# --- the cache ---


@pytest.mark.parametrize("scheme", SCHEMES)
def test_cached_partition_equals_the_computed_one(tmp_path, scheme):
    labels = labelled()
    computed = partition(labels, 4, scheme, seed=0)

    for _ in range(2):
        cached = partition(labels, 4, scheme, seed=0, cache=tmp_path)
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(computed, cached, strict=True))


def test_cache_tells_apart_everything_that_matters(tmp_path):
    labels = labelled()
    other_labels = np.roll(labels, 1)
    asked = [
        (labels, 4, {"seed": 0}),
        (other_labels, 4, {"seed": 0}),
        (labels, 3, {"seed": 0}),
        (labels, 4, {"seed": 1}),
        (labels, 4, {"seed": 0, "alpha": 0.4}),
        (labels, 4, {"seed": 0, "min_samples": 11}),
    ]
    for given_labels, peers, arguments in asked:
        cached = partition(given_labels, peers, "dirichlet", cache=tmp_path, **arguments)
        computed = partition(given_labels, peers, "dirichlet", **arguments)
        assert all(np.array_equal(a, b) for a, b in zip(cached, computed, strict=True))
    assert len(list(tmp_path.glob("*.npz"))) == len(asked)


def test_damaged_cache_is_computed_again(tmp_path):
    labels = labelled()
    first = partition(labels, 4, "iid", seed=0, cache=tmp_path)
    (kept,) = tmp_path.glob("*.npz")

    for content in (b"", b"damaged", kept.read_bytes()[:-30]):
        kept.write_bytes(content)
        again = partition(labels, 4, "iid", seed=0, cache=tmp_path)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_asked_by_many_at_once_it_is_computed_once(tmp_path, monkeypatch):
    computed = []
    compute = module._compute

    def counted(labels, split):
        computed.append(split)
        return compute(labels, split)

    monkeypatch.setattr(module, "_compute", counted)
    labels = labelled()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: partition(labels, 4, "dirichlet", seed=0, cache=tmp_path), range(8)))

    assert len(computed) == 1
    assert all(np.array_equal(a, b) for answer in answers for a, b in zip(answers[0], answer, strict=True))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_second_process_needs_no_import(tmp_path):
    partition(labelled(), 4, "iid", seed=0, cache=tmp_path)
    program = (
        "import sys; from pathlib import Path; import numpy as np; from fedkd.data.partition import partition\n"
        "partition(np.random.default_rng(0).integers(0, 10, 600), 4, 'iid', seed=0, cache=Path(sys.argv[1]))\n"
        "print([name for name in ('flwr_datasets', 'datasets', 'torch') if name in sys.modules])"
    )

    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True, text=True)

    assert run.stdout.strip() == "[]"
