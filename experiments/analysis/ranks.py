"""Who ranks where over seeds and data, and which ranks so few blocks can tell apart: a critical-difference analysis.

A block is one seed on one scenario: within it every variant met the same data, the same models and the same random
streams. Demšar 2006 (https://www.jmlr.org/papers/v7/demsar06a.html) ranks the variants in each block, asks with
Friedman's test whether they differ at all, and then which two do. His tables are for many blocks. Here the null
distributions are those of permutations within the blocks, which hold for any number of them, ties included; and as soon
as there are blocks enough for it to find anything, each two are told apart by Wilcoxon's signed-rank test with Holm's
correction, which does not depend on what else is compared (Benavoli et al. 2016,
https://jmlr.org/papers/v17/benavoli16a.html). That keeps its level whichever variants are alike. The critical
difference keeps it only where all are: two alike whose order changes from block to block, with others always between
them, can be told apart oftener than in 5 %. Friedman's test is told beside either and bars nothing.
"""

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from experiments.analysis.statistics import FEWEST_SEEDS, LEVEL, holm

FEWEST_VARIANTS = 3
_PERMUTATIONS = 10_000
_AT_ONCE = 1_000

Ranks = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ranking:
    """Variants by their mean rank.

    Attributes:
        labels: best first.
        ranks: by block, 1 is best, ``[variants, blocks]``, in the order of the labels.
        p: of Friedman's test, by permutations within the blocks.
        critical: least difference of two mean ranks that is larger than chance (Nemenyi's, by permutations); infinite
            where so few blocks allow none; NaN where Wilcoxon's test judges instead.
        cliques: maximal sets of variants, as places in the order, no two of which can be told apart.
    """

    labels: tuple[str, ...]
    ranks: Ranks
    p: float
    critical: float
    cliques: tuple[tuple[int, ...], ...]

    @property
    def blocks(self) -> int:
        """Return how many blocks there are."""
        return int(self.ranks.shape[1])

    @property
    def means(self) -> list[float]:
        """Return the mean rank of each variant."""
        return [float(value) for value in self.ranks.mean(axis=1)]

    @property
    def told_apart(self) -> int:
        """Return how many pairs are told apart."""
        together = {pair for clique in self.cliques for pair in combinations(clique, 2)}
        return math.comb(len(self.labels), 2) - len(together)


def rank(scores: Mapping[str, Mapping[Hashable, float]]) -> Ranking | None:
    """Rank variants over the blocks that all of them have; None for fewer than three of either.

    Args:
        scores: by label, then by block; higher is better.
    """
    from scipy.stats import rankdata

    blocks = [block for block in next(iter(scores.values()), {}) if all(block in found for found in scores.values())]
    if len(scores) < FEWEST_VARIANTS or len(blocks) < FEWEST_SEEDS:
        return None
    values = np.asarray([[found[block] for block in blocks] for found in scores.values()])
    ranks = rankdata(-values, axis=0)
    order = np.argsort(ranks.mean(axis=1), kind="stable")
    values, ranks = values[order], ranks[order]
    null = _null(ranks)
    p = (1 + int((null[:, 0] >= _spread(ranks.mean(axis=1)) - 1e-9).sum())) / (1 + len(null))
    critical = math.nan if _enough(*ranks.shape) else _quantile(null[:, 1])
    apart = _apart(values, ranks, critical)
    labels = list(scores)
    return Ranking(tuple(labels[i] for i in order), ranks, p, critical, tuple(_cliques(len(labels), apart)))


def _null(ranks: Ranks) -> Ranks:
    """Return Friedman's statistic, unscaled, and the range of the mean ranks under permutations, ``[n, 2]``."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(_PERMUTATIONS // _AT_ONCE):
        means = rng.permuted(np.broadcast_to(ranks, (_AT_ONCE, *ranks.shape)), axis=1).mean(axis=2)
        found.append(np.stack([_spread(means), np.ptp(means, axis=1)], axis=1))
    return np.concatenate(found)


def _spread(means: Ranks) -> Ranks:
    return np.asarray(((means - means.mean(axis=-1, keepdims=True)) ** 2).sum(axis=-1))


def _quantile(ranges: Ranks) -> float:
    """Return the least range that is reached with a probability of at most 5 %; infinity if there is none."""
    values, counts = np.unique(ranges.round(9), return_counts=True)
    reached = counts[::-1].cumsum()[::-1] / len(ranges)
    rare = values[reached <= 1 - LEVEL]
    return float(rare[0]) if len(rare) else math.inf


def _enough(variants: int, blocks: int) -> bool:
    """Tell whether the least p that Wilcoxon's test can reach survives Holm's correction."""
    return math.comb(variants, 2) * 2 / 2**blocks < 1 - LEVEL


def _apart(values: Ranks, ranks: Ranks, critical: float) -> set[tuple[int, int]]:
    """Return the pairs that are told apart."""
    from scipy.stats import wilcoxon

    pairs = list(combinations(range(len(ranks)), 2))
    if math.isnan(critical):
        found = [float(wilcoxon(values[i], values[j]).pvalue) if (values[i] != values[j]).any() else 1.0
                 for i, j in pairs]  # fmt: skip
        return {pair for pair, p in zip(pairs, holm(found), strict=True) if p < 1 - LEVEL}
    means = ranks.mean(axis=1)
    return {(i, j) for i, j in pairs if means[j] - means[i] >= critical - 1e-9}


def _cliques(variants: int, apart: set[tuple[int, int]]) -> Iterator[tuple[int, ...]]:
    """Yield the maximal sets of at least two variants no two of which are told apart, best first."""
    import networkx

    graph = networkx.Graph(pair for pair in combinations(range(variants), 2) if pair not in apart)
    yield from sorted(tuple(sorted(clique)) for clique in networkx.find_cliques(graph))
