"""What a report says in words: what came out, and how much of it can be told from noise."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from experiments.analysis.settings import has_effect, label
from experiments.analysis.statistics import FEWEST_SEEDS, INTERVAL, median, price
from experiments.analysis.variants import Scenario, Study, differing, final_level, shared_seeds
from strategies.relay.console import size

NEAR_THE_BEST = 0.98
CONTROL_NAMES = {"isolated": "isolated", "channel": "true labels", "pooled": "pooled"}
"""What each control is called, the floor first."""
_MEASURES = {
    "worst": "the worst peer", "spread": "the spread across peers", "own_accuracy": "own classes", "ece": "ECE",
    "nll": "NLL", "brier": "Brier",
}  # fmt: skip


def in_short(found: Study, *, quick: bool, waiting: int) -> list[str]:
    """Say what all of a report stands on, one sentence each.

    Args:
        found: all runs.
        quick: they are a recipe's quick size.
        waiting: how many trials have not begun.
    """
    seeds = len({run.seed for run in found.runs})
    begun = f"{counted(len(found.runs), 'trial')} with {counted(seeds, 'seed')}; {len(found.failed)} failed"
    lines = ["This is the quick size: it shows the form of the result and decides nothing."] if quick else []
    caveats = dict.fromkeys(f"{caveat[:1].upper()}{caveat[1:]}." for run in found.runs for caveat in run.caveats)
    return [*lines, begun + (f", {waiting} more have not begun." if waiting else "."), *caveats]


def what_came_out(entry: Mapping[str, Any], *, chosen: bool) -> list[str]:
    """Say what came out of one scenario, one sentence each.

    Args:
        entry: the scenario as the page shows it.
        chosen: nobody asked for a target, so one was chosen.
    """
    scenario: Scenario = entry["source"]
    best = scenario.best
    if best is None:
        return ["No trial finished."]
    common = shared_seeds(scenario.variants)
    several = len(scenario.variants) > 1
    end = f"at {share(final_level(best, common))} mean accuracy{_of_which_seeds(scenario, common)}"
    text = f"“{best.label}” ended highest, {end}" if several else f"It ended {end}"
    if gained := best.over("isolated"):
        text += f", {points(fmean(gained.values()))} points against isolated peers{_range(list(gained.values()))}"
    if entry["compared"]:
        text += f"; {_told_apart(scenario, entry['telling'], entry['compared'])}"
    return [f"{text}.", _cheapest(entry, common, chosen=chosen), *_head_start(scenario)]


def _range(differences: Sequence[float]) -> str:
    if len(differences) == 1:
        return ""
    return f" ({points(min(differences))} to {points(max(differences))} by seed)"


def _told_apart(scenario: Scenario, telling: int, compared: int) -> str:
    seeds = _most_seeds(scenario)
    if seeds < FEWEST_SEEDS:
        return f"{counted(seeds, 'seed')} cannot tell a difference from noise"
    return f"{telling} of {compared} differences between variants are larger than seed noise"


def _cheapest(entry: Mapping[str, Any], common: Sequence[int], *, chosen: bool) -> str:
    """Say with which variant the target cost the fewest bytes."""
    several = len(entry["source"].variants) > 1
    target = f"the target of {share(entry['target'])}"
    if chosen:
        target += f", which is 98 % of the {'best ' * several}final accuracy,"
    paid = {name: [of[seed].bytes for seed in common or of] for name, of in entry["prices"].items() if of}
    name = min(paid, key=lambda name: median(paid[name]))
    cost = median(paid[name])
    if math.isinf(cost):
        return f"No variant reached {target} under more than half of its seeds."
    which = f"came cheapest with “{name}”:" if several else "was reached after"
    over = " (median over seeds)" if len(paid[name]) > 1 else ""
    return f"{target.capitalize()} {which} {size(int(cost)).strip()}{over}."


def _of_which_seeds(scenario: Scenario, common: Sequence[int]) -> str:
    """Say which seeds variants are compared over, where not all have the same."""
    if all(len(variant.runs) == len(common) for variant in scenario.variants if variant.runs):
        return ""
    if not common:
        return " (each over seeds of its own: none is common to all variants)"
    return f" over the {counted(len(common), 'seed')} that all variants have"


def _head_start(scenario: Scenario) -> Iterator[str]:
    """Say by how much another start than a cold one cuts FedAvg's rounds, for every two that differ in that alone."""
    averaging = [v for v in scenario.variants if v.runs and v.settings["strategy"] == "fedavg"]
    keys = [key for key in differing(averaging) if key != "fedavg-start"]
    pairs = [
        (cold, other)
        for cold, other in itertools.product(averaging, averaging)
        if cold.settings["fedavg-start"] == "cold" != other.settings["fedavg-start"]
        and all(cold.settings[key] == other.settings[key] for key in keys if has_effect(cold.settings, key))
    ]
    for cold, other in pairs:
        seeds = sorted(cold.runs.keys() & other.runs.keys())
        if not seeds:
            continue
        levels = [NEAR_THE_BEST * max(point.accuracy for point in cold.runs[seed].curve()) for seed in seeds]
        theirs, ours = (
            median([price(variant.runs[seed], level).rounds for seed, level in zip(seeds, levels, strict=True)])
            for variant in (cold, other)
        )
        which = f"{label(other.settings, keys)}: " if keys and len(pairs) > 1 else ""
        yield f"{which}{_rounds_saved(theirs, ours, len(seeds), start=str(other.settings['fedavg-start']))}"


def _rounds_saved(cold: float, other: float, seeds: int, *, start: str) -> str:
    medians = f"medians over {counted(seeds, 'seed')}"
    text = f"From a cold start FedAvg reaches 98 % of its own best accuracy in {counted(cold, 'round')}"
    if math.isinf(other):
        return f"{text}; from a {start} start it does not get there ({medians})."
    cut = f", a cut of {1 - other / cold:.0%}" if cold else ""
    before = {
        "distilled": "the exchange before a distilled start is the first of its rounds",
        "pretrained": "the epochs before a pretrained start are not counted",
    }
    told = f"from a {start} start it gets there in {counted(other, 'round')}{cut}"
    return f"{text}; {told} ({medians}; {before[start]})."


def how_to_read(scenario: Scenario) -> str:
    """Return what a reader of a scenario's tables needs to know."""
    parts = []
    for name, words in CONTROL_NAMES.items():
        if one := scenario.control(name):
            parts.append(f"{words.capitalize()}: {share(fmean(one.values()))}.")
        elif any(getattr(variant, name) for variant in scenario.variants):
            parts.append(f"{words.capitalize()}: not one level, since what is compared changes it; each has its own.")
    parts += _samples_seen(scenario)
    parts.append(
        f"Means over seeds, at the last measurement, with their {INTERVAL}. Gain: over the models that the peers came "
        "with. Over isolated: final accuracy less that of the same peers without exchange, paired by seed, in points. "
        "Share of channel: how much of the way the exchange went, from isolated to the same peers with the proxy set's "
        "true labels for teachers. "
        "Spread: standard deviation over the peers, in points, before → after. Own classes: accuracy on the peer's own "
        "label mix. Until the target, a mean accuracy of the peers: medians over seeds, where not reached counts as "
        "infinite; seconds are wall time on this machine from the end of round 0. ECE in 15 bins, NLL in nats, Brier "
        "score: means of the peers. Bold: the best of a column."
    )
    return " ".join(parts)


def _samples_seen(scenario: Scenario) -> Iterator[str]:
    """Say on how much private data the pooled models were trained, and the peers beside them."""
    runs = [run for variant in scenario.variants for run in variant.runs.values()]
    pooled, peers = (
        sorted({float(value) for run in runs if (value := run.summary.get(name)) is not None})
        for name in ("pooled_samples_seen", "samples_seen")
    )
    if pooled and peers:
        ours, theirs = (f"{n[0]:,.0f}" + (f" to {n[-1]:,.0f}" if len(n) > 1 else "") for n in (pooled, peers))
        yield f"Pooled was trained on {ours} private samples, repeats counted, the peers together on {theirs}."


def about_noise(scenario: Scenario, telling: Mapping[str, int], compared: int) -> str:
    """Return how far the seeds of a scenario can tell differences from noise.

    Args:
        scenario: the scenario.
        telling: by measure, how many differences are larger than noise.
        compared: of how many.
    """
    seeds = _most_seeds(scenario)
    if not compared:
        return ""
    if seeds < FEWEST_SEEDS:
        return f"{counted(seeds, 'seed')} cannot tell a difference from noise: run at least {FEWEST_SEEDS}."
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


def counted(number: float, what: str) -> str:
    """Return a number of things.

    >>> counted(1, "seed"), counted(2.5, "round")
    ('1 seed', '2.5 rounds')
    """
    return f"{number:g} {what}{'s' * (number != 1)}"


def _most_seeds(scenario: Scenario) -> int:
    return max((len(variant.runs) for variant in scenario.variants), default=0)


def share(value: float) -> str:
    """Return a share in per cent; a dash for NaN."""
    return f"{value:.1%}" if math.isfinite(value) else "–"


def points(value: float) -> str:
    """Return a difference of shares in points, with its sign; a dash for NaN."""
    return f"{100 * value:+.1f}" if math.isfinite(value) else "–"
