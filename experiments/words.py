"""What a report says in words: what came out, and how much of it can be told from noise."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from experiments.settings import has_effect, label
from experiments.statistics import FEWEST_SEEDS, median, price
from experiments.study import Scenario, Study, differing, final_level, shared_seeds
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
        common = shared_seeds(scenario.variants)
        end = share(final_level(best, common))
        text = f"{where}“{best.label}” ended highest, at {end} mean accuracy{_of_which_seeds(scenario, common)}"
        if gained := best.over("isolated"):
            text += f", {points(fmean(gained.values()))} points against isolated peers"
        if entry["compared"]:
            text += f"; {entry['telling']} of {entry['compared']} differences are larger than seed noise"
        lines.append(text + ".")
        cheapest = min(
            (
                (median([paid[seed].bytes for seed in common or paid]), name)
                for name, paid in entry["prices"].items()
                if paid
            ),
            default=(math.inf, ""),
        )
        origin = ", which is 98 % of the best final accuracy," if chosen else ""
        if math.isfinite(cheapest[0]):
            lines.append(
                f"{where}the target of {share(target)}{origin} came cheapest with “{cheapest[1]}”: "
                f"{size(int(cheapest[0])).strip()} (median over seeds)."
            )
        else:
            lines.append(
                f"{where}no variant reached the target of {share(target)}{origin} under more than half of its seeds."
            )
        lines += _head_start(scenario, where)
    return lines


def _of_which_seeds(scenario: Scenario, common: Sequence[int]) -> str:
    """Say which seeds variants are compared over, where not all have the same."""
    if all(len(variant.runs) == len(common) for variant in scenario.variants if variant.runs):
        return ""
    if not common:
        return " (each over seeds of its own: none is common to all variants)"
    return f" over the {len(common)} seed{'s' * (len(common) > 1)} that all variants have"


def _head_start(scenario: Scenario, where: str) -> Iterator[str]:
    """Say by how much a distilled start cuts the rounds of federated averaging, for every two that differ in that."""
    averaging = [v for v in scenario.variants if v.runs and v.settings["strategy"] == "fedavg"]
    keys = [key for key in differing(averaging) if key != "fedavg-start"]
    pairs = [
        (cold, distilled)
        for cold, distilled in itertools.product(averaging, averaging)
        if (cold.settings["fedavg-start"], distilled.settings["fedavg-start"]) == ("cold", "distilled")
        and all(cold.settings[key] == distilled.settings[key] for key in keys if has_effect(cold.settings, key))
    ]
    for cold, distilled in pairs:
        seeds = sorted(cold.runs.keys() & distilled.runs.keys())
        levels = [NEAR_THE_BEST * max(point.accuracy for point in cold.runs[seed].curve()) for seed in seeds]
        theirs, ours = (
            median([price(variant.runs[seed], level).rounds for seed, level in zip(seeds, levels, strict=True)])
            for variant in (cold, distilled)
        )
        if seeds:
            which = f"{label(distilled.settings, keys)}: " if len(pairs) > 1 else ""
            yield f"{where}{which}{_rounds_saved(theirs, ours, len(seeds))}"


def _rounds_saved(cold: float, distilled: float, seeds: int) -> str:
    text = f"to 98 % of a cold start's best accuracy federated averaging needs {cold:g} rounds from that start"
    medians = f"medians over {seeds} seed{'s' * (seeds > 1)}"
    if math.isinf(distilled):
        return f"{text}, and does not get there from a distilled one ({medians})."
    cut = f", a cut of {1 - distilled / cold:.0%}" if cold else ""
    return (
        f"{text} and {distilled:g} from a distilled one{cut} ({medians}; the exchange before a distilled start is the "
        "first of its rounds)."
    )


def how_to_read(scenario: Scenario) -> str:
    """Return what a reader of a scenario's tables needs to know."""
    parts = []
    for name in ("isolated", "pooled"):
        if one := scenario.control(name):
            parts.append(f"{name.capitalize()}: {share(fmean(one.values()))}.")
        elif any(getattr(variant, name) for variant in scenario.variants):
            parts.append(f"{name.capitalize()}: not one level, since what is compared changes it; each has its own.")
    parts.append(
        "Means over seeds, at the last measurement. Over isolated: final accuracy less that of the same peers without "
        "exchange, paired by seed, in points. Spread: standard deviation over the peers, in points, before → "
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
