"""Controls that a comparison carries in itself: what must agree by algebra, and where floor and ceiling are."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from experiments.analysis.settings import config_of, label
from experiments.analysis.statistics import Comparison, compare
from experiments.analysis.variants import Scenario, Study, Variant, differing, shared_seeds

_CLOSE = 0.005
"""Differences of accuracy up to this are agreement even under every seed: rounding can tip single samples."""

_NARROW = 0.05
"""An interval of differences that is wider than this says nothing about agreement."""


@dataclass(frozen=True)
class Check:
    """One control.

    Attributes:
        name: what is checked.
        expected: what should come out, and why.
        found: what came out.
        ok: whether it did; None where the runs do not tell.
    """

    name: str
    expected: str
    found: str
    ok: bool | None


def checks(study: Study) -> list[Check]:
    """Check everything that the runs of a study allow to check."""
    found: list[Check] = []
    for scenario in study.scenarios:
        where = f" ({scenario.label})" if len(study.scenarios) > 1 else ""
        found += _agree(
            scenario,
            f"ce and kl agree{where}",
            "The teacher is constant, so both have the same gradient in the student.",
            {"divergence": "ce"},
            {"divergence": "kl"},
            only=lambda s: s["strategy"] != "fedavg" and s["regime"] == "vanilla",
        )
        for divergence in ("kl", "ce"):
            found += _agree(
                scenario,
                f"pairwise mean and averaged probabilities agree under {divergence}{where}",
                "Both are linear in the teacher, so a mean of divergences has the gradient of one from the mean.",
                {"strategy": "pairwise"},
                {"strategy": "averaged"},
                only=lambda s, d=divergence: (
                    s["divergence"] == d
                    and s["reduction"] == "mean"
                    and s["average"] == "probs"
                    and s["matching"] == "all"
                    and s["sharpen"] == 0
                    and s["robust"] not in ("median", "trimmed")
                    and config_of(s).combined_temperature == 1
                ),
            )
        found += _floor(scenario, where) + _ceiling(scenario, where)
    return found


def matched_gradients(scenario: Scenario) -> list[dict[str, Any]]:
    """Return plain and gradient-matched accuracy side by side, for variants that exist in both, over common seeds."""
    table = []
    for plain, matched in _twins(scenario, {"match-gradients": False}, {"match-gradients": True}):
        if seeds := shared_seeds((plain, matched)):
            name = label(plain.settings, [k for k in differing(scenario.variants) if k != "match-gradients"])
            a, b = (fmean(variant.finals()[seed] for seed in seeds) for variant in (plain, matched))
            table.append({"variant": name, "plain": a, "matched": b, "difference": b - a, "seeds": len(seeds)})
    return table


def _agree(
    scenario: Scenario, name: str, expected: str, one: Mapping[str, Any], other: Mapping[str, Any], *, only: Any
) -> list[Check]:
    differences: list[float] = []
    for a, b in _twins(scenario, one, other):
        if only({**a.settings, **other}):
            ours, theirs = a.finals(), b.finals()
            differences += [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    if not differences:
        return []
    result = _from_zero(differences)
    worst = max(map(abs, differences))
    if worst <= _CLOSE:
        ok: bool | None = True
    elif result.low > 0 or result.high < 0:
        ok = False
    else:
        ok = True if result.high - result.low <= _NARROW else None
    text = (
        f"mean difference {100 * result.difference:+.2f} points{_interval(result)}, largest {100 * worst:.2f}, over "
        f"{len(differences)} pair{'s' * (len(differences) > 1)}"
    )
    return [Check(name, expected, text, ok)]


def _floor(scenario: Scenario, where: str) -> list[Check]:
    return _bound(scenario, "isolated", f"isolated is the floor{where}", 1, "Exchange should not cost accuracy.")


def _ceiling(scenario: Scenario, where: str) -> list[Check]:
    expected = "One model on all private data has seen more than any peer."
    return _bound(scenario, "pooled", f"pooled is the ceiling{where}", -1, expected)


def _bound(scenario: Scenario, control: str, name: str, sign: int, expected: str) -> list[Check]:
    """Set every variant against its own control, by seed: on the wrong side is what is there beyond seed noise."""
    found: dict[str, Comparison] = {}
    for variant in scenario.variants:
        if margins := variant.over(control):
            found[variant.label] = _from_zero([sign * margin for margin in margins.values()])
    if not found:
        return []
    beyond = {label: result for label, result in found.items() if result.difference < -_CLOSE}
    wrong = [result for result in beyond.values() if result.high < 0]
    one = scenario.control(control)
    level = f"{control} {fmean(one.values()):.1%}" if one else f"{control}, of each variant its own"
    if not beyond:
        nearest = min(result.difference for result in found.values())
        return [Check(name, expected, f"{level}; the nearest variant is {100 * nearest:+.1f} points away", True)]
    words = [
        f"{label} ({100 * sign * result.difference:+.1f}{_interval(result, sign)})" for label, result in beyond.items()
    ]
    return [
        Check(name, expected, f"{level}; on the wrong side, in points: {', '.join(words)}", False if wrong else None)
    ]


def _from_zero(differences: Sequence[float]) -> Comparison:
    """Return what seeds say about the mean of paired differences."""
    return compare("", dict(enumerate(differences)), "", dict.fromkeys(range(len(differences)), 0.0))


def _interval(result: Comparison, sign: int = 1) -> str:
    ends = sorted(100 * sign * end for end in (result.low, result.high))
    return f" [{ends[0]:+.1f}, {ends[1]:+.1f}]" if math.isfinite(result.low) else ""


def _twins(scenario: Scenario, one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterable[tuple[Variant, Variant]]:
    """Yield the pairs of variants that differ in these settings alone."""
    keys = differing(scenario.variants)

    def rest(variant: Variant) -> tuple[Any, ...]:
        return tuple(variant.settings[key] for key in keys if key not in one)

    def having(wanted: Mapping[str, Any]) -> dict[tuple[Any, ...], Variant]:
        return {rest(v): v for v in scenario.variants if all(v.settings[k] == value for k, value in wanted.items())}

    first, second = having(one), having(other)
    for key, variant in first.items():
        if key in second:
            yield variant, second[key]
