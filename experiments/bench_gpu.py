"""How busy peers keep one GPU: images a second of 32 of them, by the number of actors that share it.

Two fleets on synthetic images of 32×32×3: ResNet-18 with its stem for small images, and five architectures mixed. What
is counted is the images of training steps, in the wall time of the rounds after the first with training, by the relay's
own clock; the proxy set is predicted in that time too. The bare loop has one compiled bfloat16 ResNet-18 and data that
lie on the GPU; it trains, predicts as many images for each that it trains on as a peer does, and does nothing else. The
plain loop is the mixed fleet's work, model after model in float32.

Nothing is fetched: `fedkd bench gpu` needs no network. Without a GPU it says so, and what it would do; `--quick` then
exercises the same code on the CPU at a tiny size, whose figures say nothing about a GPU.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.launch import Federation, launch
from experiments.measuring import leave
from experiments.project import OWN_FOLDER
from fedkd.errors import FedkdError

ACTORS = (1, 2, 4, 8)
MIXED = "cnn-small,cnn-wide,resnet8,resnet20,resnet18"
FULL = {
    "peers": 32, "private": 1000, "proxy": 2000, "test": 200, "rounds": 3, "batch": 128, "side": 32, "steps": 300,
    "fleets": {"resnet18": "resnet18", "mixed": MIXED}, "actors": ACTORS,
}  # fmt: skip
QUICK = {
    "peers": 2, "private": 40, "proxy": 48, "test": 20, "rounds": 1, "batch": 16, "side": 8, "steps": 16,
    "fleets": {"mixed": "mlp,cnn-small"}, "actors": (1,),
}  # fmt: skip
SETTINGS = {
    "partition": "iid",
    "strategy": "averaged",
    "schedule": "alternate",  # as the plain loop does
    "divergence": "kl",
    "pretrain-epochs": 0,
    "distill-epochs": 1,
    "local-epochs": 1,
    "controls": "",
    "fast": True,
}

Size = dict[str, Any]
Figures = dict[str, Any]


def run(*, quick: bool = False) -> Figures:
    """Measure the bare loop, the plain loop, and both fleets by number of actors and with and without compiling.

    Args:
        quick: a tiny size, on the CPU where there is no GPU, without compiling.

    Returns:
        ``{"ratio", "plain_ratio", "device", "bare", "plain", "rows": [{"fleet", "actors", "compiled",
        "images_per_second"}]}``: ``ratio`` the best of the first fleet over the bare loop, ``plain_ratio`` the best of
        the mixed one over the plain loop. Without a GPU, and not ``quick``, ``{"ratio": None, "missing": why}``.

    Raises:
        FedkdError: a run failed.
    """
    import torch

    gpu = torch.cuda.is_available()
    if not gpu and not quick:
        return {"ratio": None, "missing": _missing(FULL)}
    size: Size = dict(QUICK if quick else FULL)
    device = "cuda" if gpu else "cpu"
    with tempfile.TemporaryDirectory(prefix="fedkd-gpu-") as name:
        folder = Path(name)
        np.savez(folder / "data.npz", **images(size))
        bare = bare_loop(size, device)
        plain = _plain(folder / "data.npz", size, device)
        rows = [
            _fleet(folder, size, fleet, actors, device, compiled=compiled)
            for fleet in size["fleets"]
            for compiled in ((False, True) if gpu and not quick else (False,))
            for actors in size["actors"]
        ]

    def best(fleet: str) -> float:
        return max(row["images_per_second"] for row in rows if row["fleet"] == fleet)

    return {
        "ratio": best(next(iter(size["fleets"]))) / bare,
        "plain_ratio": best("mixed") / plain,
        "device": torch.cuda.get_device_name() if gpu else "cpu: there is no GPU, the figures say nothing about one",
        "size": size,
        "settings": SETTINGS,
        "bare": bare,
        "plain": plain,
        "rows": rows,
    }


def main(json_path: Path | None = None, *, quick: bool = False) -> None:
    """Print a table of :func:`run`, and write it to ``json_path`` if given."""
    from rich.console import Console
    from rich.table import Table

    result = run(quick=quick)
    if "missing" in result:
        print(result["missing"])
        leave(result, json_path)
        return
    table = Table(title=f"{result['size']['peers']} peers on {result['device']}", box=None)
    for column in ("fleet", "actors", "compiled", "images/s", "over bare", "over plain"):
        table.add_column(column, justify="left" if column == "fleet" else "right")
    for row in result["rows"]:
        speed, first = row["images_per_second"], row["fleet"] != "mixed"
        table.add_row(
            row["fleet"],
            str(row["actors"]),
            "yes" if row["compiled"] else "no",
            f"{speed:,.0f}",
            f"{speed / result['bare']:.2f}" if first else "",
            "" if first else f"{speed / result['plain']:.2f}",
        )
    Console().print(table)
    print(f"bare loop: {result['bare']:,.0f} images/s; plain loop of the mixed fleet: {result['plain']:,.0f} images/s")
    leave(result, json_path)


def bare_loop(size: Size, device: str) -> float:
    """Return the images a second that one model trains on while it also predicts as many of them as a peer would.

    It is compiled on a GPU, bfloat16 and channels last, with all data on the device.

    Args:
        size: ``steps``, ``batch``, ``side``, ``proxy``, ``private``, and ``fleets``, whose first model is trained.
        device: ``cuda`` or ``cpu``.
    """
    import torch
    from torch.nn import functional as F

    from fedkd.models import build

    name = next(iter(size["fleets"].values())).split(",")[0]
    model = build(name, input_shape=(3, size["side"], size["side"]), num_classes=10, seed=0)
    model = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        model.compile(mode="reduce-overhead", dynamic=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    count = 8 * size["batch"]
    x = torch.randn(count, 3, size["side"], size["side"], device=device).to(memory_format=torch.channels_last)
    y = torch.randint(10, (count,), device=device)

    @torch.no_grad()
    def predict() -> None:
        model.eval()
        with torch.autocast(device, dtype=torch.bfloat16):
            model(x)
        model.train()

    def work(steps: int) -> None:
        owed = 0.0  # images still to be predicted
        for step in range(steps):
            index = torch.arange(size["batch"], device=device) + step % 8 * size["batch"]
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            owed += size["batch"] * size["proxy"] / (size["proxy"] + size["private"])
            if owed >= count:
                predict()
                owed -= count
        if device == "cuda":
            torch.cuda.synchronize()

    work(min(40, size["steps"]))  # compiling and the choice of kernels, for training and for predicting
    began = time.perf_counter()
    work(size["steps"])
    return float(size["steps"] * size["batch"] / (time.perf_counter() - began))


def images(size: Size) -> dict[str, np.ndarray]:
    """Return noise of ``side`` × ``side`` × 3 as arrays of an npz source; no speed depends on what is in an image."""
    stream = np.random.default_rng(0)
    counts = {"train": size["proxy"] + size["peers"] * size["private"], "test": size["test"]}
    found = {}
    for part, count in counts.items():
        found[f"x_{part}"] = stream.integers(0, 256, (count, size["side"], size["side"], 3), dtype=np.uint8)
        found[f"y_{part}"] = np.arange(count) % 10
    return found


def _trained(size: Size) -> int:
    """Return how many images a round trains on, over all peers."""
    return int(size["peers"] * (size["proxy"] + size["private"]))


def _plain(data: Path, size: Size, device: str) -> float:
    options = [f"--{key}={size[key]}" for key in ("peers", "proxy", "rounds", "batch")]
    command = [sys.executable, "-m", "experiments.plain_loop", str(data), *options, "--seed=0", f"--device={device}"]
    done = subprocess.run(
        [*command, f"--models={size['fleets']['mixed']}"], capture_output=True, text=True, check=False, cwd=OWN_FOLDER
    )
    if done.returncode:
        raise FedkdError(f"the plain loop failed: {done.stderr.strip()[-500:]}")
    return float(_trained(size) / min(json.loads(done.stdout)["seconds"]))


def _fleet(folder: Path, size: Size, fleet: str, actors: int, device: str, *, compiled: bool) -> Figures:
    place = folder / f"{fleet}-{actors}-{compiled}"
    settings = {
        **SETTINGS, "dataset": f"npz:{folder / 'data.npz'}", "models": size["fleets"][fleet], "rounds": size["rounds"],
        "proxy-size": size["proxy"], "batch-size": size["batch"], "compiled": compiled, "eval-every": size["rounds"],
        "device": device, "out-dir": str(place),
    }  # fmt: skip
    share = {"gpus_per_peer": 1 / actors, "gpus": 1} if device == "cuda" else {}
    outcome = launch(OWN_FOLDER, settings, Federation(peers=size["peers"], actors=actors, **share), out=lambda _: None)
    if not outcome.completed:
        raise FedkdError(f"the benchmark's run failed: {outcome.reason or outcome.status}")
    seconds = json.loads((place / "summary.json").read_text(encoding="utf-8"))["round_seconds"][1:]
    # Kernels are chosen, and models compiled, in the first round with training; a run of one has no other.
    counted = seconds[1:] or seconds
    speed = _trained(size) * len(counted) / sum(counted)
    return {"fleet": fleet, "actors": actors, "compiled": compiled, "images_per_second": speed}


def _missing(size: Size) -> str:
    fleets = " and ".join(f"{size['peers']} peers of {models}" for models in size["fleets"].values())
    return (
        "There is no GPU here that PyTorch can use: the figures are missing. Where there is one, this command trains "
        f"{fleets}, with {', '.join(map(str, size['actors']))} actors on the GPU, as they are and compiled, and sets "
        "their images a second against one bare compiled bfloat16 loop and against the plain loop of every model. "
        "`fedkd bench gpu --quick` runs the same code here on the CPU, at a tiny size."
    )
