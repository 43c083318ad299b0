"""What poisoned knowledge costs honest peers, with and without a defence.

Ten peers on the digits, the last two or four of which attack; all trials share one run, data and partition. The figure
is the mean test accuracy of the honest peers after the last round.
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

PEERS = 10
ATTACKS = ("flip", "collude", "constant", "noise")
SHARES = (0.2, 0.4)
DEFENCES = ("none", "median", "trimmed", "agreement")
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
    """Run all trials; return ``{"ratio", "rows": [{"attack", "attackers", "robust", "accuracy"}]}``, shares of 1.

    ``ratio`` is the accuracy under the worst attack with the best defence against it, over that when nobody attacks.

    Args:
        quick: one attack and two defences.

    Raises:
        FedkdError: the run failed.
    """
    attacks, defences = (("flip",), ("none", "agreement")) if quick else (ATTACKS, DEFENCES)
    plans: list[Trial] = [{"attack": "none", "attackers": 0.0, "robust": "none"}]
    plans += [
        {"attack": attack, "attackers": share, "robust": robust}
        for attack, share, robust in itertools.product(attacks, SHARES, defences)
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
    defences = list(dict.fromkeys(row["robust"] for row in rows))
    table = Table(title=f"Honest peers' accuracy, {PEERS} peers; nobody attacks: {rows[0]['accuracy']:.1%}", box=None)
    for column in ("attack", "attackers", *defences):
        table.add_column(column, justify="right")
    for (attack, share), group in itertools.groupby(rows[1:], key=lambda row: (row["attack"], row["attackers"])):
        found = {row["robust"]: f"{row['accuracy']:.1%}" for row in group}
        table.add_row(attack, f"{share:.0%}", *(found.get(defence, "") for defence in defences))
    Console().print(table)
    leave(result, json_path)


def _kept(rows: list[Trial]) -> float:
    best: dict[tuple[str, float], float] = {}
    for row in rows[1:]:
        if row["robust"] != "none":
            attack = row["attack"], row["attackers"]
            best[attack] = max(best.get(attack, 0.0), row["accuracy"])
    return float(min(best.values()) / rows[0]["accuracy"])


def _honest(folder: Path, plan: Trial) -> float:
    if not (folder / "summary.json").exists():
        why = (folder / "error.txt").read_text(encoding="utf-8") if (folder / "error.txt").exists() else "no result"
        raise FedkdError(f"the trial {plan} failed: {why}")
    peers = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["peers"]
    honest = peers[: PEERS - round(plan["attackers"] * PEERS)]
    return statistics.fmean(peer["after"] for peer in honest)
