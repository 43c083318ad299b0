"""Controls that a comparison carries in itself: what must agree by algebra, and where floor and ceiling are."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from experiments.statistics import compare
from experiments.study import Scenario, Study, Variant, differing, label

_CLOSE = 0.005
"""Differences of accuracy up to this are agreement even under every seed: rounding can tip single samples."""


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
                    and s["robust"] == "none"
                ),
            )
        found += _floor(scenario, where) + _ceiling(scenario, where)
    return found


def matched_gradients(scenario: Scenario) -> list[dict[str, Any]]:
    """Return plain and gradient-matched accuracy side by side, for variants that exist in both."""
    table = []
    for plain, matched in _twins(scenario, {"match-gradients": False}, {"match-gradients": True}):
        result = compare("plain", plain.finals(), "matched", matched.finals())
        if result.seeds:
            name = label({**plain.settings}, [k for k in differing(scenario.variants) if k != "match-gradients"])
            a, b = (fmean(variant.finals().values()) for variant in (plain, matched))
            table.append({"variant": name, "plain": a, "matched": b, "difference": b - a, "seeds": result.seeds})
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
    result = compare("", dict(enumerate(differences)), "", dict.fromkeys(range(len(differences)), 0.0))
    ok = max(map(abs, differences)) <= _CLOSE or result.low <= 0 <= result.high
    worst = 100 * max(map(abs, differences))
    text = f"mean difference {100 * result.difference:+.2f} points, largest {worst:.2f}, over {len(differences)} pairs"
    if math.isnan(result.low) and not ok:
        return [Check(name, expected, f"{text}; one pair does not tell", None)]
    return [Check(name, expected, text, ok)]


def _floor(scenario: Scenario, where: str) -> list[Check]:
    return _bound(scenario, scenario.isolated, f"isolated is the floor{where}", 1, "Exchange should not cost accuracy.")


def _ceiling(scenario: Scenario, where: str) -> list[Check]:
    expected = "One model on all private data has seen more than any peer."
    return _bound(scenario, scenario.pooled, f"pooled is the ceiling{where}", -1, expected)


def _bound(scenario: Scenario, control: Mapping[int, float], name: str, sign: int, expected: str) -> list[Check]:
    beyond, margins = [], []
    for variant in scenario.variants:
        finals = variant.finals()
        margin = [sign * (finals[seed] - control[seed]) for seed in finals.keys() & control.keys()]
        if margin:
            margins.append(fmean(margin))
            if fmean(margin) < 0:
                beyond.append(f"{variant.label} ({100 * sign * fmean(margin):+.1f})")
    if not margins:
        return []
    level = f"{name.split()[0]} {fmean(control.values()):.1%}"
    if not beyond:
        return [Check(name, expected, f"{level}; the nearest variant is {100 * min(margins):.1f} points away", True)]
    return [Check(name, expected, f"{level}; on the wrong side, in points: {', '.join(beyond)}", False)]


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
