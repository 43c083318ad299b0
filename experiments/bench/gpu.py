"""How busy peers keep one GPU: images a second of 32 of them, by the number of actors that share it.

Two fleets on synthetic images of 32×32×3: ResNet-18 with its stem for small images, and five architectures mixed. What
is counted is the images of training steps, in the wall time of the rounds after the first with training, by the relay's
own clock; the proxy set is predicted in that time too. The bare loop has one compiled bfloat16 ResNet-18 and data that
lie on the GPU; it trains, predicts as many images for each that it trains on as a peer does, and does nothing else. The
plain loop is the mixed fleet's work, model after model in float32. A trace shows what single phases do on the device.

Whole, it takes most of an hour, most of which is compiling: the telling rows come first, the file is written after
each, and ``--seconds`` ends it in time. Nothing is fetched. Without a GPU it says so, and what it would do; ``--quick``
then exercises the same code on the CPU at a tiny size, whose figures say nothing about a GPU.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import gpu_rows
from experiments.bench.gpu_rows import FIGURES, FULL, QUICK, SETTINGS, Figures, Row, Size
from experiments.bench.gpu_watch import Watch
from experiments.bench.measuring import leave
from experiments.launch.project import OWN_FOLDER
from fedkd.errors import FedkdError, SettingError

_LONGEST = {"bare": 120, "plain": 180, "trace": 90, "fleet": 180, "compiled": 420}
"""Seconds after which a row is given up."""

_LEAST = {"bare": 30, "plain": 15, "trace": 20, "fleet": 25, "compiled": 90}
"""Seconds below which a row is not begun."""

_DOWN = 15.0
"""Seconds that a run may take to go down."""


def main(
    json_path: Path | None = None,
    *,
    quick: bool = False,
    actors: Sequence[int] = (),
    fleets: Sequence[str] = (),
    compiled: bool | None = None,
    seconds: float = math.inf,
) -> None:
    """Measure row after row, print each, and write all that there are to a file after each.

    Args:
        json_path: the file.
        quick: a tiny size, on the CPU where there is no GPU, without compiling.
        actors: how many share the GPU, in turns; empty: 1, 2, 4 and 8.
        fleets: ``resnet18``, ``mixed``; empty: both.
        compiled: only compiled (True) or only as they are (False); None: both.
        seconds: that all may take.

    The file has ``ratio``, the best of the first fleet over the bare loop, and ``plain_ratio``, the best of the mixed
    one over the plain loop; ``bare`` and ``plain`` in images a second; ``rows`` with ``fleet``, ``actors``,
    ``compiled``, ``images_per_second``, ``peak_mib``, ``before_mib``, ``busy_percent`` and ``seconds``; ``trace``, the
    lines of :func:`experiments.bench.gpu_trace.trace`; and ``missing``, by row the reason why it is not there.

    Raises:
        SettingError: no such fleet, or no number of actors or seconds.
        FedkdError: no row could be measured.
    """
    import torch

    if not seconds > 0:
        raise SettingError("--seconds", seconds, "a number above 0")
    size: Size = dict(QUICK if quick else FULL)
    gpu = torch.cuda.is_available()
    ways = (False,) if quick else (False, True) if compiled is None else (compiled,)
    wanted = gpu_rows.rows(
        size, actors=tuple(actors) or size["actors"], fleets=tuple(fleets) or tuple(size["fleets"]), compiled=ways
    )
    found: Figures = {
        "ratio": None, "plain_ratio": None,
        "device": torch.cuda.get_device_name() if gpu else "cpu: there is no GPU, the figures say nothing about one",
        "size": size, "settings": SETTINGS, "bare": None, "plain": None, "rows": [], "trace": [], "missing": {},
    }  # fmt: skip
    if not gpu and not quick:
        said = _no_gpu(size, wanted)
        print(said)
        leave({**found, "missing": dict.fromkeys((row.name for row in wanted), said)}, json_path)
        return
    print(f"{size['peers']} peers on {found['device']}")
    _measure_all(wanted, found, size, "cuda" if gpu else "cpu", json_path, ends=time.monotonic() + seconds)
    for what, over in (("ratio", "the bare loop"), ("plain_ratio", "the plain loop of the mixed fleet")):
        print(f"best of {over}: {found[what]:.2f}" if found[what] else f"no ratio to {over}: a row is missing")
    if len(found["missing"]) == len(wanted):
        raise FedkdError(f"no row could be measured; the first: {next(iter(found['missing'].values()))}")


def _measure_all(
    wanted: Sequence[Row], found: Figures, size: Size, device: str, json_path: Path | None, *, ends: float
) -> None:
    took: dict[str, float] = {}
    with Watch() as watch, tempfile.TemporaryDirectory(prefix="fedkd-gpu-") as name:
        folder = Path(name)
        np.savez(folder / "data.npz", **gpu_rows.images(size))
        for row in wanted:
            kind = "compiled" if row.compiled else row.kind
            left = ends - time.monotonic() - (_DOWN if row.kind == "fleet" else 0.0)
            if left < max(_LEAST[kind], took.get(kind, 0.0)):
                problem: str | Figures = f"no time: {max(0.0, left):.0f} s were left"
                seconds = 0.0
            else:
                first, began = len(watch.samples), time.monotonic()
                problem = _run(row, folder, size, device, min(float(_LONGEST[kind]), left))
                seconds = time.monotonic() - began
                if not isinstance(problem, str):
                    problem |= {"seconds": round(seconds, 1), **watch.since(first)}
                    # What the first compiled row has compiled lies in a cache for the others.
                    took[kind] = max(took.get(kind, 0.0), seconds * (0.5 if row.compiled else 0.9))
            _note(row, problem, found)
            print(_line(row, found), flush=True)
            leave(found, json_path)


def _run(row: Row, folder: Path, size: Size, device: str, limit: float) -> str | Figures:
    """Measure a row in a process of its own; return its figures, or why there are none."""
    command = [sys.executable, "-m", "experiments.bench.gpu_rows", "--row", row.name, "--folder", str(folder)]
    with subprocess.Popen(
        [*command, "--size", json.dumps(size), "--device", device],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=OWN_FOLDER,
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            _end(process)
            return f"not done in {limit:.0f} s"
        except BaseException:
            _end(process)
            raise
    for line in said.splitlines():
        if line.startswith(FIGURES):
            return dict(json.loads(line.removeprefix(FIGURES)))
    return " | ".join(said.strip().splitlines()[-3:])[-500:] or f"exit status {process.returncode}"


def _end(process: "subprocess.Popen[str]") -> None:
    """End a row's process, and with it what it started: a launch takes its Flower and Ray down with it."""
    process.terminate()
    try:
        process.communicate(timeout=_DOWN)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def _note(row: Row, figures: str | Figures, found: Figures) -> None:
    """Put a row's figures, or why there are none, among what was found, and work the ratios out anew."""
    if isinstance(figures, str):
        found["missing"][row.name] = figures
        return
    if row.kind == "trace":
        found["trace"] = figures["phases"]
    elif row.kind == "fleet":
        found["rows"].append({"fleet": row.fleet, "actors": row.actors, "compiled": row.compiled, **figures})
    else:
        found[row.kind], found[f"{row.kind}_run"] = figures["images_per_second"], figures
    first = next(iter(found["size"]["fleets"]))
    for what, fleet, over in (("ratio", first, found["bare"]), ("plain_ratio", "mixed", found["plain"])):
        speeds = [line["images_per_second"] for line in found["rows"] if line["fleet"] == fleet]
        found[what] = max(speeds) / over if speeds and over else None


def _line(row: Row, found: Mapping[str, Any]) -> str:
    """Return a row as a line of the terminal."""
    if row.name in found["missing"]:
        return f"{row.name:<22} MISSING: {found['missing'][row.name]}"
    if row.kind == "trace":
        return "\n".join(_phase(line) for line in found["trace"])
    own = found[f"{row.kind}_run"] if row.kind != "fleet" else found["rows"][-1]
    text = f"{row.name:<22} {own['images_per_second']:>10,.0f} images/s"
    over = "plain" if row.fleet == "mixed" else "bare"
    if row.kind == "fleet" and found[over]:
        text += f", {own['images_per_second'] / found[over]:.2f} of {over}"
    if "peak_mib" in own:
        text += f", {own['peak_mib'] - own['before_mib']:,.0f} MiB, busy {own['busy_percent']:.0f} %"
    return f"{text}, in {own['seconds']:.0f} s"


def _phase(line: Mapping[str, Any]) -> str:
    way = f"{line['model']}, {line['phase']}{', fast' * line['fast']}"
    text = f"trace: {way:<28} {line['wall_ms']:.2f} ms a step"
    if "gpu_ms" in line:
        text += f", {line['gpu_ms']:.2f} of them in kernels, {line['launches']:.0f} launches; waits: {line['waits']}"
    return text


def _no_gpu(size: Size, wanted: Sequence[Row]) -> str:
    fleets = " and ".join(f"{size['peers']} peers of {models}" for models in size["fleets"].values())
    return (
        "There is no GPU here that PyTorch can use: the figures of "
        f"{', '.join(row.name for row in wanted)} are missing. Where there is one, this command trains {fleets}, with "
        "one actor and with several on the GPU, as they are and compiled, and sets their images a second against one "
        "bare compiled bfloat16 loop and against the plain loop of every model. `fedkd bench gpu --quick` runs the "
        "same code here on the CPU, at a tiny size."
    )
