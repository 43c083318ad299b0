"""What can be said from a few seeds: intervals, paired tests, and what a target costs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean
from typing import Protocol

import numpy as np

from experiments.analysis.runs import Point

LEVEL = 0.95
FEWEST_SEEDS = 3
MEASURES = ("accuracy", "worst", "spread", "own_accuracy", "ece", "nll", "brier")
"""Of a run's end, that variants are compared by."""
INTERVAL = "95 % interval (Student's t: it holds if seeds scatter normally)"
"""What stands under every figure that shows an interval."""

_ROUNDING = 1e-12
"""Of means over peers: what differs by less is equal."""

Values = Mapping[int, float]
"""A number by seed."""


class Trial(Protocol):
    """One run, read from its folder or from a table of many."""

    def curve(self) -> list[Point]:
        """Return where it stood, by round."""

    @property
    def counts_from(self) -> int:
        """Return the round from which on its accuracy is that of what is compared."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its 95 % interval (Student's t); the interval is NaN for a single seed."""

    value: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Comparison:
    """Two variants over the seeds that both have.

    Attributes:
        first: label; ``second`` likewise.
        difference: mean of first − second.
        low: lower end of the 95 % interval of the mean difference (Student's t); ``high``: upper end.
        p: two-sided p of the paired t-test; NaN for fewer than two seeds, or where all differences are zero. Where they
            are all the same and not zero, which leaves that test nothing to measure noise by, it is the sign-flip
            test's, and there is no interval.
        adjusted: the same after Holm's correction for all pairs tested together.
        seeds: how many.
        identical: every difference is zero.
    """

    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float
    seeds: int
    identical: bool
    adjusted: float = math.nan

    @property
    def verdict(self) -> str:
        """Say what the seeds allow to say."""
        if self.identical:
            return "identical"
        if self.seeds < FEWEST_SEEDS:
            return "too few seeds to tell"
        return "larger than seed noise" if self.larger_than_noise else "within seed noise"

    @property
    def larger_than_noise(self) -> bool:
        """Tell whether the difference is larger than what seeds do by themselves."""
        return self.seeds >= FEWEST_SEEDS and self.adjusted < 1 - LEVEL


@dataclass(frozen=True)
class Price:
    """What one run paid until its mean accuracy reached a target; infinite where it never did."""

    rounds: float
    bytes: float
    seconds: float


def mean(values: Sequence[float]) -> Mean:
    """Return the mean of those values that are finite, and its interval.

    A percentile bootstrap of two to eight seeds would hold the true mean in 50 to 89 % of cases; Student's t does in
    95 %, where seeds scatter normally.

    >>> mean([0.5])
    Mean(value=0.5, low=nan, high=nan, seeds=1)
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Mean(math.nan, math.nan, math.nan, 0)
    center = fmean(finite)
    half = _half(finite)
    return Mean(center, center - half, center + half, len(finite))


def _half(values: Sequence[float]) -> float:
    """Return half the width of the interval of a mean; NaN for a single value."""
    from scipy import special

    if len(values) < 2:
        return math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(special.stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * error  # without stats.t's long way there


def compare(first: str, a: Values, second: str, b: Values) -> Comparison:
    """Compare two variants by the seeds they share, with the paired t-test.

    Accuracies are counts over small test sets: three seeds that differ by the same number of images are no rarity, and
    no certainty. The t-test would call them one, at p = 0.

    Args:
        first: the label of ``a``.
        a: by seed.
        second: the label of ``b``.
        b: by seed.
    """
    from scipy import special

    differences = np.asarray([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())], dtype=float)
    differences = differences[np.isfinite(differences)]
    differences[np.abs(differences) < _ROUNDING] = 0.0
    count = len(differences)
    if count == 0:
        return Comparison(first, second, math.nan, math.nan, math.nan, math.nan, 0, False)
    center = float(differences.mean())
    if not differences.any():
        return Comparison(first, second, 0.0, 0.0, 0.0, math.nan, count, True)  # nothing to test, nor to correct for
    half = _half(differences.tolist())
    if count < 2:
        return Comparison(first, second, center, half, half, math.nan, count, False)
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    if error < _ROUNDING:  # the same difference under every seed
        return Comparison(first, second, center, math.nan, math.nan, 2 / 2**count, count, False)
    p = 2 * float(special.stdtr(count - 1, -abs(center) / error))
    return Comparison(first, second, center, center - half, center + half, p, count, False)


def every_pair(values: Mapping[str, Values]) -> list[Comparison]:
    """Compare every two, corrected for their number.

    Args:
        values: by label, then by seed.
    """
    return corrected([compare(a, values[a], b, values[b]) for a, b in combinations(values, 2)])


def against(reference: str, values: Mapping[str, Values]) -> dict[str, Comparison]:
    """Compare all others with one, corrected for their number; return them by label.

    Args:
        reference: one of the labels.
        values: by label, then by seed.
    """
    others = [label for label in values if label != reference]
    found = corrected([compare(label, values[label], reference, values[reference]) for label in others])
    return dict(zip(others, found, strict=True))


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return comparisons that are made together with their p-values corrected for their number (Holm)."""
    adjusted = holm([comparison.p for comparison in comparisons])
    return [replace(comparison, adjusted=p) for comparison, p in zip(comparisons, adjusted, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number; NaN stays NaN and does not count.

    Source: Holm 1979, https://www.jstor.org/stable/4615733.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, highest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, p_values[i] * (len(order) - rank)))
        adjusted[i] = highest
    return adjusted


def price(run: Trial, target: float) -> Price:
    """Return what a run paid until the mean accuracy of its peers reached a target."""
    for point in run.curve():
        if point.accuracy >= target and point.round >= run.counts_from:
            return Price(point.round, point.bytes, point.seconds)
    return Price(math.inf, math.inf, math.inf)


def median(values: Sequence[float]) -> float:
    """Return the median with infinity for what was not reached, so that nothing is dropped; NaN where one is not known.

    >>> median([3.0, math.inf, 5.0]), median([3.0, math.inf]), median([3.0, math.nan, 5.0])
    (5.0, inf, nan)
    """
    ordered = sorted(values)
    half = len(ordered) // 2
    if not ordered or any(map(math.isnan, ordered)):
        return math.nan
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
