"""How much of what the channel can carry do peers get? Ways to weigh teachers, on skewed and on iid data.

What can be had by logits on a proxy set is bounded by its true labels: the control ``channel`` gives every peer these
for a teacher, with the same start, private batches and steps. The share of the way from the isolated control to
that one is what a way to weigh teachers is worth. All trials share one ``flwr run``; the ways of a scenario and seed
share their controls. Images are slices of the real ones, the digits are scikit-learn's.
"""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from clients.state import write_whole
from experiments.analysis.comparison import comparison_runs
from experiments.analysis.runs import Run, read_run
from experiments.analysis.variants import carrier_of, carriers
from experiments.bench.measuring import leave, trials_folder
from experiments.compare.recipe import Recipe
from experiments.compare.running import compare
from experiments.launch.runner import Federation
from experiments.slices import cifar10, fashion_mnist
from fedkd.errors import FedkdError
from fedkd.results.folder import share_of_channel
from fedkd.settings.declare import Scalar

Settings = Mapping[str, Scalar]

SEEDS = (0, 1, 2)
MEAN = "mean"
WAYS: Mapping[str, Settings] = {
    MEAN: {"weighing": "uniform", "teacher-temperature": 1.0, "robust": "none"},
    "ours": {"weighing": "discrimination", "teacher-temperature": 0.5, "robust": "eigentrust"},
    "counts": {"weighing": "counts", "teacher-temperature": 0.25, "robust": "none"},
}
_SLICES = ("fashion-mnist", "cifar10")
_CONTROLS = ("isolated", "channel")
_FLEET = ",".join(
    f"experiments.studies.fleet:{name}"
    for name in ("mlp", "lenet", "vgg", "resnet8", "mlp_wide", "lenet_narrow", "vgg_wide", "resnet8_narrow")
)
COMMON: Settings = {
    "strategy": "averaged",
    "topology": "complete",
    "peers": 8,
    "models": _FLEET,
    "proxy-size": 600,
    "learning-rate": 0.002,
    "pretrain-epochs": 5,
    "rounds": 6,
    "eval-every": 2,
    "schedule": "mixed",
    "kd-weight": 0.5,
    "distill-epochs": 1,
    "controls": ",".join(_CONTROLS),
}
_SKEWED: Settings = {"partition": "dirichlet", "partition-alpha": 0.1}
_FASHION, _CIFAR = "npz:fashion-mnist.npz", "npz:cifar10.npz"
SCENARIOS: Mapping[str, Settings] = {
    "fashion-mnist": {"dataset": _FASHION, **_SKEWED},
    "fashion-mnist, more steps": {
        "dataset": _FASHION, **_SKEWED, "kd-weight": 0.8, "distill-epochs": 3, "rounds": 10, "eval-every": 5,
    },
    "fashion-mnist, two classes a peer": {
        "dataset": _FASHION, "partition": "classes", "classes-per-peer": 2, "peers": 10,
    },
    "fashion-mnist, iid": {"dataset": _FASHION, "partition": "iid"},
    "fashion-mnist, gossip of two": {"dataset": _FASHION, **_SKEWED, "strategy": "gossip", "fanout": 2},
    "fashion-mnist, 3-regular": {
        "dataset": _FASHION, **_SKEWED, "topology": "k-regular", "topology-degree": 3,
    },
    "cifar10": {"dataset": _CIFAR, **_SKEWED, "pooled-model": "experiments.studies.fleet:vgg_wide"},
    "digits": {
        "dataset": "digits", **_SKEWED, "models": "mlp,cnn-small,cnn-wide,resnet8", "proxy-size": 400,
        "pretrain-epochs": 20, "distill-epochs": 2,
    },
}  # fmt: skip
QUICK: Settings = {
    "peers": 3, "models": "mlp", "proxy-size": 300, "pretrain-epochs": 5, "rounds": 2, "distill-epochs": 4,
    "eval-every": 1,
}  # fmt: skip


def run(*, quick: bool = False, folder: Path | None = None) -> dict[str, Any]:
    """Run all trials that have not finished yet; return ``{"ratio", "settings", "trials_of_commits", "rows"}``.

    A row has the ``scenario`` and the ``way``; the peers' mean accuracy when they begin (``before``), at the end
    (``accuracy``), alone (``isolated``) and with the true labels for a teacher (``channel``); that of
    the ``worst`` peer; ``bytes``, of all peers, up and down; and the ``share`` of the way from alone to the labels. All
    are means over the seeds, the share that of the means. ``ratio`` is the share of ours on skewed Fashion-MNIST: the
    goal is 0.8.

    Args:
        quick: one scenario of three peers on the digits, to see that it runs.
        folder: where the trials lie, which take an hour or more; None: in one that is removed at the end.

    Raises:
        FedkdError: the images are not there, or a run failed.
    """
    scenarios = {"digits": {**SCENARIOS["digits"], **QUICK}} if quick else SCENARIOS
    seeds = SEEDS[:1] if quick else SEEDS
    with trials_folder(folder, "accuracy", *(f"{name}.npz" for name in _SLICES), "trials") as within:
        if not quick:
            _write_slices(within)
        recipe, place = _recipe(scenarios, seeds, within, quick=quick), within / "trials"
        compared = compare(recipe, Federation(peers=1), place, command="fedkd bench accuracy", out=lambda _: None)
        if compared.failed:
            raise FedkdError(f"the benchmark's trials failed: {', '.join(compared.failed)}")
        runs = [read_run(path) for path in comparison_runs(compared.folder)]
    rows = []
    for name, scenario in scenarios.items():
        members = {way: _of(runs, {**COMMON, **scenario, **settings}) for way, settings in WAYS.items()}
        controls = {
            control: _control([r for found in members.values() for r in found], control, runs) for control in _CONTROLS
        }
        rows += [_row(name, way, found, controls) for way, found in members.items()]
    commits = Counter(str(run.environment.get("commit")) for run in runs)
    return {"ratio": rows[1]["share"], "settings": {**COMMON}, "trials_of_commits": commits, "rows": rows}


def main(json_path: Path | None = None, *, quick: bool = False, folder: Path | None = None) -> None:
    """Print a table of :func:`run`, and write it to ``json_path`` if given."""
    from rich.console import Console
    from rich.table import Table

    result = run(quick=quick, folder=folder)
    leave(result, json_path)
    table = Table(title="Mean accuracy of the peers, and what share of the way to true labels that is", box=None)
    for column in ("", "", "before", "isolated", "accuracy", "worst peer", "true labels", "share", "kB"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in result["rows"]:
        shares = [f"{row[name]:.1%}" for name in ("before", "isolated", "accuracy", "worst", "channel")]
        share = "" if row["share"] is None else f"{row['share']:.2f}"
        first = row["scenario"] if row["way"] == MEAN else ""
        table.add_row(first, row["way"], *shares, share, f"{row['bytes'] / 1000:,.0f}")
    Console().print(table)


def _recipe(scenarios: Mapping[str, Settings], seeds: Sequence[int], folder: Path, *, quick: bool) -> Recipe:
    grids = tuple(
        {**{key: [value] for key, value in {**scenario, **way}.items()}, "seed": list(seeds)}
        for scenario in scenarios.values()
        for way in WAYS.values()
    )
    settings = {**COMMON, "data-dir": str(folder)}
    title = "Ways to weigh teachers"
    return Recipe("accuracy", title, "", (), None, settings, grids, text="", cwd=folder, quick=quick)


def _of(runs: Sequence[Run], settings: Settings) -> list[Run]:
    """Return the runs under some settings; which of them ran the controls does not matter."""
    dataset = str(settings["dataset"]).removeprefix("npz:")
    others = {key: value for key, value in settings.items() if key not in ("dataset", "controls")}
    return [
        run
        for run in runs
        if str(run.settings["dataset"]).endswith(dataset) and others.items() <= dict(run.settings).items()
    ]


def _control(scenario: Sequence[Run], name: str, runs: Sequence[Run]) -> float:
    """Return what a control of a scenario came to, over the seeds; one of all trials has run it for those like it.

    Raises:
        FedkdError: none has for one of the scenario's.
    """
    having, found = carriers(runs, name), {}
    for run in scenario:
        if (carrier := carrier_of(run.settings, name, having)) is None:
            raise FedkdError(f"no trial has run the control {name} of {run.path}")
        found[run.seed] = carrier.control(name)
    return fmean(found.values())


def _row(scenario: str, way: str, runs: Sequence[Run], controls: Mapping[str, float]) -> dict[str, Any]:
    def mean(name: str) -> float:
        return fmean(fmean(peer[name] for peer in run.summary["peers"]) for run in runs)

    isolated, channel, accuracy = controls["isolated"], controls["channel"], mean("after")
    share = share_of_channel(accuracy, isolated, channel)
    return {
        "scenario": scenario,
        "way": way,
        "seeds": sorted(run.seed for run in runs),
        "before": mean("before"),
        "isolated": isolated,
        "accuracy": accuracy,
        "by_seed": {run.seed: fmean(peer["after"] for peer in run.summary["peers"]) for run in runs},
        "worst": fmean(min(peer["after"] for peer in run.summary["peers"]) for run in runs),
        "channel": channel,
        "share": share if math.isfinite(share) else None,
        "bytes": fmean(run.summary["totals"]["bytes_up"] + run.summary["totals"]["bytes_down"] for run in runs),
    }


def _save(path: Path, arrays: dict[str, Any]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _write_slices(folder: Path) -> None:
    data = Path(os.environ.get("FEDKD_DATA") or "~/.cache/fedkd/data").expanduser()
    try:
        for name, arrays in zip(_SLICES, (fashion_mnist(data), cifar10(data / "cifar10.npz")), strict=True):
            if not (folder / f"{name}.npz").exists():  # whole or not at all: who goes on takes what is there
                write_whole(folder / f"{name}.npz", lambda path, arrays=arrays: _save(path, dict(arrays)))
    except (OSError, RuntimeError) as error:
        raise FedkdError(
            f"{error} (FEDKD_DATA names the folder with FashionMNIST/raw, unpacked, and cifar10.npz)"
        ) from error
