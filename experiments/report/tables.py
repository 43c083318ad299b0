"""The numbers of a report: what every variant reached, what that cost, and how sure of themselves its models are."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from experiments.analysis.runs import Run
from experiments.analysis.settings import from_scratch
from experiments.analysis.statistics import Price, mean, median
from experiments.analysis.variants import Scenario, Variant
from experiments.report.sentences import points, share
from fedkd.settings.declare import CONTROLS
from strategies.relay.console import size

Numbers = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """What stands in a table, and whether no variant has a better value in that column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Shown:
    """A table as a page shows it."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class _Column:
    """A column: its head, the text of a row's cell, and the number that is better when larger (1) or smaller (−1)."""

    head: str
    text: Callable[[Numbers], str]
    key: str = ""
    better: int = 0


def numbers(variant: Variant, prices: Sequence[Price]) -> dict[str, Any]:
    """Return a variant's row: means over seeds, medians where something may never have been reached."""
    accuracy = mean(list(variant.finals().values()))
    starts = [run.curve()[0] for run in variant.runs.values()]
    one_model = variant.settings["strategy"] == "fedavg"

    def start(what: str) -> float:
        return fmean(getattr(point, what) for point in starts) if starts else math.nan

    def end(what: str) -> float:
        return fmean(variant.finals(what).values()) if variant.runs else math.nan

    return {
        "variant": variant.label,
        "accuracy": accuracy.value,
        "low": accuracy.low,
        "high": accuracy.high,
        "gain": math.nan if from_scratch(variant.settings) else accuracy.value - start("accuracy"),
        **{f"over_{name}": mean(list(variant.over(name).values())).value for name in CONTROLS},
        "share_of_channel": variant.share_of_channel,
        "worst": end("worst"),
        "spread": math.nan if one_model else end("spread"),
        "spread_before": start("spread"),
        "own_accuracy": end("own_accuracy"),
        **{f"{what}_before": start(what) for what in ("ece", "nll", "brier")},
        **{what: end(what) for what in ("ece", "nll", "brier")},
        **{f"{what}_to_target": median([getattr(p, what) for p in prices]) for what in ("rounds", "bytes", "seconds")},
        "reached": sum(math.isfinite(p.rounds) for p in prices),
        "seeds": len(variant.runs),
        "failed": len(variant.missing),
        "one_model": one_model,
    }


def ends(scenario: Scenario) -> list[dict[str, Any]]:
    """Return the end of every run of a scenario, with its folder's name: what all means are made of."""
    return [_end(variant, run) for variant in scenario.variants for run in variant.runs.values()]


def shown(rows: Sequence[Numbers], target: float) -> list[Shown]:
    """Return the tables of a page.

    Args:
        rows: a variant each.
        target: accuracy whose price they tell.
    """
    name = _Column("variant", lambda row: row["variant"])
    over = [_Column("over isolated", lambda row: points(row["over_isolated"]), "over_isolated", 1)]
    of_channel = [_Column("share of channel", lambda row: _percent(row["share_of_channel"]), "share_of_channel", 1)]
    tables = {
        "Accuracy": [
            _Column("final accuracy", lambda row: share(row["accuracy"]), "accuracy", 1),
            _Column("95 % interval", _interval),
            _Column("gain", lambda row: points(row["gain"]), "gain", 1),
            *(over if any(math.isfinite(row["over_isolated"]) for row in rows) else ()),
            *(of_channel if any(math.isfinite(row["share_of_channel"]) for row in rows) else ()),
            _Column("worst peer", lambda row: share(row["worst"]), "worst", 1),
            _Column("spread across peers", _spread, "spread", -1),
            _Column("own classes", lambda row: share(row["own_accuracy"]), "own_accuracy", 1),
            _Column("seeds", _seeds),
        ],
        f"To the target of {share(target)}": [
            _Column("rounds", lambda row: _price(row, "rounds", "{:g}".format), "rounds_to_target", -1),
            _Column("bytes", lambda row: _price(row, "bytes", _bytes), "bytes_to_target", -1),
            _Column("seconds", lambda row: _price(row, "seconds", "{:.1f}".format), "seconds_to_target", -1),
            _Column("reached by", lambda row: f"{row['reached']} of {row['seeds']}"),
        ],
        "Calibration, before → after": [
            _Column("ECE", lambda row: _change(row, "ece", 1, 3), "ece", -1),
            _Column("NLL", lambda row: _change(row, "nll", 1, 2), "nll", -1),
            _Column("Brier", lambda row: _change(row, "brier", 1, 3), "brier", -1),
        ],
    }
    return [
        Shown(title, [column.head for column in [name, *columns]], _cells(rows, [name, *columns]))
        for title, columns in tables.items()
    ]


def _cells(rows: Sequence[Numbers], columns: Sequence[_Column]) -> list[list[Cell]]:
    def best(column: _Column) -> float:
        """Return the best value of a column; NaN where half of the rows share it or none has one."""
        values = [column.better * row[column.key] for row in rows if column.better]
        top = max((v for v in values if math.isfinite(v)), default=math.nan)
        return top if 2 * values.count(top) < len(rows) else math.nan

    tops = [best(column) for column in columns]
    return [
        [
            Cell(column.text(row), bool(column.better) and column.better * row[column.key] == top)
            for column, top in zip(columns, tops, strict=True)
        ]
        for row in rows
    ]


def _end(variant: Variant, run: Run) -> dict[str, Any]:
    return {"variant": variant.label, "seed": run.seed, **vars(run.curve()[-1]), "run": run.name}


def _percent(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else "–"


def _interval(row: Numbers) -> str:
    return f"{share(row['low'])} – {share(row['high'])}" if math.isfinite(row["low"]) else "one seed"


def _seeds(row: Numbers) -> str:
    return f"{row['seeds']}" + (f", {row['failed']} failed" if row["failed"] else "")


def _change(row: Numbers, what: str, scale: float, digits: int) -> str:
    before, after = (scale * row[key] for key in (f"{what}_before", what))
    return f"{before:.{digits}f} → {after:.{digits}f}" if math.isfinite(after) else "–"


def _spread(row: Numbers) -> str:
    return "one model" if row["one_model"] else _change(row, "spread", 100, 1)


def _price(row: Numbers, what: str, text: Callable[[float], str]) -> str:
    value = row[f"{what}_to_target"]
    return "not reached" if math.isinf(value) else "–" if math.isnan(value) else text(value)


def _bytes(value: float) -> str:
    return size(int(value)).strip()
