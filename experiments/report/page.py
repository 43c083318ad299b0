"""`fedkd report`: one self-contained HTML file about finished runs, and every figure and table as files beside it."""

import base64
import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.analysis.checks import checks, matched_gradients
from experiments.analysis.comparison import Comparison, again, comparison_runs, means
from experiments.analysis.ranks import Ranking, rank
from experiments.analysis.runs import Run, read_run
from experiments.analysis.statistics import MEASURES, every_pair, price
from experiments.analysis.variants import Scenario, Study, final_level, shared_seeds, study
from experiments.outputs import REPORT, is_report, refuse_foreign
from experiments.report import figures, heat_maps, panels
from experiments.report.figure_style import Figure, Table
from experiments.report.sentences import NEAR_THE_BEST, about_noise, how_to_read, in_short, points, share, what_came_out
from experiments.report.tables import ends, numbers, shown
from fedkd.errors import FedkdError, SettingError

_TEMPLATE = Path(__file__).parent / "page.html.jinja"
_MOST_PAIRS = 12
_MOST_CHOSEN = 4


@dataclass(frozen=True)
class _Place:
    """Where a report goes and what its pictures carry inside them."""

    folder: Path
    note: str

    def write(self, figures: Sequence[Figure], prefix: str) -> list[dict[str, Any]]:
        """Write figures as files; return what a page needs of them."""
        return [
            {
                "name": prefix + figure.name,
                "title": figure.title,
                "caption": figure.caption,
                "tall": figure.tall,
                "image": _save(figure, self.folder / "figures" / (prefix + figure.name), self.note),
            }
            for figure in figures
        ]

    def tabulate(self, name: str, rows: Table | Sequence[Mapping[str, Any]]) -> None:
        """Write a table."""
        _write_table(self.folder / "tables" / f"{name}.csv", rows)


def find_runs(paths: Sequence[Path], *, out: Callable[[str], None] = print) -> list[Path]:
    """Return the folders of runs that paths stand for; a comparison's folder stands for its trials.

    Args:
        paths: may hold others, as ``runs/*`` does; those are skipped.
        out: takes a line about each that is skipped.

    Raises:
        FedkdError: a path that does not exist, or none that holds a run.
    """
    found: list[Path] = []
    for path in paths:
        if _is_comparison(path):
            found += comparison_runs(path)
        elif _is_run(path):
            found.append(path)
        elif path.exists():
            out(f"skipped: {path} holds no run")
        else:
            raise FedkdError(f"Expected the folder of a run or of a comparison, but there is no {path}.")
    if not found:
        raise FedkdError("Expected at least one folder of a run or of a comparison, but none of those given holds one.")
    return list({path.resolve(): path for path in found}.values())


def describe(paths: Sequence[Path], *, command: str, target: float | None) -> Comparison:
    """Return what a report about some paths says of itself: a comparison's own words where it is about just that.

    Raises:
        FedkdError: a target nothing can reach.
    """
    if target is not None and not 0 < target <= 1:
        raise SettingError("--target", target, "an accuracy in (0, 1]")
    if len(paths) == 1 and _is_comparison(paths[0]):
        about = Comparison.read(paths[0])
        return about if target is None else replace(about, target=target, command=f"{about.command}\n{command}")
    names = [path.resolve().name for path in paths if _is_run(path) or _is_comparison(path)]
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return Comparison(f"Runs {', '.join(names[:2])}{more}", "", (), target, command, "", {})


def _is_comparison(folder: Path) -> bool:
    return (folder / "comparison.json").exists()


def _is_run(folder: Path) -> bool:
    return (folder / "config.json").exists()


def write_report(runs: Sequence[Path], folder: Path, about: Comparison) -> Path:
    """Write ``report.html``, ``figures/`` and ``tables/`` into a folder; return the HTML file.

    Args:
        runs: folders of runs.
        folder: where it goes.
        about: title, target, commands.

    Raises:
        FedkdError: nothing to report about, a folder that is not a run's, or files of somebody else's where it goes.
    """
    from jinja2 import Environment

    refuse_foreign(folder, REPORT, key="--out", ours=is_report(folder) or _is_comparison(folder))
    found = study([read_run(path) for path in runs])
    if len(found.failed) == len(found.runs):
        why = (found.runs[0].error or "nothing was measured").splitlines()[-1]
        raise FedkdError(f"Expected at least one finished run, but all failed; the first: {why}")
    for name in ("figures", "tables"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    versions, common = _versions(found), _common(found)
    place = _Place(folder, f"{about.command}\n{versions}\n{common}")
    several = len(found.scenarios) > 1
    scenarios = [
        _scenario(scenario, f"{number}-" if several else "", about.target, place)
        for number, scenario in enumerate(found.scenarios, 1)
    ]
    for entry in scenarios:
        entry["short"] = what_came_out(entry, chosen=about.target is None)
    overall = _overall(found, place) if several else []
    controls = checks(found)
    place.tabulate("controls", [vars(check) for check in controls])
    trials = [_trial(run, about, folder) for run in found.runs]
    place.tabulate("trials", trials)
    waiting = [name for name in about.trials if name not in {run.name for run in found.runs}]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=about.title,
        paper=about.paper,
        claims=about.claims,
        short=in_short(found, quick=about.quick, waiting=len(waiting)),
        failed=found.failed,
        waiting=waiting,
        problems=found.problems,
        scenarios=scenarios,
        overall=overall,
        checks=controls,
        trials=trials,
        same_numbers=all(run.settings["mode"] == "sync" for run in found.runs),
        command=about.command,
        versions=versions,
        machine=_machine(found),
        recipe=about.recipe,
        common=common,
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _scenario(scenario: Scenario, prefix: str, wanted: float | None, place: _Place) -> dict[str, Any]:
    """Draw and tabulate one scenario."""
    target = _target(scenario) if wanted is None else wanted
    prices = {v.label: {seed: price(run, target) for seed, run in v.runs.items()} for v in scenario.variants}
    rows = [numbers(variant, list(prices[variant.label].values())) for variant in scenario.variants]
    place.tabulate(f"{prefix}variants", rows)
    place.tabulate(f"{prefix}runs", ends(scenario))
    having = [v for v in scenario.variants if v.runs]
    pairs = {what: every_pair({v.label: v.finals(what) for v in having}) for what in MEASURES}
    place.tabulate(
        f"{prefix}pairs",
        [{"measure": what, **vars(p), "verdict": p.verdict} for what, tested in pairs.items() for p in tested],
    )
    telling = sorted((p for p in pairs["accuracy"] if p.larger_than_noise), key=lambda p: -abs(p.difference))
    compared = len(pairs["accuracy"])
    counts = {what: sum(p.larger_than_noise for p in tested) for what, tested in pairs.items()}
    return {
        "label": scenario.label,
        "source": scenario,
        "target": target,
        "prices": prices,
        "tables": shown(rows, target),
        "note": how_to_read(scenario),
        "figures": place.write(_figures(scenario, prices, target, pairs["accuracy"]), prefix),
        "pairs": [
            {
                "first": p.first,
                "second": p.second,
                "difference": f"{100 * p.difference:+.1f}",
                "interval": f"{points(p.low)} to {points(p.high)}" if math.isfinite(p.low) else "–",
                "p": f"{p.adjusted:.2g}",
                "seeds": p.seeds,
            }
            for p in telling[:_MOST_PAIRS]
        ],
        "pairs_file": f"{prefix}pairs",
        "telling": len(telling),
        "compared": compared,
        "noise": about_noise(scenario, counts, compared),
        "matched": [
            {**row, "plain": share(row["plain"]), "matched": share(row["matched"]),
             "difference": f"{100 * row['difference']:+.1f}"}
            for row in matched_gradients(scenario)
        ],
    }  # fmt: skip


def _figures(scenario: Scenario, prices: Mapping[str, Any], target: float, pairs: Any) -> list[Figure]:
    if scenario.best is None:
        return []
    having = [variant for variant in scenario.variants if variant.runs]
    ranking = rank({variant.label: variant.finals() for variant in having})
    drawn: list[Figure | None] = [
        figures.accuracy_by(scenario, "round"),
        figures.accuracy_by(scenario, "bytes"),
        figures.finals(scenario),
        *(figures.to_target(prices, target, what) for what in ("rounds", "bytes", "seconds")),
        heat_maps.differences(scenario, pairs) if len(having) > 1 else None,
        figures.ranks(ranking, blocks="one per seed") if ranking else None,
        *heat_maps.parameter_maps(scenario),
        panels.dumbbells(having),
        panels.agreements(having),
        panels.reliabilities(having),
    ]
    tuned = [variant for variant in having if variant.settings["regime"] == "tuned"]
    drawn += [heat_maps.chosen_map(variant, number) for number, variant in enumerate(tuned[:_MOST_CHOSEN], 1)]
    return [figure for figure in drawn if figure]


def _overall(found: Study, place: _Place) -> list[dict[str, Any]]:
    """Rank what was compared in every scenario, over all of them."""
    ranking: Ranking | None = rank(found.in_every_scenario())
    if ranking is None:
        return []
    return place.write([figures.ranks(ranking, blocks="one per scenario and seed")], "overall-")


def _target(scenario: Scenario) -> float:
    """Return what is asked for where nobody asked: 98 % of the best final accuracy."""
    best = scenario.best
    if best is None:
        return 1.0
    return math.floor(1000 * NEAR_THE_BEST * final_level(best, shared_seeds(scenario.variants))) / 1000


def _trial(run: Run, about: Comparison, folder: Path) -> dict[str, str]:
    curve = run.curve()
    result = f"{share(curve[0].accuracy)} → {share(curve[-1].accuracy)}" if curve else "no measurement"
    place = run.path.relative_to(folder) if run.path.is_relative_to(folder) else run.path
    command = about.trials.get(run.name, "")
    if not command or not means(command, run.settings):  # it was written when other values were the defaults
        command = again(run)
    return {
        "name": run.name,
        "result": result if not run.error else f"{result}; {run.error.splitlines()[-1]}",
        "folder": str(place),
        "command": command,
    }


def _save(figure: Figure, path: Path, note: str) -> str:
    """Write a figure as SVG, PNG and CSV; return the SVG in base64."""
    import matplotlib

    figure.canvas.draw_without_rendering()
    figure.canvas.set_layout_engine("none")  # the layout is found: not once more for every format
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


def _versions(found: Study) -> str:
    known = [run.environment for run in found.runs if run.environment.get("versions")]
    several = len({str(e["versions"]) + str(e.get("commit")) for e in known}) > 1
    versions = " · ".join(f"{name} {value}" for name, value in known[0]["versions"].items()) if known else "unknown"
    commit = known[0].get("commit") if known else ""
    text = versions + (f" · commit {commit[:12]}{'+' * commit.endswith('+')}" if commit else "")
    return text + (" · NOT ALL RUNS: versions differ, see their config.json" if several else "")


def _machine(found: Study) -> str:
    environment = found.runs[0].environment
    return f"{environment.get('platform', 'unknown machine')}, {environment.get('cpus', '?')} CPUs"


def _common(found: Study) -> str:
    return "\n".join(f"{key} = {value}" for key, value in found.common.items()) or "all defaults"
