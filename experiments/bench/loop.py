"""What a round costs under `flwr run`, against the same work as a plain PyTorch loop.

Ten peers of five architectures, 1,000 private images of 28×28 each, 2,000 proxy and 2,000 test images, batches of 64: a
peer distils for one epoch, trains for one, is measured and predicts. One peer works at a time, as in the plain loop, on
one thread. Each turn has a seed of its own, and in it the plain loop, a run as it comes and one with `fast = true`
follow one another; ratios are taken within a turn. A run's CPU seconds are those of all its processes, Flower's and
Ray's too, from the end of round 0 to the end of the last.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.measuring import Marks, Watch, leave
from experiments.launch.project import OWN_FOLDER
from experiments.launch.runner import Federation, launch
from fedkd.errors import FedkdError

MODELS = "mlp,cnn-small,cnn-wide,resnet8,resnet14"
PEERS, PRIVATE, PROXY, TEST, ROUNDS, TURNS = 10, 1000, 2000, 2000, 2, 3
QUICK = {"models": "mlp,cnn-small", "peers": 2, "private": 70, "proxy": 80, "test": 50, "rounds": 1, "turns": 1}
FULL = {
    "models": MODELS, "peers": PEERS, "private": PRIVATE, "proxy": PROXY, "test": TEST, "rounds": ROUNDS, "turns": TURNS
}  # fmt: skip
SETTINGS = {
    "partition": "iid",
    "strategy": "averaged",
    "schedule": "alternate",  # as the plain loop does
    "weighing": "uniform",  # the loop without us takes the plain mean
    "robust": "none",
    "divergence": "kl",
    "batch-size": 64,
    "pretrain-epochs": 1,
    "distill-epochs": 1,
    "local-epochs": 1,
    "controls": "",
}
WAYS = ("plain", "default", "fast")

Size = dict[str, Any]
Figures = dict[str, Any]


def run(*, quick: bool = False) -> Figures:
    """Run every way in every turn.

    Args:
        quick: a size that only shows that it runs.

    Returns:
        ``{"ratio", "fast_ratio", "accuracy_difference", "size", "data", "turns": [{"seed", way: {"cpu_seconds",
        "accuracy"}}]}``: CPU seconds per round; ``ratio`` the median over the turns of default over plain; accuracies
        are means over the peers, their differences to the plain loop means over the turns.

    Raises:
        FedkdError: a run failed.
    """
    size: Size = dict(QUICK if quick else FULL)
    with tempfile.TemporaryDirectory(prefix="fedkd-loop-") as name:
        folder = Path(name)
        arrays, origin = images(size)
        np.savez(folder / "data.npz", **arrays)
        turns = [_turn(folder, size, seed) for seed in range(size["turns"])]

    def ratio(way: str) -> float:
        return statistics.median(turn[way]["cpu_seconds"] / turn["plain"]["cpu_seconds"] for turn in turns)

    def gap(way: str) -> float:
        return statistics.fmean(turn[way]["accuracy"] - turn["plain"]["accuracy"] for turn in turns)

    return {
        "ratio": ratio("default"),
        "fast_ratio": ratio("fast"),
        "accuracy_difference": {way: gap(way) for way in WAYS[1:]},
        "size": size,
        "settings": SETTINGS,
        "data": origin,
        "turns": turns,
    }


def main(json_path: Path | None = None, *, quick: bool = False) -> None:
    """Print a table of :func:`run`, and write it to ``json_path`` if given."""
    from rich.console import Console
    from rich.table import Table

    result = run(quick=quick)
    size = result["size"]
    table = Table(title=f"A round of {size['peers']} peers, {size['models']}, on {result['data']}", box=None)
    for column in ("seed", "way", "CPU s/round", "over plain", "of it peers'", "s/round", "accuracy"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for turn in result["turns"]:
        for way in WAYS:
            found = turn[way]
            table.add_row(
                str(turn["seed"]) if way == "plain" else "",
                way,
                f"{found['cpu_seconds']:.2f}",
                f"{found['cpu_seconds'] / turn['plain']['cpu_seconds']:.2f}",
                f"{found['peers_cpu_seconds']:.2f}",
                f"{found['seconds']:.2f}",
                f"{found['accuracy']:.1%}",
            )
    Console().print(table)
    gaps = ", ".join(f"{way} {100 * gap:+.2f}" for way, gap in result["accuracy_difference"].items())
    print(f"CPU over the plain loop's: {result['ratio']:.2f} as it comes, {result['fast_ratio']:.2f} with fast = true")
    print(f"accuracy against the plain loop's, mean over the seeds, points: {gaps}")
    leave(result, json_path)


def images(size: Size) -> tuple[dict[str, np.ndarray], str]:
    """Return images of 28×28 as arrays of an npz source, and what they are.

    Those of Fashion-MNIST where the environment's ``FEDKD_DATA`` has it; else each class is a pattern under noise.
    """
    counts = {"train": size["proxy"] + size["peers"] * size["private"], "test": size["test"]}
    stream = np.random.default_rng(0)
    found = {}
    folder = Path(os.environ.get("FEDKD_DATA", ""))
    if os.environ.get("FEDKD_DATA") and (folder / "FashionMNIST").is_dir():
        from fedkd.data.sources import load_source

        source = load_source("fashion-mnist", data_dir=folder)
        for part, count in counts.items():
            data = getattr(source, part).subset(stream.permutation(len(getattr(source, part)))[:count])
            found |= {f"x_{part}": data.inputs.squeeze(1).numpy(), f"y_{part}": data.labels.numpy()}
        return found, "Fashion-MNIST"
    patterns = stream.uniform(0, 160, (10, 28, 28))
    for part, count in counts.items():
        labels = stream.integers(0, 10, count)
        noisy = patterns[labels] + stream.normal(0, 80, (count, 28, 28))
        found |= {f"x_{part}": np.clip(noisy, 0, 255).astype(np.uint8), f"y_{part}": labels.astype(np.int64)}
    return found, "patterns under noise"


def _turn(folder: Path, size: Size, seed: int) -> Figures:
    return {
        "seed": seed,
        "plain": _plain(folder / "data.npz", size, seed),
        "default": _ours(folder, size, seed, fast=False),
        "fast": _ours(folder, size, seed, fast=True),
    }


def _plain(data: Path, size: Size, seed: int) -> Figures:
    options = [f"--{key}={size[key]}" for key in ("models", "peers", "proxy", "rounds")]
    command = [sys.executable, "-m", "experiments.bench.plain_loop", str(data), *options, f"--seed={seed}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=OWN_FOLDER)
    if done.returncode:
        raise FedkdError(f"the plain loop failed: {done.stderr.strip()[-500:]}")
    said = json.loads(done.stdout)
    cpu, wall = statistics.fmean(said["cpu_seconds"]), statistics.fmean(said["seconds"])
    return {"cpu_seconds": cpu, "peers_cpu_seconds": cpu, "seconds": wall, "accuracy": said["accuracy"]}


def _ours(folder: Path, size: Size, seed: int, *, fast: bool) -> Figures:
    place = folder / f"{seed}-{fast}"
    settings = {
        **SETTINGS, "dataset": f"npz:{folder / 'data.npz'}", "models": size["models"], "proxy-size": size["proxy"],
        "rounds": size["rounds"], "seed": seed, "fast": fast, "out-dir": str(place),
    }  # fmt: skip
    ends = [size["peers"] * (round + 1) for round in range(size["rounds"] + 1)]  # a row for each peer
    with Watch() as watch:

        def note() -> tuple[float, float, float]:
            return time.monotonic(), watch.cpu_seconds(), watch.spent(_is_actor)

        with Marks(place / "rounds.jsonl", ends, note) as marks:
            federation = Federation(peers=size["peers"], actors=1)
            outcome = launch(OWN_FOLDER, settings, federation, out=lambda line: None)
    if not outcome.completed or len(marks.noted) != len(ends):
        raise FedkdError(f"the benchmark's run failed: {outcome.reason or outcome.status}")
    wall, cpu, peers = (
        (last - first) / size["rounds"] for first, last in zip(marks.noted[0], marks.noted[-1], strict=True)
    )
    after = json.loads((place / "summary.json").read_text(encoding="utf-8"))["mean"]["after"]
    return {"cpu_seconds": cpu, "peers_cpu_seconds": peers, "seconds": wall, "accuracy": after}


def _is_actor(title: str) -> bool:
    return title.startswith("ray::ClientAppActor")
