"""Finished runs sorted: what was compared (variants), and under which data (scenarios)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol, TypeVar

from experiments.analysis.runs import Run
from experiments.analysis.settings import SCENARIO_KEYS, VARIANT_KEYS, control_group, control_groups, effective, label
from fedkd.errors import FedkdError
from fedkd.results.folder import share_of_channel
from fedkd.settings.config import RunConfig
from fedkd.settings.declare import CONTROLS, Scalar


@dataclass(frozen=True)
class Variant:
    """What is compared: runs that differ only in their seeds.

    Attributes:
        label: what sets it apart from the other variants.
        settings: common to its runs.
        runs: finished ones, by seed.
        missing: seeds of runs that failed.
        isolated: mean final accuracy of the same peers without exchange, by seed.
        channel: mean final accuracy of the same peers with true labels in their teachers' place, by seed.
        pooled: final accuracy of one model on all private data, by seed.
        isolated_by_peer: final accuracy of each peer without exchange, averaged over seeds.
        share_of_channel: of the way from isolated peers to those with true labels for teachers; of the means over the
            peers that have both controls and the seeds that have such peers.
    """

    label: str
    settings: Mapping[str, Scalar]
    runs: Mapping[int, Run]
    missing: tuple[int, ...] = ()
    isolated: Mapping[int, float] = field(default_factory=dict)
    channel: Mapping[int, float] = field(default_factory=dict)
    pooled: Mapping[int, float] = field(default_factory=dict)
    isolated_by_peer: Mapping[str, float] = field(default_factory=dict)
    share_of_channel: float = math.nan

    def finals(self, what: str = "accuracy") -> dict[int, float]:
        """Return a number of the last point of every run's curve, by seed."""
        return {seed: float(getattr(run.curve()[-1], what)) for seed, run in self.runs.items() if run.curve()}

    def over(self, control: str) -> dict[int, float]:
        """Return final accuracy less that of a control (``isolated``, ``channel``, ``pooled``), by seed."""
        finals, levels = self.finals(), getattr(self, control)
        return {seed: final - levels[seed] for seed, final in finals.items() if seed in levels}


@dataclass(frozen=True)
class Scenario:
    """Variants that met the same data and models.

    Attributes:
        label: what sets these data apart.
        variants: what was compared on them.
    """

    label: str
    variants: tuple[Variant, ...]

    @property
    def best(self) -> Variant | None:
        """Return the variant with the highest final accuracy; None if no run finished."""
        return next(iter(best_first(self.variants)), None)

    def control(self, name: str) -> Mapping[int, float]:
        """Return a control (``isolated``, ``channel``, ``pooled``) by seed; empty where variants do not share one."""
        found: dict[int, float] = {}
        for variant in self.variants:
            for seed, value in getattr(variant, name).items():
                if found.setdefault(seed, value) != value:
                    return {}
        return found


@dataclass(frozen=True)
class Study:
    """All that a report is about.

    Attributes:
        scenarios: in the order of their first runs.
        runs: all runs, failed ones too.
        common: settings that all runs share and that are not the defaults.
        varied: settings that differ between variants.
        repeated: a sentence for each run that is left out, as another has the same settings and seed.
        uncontrolled: a sentence for each run whose peers trained in other rounds than those of the run that was to
            serve it with its isolated control.
    """

    scenarios: tuple[Scenario, ...]
    runs: tuple[Run, ...]
    common: Mapping[str, Scalar]
    varied: tuple[str, ...]
    repeated: tuple[str, ...] = ()
    uncontrolled: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[Run, ...]:
        """Return the runs without a result."""
        return tuple(run for run in self.runs if not run.summary or not run.curve())

    @property
    def problems(self) -> list[str]:
        """Return everything that could not be read, and what is left out because it is there twice."""
        return [problem for run in self.runs for problem in run.problems] + [*self.repeated, *self.uncontrolled]

    def in_every_scenario(self) -> dict[str, dict[tuple[int, int], float]]:
        """Return the final accuracies, by (scenario, seed), of what was compared in every scenario, by label."""
        found: dict[tuple[Scalar | None, ...], dict[int, Variant]] = {}
        for number, scenario in enumerate(self.scenarios):
            for variant in scenario.variants:
                if variant.runs:
                    found.setdefault(effective(variant.settings, self.varied), {})[number] = variant
        everywhere = [of for of in found.values() if len(of) == len(self.scenarios)]
        telling = [key for key in self.varied if len({of[0].settings[key] for of in everywhere}) > 1]
        return {
            label(of[0].settings, telling) or "this run": {
                (number, seed): value for number, variant in of.items() for seed, value in variant.finals().items()
            }
            for of in everywhere
        }


def study(runs: Sequence[Run]) -> Study:
    """Sort runs into scenarios and variants.

    Raises:
        FedkdError: there is no run.
    """
    if not runs:
        raise FedkdError("Expected at least one run to report about, but got none.")
    keys = list(RunConfig().to_mapping())
    varied = tuple(k for k in keys if k in VARIANT_KEYS and len({run.settings[k] for run in runs}) > 1)
    scenic = tuple(k for k in SCENARIO_KEYS if len({run.settings[k] for run in runs}) > 1)
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        brought = () if run.simulated else ("deployed", run.models)
        groups.setdefault((*(run.settings[k] for k in scenic), brought), []).append(run)
    defaults = RunConfig().to_mapping()
    common = {
        key: runs[0].settings[key]
        for key in keys
        if key not in ("out-dir", "run-name", "controls", "resume", "trials", "keep-models")
        and len({run.settings[key] for run in runs}) == 1
        and runs[0].settings[key] != defaults[key]
    }
    scenarios = tuple(_scenario(members, scenic, varied) for members in groups.values())
    uncontrolled = tuple(_uncontrolled(scenarios))
    return Study(scenarios, tuple(runs), common, varied, tuple(_repeated(runs, scenarios)), uncontrolled)


def differing(variants: Sequence[Variant]) -> list[str]:
    """Return the settings in which variants differ, in the order of the settings."""
    keys = variants[0].settings if variants else ()
    return [key for key in keys if key in VARIANT_KEYS and len({v.settings[key] for v in variants}) > 1]


def shared_seeds(variants: Iterable[Variant]) -> list[int]:
    """Return the seeds under which all variants that have results have one: what may be set side by side."""
    having = [variant.finals().keys() for variant in variants if variant.runs]
    return sorted(set.intersection(*map(set, having))) if having else []


def final_level(variant: Variant, seeds: Sequence[int]) -> float:
    """Return the mean final accuracy over some seeds; over all that a variant has if none is given."""
    finals = variant.finals()
    return fmean([finals[seed] for seed in seeds or finals])


def best_first(variants: Sequence[Variant]) -> list[Variant]:
    """Return the variants that have results, by final accuracy over the seeds that all of them have."""
    seeds = shared_seeds(variants)
    return sorted((v for v in variants if v.runs), key=lambda v: final_level(v, seeds), reverse=True)


def _scenario(runs: Sequence[Run], scenic: Sequence[str], varied: Sequence[str]) -> Scenario:
    groups: dict[tuple[Scalar | None, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(effective(run.settings, varied), []).append(run)
    varied = [key for key in varied if len({run.settings[key] for run in runs}) > 1]
    carried = {name: carriers(runs, name) for name in CONTROLS}
    variants = []
    for members in groups.values():
        good = {run.seed: run for run in reversed(members) if run.summary and run.curve()}
        good = {run.seed: run for run in members if good.get(run.seed) is run}  # the first of each seed
        missing = tuple(run.seed for run in members if run.seed not in good)
        settings = members[0].settings
        alone, shown, together = (_serving(good, name, carried[name]) for name in ("isolated", "channel", "pooled"))
        variants.append(
            Variant(
                label(settings, _telling(settings, varied, runs)) or "this run", settings, good, missing,
                isolated={seed: run.control("isolated") for seed, run in alone.items()},
                channel={seed: run.control("channel") for seed, run in shown.items()},
                pooled={seed: run.control("pooled") for seed, run in together.items()},
                isolated_by_peer=_isolated_by_peer(alone.values()),
                share_of_channel=_share_of_channel(good, alone, shown),
            )
        )  # fmt: skip
    return Scenario(_data_label(runs[0], scenic), tuple(variants))


def _share_of_channel(runs: Mapping[int, Run], alone: Mapping[int, Run], shown: Mapping[int, Run]) -> float:
    means = []
    for seed in runs.keys() & alone.keys() & shown.keys():
        found = [
            {peer["peer"]: peer[what] for peer in run.summary["peers"] if peer.get(what) is not None}
            for run, what in ((runs[seed], "after"), (alone[seed], "isolated"), (shown[seed], "channel"))
        ]
        if both := found[0].keys() & found[1].keys() & found[2].keys():
            means.append([fmean(numbers[peer] for peer in sorted(both)) for numbers in found])
    return share_of_channel(*map(fmean, zip(*means, strict=True))) if means else math.nan


def _data_label(run: Run, scenic: Sequence[str]) -> str:
    """Return what a scenario is called; the peers of a deployment bring data of their own, which no setting tells."""
    if not run.simulated:
        return " · ".join(["deployed", f"peers {run.settings['peers']}", ", ".join(dict.fromkeys(run.models))])
    return label(run.settings, scenic) or "Results"


def _telling(settings: Mapping[str, Scalar], varied: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """Return the keys whose values name a variant: in which those differ for which they do anything.

    Of FedAvg only those in which its own variants differ: what else varies is about logits, which travel there once or
    not at all.
    """
    if settings["strategy"] != "fedavg":
        used = [effective(run.settings, varied) for run in runs]
        values = [{value for value in column if value is not None} for column in zip(*used, strict=True)]
        return [key for key, found in zip(varied, values, strict=True) if len(found) > 1]
    like = [run.settings for run in runs if run.settings["strategy"] == "fedavg"]
    return [key for key in varied if key == "strategy" or len({of[key] for of in like}) > 1]


def _repeated(runs: Sequence[Run], scenarios: Sequence[Scenario]) -> Iterable[str]:
    shown = {id(run) for scenario in scenarios for variant in scenario.variants for run in variant.runs.values()}
    for run in runs:
        if run.summary and run.curve() and id(run) not in shown:
            yield f"{run.path}: left out, another run has the same settings and seed {run.seed}"


class Controlled(Protocol):
    """What may have carried a control."""

    @property
    def settings(self) -> Mapping[str, Scalar]:
        """Return all its settings."""

    def control(self, name: str) -> float:
        """Return the level of a control; NaN without it."""


_Controlled = TypeVar("_Controlled", bound=Controlled)


def carriers(runs: Sequence[_Controlled], name: str) -> dict[tuple[Scalar | None, ...], _Controlled]:
    """Return the first run of each group that ran a control."""
    having = [run for run in runs if math.isfinite(run.control(name))]
    return {control_group(run.settings, name): run for run in reversed(having)}


def _serving(runs: Mapping[int, Run], name: str, carriers: Mapping[tuple[Scalar | None, ...], Run]) -> dict[int, Run]:
    """Return by seed the run whose control serves a variant's run: its own, or that of one whose peers did the same."""
    found = {}
    for seed, run in runs.items():
        averages = run.settings["strategy"] == "fedavg"  # measured against the peers' own models: of another schedule
        if not averages and math.isfinite(run.control(name)):
            found[seed] = run
            continue
        carrier = carrier_of(run.settings, name, carriers)
        if carrier and (averages or name == "pooled" or _alike(run, carrier, name)):
            found[seed] = carrier
    return found


def carrier_of(
    settings: Mapping[str, Scalar], name: str, carriers: Mapping[tuple[Scalar | None, ...], _Controlled]
) -> _Controlled | None:
    """Return whose control serves a trial with some settings; None if nobody's does."""
    return next((carriers[of] for of in control_groups(settings, name) if of in carriers), None)


def _alike(run: Run, other: Run, name: str) -> bool:
    """Tell whether the peers of two runs were trained on private data in the same rounds, as far as they tell.

    For the channel control they have to have had teachers in the same rounds, too.
    """
    trained = not run.schedule or not other.schedule or run.schedule == other.schedule
    return trained and (name != "channel" or run.taught == other.taught)


def _uncontrolled(scenarios: Iterable[Scenario]) -> Iterable[str]:
    for scenario in scenarios:
        runs = [run for variant in scenario.variants for run in variant.runs.values()]
        for name, did in (("isolated", "trained"), ("channel", "had teachers")):
            held = carriers(runs, name)
            for variant in scenario.variants:
                for seed in variant.runs.keys() - getattr(variant, name).keys():
                    run = variant.runs[seed]
                    if carrier := held.get(control_group(run.settings, name)):
                        yield (
                            f"{run.path}: not held against the control {name}, since its own peers {did} in other "
                            f"rounds than those of {carrier.path}, whose control it was to share"
                        )


def _isolated_by_peer(runs: Iterable[Run]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for run in runs:
        for peer in run.summary["peers"]:
            if peer["isolated"] is not None:
                found.setdefault(peer["peer"], []).append(peer["isolated"])
    return {name: fmean(values) for name, values in found.items()}
