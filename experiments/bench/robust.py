"""What poisoned knowledge costs honest peers, by how they weigh their teachers, with and without a defence.

Ten peers on the digits, the last two or four of which attack; all trials share one run, data and partition. The figure
is the mean test accuracy of the honest peers after the last round. Ways to weigh teachers that need more than logits
are left out: a liar would lie there too.
"""

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.analysis.runs import read_run
from experiments.bench.measuring import leave, trials_folder
from experiments.launch.project import OWN_FOLDER
from experiments.launch.runner import Federation, launch
from fedkd.errors import FedkdError, SettingError
from fedkd.settings.config import RunConfig
from fedkd.settings.rules import WEIGHINGS

PEERS = 10
ATTACKS = ("flip", "collude", "constant", "noise", "boast", "boast-all")
SHARES = (0.2, 0.4)
DEFENCES = ("none", "median", "trimmed", "agreement", "eigentrust")
WAYS = tuple(name for name in WEIGHINGS if name not in ("counts", "density"))
PLAIN = "uniform"
TEACHER_TEMPERATURE = 0.5
"""Of the ways that are no plain mean."""
BASE = {
    "partition-alpha": 1.0,
    "models": "mlp,cnn-small",
    "controls": "",
    "trim": 0.3,
    "rounds": 6,
    "distill-epochs": 4,
}

Trial = dict[str, Any]


def run(*, quick: bool = False, folder: Path | None = None, ways: Sequence[str] = WAYS) -> dict[str, Any]:
    """Run all trials that have not finished yet; return ``{"ratio", "trials_of_commits", "rows"}``.

    A row has ``attack``, ``attackers``, ``weighing``, ``robust`` and ``accuracy``. Shares are of 1. ``ratio`` is the
    accuracy of plain means under the worst attack with the best defence against it, over that when nobody attacks.
    ``median`` and ``trimmed`` are tried on plain means alone, of the others every way to weigh by itself and with
    ``agreement`` and ``eigentrust``, which judge whole teachers.

    Args:
        quick: one attack, two defences and two ways.
        ways: to weigh teachers, of :data:`WAYS`; all of them take two hours on two cores, a fifth of the trials are of
            plain means and the default.
        folder: where the trials lie, which take half an hour or more; None: in one that is removed at the end.

    Raises:
        SettingError: a way that is not among them.
        FedkdError: the run failed, or the folder holds trials under other settings.
    """
    if wrong := [way for way in ways if way not in WAYS]:
        raise SettingError("--ways", wrong[0], f"some of {', '.join(WAYS)}")
    if quick:
        plans = _plans(ATTACKS[:1], (PLAIN, "discrimination"), ("none", "agreement"))
    else:
        plans = _plans(ATTACKS, [way for way in WAYS if way in {PLAIN, *ways}], DEFENCES)
    everything = map(_name, _plans(ATTACKS, WAYS, DEFENCES))  # a folder may hold the trials of other ways already
    with trials_folder(folder, "robust", "trials.jsonl", *everything) as within:
        places = [within / _name(plan) for plan in plans]
        todo = [
            (plan, place) for plan, place in zip(plans, places, strict=True) if not _finished(place, {**BASE, **plan})
        ]
        lines = [{"name": place.name, "settings": {**BASE, **plan, "out-dir": str(place)}} for plan, place in todo]
        (within / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if todo:
            trials = {"trials": str(within / "trials.jsonl")}
            outcome = launch(OWN_FOLDER, trials, Federation(peers=PEERS), out=lambda _: None)
            if not outcome.completed:
                raise FedkdError(f"the benchmark's run failed: {outcome.reason or outcome.status}")
        rows = [{**plan, "accuracy": _honest(place, plan)} for plan, place in zip(plans, places, strict=True)]
        commits = Counter(str(read_run(place).environment.get("commit")) for place in places)
    return {"ratio": _kept(rows), "peers": PEERS, "settings": BASE, "trials_of_commits": commits, "rows": rows}


def main(
    json_path: Path | None = None, *, quick: bool = False, folder: Path | None = None, ways: Sequence[str] = WAYS
) -> None:
    """Print a table of :func:`run`, and write it to ``json_path`` if given."""
    from rich.console import Console
    from rich.table import Table

    result = run(quick=quick, folder=folder, ways=ways)
    leave(result, json_path)
    rows = result["rows"]
    for robust in dict.fromkeys(row["robust"] for row in rows):
        chosen = [row for row in rows if row["robust"] == robust]
        ways = list(dict.fromkeys(row["weighing"] for row in chosen))
        table = Table(title=f"Honest peers' accuracy, {PEERS} peers, robust = {robust}", box=None)
        for column in ("attack", "attackers", *ways):
            table.add_column(column, justify="right")
        found = {(row["attack"], row["attackers"], row["weighing"]): f"{row['accuracy']:.1%}" for row in chosen}
        for attack, share in dict.fromkeys((row["attack"], row["attackers"]) for row in chosen):
            table.add_row(attack, f"{share:.0%}", *(found[attack, share, way] for way in ways))
        Console().print(table)


def _plans(attacks: Sequence[str], ways: Sequence[str], defences: Sequence[str]) -> list[Trial]:
    """Return what there is to try, the telling ones first."""
    plans: list[Trial] = [
        {"attack": attack, "attackers": share, **_weighed(way), "robust": robust}
        for attack, share in [("none", 0.0), *itertools.product(attacks, SHARES)]
        for way, robust in itertools.product(ways, defences)
        if way == PLAIN or robust in ("none", "agreement", "eigentrust")
    ]
    return sorted(plans, key=lambda plan: plan["weighing"] not in (PLAIN, RunConfig().weighing))


def _weighed(way: str) -> Trial:
    return {"weighing": way, "teacher-temperature": 1.0 if way == PLAIN else TEACHER_TEMPERATURE}


def _name(plan: Trial) -> str:
    return f"{plan['attack']}-{plan['attackers']:g}-{plan['weighing']}-{plan['robust']}"


def _kept(rows: list[Trial]) -> float:
    plain = [row for row in rows if row["weighing"] == PLAIN]
    (unharmed,) = (row["accuracy"] for row in plain if row["attack"] == row["robust"] == "none")
    best: dict[tuple[str, float], float] = {}
    for row in plain:
        if row["robust"] != "none" and row["attack"] != "none":
            attack = row["attack"], row["attackers"]
            best[attack] = max(best.get(attack, 0.0), row["accuracy"])
    return float(min(best.values()) / unharmed)


def _finished(place: Path, settings: Trial) -> bool:
    """Tell whether a trial has results.

    Raises:
        FedkdError: of other settings.
    """
    if not (place / "summary.json").exists():
        return False
    run = read_run(place)
    for key, value in settings.items():
        if run.settings[key] != value:
            raise FedkdError(f"{place} was run with {key}={run.settings[key]}, not {value}: take another --folder")
    return True


def _honest(folder: Path, plan: Trial) -> float:
    if not (folder / "summary.json").exists():
        why = (folder / "error.txt").read_text(encoding="utf-8") if (folder / "error.txt").exists() else "no result"
        raise FedkdError(f"the trial {plan} failed: {why}")
    peers = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["peers"]
    honest = peers[: PEERS - round(plan["attackers"] * PEERS)]
    return statistics.fmean(peer["after"] for peer in honest)
