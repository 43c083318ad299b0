"""What poisoned knowledge costs honest peers, by how they weigh their teachers, with and without a defence.

Ten peers on the digits, the last two or four of which attack; all trials share one run, data and partition. The figure
is the mean test accuracy of the honest peers after the last round. Ways to weigh teachers that need more than logits
are left out: a liar would lie there too.
"""

import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from experiments.bench.measuring import leave
from experiments.launch.project import OWN_FOLDER
from experiments.launch.runner import Federation, launch
from fedkd.errors import FedkdError
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


def run(*, quick: bool = False) -> dict[str, Any]:
    """Run all trials; return ``{"ratio", "rows": [{"attack", "attackers", "weighing", "robust", "accuracy"}]}``.

    Shares are of 1. ``ratio`` is the accuracy of plain means under the worst attack with the best defence against it,
    over that when nobody attacks. ``median`` and ``trimmed`` are tried on plain means alone, of the others every way to
    weigh by itself and with ``agreement`` and ``eigentrust``, which judge whole teachers.

    Args:
        quick: one attack, two defences and two ways.

    Raises:
        FedkdError: the run failed.
    """
    attacks = ATTACKS[:1] if quick else ATTACKS
    defences, ways = (("none", "agreement"), (PLAIN, "discrimination")) if quick else (DEFENCES, WAYS)
    scenes = [("none", 0.0), *itertools.product(attacks, SHARES)]
    plans: list[Trial] = [
        {"attack": attack, "attackers": share, **_weighed(way), "robust": robust}
        for attack, share in scenes
        for way, robust in itertools.product(ways, defences)
        if way == PLAIN or robust in ("none", "agreement", "eigentrust")
    ]
    with tempfile.TemporaryDirectory(prefix="fedkd-robust-") as name:
        folder = Path(name)
        lines = [
            {"name": str(i), "settings": {**BASE, **plan, "out-dir": str(folder / str(i))}}
            for i, plan in enumerate(plans)
        ]
        (folder / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        outcome = launch(
            OWN_FOLDER, {"trials": str(folder / "trials.jsonl")}, Federation(peers=PEERS), out=lambda _: None
        )
        if not outcome.completed:
            raise FedkdError(f"the benchmark's run failed: {outcome.reason or outcome.status}")
        rows = [{**plan, "accuracy": _honest(folder / str(i), plan)} for i, plan in enumerate(plans)]
    return {"ratio": _kept(rows), "peers": PEERS, "settings": BASE, "rows": rows}


def main(json_path: Path | None = None, *, quick: bool = False) -> None:
    """Print a table of :func:`run`, and write it to ``json_path`` if given."""
    from rich.console import Console
    from rich.table import Table

    result = run(quick=quick)
    rows = result["rows"]
    for robust in dict.fromkeys(row["robust"] for row in rows):
        chosen = [row for row in rows if row["robust"] == robust]
        ways = list(dict.fromkeys(row["weighing"] for row in chosen))
        table = Table(title=f"Honest peers' accuracy, {PEERS} peers, robust = {robust}", box=None)
        for column in ("attack", "attackers", *ways):
            table.add_column(column, justify="right")
        for (attack, share), group in itertools.groupby(chosen, key=lambda row: (row["attack"], row["attackers"])):
            found = {row["weighing"]: f"{row['accuracy']:.1%}" for row in group}
            table.add_row(attack, f"{share:.0%}", *(found[way] for way in ways))
        Console().print(table)
    leave(result, json_path)


def _weighed(way: str) -> Trial:
    return {"weighing": way, "teacher-temperature": 1.0 if way == PLAIN else TEACHER_TEMPERATURE}


def _kept(rows: list[Trial]) -> float:
    plain = [row for row in rows if row["weighing"] == PLAIN]
    (unharmed,) = (row["accuracy"] for row in plain if row["attack"] == row["robust"] == "none")
    best: dict[tuple[str, float], float] = {}
    for row in plain:
        if row["robust"] != "none" and row["attack"] != "none":
            attack = row["attack"], row["attackers"]
            best[attack] = max(best.get(attack, 0.0), row["accuracy"])
    return float(min(best.values()) / unharmed)


def _honest(folder: Path, plan: Trial) -> float:
    if not (folder / "summary.json").exists():
        why = (folder / "error.txt").read_text(encoding="utf-8") if (folder / "error.txt").exists() else "no result"
        raise FedkdError(f"the trial {plan} failed: {why}")
    peers = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["peers"]
    honest = peers[: PEERS - round(plan["attackers"] * PEERS)]
    return statistics.fmean(peer["after"] for peer in honest)
