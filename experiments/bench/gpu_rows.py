"""What `fedkd bench gpu` measures, row by row; each is a process of its own: ``python -m experiments.bench.gpu_rows``.

A row that hangs or runs out of memory then costs itself alone, and what one leaves on the GPU is gone before the next.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from experiments.bench.gpu_trace import trace
from experiments.launch.project import OWN_FOLDER
from experiments.launch.runner import Federation, launch
from fedkd.errors import FedkdError, SettingError

MIXED = "cnn-small,cnn-wide,resnet8,resnet20,resnet18"
FULL = {
    "peers": 32, "private": 1000, "proxy": 2000, "test": 200, "rounds": 3, "batch": 128, "side": 32, "steps": 300,
    "fleets": {"resnet18": "resnet18", "mixed": MIXED}, "actors": (1, 2, 4, 8),
}  # fmt: skip
QUICK = {
    "peers": 2, "private": 40, "proxy": 48, "test": 20, "rounds": 1, "batch": 16, "side": 8, "steps": 16,
    "fleets": {"mixed": "mlp,cnn-small"}, "actors": (1,),
}  # fmt: skip
SETTINGS = {
    "partition": "iid",
    "strategy": "averaged",
    "schedule": "alternate",  # as the plain loop does
    "weighing": "uniform",  # the loop without us takes the plain mean
    "robust": "none",
    "divergence": "kl",
    "pretrain-epochs": 0,
    "distill-epochs": 1,
    "local-epochs": 1,
    "controls": "",
    "fast": True,
}

FIGURES = "figures: "
"""What the line of a row's process begins with that holds its figures."""

Size = dict[str, Any]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        kind: ``bare``, the one compiled loop; ``plain``, the mixed fleet's work without fedkd; ``trace``, a look into
            single phases; or ``fleet``, a run.
        fleet: its name; empty but for a run.
        actors: how many share the GPU.
        compiled: whether models are compiled.
    """

    kind: str
    fleet: str = ""
    actors: int = 0
    compiled: bool = False

    @property
    def name(self) -> str:
        """Return what it is called: ``bare``, ``resnet18/4``, ``mixed/8/compiled``."""
        return f"{self.fleet}/{self.actors}{'/compiled' * self.compiled}" if self.kind == "fleet" else self.kind

    @classmethod
    def parse(cls, name: str) -> Self:
        """Read a name.

        >>> Row.parse("mixed/8/compiled")
        Row(kind='fleet', fleet='mixed', actors=8, compiled=True)
        """
        fleet, _, rest = name.partition("/")
        if not rest:
            return cls(name)
        actors, _, how = rest.partition("/")
        return cls("fleet", fleet, int(actors), how == "compiled")


def rows(
    size: Mapping[str, Any], *, actors: tuple[int, ...], fleets: tuple[str, ...], compiled: tuple[bool, ...]
) -> list[Row]:
    """Return the rows that were asked for, the telling ones first.

    A figure says nothing without what it is set against; of the numbers of actors a middle one, the ends, then the
    rest. What is not compiled comes first: compiling takes minutes.

    Args:
        size: its ``fleets`` and ``actors`` are those that are known.
        actors: numbers of actors.
        fleets: names of fleets.
        compiled: whether as they are (False), compiled (True), or both.

    Raises:
        SettingError: no such fleet, or no number of actors.
    """
    fleets = tuple(dict.fromkeys(fleets))
    for fleet in fleets:
        if fleet not in size["fleets"]:
            raise SettingError("--fleet", fleet, f"of {', '.join(size['fleets'])}, with commas between them")
    for count in actors:
        if count < 1:
            raise SettingError("--actors", count, "whole numbers >= 1, with commas between them")
    first = next(iter(size["fleets"]))
    middle, ends = actors[len(actors) // 2 :][:1], (actors[0], actors[-1])
    order = list(dict.fromkeys([*middle, *ends, *actors]))
    found = [Row("bare")] if first in fleets else []
    for how in sorted(compiled):
        for fleet in fleets:
            if fleet == "mixed" and Row("plain") not in found:
                found.append(Row("plain"))
            found += [Row("fleet", fleet, count, how) for count in order]
    return [*found, Row("trace")]


def measure(row: Row, folder: Path, size: Size, device: str) -> Figures:
    """Return a row's figures; ``images_per_second`` of training, but for the trace.

    Args:
        row: what to measure.
        folder: holds ``data.npz``; runs go there.
        size: as :data:`FULL`.
        device: ``cuda`` or ``cpu``.

    Raises:
        FedkdError: a run failed.
    """
    if row.kind == "bare":
        return {"images_per_second": bare_loop(size, device)}
    if row.kind == "plain":
        return {"images_per_second": _plain(folder / "data.npz", size, device)}
    if row.kind == "trace":
        names = list(dict.fromkeys([*size["fleets"].values()][-1].split(",")))
        return {"phases": [line for name in (names[0], names[-1]) for line in trace(name, size, device)]}
    return {"images_per_second": _fleet(folder, size, row, device)}


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


def _rate(size: Size, seconds: Sequence[float]) -> float:
    """Return the images a second over the rounds with training that lasted so long, but for the first.

    Kernels are chosen, and models compiled, in the first one; where there is no other, it counts.
    """
    counted = seconds[1:] or seconds
    trained = size["peers"] * (size["proxy"] + size["private"])  # in a round, over all peers
    return float(trained * len(counted) / sum(counted))


def _plain(data: Path, size: Size, device: str) -> float:
    options = [f"--{key}={size[key]}" for key in ("peers", "proxy", "rounds", "batch")]
    command = [
        sys.executable,
        "-m",
        "experiments.bench.plain_loop",
        str(data),
        *options,
        "--seed=0",
        f"--device={device}",
    ]
    done = subprocess.run(
        [*command, f"--models={size['fleets']['mixed']}"], capture_output=True, text=True, check=False, cwd=OWN_FOLDER
    )
    if done.returncode:
        raise FedkdError(f"the plain loop failed: {done.stderr.strip()[-500:]}")
    return _rate(size, json.loads(done.stdout)["seconds"])


def _fleet(folder: Path, size: Size, row: Row, device: str) -> float:
    place = folder / row.name.replace("/", "-")
    settings = {
        **SETTINGS, "dataset": f"npz:{folder / 'data.npz'}", "models": size["fleets"][row.fleet],
        "rounds": size["rounds"], "proxy-size": size["proxy"], "batch-size": size["batch"], "compiled": row.compiled,
        "eval-every": size["rounds"], "device": device, "out-dir": str(place),
    }  # fmt: skip
    share = {"gpus_per_peer": 1 / row.actors, "gpus": 1} if device == "cuda" else {}
    federation = Federation(peers=size["peers"], actors=row.actors, **share)
    outcome = launch(OWN_FOLDER, settings, federation, out=lambda _: None)
    if not outcome.completed:
        raise FedkdError(f"the benchmark's run failed: {outcome.reason or outcome.status}")
    return _rate(size, json.loads((place / "summary.json").read_text(encoding="utf-8"))["round_seconds"][1:])


def main() -> None:
    """Measure the row of the command line and print its figures."""
    parser = argparse.ArgumentParser(description="One row of `fedkd bench gpu`.")
    for option in ("--row", "--folder", "--size", "--device"):
        parser.add_argument(option, required=True)
    given = parser.parse_args()
    row = Row.parse(given.row)
    if row.kind == "plain":
        # Its loop is a process of its own, which would stay on the GPU beside the rows that come after this one.
        signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    found = measure(row, Path(given.folder), json.loads(given.size), given.device)
    print(f"{FIGURES}{json.dumps(found)}")


if __name__ == "__main__":
    main()
