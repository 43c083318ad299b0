"""What differential privacy costs in accuracy, and what it does to an attacker who asks who was in the training set.

Accuracy: perceptrons on the digits (Dirichlet, α = 0.3), logits averaged; all trials share one `flwr run`, data and
partition. What a peer publishes in the whole run is (ε, 10⁻⁵)-private. The bar to clear is *isolated*, the same peers
without any exchange.

Membership: a perceptron trained on 100 digits for long, and 100 digits that it never saw; the attacker knows pictures
and labels and guesses by the loss (Yeom et al., "Privacy risk in machine learning", 2018). It reads the logits that
the peer publishes *on the candidates*, as if these were among the proxy samples; or those on other public digits, from
which it distils a *copy* that it asks about the candidates. An AUC of 0.5 is a guess.
"""

import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.measuring import leave
from experiments.launch.project import OWN_FOLDER
from experiments.launch.runner import Federation, launch
from fedkd.errors import FedkdError

BASE: dict[str, Any] = {
    "models": "mlp",
    "proxy-size": 400,
    "pretrain-epochs": 10,
    "average": "logits",
    "schedule": "alternate",
    "weighing": "uniform",  # of noise all teachers say as much
    "robust": "none",
    "divergence": "js",
    "controls": "",
}
EPSILONS = (0.0, 1000.0, 100.0, 10.0, 1.0)
"""0: without privacy."""
WAYS = (
    {"peers": 10, "rounds": 3, "proxy-per-round": 0},
    {"peers": 10, "rounds": 3, "proxy-per-round": 20},
    {"peers": 10, "rounds": 1, "proxy-per-round": 20},
    {"peers": 30, "rounds": 1, "proxy-per-round": 20},
)
"""Fewer samples, fewer rounds, more peers: each makes the same ε cost less noise, or averages more of it away."""
SEEDS = (0, 1, 2)
QUICK: dict[str, Any] = {"proxy-size": 60, "pretrain-epochs": 1}
MEMBERS, PUBLIC, ATTACK_EPOCHS, COPY_EPOCHS = 100, 400, 100, 60
ATTACK_SEEDS = tuple(range(10))

Row = dict[str, Any]


def run(*, quick: bool = False) -> dict[str, Any]:
    """Measure both; return the rows of the two tables under ``accuracy`` and ``membership``.

    ``ratio`` is the best accuracy at ε = 10 over the best one without privacy.

    Args:
        quick: two ways of two peers, one seed.

    Raises:
        FedkdError: the run failed, or the package dp-accounting is missing.
    """
    ways, epsilons, seeds, base = WAYS, EPSILONS, SEEDS, BASE
    if quick:
        ways = tuple({"peers": 2, "rounds": 1, "proxy-per-round": per_round} for per_round in (0, 20))
        epsilons, seeds, base = (0.0, 10.0), (0,), {**BASE, **QUICK}
    membership = attack(epsilons, seeds=(0, 1) if quick else ATTACK_SEEDS)
    accuracy = _accuracy(ways, epsilons, seeds, base)
    free, private = (max(row["after"] for row in accuracy if row["epsilon"] == e) for e in (0.0, 10.0))
    return {"ratio": private / free, "settings": base, "seeds": seeds, "accuracy": accuracy, "membership": membership}


def main(json_path: Path | None = None, *, quick: bool = False) -> None:
    """Print the tables of :func:`run`, and write them to ``json_path`` if given."""
    from rich.console import Console
    from rich.table import Table

    result = run(quick=quick)
    console = Console()
    table = Table(title="Mean test accuracy after the last round", box=None)
    epsilons = list(dict.fromkeys(row["epsilon"] for row in result["accuracy"]))
    for column in ("peers", "rounds", "samples a round", "isolated", *(_named(epsilon) for epsilon in epsilons)):
        table.add_column(column, justify="right")
    for way, group in itertools.groupby(result["accuracy"], key=lambda row: (row["peers"], row["rounds"], row["rows"])):
        members = list(group)
        found = [f"{row['after']:.1%} ± {100 * row['spread']:.1f}" for row in members]
        table.add_row(*map(str, way), f"{members[0]['isolated']:.1%}", *found)
    console.print(table)
    table = Table(title="AUC of membership inference, one release", box=None)
    for column in ("epsilon", "on the candidates", "by a copy"):
        table.add_column(column, justify="right")
    for row in result["membership"]:
        cells = (f"{row[name]:.3f} ± {row[f'{name}_spread']:.3f}" for name in ("published", "copy"))
        table.add_row(_named(row["epsilon"]), *cells)
    console.print(table)
    leave(result, json_path)


def attack(epsilons: Sequence[float], *, seeds: Sequence[int]) -> list[Row]:
    """Attack what one peer publishes once; return mean and spread of the AUC over seeds, by ε."""
    rows = []
    by_seed = [_attacked(epsilons, seed) for seed in seeds]
    for epsilon, pairs in zip(epsilons, zip(*by_seed, strict=True), strict=True):
        row: Row = {"epsilon": epsilon}
        for name, values in zip(("published", "copy"), zip(*pairs, strict=True), strict=True):
            row |= {name: statistics.fmean(values), f"{name}_spread": statistics.stdev(values)}
        rows.append(row)
    return rows


def _attacked(epsilons: Sequence[float], seed: int) -> list[tuple[float, float]]:
    """Return by ε the AUC on the candidates' published logits, and by a copy distilled from logits on other digits."""
    import torch

    from fedkd import models
    from fedkd.data.normalize import standardizer
    from fedkd.data.sources import load_source
    from fedkd.seeding import derive
    from fedkd.training.distillation import Distillation
    from fedkd.training.loops import Optimization, distil, fit, predict

    source = load_source("digits", data_dir=Path())
    order = torch.from_numpy(np.random.default_rng(derive(seed, "attack")).permutation(len(source.train)))
    candidates, public = order[: 2 * MEMBERS], order[2 * MEMBERS : 2 * MEMBERS + PUBLIC]
    inputs = standardizer("auto", source.train.inputs[public])(source.train.inputs)
    labels, how = source.train.labels[candidates], Optimization()
    shape, classes = tuple(inputs.shape[1:]), len(source.classes)

    peer = models.build("mlp", input_shape=shape, num_classes=classes, seed=derive(seed, "peer"))
    members = candidates[:MEMBERS]
    fit(peer, inputs[members], source.train.labels[members], epochs=ATTACK_EPOCHS, how=how, seed=derive(seed, "fit"))
    on_candidates, on_public = predict(peer, inputs[candidates]), predict(peer, inputs[public])
    found = []
    for epsilon in epsilons:
        copy = models.build("mlp", input_shape=shape, num_classes=classes, seed=derive(seed, "copy"))
        distillation = Distillation.from_config(_config(epsilon))
        teacher = _published(on_public, epsilon, derive(seed, "on public"))
        teachers = distillation.prepare(teacher[None], torch.ones(1))
        distil(
            copy, inputs[public], teachers, distillation,
            epochs=COPY_EPOCHS, how=how, seed=derive(seed, "distil"),
        )  # fmt: skip
        published = _published(on_candidates, epsilon, derive(seed, "on candidates"))
        found.append((_auc(published, labels), _auc(predict(copy, inputs[candidates]), labels)))
    return found


def _published(logits: Any, epsilon: float, seed: int) -> Any:
    import torch

    from fedkd.privacy import Mechanism, reproducible_normal

    mechanism = Mechanism.from_config(_config(epsilon))
    if mechanism is None:
        return logits
    return torch.from_numpy(mechanism.publish(logits.numpy(), reproducible_normal(tuple(logits.shape), seed)))


def _config(epsilon: float) -> Any:
    from fedkd.settings.config import RunConfig

    return RunConfig.from_mapping(
        {"privacy-epsilon": epsilon, "rounds": 0, "schedule": "alternate", "divergence": "kl"}
    )


def _auc(logits: Any, labels: Any) -> float:
    """Return how often a member has a smaller loss than one that is not; the first half of the rows are members."""
    import torch.nn.functional as F
    from sklearn.metrics import roc_auc_score

    losses = F.cross_entropy(logits.double(), labels, reduction="none")
    half = len(labels) // 2
    return float(roc_auc_score([1] * half + [0] * half, -losses.numpy()))


def _accuracy(ways: Sequence[Row], epsilons: Sequence[float], seeds: Sequence[int], base: Row) -> list[Row]:
    plans = [
        {**way, "privacy-epsilon": epsilon, "seed": seed}
        for way, epsilon, seed in itertools.product(ways, epsilons, seeds)
    ]
    with tempfile.TemporaryDirectory(prefix="fedkd-privacy-") as name:
        folder = Path(name)
        lines = [
            {
                "name": str(i),
                "settings": {
                    **base,
                    **plan,
                    "controls": "" if plan["privacy-epsilon"] else "isolated",
                    "out-dir": str(folder / str(i)),
                },
            }
            for i, plan in enumerate(plans)
        ]
        (folder / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        peers = max(way["peers"] for way in ways)
        outcome = launch(OWN_FOLDER, {"trials": str(folder / "trials.jsonl")}, Federation(peers=peers), out=print)
        if not outcome.completed:
            raise FedkdError(f"the benchmark's run failed: {outcome.reason or outcome.status}")
        found = [_summary(folder / str(i)) for i in range(len(plans))]
    rows = []
    for start in range(0, len(plans), len(seeds)):
        plan, group = plans[start], found[start : start + len(seeds)]
        after = [summary["mean"]["after"] for summary in group]
        # Trials without privacy come first of their way, and run the control for all of it.
        isolated = [s["isolated"] for s in group] if not plan["privacy-epsilon"] else [rows[-1]["isolated"]]
        rows.append(
            {
                "peers": plan["peers"],
                "rounds": plan["rounds"],
                "rows": plan["proxy-per-round"] or base["proxy-size"],
                "epsilon": plan["privacy-epsilon"],
                "before": statistics.fmean(summary["mean"]["before"] for summary in group),
                "after": statistics.fmean(after),
                "spread": statistics.stdev(after) if len(after) > 1 else 0.0,
                "isolated": statistics.fmean(isolated),
                "noise_multiplier": group[0]["privacy"].get("noise_multiplier"),
            }
        )
    return rows


def _summary(folder: Path) -> dict[str, Any]:
    if not (folder / "summary.json").exists():
        why = (folder / "error.txt").read_text(encoding="utf-8") if (folder / "error.txt").exists() else "no result"
        raise FedkdError(f"a trial failed: {why}")
    return dict(json.loads((folder / "summary.json").read_text(encoding="utf-8")))


def _named(epsilon: float) -> str:
    return f"ε {epsilon:g}" if epsilon else "not private"
