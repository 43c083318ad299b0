"""What a report says in words: what came out, and how much of it can be told from noise."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from experiments.statistics import FEWEST_SEEDS, mean, median, price
from experiments.study import Scenario, Study
from strategies.console import size

NEAR_THE_BEST = 0.98
_MEASURES = {
    "worst": "the worst peer", "spread": "the spread across peers", "own_accuracy": "own classes", "ece": "ECE",
    "nll": "NLL", "brier": "Brier",
}  # fmt: skip


def in_short(found: Study, scenarios: Sequence[dict[str, Any]], *, chosen: bool, waiting: int) -> list[str]:
    """Say what came out, one sentence each.

    Args:
        found: all runs.
        scenarios: as the page shows them.
        chosen: nobody asked for a target, so one was chosen.
        waiting: how many trials have not begun.
    """
    seeds = sorted({run.seed for run in found.runs})
    begun = f"{len(found.runs)} trials with {len(seeds)} seed{'s' * (len(seeds) > 1)}; {len(found.failed)} failed"
    lines = [begun + (f", {waiting} more have not begun." if waiting else ".")]
    for entry in scenarios:
        scenario: Scenario = entry["source"]
        target: float = entry["target"]
        best = scenario.best
        where = f"{scenario.label}: " if len(scenarios) > 1 else ""
        if best is None:
            lines.append(f"{where}no trial finished.")
            continue
        end = mean(list(best.finals().values()))
        text = f"{where}“{best.label}” ended highest, at {share(end.value)} mean accuracy"
        if scenario.isolated:
            text += f", {points(end.value - fmean(scenario.isolated.values()))} points against isolated peers"
        if entry["compared"]:
            text += f"; {entry['telling']} of {entry['compared']} differences are larger than seed noise"
        lines.append(text + ".")
        cheapest = min(
            ((median([p.bytes for p in paid.values()]), name) for name, paid in entry["prices"].items() if paid),
            default=(math.inf, ""),
        )
        origin = ", which is 98 % of the best final accuracy," if chosen else ""
        if math.isfinite(cheapest[0]):
            lines.append(
                f"{where}the target of {share(target)}{origin} came cheapest with “{cheapest[1]}”: "
                f"{size(int(cheapest[0])).strip()} (median over seeds)."
            )
        else:
            lines.append(f"{where}no variant reached the target of {share(target)}{origin} under half of its seeds.")
        lines += _head_start(scenario, where)
    return lines


def _head_start(scenario: Scenario, where: str) -> list[str]:
    """Say by how much a distilled start cuts the rounds of federated averaging, where both starts were run."""
    by_start = {v.settings["fedavg-start"]: v for v in scenario.variants if v.settings["strategy"] == "fedavg"}
    if set(by_start) != {"cold", "distilled"}:
        return []
    cold, distilled = by_start["cold"].runs, by_start["distilled"].runs
    needed: list[tuple[float, float]] = []
    for seed in cold.keys() & distilled.keys():
        level = NEAR_THE_BEST * max(point.accuracy for point in cold[seed].curve())
        needed.append((price(cold[seed], level).rounds, 1 + price(distilled[seed], level, after=0).rounds))
    if not needed:
        return []
    ours, theirs = (median([pair[i] for pair in needed]) for i in (1, 0))
    text = f"{where}to 98 % of a cold start's best accuracy federated averaging needs {theirs:g} rounds from that start"
    if math.isinf(ours):
        return [f"{text}, and does not get there from a distilled one (medians over {len(needed)} seeds)."]
    cut = f", a cut of {1 - ours / theirs:.0%}" if theirs else ""
    return [
        f"{text} and {ours:g} from a distilled one{cut} (medians over {len(needed)} seeds; the exchange before a "
        "distilled start is charged as one round)."
    ]


def how_to_read(scenario: Scenario) -> str:
    """Return what a reader of a scenario's tables needs to know."""
    parts = []
    for name, values in (("isolated", scenario.isolated), ("pooled", scenario.pooled)):
        if values:
            parts.append(f"{name.capitalize()}: {share(fmean(values.values()))}.")
    parts.append(
        "Means over seeds, at the last measurement. Spread: standard deviation over the peers, in points, before → "
        "after. Own classes: accuracy on the peer's own label mix. Until the target, a mean accuracy of the peers: "
        "medians over seeds, where not reached counts as infinite; seconds are wall time on this machine from the end "
        "of round 0. ECE in 15 bins, NLL in nats, Brier score: means of the peers. Bold: the best of a column."
    )
    return " ".join(parts)


def about_noise(scenario: Scenario, telling: Mapping[str, int], compared: int) -> str:
    """Return how far the seeds of a scenario can tell differences from noise.

    Args:
        scenario: the scenario.
        telling: by measure, how many differences are larger than noise.
        compared: of how many.
    """
    seeds = max((len(v.runs) for v in scenario.variants), default=0)
    if not compared:
        return ""
    if seeds < FEWEST_SEEDS:
        return f"{seeds} seed{'s' * (seeds > 1)} cannot tell a difference from noise: run at least {FEWEST_SEEDS}."
    others = ", ".join(f"{_MEASURES[what]} {count}" for what, count in telling.items() if what != "accuracy")
    text = (
        f"{telling['accuracy']} of {compared} differences in final accuracy are larger than seed noise (paired t-test, "
        f"p < 0.05 after Holm's correction over all of them); by other measures: {others}."
    )
    if seeds <= 5:
        text += (
            f" With {seeds} seeds the paired t-test leans on differences being normal: a sign-flip test, which does "
            f"not, could reach no p below {2 / 2**seeds:.3g}."
        )
    return text


def share(value: float) -> str:
    """Return a share in per cent; a dash for NaN."""
    return f"{value:.1%}" if math.isfinite(value) else "–"


def points(value: float) -> str:
    """Return a difference of shares in points, with its sign; a dash for NaN."""
    return f"{100 * value:+.1f}" if math.isfinite(value) else "–"
