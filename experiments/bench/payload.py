"""What a round costs by the size of its knowledge: three real peers over gRPC on this machine, with TLS and node keys.

The peers' models are tiny and train nothing in a round, so that what is measured is predicting, encoding, two ways
through the SuperLink, checking, decoding, and the relay's and the peers' own files. Knowledge is ``fp32`` logits of
1,000 classes; every peer sends its own and hears one other peer's (gossip).
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.measuring import leave
from experiments.deploy import trial
from experiments.deploy.create import create
from experiments.deploy.layout import Deployment
from experiments.deploy.run import run as run_on
from experiments.launch.project import OWN_FOLDER
from experiments.launch.superlink import free_port
from fedkd.errors import FedkdError

MEGABYTES = (0.1, 1.0, 10.0, 100.0)
QUICK_MEGABYTES = (0.1, 1.0)
PEERS, CLASSES, ROUNDS = 3, 1000, 4
_PIXELS = (4, 4, 1)
_AS_INIT_HAS_IT = 'dataset = ""', 'model = ""', 'proxy = ""', "require-sealed = true"
_OF_ITS_OWN = 'dataset = "npz:data.npz"', 'model = "mlp"', 'proxy = "npz:proxy.npz"', "require-sealed = false"


def run(*, quick: bool = False) -> dict[str, Any]:
    """Measure rounds; return ``rows`` of ``megabytes``, ``bytes_up`` of a peer, and ``seconds`` of each round.

    ``ratio`` is the longest time of the largest knowledge over that of the smallest.

    Args:
        quick: up to 1 MB only.

    Raises:
        FedkdError: a run failed.
    """
    sizes = QUICK_MEGABYTES if quick else MEGABYTES
    with tempfile.TemporaryDirectory(prefix="fedkd-payload-") as name:
        folder = Path(name)
        deployment = Deployment(folder / "site", ("127.0.0.1",), PEERS, free_port(), free_port(), free_port())
        create(deployment, demo=False)
        _give_data(deployment, samples=_samples(sizes[-1]))
        lines = [{"name": f"{size:g} MB", "settings": _settings(folder / f"{size:g}", size)} for size in sizes]
        (folder / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        trial.up(deployment, out=lambda _: None)
        try:
            problem = run_on(deployment, OWN_FOLDER, {"trials": str(folder / "trials.jsonl"), "controls": ""})
        finally:
            trial.down(deployment)
        if problem:
            raise FedkdError(f"the benchmark's run failed: {problem}")
        rows = [_row(folder / f"{size:g}", size) for size in sizes]
    ratio = max(rows[-1]["seconds"]) / max(rows[0]["seconds"])
    return {"ratio": ratio, "peers": PEERS, "classes": CLASSES, "rows": rows}


def main(json_path: Path | None = None, *, quick: bool = False) -> None:
    """Print a table of :func:`run`, and write it to ``json_path`` if given."""
    from rich.console import Console
    from rich.table import Table

    result = run(quick=quick)
    table = Table(title=f"Rounds of {PEERS} real peers on this machine", box=None)
    for column in ("per peer and way", "bytes up", "seconds a round"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        seconds = f"{min(row['seconds']):.1f}–{max(row['seconds']):.1f}"
        table.add_row(f"{row['megabytes']:g} MB", f"{row['bytes_up']:,}", seconds)
    Console().print(table)
    leave(result, json_path)


def _samples(megabytes: float) -> int:
    return round(megabytes * 1e6 / (4 * CLASSES))


def _settings(folder: Path, megabytes: float) -> dict[str, Any]:
    return {
        "out-dir": str(folder), "strategy": "gossip", "proxy-size": _samples(megabytes), "rounds": ROUNDS,
        "schedule": "alternate", "divergence": "js", "pretrain-epochs": 0, "distill-epochs": 0, "local-epochs": 0,
        "eval-every": ROUNDS, "controls": "", "weighing": "uniform", "robust": "none",
    }  # fmt: skip


def _give_data(deployment: Deployment, *, samples: int) -> None:
    random = np.random.default_rng(0)
    proxy = random.integers(0, 256, (samples, *_PIXELS), dtype=np.uint8)
    few = {
        "x_test": random.integers(0, 256, (CLASSES, *_PIXELS), dtype=np.uint8),
        "y_test": np.arange(CLASSES),
        "classes": np.arange(CLASSES).astype(str),
    }
    for name in deployment.names:
        folder = deployment.peer(name)
        private = random.integers(0, 256, (CLASSES, *_PIXELS), dtype=np.uint8)
        np.savez(folder / "data.npz", x_train=private, y_train=np.arange(CLASSES), **few)
        np.savez(folder / "proxy.npz", x_train=proxy, y_train=np.zeros(samples, np.int64), **few)
        text = (folder / "peer.toml").read_text(encoding="utf-8")
        for said, own in zip(_AS_INIT_HAS_IT, _OF_ITS_OWN, strict=True):
            text = text.replace(said, own)
        (folder / "peer.toml").write_text(text, encoding="utf-8")


def _row(folder: Path, megabytes: float) -> dict[str, Any]:
    if not (folder / "summary.json").exists():
        why = (folder / "error.txt").read_text(encoding="utf-8") if (folder / "error.txt").exists() else "no result"
        raise FedkdError(f"the trial with {megabytes:g} MB failed: {why}")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    if errors := [row["error"] for row in rows if row["error"]]:
        raise FedkdError(f"a round with {megabytes:g} MB failed: {errors[0]}")
    # The last round measures and draws as well.
    return {"megabytes": megabytes, "bytes_up": rows[-1]["bytes_up"], "seconds": summary["round_seconds"][1:-1]}
