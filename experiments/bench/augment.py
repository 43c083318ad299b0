"""What augmenting images adds to training on them.

A ResNet-8 goes through images of CIFAR's size in batches of 32, on one thread. The ways take turns, one pass over the
images each, and ratios to the pass without augmentation are taken turn by turn, so that drift of the machine cancels;
figures are medians of CPU seconds. The process keeps freed memory, as every peer's does.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from experiments.bench.measuring import leave
from fedkd import models
from fedkd.data.augment import Augmentation, each
from fedkd.data.normalize import standardizer
from fedkd.data.samples import Samples
from fedkd.training.loops import Optimization, fit
from fedkd.training.memory import keep_freed_memory

BATCH, STEPS, TURNS = 32, 12, 15
WAYS = ("none", "crop-flip", "torchvision, image by image", "randaugment")
_cropped = each(v2.Compose([v2.RandomCrop(32, padding=4, padding_mode="reflect"), v2.RandomHorizontalFlip()]))

Figures = dict[str, Any]


def torchvisions(images: Tensor) -> Tensor:
    """Do what ``crop-flip`` does with torchvision's classes, which draw for one image at a time."""
    return _cropped(images)


def run(*, quick: bool = False) -> Figures:
    """Train in every way, in turns.

    Args:
        quick: a size that only shows that it runs.

    Returns:
        ``{"ratio", "model", "batch", "rows": [{"way", "ms", "ratio"}]}``: CPU milliseconds of a training step, and
        their ratios to a step without augmentation; ``ratio`` is that of ``crop-flip``.
    """
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    steps, turns = (2, 1) if quick else (STEPS, TURNS)
    stream = torch.Generator().manual_seed(0)
    kept = torch.randint(256, (BATCH * steps, 3, 32, 32), generator=stream, dtype=torch.uint8)
    labels = torch.randint(10, (len(kept),), generator=stream)
    samples = Samples(kept, standardizer("auto", kept))
    specs = {way: f"{__name__}:torchvisions" if way.startswith("torchvision") else way for way in WAYS}
    settled = samples.settled()  # as a run has them that augments nothing
    made = {way: Augmentation.named(spec, samples, key="augment") for way, spec in specs.items()}
    model = models.build("resnet8", input_shape=(3, 32, 32), num_classes=10, seed=0)

    def spent(way: str, turn: int) -> float:
        augmentation = made[way]
        inputs = augmentation.of(samples, turn) if augmentation else settled
        began = time.process_time()
        fit(model, inputs, labels, epochs=1, how=Optimization(batch_size=BATCH), seed=turn)
        return time.process_time() - began

    for way in WAYS:
        spent(way, 0)  # what only the first pass does
    found = [{way: spent(way, turn) for way in WAYS} for turn in range(turns)]
    torch.set_num_threads(before)
    rows = [
        {
            "way": way,
            "ms": 1000 * statistics.median(turn[way] for turn in found) / steps,
            "ratio": statistics.median(turn[way] / turn["none"] for turn in found),
        }
        for way in WAYS
    ]
    return {"ratio": rows[1]["ratio"], "model": "resnet8", "batch": BATCH, "rows": rows}


def main(json_path: Path | None = None, *, quick: bool = False) -> None:
    """Print a table of :func:`run`, and write it to ``json_path`` if given."""
    from rich.console import Console
    from rich.table import Table

    result = run(quick=quick)
    table = Table(title=f"A step of {result['model']} on {BATCH} images of 32×32, one thread", box=None)
    for column in ("augment", "CPU ms", "over none"):
        table.add_column(column, justify="left" if column == "augment" else "right")
    for row in result["rows"]:
        table.add_row(row["way"], f"{row['ms']:.1f}", f"{row['ratio']:.3f}")
    Console().print(table)
    leave(result, json_path)
