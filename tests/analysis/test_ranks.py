"""Mean ranks over seeds and data, and which of them a few blocks can tell apart."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from experiments.analysis.ranks import rank


def blocks_of(**rows):
    """Name the blocks of rows of scores."""
    return {label: dict(enumerate(scores)) for label, scores in rows.items()}


def test_ranks_are_means_over_the_blocks_that_all_have_and_the_best_comes_first():
    scores = blocks_of(low=[0.1, 0.2, 0.3, 0.1], high=[0.9, 0.8, 0.9, 0.2], tied=[0.1, 0.7, 0.8])

    found = rank(scores)

    assert found.labels == ("high", "tied", "low")
    assert found.means == pytest.approx([1.0, 6.5 / 3, 8.5 / 3]) and found.blocks == 3


def test_the_critical_difference_of_three_blocks_is_that_of_all_permutations():
    orders = list(itertools.permutations([1, 2, 3]))
    ranges = [np.ptp(np.mean(blocks, axis=0)) for blocks in itertools.product(orders, repeat=3)]
    rare = min(r for r in ranges if np.mean([other >= r - 1e-9 for other in ranges]) <= 0.05)

    found = rank(blocks_of(a=[3, 3, 3], b=[2, 2, 2], c=[1, 1, 1]))

    assert found.critical == rare == 2
    assert found.cliques == ((0, 1), (1, 2)) and found.told_apart == 1


@pytest.mark.parametrize(("variants", "blocks"), [(12, 10), (15, 10)])
def test_with_many_blocks_it_comes_to_nemenyis_own(variants, blocks):
    rng = np.random.default_rng(0)
    nemenyi = stats.studentized_range.ppf(0.95, variants, np.inf) * math.sqrt(variants * (variants + 1) / 12 / blocks)

    found = rank({str(i): dict(enumerate(rng.normal(size=blocks))) for i in range(variants)})

    assert found.critical == pytest.approx(nemenyi, rel=0.05)


def test_friedmans_p_is_scipys_where_that_holds():
    scores = np.random.default_rng(1).normal(size=(5, 40)) + 0.15 * np.arange(5)[:, None]

    found = rank({str(i): dict(enumerate(row)) for i, row in enumerate(scores)})

    assert found.p == pytest.approx(stats.friedmanchisquare(*scores).pvalue, abs=0.01)


def test_with_blocks_enough_wilcoxons_test_judges_and_does_not_depend_on_the_rest():
    rng = np.random.default_rng(2)
    a, b = (0.5 + shift + 0.02 * rng.normal(size=12) for shift in (0.0, 0.05))
    others = {f"far {i}": 0.5 + 0.4 * rng.normal(size=12) for i in range(3)}

    found = rank(blocks_of(a=a, b=b, **others))

    places = {label: i for i, label in enumerate(found.labels)}
    assert math.isnan(found.critical)
    assert not any({places["a"], places["b"]} <= set(clique) for clique in found.cliques)


def test_too_few_blocks_tell_nothing_apart():
    found = rank(blocks_of(a=[2] * 3, b=[2] * 3, c=[1] * 3))

    assert math.isinf(found.critical) and found.told_apart == 0
    assert rank(blocks_of(a=[3, 3], b=[2, 2], c=[1, 1])) is None
    assert rank(blocks_of(a=[3, 3, 3], b=[2, 2, 2])) is None


def test_noise_is_called_noise_about_as_often_as_promised():
    rng = np.random.default_rng(3)

    found = [rank({str(i): dict(enumerate(row)) for i, row in enumerate(rng.normal(size=(4, 3)))}) for _ in range(40)]

    assert sum(ranking.told_apart > 0 for ranking in found) <= 6  # 2 expected; more than 6 has a chance of 0.3 %
