"""The leaderboard: one page of what each preset came to under each scenario, made from a comparison's folder.

Every row is a preset, ours like the others, and every trial that was planned has its place: what has no result says so.
Where trials of one preset differ in more than data and seed (the schedule, say), each of these is a row.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.analysis import statistics
from experiments.analysis.comparison import Comparison
from experiments.analysis.runs import Run, read_run
from experiments.analysis.settings import SCENARIO_KEYS, VARIANT_KEYS, effective, label
from experiments.studies.gather import gather, portable
from experiments.studies.tables import counted, markdown, megabytes, spelled
from fedkd.errors import FedkdError
from fedkd.settings.config import RunConfig
from fedkd.settings.declare import Scalar
from strategies.relay.trials import read_trials

TITLE = "# Leaderboard\n"
"""The first line of the page, by which it is known."""
SHARE = 0.9
"""Of the accuracy that the true labels of the proxy set lead to: the target that rounds are counted to."""
_EXPLAINED = (
    "What a preset is, its source and what it differs in from its paper: [Strategies](strategies.md). Accuracy is the "
    "mean over the peers at the end, spread their standard deviation; these and the worst peer's are mean ± standard "
    "deviation over seeds. Bytes are those of all peers, up and down. Private images are those that a peer was "
    "trained on in a round, each as often as it was drawn. Seconds are wall time on the machine at hand. Rounds are "
    f"the median over seeds until {SHARE:.0%} of what the true labels of the proxy set lead to in the teachers' place "
    "(the channel control; of several, the highest of that seed)."
)
_TRAINED = (
    "peers", "pretrain-epochs", "rounds", "optimizer", "learning-rate", "weight-decay", "batch-size", "distill-epochs",
    "local-epochs",
)  # fmt: skip
"""Settings that rows should have alike to be compared."""
_TOLD = ("dataset", "partition", "partition-alpha")
"""Settings that a scenario is called after, where they tell all scenarios apart."""

Settings = Mapping[str, Scalar]


@dataclass
class Row:
    """One preset under one scenario.

    Attributes:
        preset: its name.
        settings: of its trials, but for their seeds.
        commands: by seed, what runs each trial alone.
        runs: those that have a result, by seed.
    """

    preset: str
    settings: Settings
    commands: dict[int, str] = field(default_factory=dict)
    runs: dict[int, Run] = field(default_factory=dict)

    def ends(self, what: str = "accuracy") -> dict[int, float]:
        """Return a number of the last point of every run's curve, by seed."""
        return {seed: float(getattr(run.curve()[-1], what)) for seed, run in self.runs.items()}

    @property
    def seconds(self) -> dict[int, float]:
        """Wall seconds of a round after round 0, the mean of each run, by seed."""
        return {seed: run.curve()[-1].seconds / max(1, run.curve()[-1].round) for seed, run in self.runs.items()}

    @property
    def samples(self) -> float:
        """Private samples of a peer in a round, on average over peers, rounds and seeds; NaN if no run told."""
        found = []
        for run in self.runs.values():
            seen, last = run.schedule, run.curve()[-1].round
            found += [
                (seen[peer, last] - seen[peer, 0]) / last
                for peer in run.peers
                if last and (peer, last) in seen and (peer, 0) in seen
            ]
        return fmean(found) if found else math.nan


def page(folder: Path, *, as_they_are: bool = False) -> str:
    """Return the page as Markdown.

    Args:
        folder: of a comparison whose trials have presets.
        as_they_are: take trials of several commits, or of changed files, and say so.

    Raises:
        FedkdError: it is no such folder, nothing in it finished, or no one clean commit made all of it.
    """
    about = Comparison.read(folder)
    if not about.presets:
        raise FedkdError(f"Expected a comparison of presets, but no trial in {folder} has one.")
    _, record = gather(folder, as_they_are=as_they_are)
    scenarios = _scenarios(folder, about)
    titles = _titles([rows[0].settings for rows in scenarios])
    parts = [TITLE, _head(about, record, scenarios)]
    parts += [f"## {title}\n\n{_table(rows)}" for title, rows in zip(titles, scenarios, strict=True)]
    return "\n".join(parts)


def _scenarios(folder: Path, about: Comparison) -> list[list[Row]]:
    """Return the rows of each scenario, in the order of their first trials."""
    found: dict[tuple[Any, ...], dict[tuple[Any, ...], Row]] = {}
    for trial in read_trials(folder / "trials.jsonl", RunConfig()):
        if not (called := about.presets.get(trial.name)):
            continue
        path = folder / "trials" / trial.name
        run = read_run(path) if (path / "config.json").exists() else None
        # As it was run: what the file of trials leaves out are defaults, which may have changed since.
        settings = dict(run.settings if run else trial.config.effective().to_mapping())
        scenario = (settings["peers"], *effective(settings, SCENARIO_KEYS))
        rows = found.setdefault(scenario, {})
        row = rows.setdefault((called, *effective(settings, VARIANT_KEYS)), Row(called, settings))
        row.commands[trial.config.seed] = portable(about.trials[trial.name])
        if run and run.summary and run.curve():
            row.runs[trial.config.seed] = run
    return [list(rows.values()) for rows in found.values()]


def _titles(scenarios: Sequence[Settings]) -> list[str]:
    """Return what tells scenarios apart, in the fewest words that do."""
    defaults = RunConfig().to_mapping()
    varied = [key for key in defaults if key in SCENARIO_KEYS and len({one[key] for one in scenarios}) > 1]
    for keys in (_TOLD, [*_TOLD, *(key for key in varied if key not in _TOLD)]):
        titles = [label({**one, "dataset": Path(str(one["dataset"])).stem}, keys) for one in scenarios]
        if len(set(titles)) == len(titles):
            break
    return titles


def _head(about: Comparison, record: Mapping[str, Any], scenarios: Sequence[Sequence[Row]]) -> str:
    rows = [row for scenario in scenarios for row in scenario]
    seeds = sorted({seed for row in rows for seed in row.commands})
    versions = record["versions"] if isinstance(record["versions"], Mapping) else {}
    words = ", ".join(f"{name} {version}" for name, version in versions.items()) or "of several sets of versions"
    made, planned = sum(len(row.runs) for row in rows), sum(len(row.commands) for row in rows)
    dates, commits = " to ".join(dict.fromkeys(record["dates"])), ", ".join(record["commits"])
    lines = [
        _EXPLAINED,
        _alike([row.settings for row in rows]),
        f"{made} of {planned} trials have a result; seeds {', '.join(map(str, seeds))}; measured "
        f"{dates or 'on an unknown date'} at commit {commits} ({words}; {', '.join(record['platform'])}) by",
        f"```sh\n{record['command']}\n```",
    ]
    if about.quick:
        lines.insert(0, "**This is the recipe's quick size: it shows the form of the page and decides nothing.**")
    return "\n\n".join(lines) + "\n"


def _alike(settings: Sequence[Settings]) -> str:
    """Say which of the settings that should be alike are, and which are not."""
    values = {key: {one[key] for one in settings} for key in _TRAINED}
    same = ", ".join(f"`{key}={next(iter(found))}`" for key, found in values.items() if len(found) == 1)
    others = ", ".join(f"`{key}`" for key, found in values.items() if len(found) > 1)
    return f"Alike in all rows: {same}." + f" Not alike: {others}." * bool(others)


def _table(rows: Sequence[Row]) -> str:
    """Return a scenario's table, the best first, what the controls came to, and a command for each row."""
    ordered = sorted(rows, key=lambda row: fmean(row.ends().values()) if row.runs else -math.inf, reverse=True)
    names, targets = _names(ordered), _targets(ordered)
    known = [target for target in targets.values() if math.isfinite(target)]
    reach = f"rounds to {100 * fmean(known):.1f} %" if known else f"rounds to {SHARE:.0%} of true labels"
    head = [
        "method",
        "accuracy",
        "worst peer",
        "spread",
        "bytes",
        "private images a round",
        "wall seconds of a round",
        reach,
    ]
    cells = [_cells(row, targets) if row.runs else ["no result"] * (len(head) - 1) for row in ordered]
    commands = [
        f"# {name.replace('`', '')}\n{row.commands[min(row.commands)]}"
        for name, row in zip(names, ordered, strict=True)
    ]
    shown = "\n".join(["One trial of each row:\n", "```sh", *commands, "```"])
    return f"{markdown(head, [names, *zip(*cells, strict=True)])}\n{_levels(ordered)}\n{shown}\n"


def _cells(row: Row, targets: Mapping[int, float]) -> list[str]:
    """Return what stands in a row beside its name."""
    shares = [spelled(row.ends(what)) for what in ("accuracy", "worst", "spread")]
    bytes_, seconds = fmean(row.ends("bytes").values()), fmean(row.seconds.values())
    numbers = (f"{row.samples:.0f}", f"{seconds:.1f}")
    return [*shares, megabytes(bytes_), *(word if word != "nan" else "—" for word in numbers), _rounds(row, targets)]


def _names(rows: Sequence[Row]) -> list[str]:
    """Return each row's preset, with the settings that tell it from others of the same preset, and seeds that miss."""
    found = []
    for row in rows:
        namesakes = [other.settings for other in rows if other.preset == row.preset]
        own = effective(row.settings, VARIANT_KEYS)
        others = list(zip(*(effective(settings, VARIANT_KEYS) for settings in namesakes), strict=True))
        pairs = [
            f"`{key}={value}`"
            for key, value, all_of in zip(VARIANT_KEYS, own, others, strict=True)
            if None not in all_of and len(set(all_of)) > 1
        ]
        missing = len(row.commands) - len(row.runs)
        seeds = f" ({len(row.runs)} of {len(row.commands)} seeds)" if missing else ""
        found.append(" ".join([f"`{row.preset}`", *pairs]) + seeds)
    return found


def _targets(rows: Sequence[Row]) -> dict[int, float]:
    """Return the target of each seed, a share of the highest channel control; NaN where there is none."""
    seeds = {seed for row in rows for seed in row.runs}
    levels = {seed: [row.runs[seed].control("channel") for row in rows if seed in row.runs] for seed in seeds}
    known = {seed: [level for level in found if math.isfinite(level)] for seed, found in levels.items()}
    return {seed: SHARE * max(found) if found else math.nan for seed, found in known.items()}


def _rounds(row: Row, targets: Mapping[int, float]) -> str:
    needed = [
        statistics.price(run, targets[seed]).rounds if math.isfinite(targets[seed]) else math.nan
        for seed, run in row.runs.items()
    ]
    median = statistics.median(needed)
    return "—" if math.isnan(median) else counted(median)


def _levels(rows: Sequence[Row]) -> str:
    """Say where the peers began and what the controls of these trials came to: from the lowest row to the highest."""
    words = [_span("before the exchange", [[run.curve()[0].accuracy for run in row.runs.values()] for row in rows])]
    for name, control in (("isolated", "isolated"), ("true labels in the teachers' place", "channel")):
        words.append(_span(name, [[run.control(control) for run in row.runs.values()] for row in rows]))
    told = "; ".join(filter(None, words))
    return f"{told[:1].upper()}{told[1:]}.\n" if told else ""


def _span(name: str, by_row: Sequence[Sequence[float]]) -> str:
    known = [[value for value in values if math.isfinite(value)] for values in by_row]
    means = [100 * fmean(values) for values in known if values]
    return f"{name} {' to '.join(dict.fromkeys(f'{end:.1f}' for end in (min(means), max(means))))} %" if means else ""
