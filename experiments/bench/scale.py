"""What a peer costs when there are many: 10, 100 and 1,000 simulated peers through `flwr run`, five rounds of gossip.

Tiny models (a perceptron), 20 private samples of 8×8 each and a proxy set of 100: what is measured is the machinery
around the training. Seconds and CPU seconds are those of the rounds alone, start-up and tear-down left out; memory is
that of the whole run.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.measuring import Marks, Watch, leave
from experiments.launch.project import OWN_FOLDER
from experiments.launch.runner import Federation, launch
from fedkd.errors import FedkdError

PEERS, QUICK_PEERS = (10, 100, 1000), (2, 6)
ROUNDS = 5
SAMPLES, PROXY, TEST, CLASSES = 20, 100, 100, 10
SETTINGS = {
    "strategy": "gossip",
    "fanout": 4,
    "partition": "iid",
    "models": "mlp",
    "proxy-size": PROXY,
    "batch-size": 64,
    "pretrain-epochs": 1,
    "schedule": "alternate",
    "divergence": "js",
    "weighing": "uniform",  # what carrying the mail costs, not what is made of it
    "robust": "none",
    "distill-epochs": 1,
    "controls": "",
}


def run(*, quick: bool = False) -> dict[str, Any]:
    """Run every size; return ``{"ratio": ..., "rows": [...]}``.

    ``ratio`` is the CPU seconds per peer and round of the largest federation over those of the smallest: at most 1
    where the cost of a round grows no faster than the number of peers.

    Args:
        quick: sizes that only show that it runs.

    Raises:
        FedkdError: a run failed.
    """
    sizes, rounds = (QUICK_PEERS, 2) if quick else (PEERS, ROUNDS)
    rows = [_measure(peers, rounds) for peers in sizes]
    ratio = rows[-1]["cpu_seconds_per_peer_round"] / rows[0]["cpu_seconds_per_peer_round"]
    return {"ratio": ratio, "rounds": rounds, "settings": SETTINGS, "rows": rows}


def main(json_path: Path | None = None, *, quick: bool = False) -> None:
    """Print a table of :func:`run`, and write it to ``json_path`` if given."""
    from rich.console import Console
    from rich.table import Table

    result = run(quick=quick)
    table = Table(title=f"Gossip, fanout {SETTINGS['fanout']}, {result['rounds']} rounds", box=None)
    for column in ("peers", "s/round", "ms/peer", "CPU ms/peer", "driver MiB", "actor MiB", "all MiB", "disk MiB"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(
            f"{row['peers']:,}",
            f"{row['seconds_per_round']:.2f}",
            f"{1000 * row['seconds_per_peer_round']:.0f}",
            f"{1000 * row['cpu_seconds_per_peer_round']:.0f}",
            *(f"{row[f'{what}_bytes'] / 2**20:,.0f}" for what in ("driver_peak", "actor_peak", "all_peak", "disk")),
        )
    Console().print(table)
    print(f"CPU per peer and round, largest over smallest federation: {result['ratio']:.2f}")
    leave(result, json_path)


def _measure(peers: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="fedkd-scale-") as name, Watch() as watch:
        folder = Path(name)
        np.savez(folder / "data.npz", **_data(peers))

        def note() -> tuple[float, float]:
            return time.monotonic(), watch.cpu_seconds()

        settings = {
            **SETTINGS, "dataset": f"npz:{folder / 'data.npz'}", "rounds": rounds, "peers": peers,
            "out-dir": str(folder / "run"),
        }  # fmt: skip
        ends = [peers * (round + 1) for round in range(rounds + 1)]  # a row for each peer
        with Marks(folder / "run" / "rounds.jsonl", ends, note) as marks:
            outcome = launch(OWN_FOLDER, settings, Federation(peers=peers).sharing(), out=lambda line: None)
        if not outcome.completed or len(marks.noted) != rounds + 1:
            raise FedkdError(f"the benchmark's run failed: {outcome.reason or outcome.status}")
        disk = sum(path.stat().st_size for path in (folder / "run").rglob("*") if path.is_file())
    wall, cpu = (last - first for first, last in zip(marks.noted[0], marks.noted[-1], strict=True))
    return {
        "peers": peers,
        "seconds_per_round": wall / rounds,
        "seconds_per_peer_round": wall / rounds / peers,
        "cpu_seconds_per_peer_round": cpu / rounds / peers,
        "seconds": outcome.seconds,
        "driver_cpu_seconds": watch.spent(_is_driver),
        "actors_cpu_seconds": watch.spent(_is_actor),
        "driver_peak_bytes": watch.peak(_is_driver),
        "actor_peak_bytes": watch.peak(_is_actor),
        "all_peak_bytes": watch.peak_bytes,
        "disk_bytes": disk,
    }


def _is_driver(title: str) -> bool:
    return "flwr-simulation" in title


def _is_actor(title: str) -> bool:
    return title.startswith("ray::ClientAppActor")


def _data(peers: int) -> dict[str, np.ndarray]:
    """Return images of as many classes, each a blurred spot of its own, enough for all peers."""
    stream = np.random.default_rng(0)
    spots = stream.uniform(0, 200, (CLASSES, 8, 8))
    found = {}
    for part, count in (("train", PROXY + peers * SAMPLES), ("test", TEST)):
        labels = stream.integers(0, CLASSES, count)
        noisy = spots[labels] + stream.normal(0, 40, (count, 8, 8))
        found |= {f"x_{part}": np.clip(noisy, 0, 255).astype(np.uint8), f"y_{part}": labels.astype(np.int64)}
    return found
