"""`fedkd report`: one self-contained HTML file about finished runs, and every figure and table as files beside it."""

import base64
import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments import maps, plots
from experiments.canvas import Figure, Table
from experiments.checks import checks, matched_gradients
from experiments.comparison import Comparison, alone, comparison_runs
from experiments.statistics import Price, all_pairs, mean, median, price
from experiments.study import Run, Scenario, Study, Variant, read_run, study
from experiments.words import NEAR_THE_BEST, about_noise, how_to_read, in_short, points, share
from fedkd.errors import FedkdError, SettingError
from strategies.console import size

_TEMPLATE = Path(__file__).parent / "report.html.jinja"
_HEADS = ("final accuracy", "95 % interval", "gain", "worst peer", "spread", "own classes", "ECE", "rounds to target",
          "bytes to target", "seconds to target", "reached")  # fmt: skip
_MOST_PAIRS = 12
_BRIEFLY = ("fedkd", "python", "flwr", "ray", "torch")


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return the folders of runs that paths stand for; a comparison's folder stands for its trials.

    Raises:
        FedkdError: a path is neither.
    """
    found: list[Path] = []
    for path in paths:
        found += comparison_runs(path) if (path / "comparison.json").exists() else [path]
    return found


def describe(paths: Sequence[Path], *, command: str, target: float | None) -> Comparison:
    """Return what a report about some paths says of itself: a comparison's own words where it is about just that.

    Raises:
        FedkdError: a target nothing can reach.
    """
    if target is not None and not 0 < target <= 1:
        raise SettingError("--target", target, "an accuracy in (0, 1]")
    if len(paths) == 1 and (paths[0] / "comparison.json").exists():
        about = Comparison.read(paths[0])
        return about if target is None else replace(about, target=target)
    names = ", ".join(path.resolve().name for path in paths[:4]) + (", ..." if len(paths) > 4 else "")
    return Comparison(f"Runs {names}", "", (), target, command, "", {})


def write_report(runs: Sequence[Path], folder: Path, about: Comparison) -> Path:
    """Write ``report.html``, ``figures/`` and ``tables/`` into a folder; return the HTML file.

    Args:
        runs: folders of runs.
        folder: where it goes.
        about: title, target, commands.

    Raises:
        FedkdError: nothing to report about, or a folder that is not a run's.
    """
    from jinja2 import Environment

    found = study([read_run(path) for path in runs])
    if len(found.failed) == len(found.runs):
        raise FedkdError(f"Expected at least one finished run, but all failed; the first: {found.runs[0].error}")
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    (folder / "tables").mkdir(exist_ok=True)
    versions = _versions(found)
    note = f"{about.command}\n{versions}\n{_common(found)}"
    scenarios = [
        _scenario(scenario, f"{number}-" if len(found.scenarios) > 1 else "", about.target, folder, note)
        for number, scenario in enumerate(found.scenarios, 1)
    ]
    controls = checks(found)
    _write_table(folder / "tables" / "controls.csv", [vars(check) for check in controls])
    trials = [_trial(run, about, folder) for run in found.runs]
    _write_table(folder / "tables" / "trials.csv", trials)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=about.title,
        paper=about.paper,
        claims=about.claims,
        short=in_short(found, scenarios, chosen=about.target is None),
        failed=found.failed,
        problems=found.problems,
        scenarios=scenarios,
        checks=controls,
        trials=trials,
        command=about.command,
        versions=versions,
        brief_versions=_versions(found, _BRIEFLY),
        machine=_machine(found),
        recipe=about.recipe,
        common=_common(found),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _scenario(scenario: Scenario, prefix: str, wanted: float | None, folder: Path, note: str) -> dict[str, Any]:
    """Draw and tabulate one scenario."""
    target = _target(scenario) if wanted is None else wanted
    prices = {v.label: [price(run, target) for run in v.runs.values()] for v in scenario.variants}
    numbers = [_numbers(variant, prices[variant.label]) for variant in scenario.variants]
    _write_table(folder / "tables" / f"{prefix}variants.csv", numbers)
    pairs = all_pairs([v for v in scenario.variants if v.runs])
    telling = sorted((p for p in pairs if p.verdict == "larger than seed noise"), key=lambda p: -abs(p.difference))
    figures = [
        {
            "name": prefix + figure.name,
            "title": figure.title,
            "caption": figure.caption,
            "image": _save(figure, folder / "figures" / (prefix + figure.name), note),
        }
        for figure in _figures(scenario, prices, target, pairs)
    ]
    return {
        "label": scenario.label,
        "source": scenario,
        "target": target,
        "prices": prices,
        "heads": _HEADS,
        "table": [_cells(row) for row in numbers],
        "note": how_to_read(scenario, target),
        "figures": figures,
        "pairs": [
            {
                "first": p.first,
                "second": p.second,
                "difference": f"{100 * p.difference:+.1f}",
                "interval": f"{100 * p.low:+.1f} to {100 * p.high:+.1f}",
                "p": f"{p.adjusted:.2g}",
                "seeds": p.seeds,
            }
            for p in telling[:_MOST_PAIRS]
        ],
        "telling": len(telling),
        "compared": len(pairs),
        "noise": about_noise(scenario, len(pairs), len(telling)),
        "matched": [
            {**row, "plain": share(row["plain"]), "matched": share(row["matched"]),
             "difference": f"{100 * row['difference']:+.1f}"}
            for row in matched_gradients(scenario)
        ],
    }  # fmt: skip


def _figures(scenario: Scenario, prices: Mapping[str, Sequence[Price]], target: float, pairs: Any) -> list[Figure]:
    best = scenario.best
    if best is None:
        return []
    several = sum(bool(v.runs) for v in scenario.variants) > 1
    drawn: list[Figure | None] = [
        plots.accuracy_by(scenario, "round"),
        plots.accuracy_by(scenario, "bytes"),
        plots.finals(scenario),
        plots.to_target(prices, target),
        maps.differences(scenario, pairs) if several else None,
        plots.dumbbell(best, scenario.isolated_by_peer),
        maps.agreement_map(best),
        plots.reliability_diagram(best),
    ]
    drawn += maps.parameter_maps(scenario)
    tuned = [maps.chosen_map(v) for v in scenario.variants if v.settings["regime"] == "tuned"]
    return [figure for figure in [*drawn, *tuned[:1]] if figure]


def _numbers(variant: Variant, prices: Sequence[Price]) -> dict[str, Any]:
    accuracy = mean(list(variant.finals().values()))
    ends = {
        what: fmean(variant.finals(what).values()) if variant.runs else math.nan
        for what in ("worst", "spread", "own_accuracy", "ece")
    }
    starts = [run.curve()[0] for run in variant.runs.values()]
    return {
        "variant": variant.label,
        "accuracy": accuracy.value,
        "low": accuracy.low,
        "high": accuracy.high,
        "gain": accuracy.value - fmean(p.accuracy for p in starts) if starts else math.nan,
        "ece_before": fmean(p.ece for p in starts) if starts else math.nan,
        **ends,
        **{f"{what}_to_target": median([getattr(p, what) for p in prices]) for what in ("rounds", "bytes", "seconds")},
        "reached": sum(math.isfinite(p.rounds) for p in prices),
        "seeds": len(variant.runs),
        "failed": len(variant.missing),
    }


def _cells(row: Mapping[str, Any]) -> list[str]:
    of = f"{row['reached']} of {row['seeds']}" + (f" ({row['failed']} failed)" if row["failed"] else "")
    interval = f"{share(row['low'])} – {share(row['high'])}" if math.isfinite(row["low"]) else "one seed"
    rounds, spent, seconds = (row[f"{what}_to_target"] for what in ("rounds", "bytes", "seconds"))

    def reached(value: float, text: str) -> str:
        return "not reached" if math.isinf(value) else "–" if math.isnan(value) else text

    return [
        row["variant"],
        share(row["accuracy"]),
        interval,
        points(row["gain"]),
        share(row["worst"]),
        f"{100 * row['spread']:.1f}",
        share(row["own_accuracy"]),
        f"{row['ece_before']:.3f} → {row['ece']:.3f}",
        reached(rounds, f"{rounds:g}"),
        reached(spent, size(int(spent)).strip() if math.isfinite(spent) else ""),
        reached(seconds, f"{seconds:.1f}"),
        of,
    ]


def _target(scenario: Scenario) -> float:
    """Return what is asked for where nobody asked: 98 % of the best final accuracy."""
    best = scenario.best
    return math.floor(1000 * NEAR_THE_BEST * fmean(best.finals().values())) / 1000 if best else 1.0


def _trial(run: Run, about: Comparison, folder: Path) -> dict[str, str]:
    curve = run.curve()
    result = f"{share(curve[0].accuracy)} → {share(curve[-1].accuracy)}" if curve else "no measurement"
    place = run.path.relative_to(folder) if run.path.is_relative_to(folder) else run.path
    command = about.trials.get(run.name) or alone(run.settings)
    return {
        "name": run.name,
        "result": result if not run.error else f"{result}; {run.error.splitlines()[-1]}",
        "folder": str(place),
        "command": command,
    }


def _save(figure: Figure, path: Path, note: str) -> str:
    """Write a figure as SVG, PNG and CSV; return the SVG in base64."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": figure.name}):
        figure.canvas.savefig(buffer, format="svg", metadata={"Date": None, "Description": note})
    path.with_name(path.name + ".svg").write_bytes(buffer.getvalue())
    figure.canvas.savefig(path.with_name(path.name + ".png"), dpi=150, metadata={"Description": note})
    _write_table(path.with_name(path.name + ".csv"), figure.table)
    return base64.b64encode(buffer.getvalue()).decode()


def _write_table(path: Path, rows: Table | Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        if rows:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def _versions(found: Study, names: Sequence[str] = ()) -> str:
    known = [run.environment for run in found.runs if run.environment.get("versions")]
    several = len({str(e["versions"]) + str(e.get("commit")) for e in known}) > 1
    shown = {n: v for n, v in known[0]["versions"].items() if not names or n in names} if known else {}
    versions = " · ".join(f"{name} {value}" for name, value in shown.items()) if known else "unknown"
    commit = known[0].get("commit") if known else ""
    text = versions + (f" · commit {commit[:12]}{'+' * commit.endswith('+')}" if commit else "")
    return text + (" · NOT ALL RUNS: versions differ, see their config.json" if several else "")


def _machine(found: Study) -> str:
    environment = found.runs[0].environment
    return f"{environment.get('platform', 'unknown machine')}, {environment.get('cpus', '?')} CPUs"


def _common(found: Study) -> str:
    return "\n".join(f"{key} = {value}" for key, value in found.common.items()) or "all defaults"
