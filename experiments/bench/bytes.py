"""Bytes until a target accuracy on Fashion-MNIST: knowledge in every codec, against federated averaging.

Four peers with about 1,000 private images each (Dirichlet, α = 0.3), half of them perceptrons, half small convolutional
networks; 1,000 public images, of which 250 travel in a round, from each peer to one other (gossip). Federated averaging
averages the smaller of the two networks, with as many private samples in a round as the peers see (two local epochs),
and with five local epochs, which saves it rounds; each from the mean of what every peer pre-trained, for as many epochs
as the peers that exchange logits, and from scratch, without that. Those peers see as many public samples beside the
private ones. All trials share one `flwr run`, data, partition and seeds. The images are a slice of the real ones: 5,000
for training, 1,000 for the test.
"""

import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from experiments.analysis.comparison import comparison_runs
from experiments.analysis.runs import Run, read_run
from experiments.analysis.statistics import price
from experiments.bench.measuring import leave
from experiments.compare.recipe import Recipe
from experiments.compare.running import compare
from experiments.launch.runner import Federation
from fedkd.errors import FedkdError, SettingError
from fedkd.settings.declare import Scalar

BASELINE = "fp32"
CODECS = (BASELINE, "fp16", "int8", "topk:3", "topk:1")
SEEDS = (0, 1, 2)
TRAIN, TEST = 5000, 1000
SETTINGS: dict[str, Scalar] = {
    "peers": 4,
    "partition-alpha": 0.3,
    "models": "mlp,cnn-small",
    "fedavg-model": "cnn-small",
    "proxy-size": 1000,
    "proxy-per-round": 250,
    "pretrain-epochs": 5,
    "weighing": "uniform",  # what a codec loses shows in the plain mean
    "robust": "none",
    "divergence": "kl",
    "schedule": "mixed",
    "kd-weight": 0.5,
    "distill-epochs": 8,
    "rounds": 15,
    "controls": "",
}
FEDAVG_EPOCHS, FEDAVG_ROUNDS = (2, 5), 30
FEDAVG_STARTS = ("pretrained", "cold")
LIKE_THE_PEERS = "fedavg, pretrained, 2 epochs"
"""Federated averaging with the peers' own pre-training and as many private samples in a round."""
QUICK: dict[str, Scalar] = {
    "dataset": "digits", "peers": 2, "proxy-size": 100, "proxy-per-round": 50, "pretrain-epochs": 1, "rounds": 2,
}  # fmt: skip
MARGIN = 0.01


def run(*, quick: bool = False) -> dict[str, Any]:
    """Run all trials; return ``{"ratio": ..., "least_ratio": ..., "targets": ..., "rows": [...]}``.

    The target of a seed is what its uncoded knowledge reaches at its best, one point less: a mean over the peers. A row
    has the ``way`` (a codec, or ``fedavg`` with its start and its local epochs), its ``best`` accuracy, the points it
    ``lost`` to uncoded knowledge, and the ``rounds`` and ``bytes`` until the target, of all peers, up and down (None:
    not in every seed); all are means over the seeds. ``ratio`` is the bytes of federated averaging from as much
    pre-training and at as many private samples a round, over those of the cheapest codec that loses at most one point:
    100 is the goal. ``least_ratio`` is the same against the cheapest federated averaging.

    Args:
        quick: two peers on the digits, to see that it runs.

    Raises:
        SettingError: Fashion-MNIST is not there.
        FedkdError: a run failed.
    """
    with tempfile.TemporaryDirectory(prefix="fedkd-bytes-") as name:
        folder = Path(name)
        settings = {**SETTINGS, **QUICK} if quick else {**SETTINGS, "dataset": _slice(folder / "slice.npz")}
        codecs, seeds = (CODECS[:2], SEEDS[:1]) if quick else (CODECS, SEEDS)
        grids = (
            {
                "strategy": ["fedavg"],
                "fedavg-start": list(FEDAVG_STARTS),
                "local-epochs": list(FEDAVG_EPOCHS),
                "rounds": [4 if quick else FEDAVG_ROUNDS],
                "seed": list(seeds),
            },
            {"strategy": ["gossip"], "codec": list(codecs), "seed": list(seeds)},
        )
        recipe = Recipe("bytes", "Bytes to a target", "", (), None, settings, grids, text="", cwd=folder, quick=quick)
        place = folder / "trials"
        compared = compare(recipe, Federation(peers=1), place, command="fedkd bench bytes", out=lambda _: None)
        if compared.failed:
            raise FedkdError(f"the benchmark's trials failed: {', '.join(compared.failed)}")
        runs = [read_run(path) for path in comparison_runs(compared.folder)]
    by_way: dict[str, dict[int, Run]] = {}
    for found in runs:
        by_way.setdefault(_way(found), {})[found.seed] = found
    uncoded = by_way[BASELINE]
    targets = {seed: _best(found) - MARGIN for seed, found in uncoded.items()}
    rows = [_row(way, members, targets, fmean(map(_best, uncoded.values()))) for way, members in by_way.items()]
    averaged = {row["way"]: row["bytes"] for row in rows if row["way"] not in CODECS}
    return {
        "ratio": _over(averaged[LIKE_THE_PEERS], rows),
        "least_ratio": _over(min((each for each in averaged.values() if each), default=None), rows),
        "targets": targets,
        "settings": {key: value for key, value in settings.items() if key != "dataset"},
        "rows": rows,
    }


def main(json_path: Path | None = None, *, quick: bool = False) -> None:
    """Print a table of :func:`run`, and write it to ``json_path`` if given."""
    from rich.console import Console
    from rich.table import Table

    result = run(quick=quick)
    targets = ", ".join(f"{target:.1%}" for target in result["targets"].values())
    table = Table(title=f"Bytes until a mean accuracy of {targets}, by seed", box=None)
    averaged = [row for row in result["rows"] if row["way"] not in CODECS]
    for column in ("", "best", "lost, points", "rounds", "kB", *(f"bytes of {row['way']}" for row in averaged)):
        table.add_column(column, justify="right" if column else "left")
    for row in result["rows"]:
        own = row["bytes"]
        table.add_row(
            row["way"],
            f"{row['best']:.1%}",
            f"{100 * row['lost']:.1f}",
            f"{row['rounds']:.1f}" if own else "never",
            f"{own / 1000:,.0f}" if own else "",
            *(f"{other['bytes'] / own:.0f} ×" if own and other["bytes"] else "" for other in averaged),
        )
    Console().print(table)
    leave(result, json_path)


def _way(run: Run) -> str:
    if run.settings["strategy"] == "fedavg":
        return f"fedavg, {run.settings['fedavg-start']}, {run.settings['local-epochs']} epochs"
    return str(run.settings["codec"])


def _row(way: str, runs: Mapping[int, Run], targets: Mapping[int, float], uncoded: float) -> dict[str, Any]:
    prices = [price(runs[seed], target) for seed, target in targets.items()]
    all_reached = all(math.isfinite(paid.rounds) for paid in prices)
    best = fmean(_best(found) for found in runs.values())
    return {
        "way": way,
        "best": best,
        "lost": uncoded - best,
        "rounds": fmean(paid.rounds for paid in prices) if all_reached else None,
        "bytes": fmean(paid.bytes for paid in prices) if all_reached else None,
    }


def _over(averaging: float | None, rows: list[dict[str, Any]]) -> float | None:
    """Return federated averaging's bytes over the cheapest codec's; None where one of them never gets there."""
    own = [row["bytes"] for row in rows if row["way"] in CODECS and row["bytes"] and row["lost"] <= MARGIN]
    return averaging / min(own) if averaging and own else None


def _best(run: Run) -> float:
    return max((p.accuracy for p in run.curve() if p.round >= run.counts_from), default=math.nan)


def _slice(path: Path) -> str:
    """Write the slice of Fashion-MNIST that the trials use; return it as the setting ``dataset`` names it."""
    from fedkd.data.sources import load_source

    folder = Path(os.environ.get("FEDKD_DATA") or "~/.cache/fedkd/data").expanduser()
    try:
        source = load_source("fashion-mnist", data_dir=folder)
    except SettingError as error:
        raise FedkdError(f"{error} (FEDKD_DATA names the folder in which FashionMNIST/raw lies)") from error
    stream = np.random.default_rng(0)
    arrays = {}
    for part, data, count in (("train", source.train, TRAIN), ("test", source.test, TEST)):
        chosen = np.sort(stream.permutation(len(data))[:count])
        arrays |= {f"x_{part}": data.inputs[chosen, 0].numpy(), f"y_{part}": data.labels[chosen].numpy()}
    np.savez(path, **arrays, classes=np.array(source.classes))
    return f"npz:{path}"
