"""A run's curves for TensorBoard, from its files: a peer is a TensorBoard run, a measure is a chart."""

import math
from dataclasses import fields
from pathlib import Path

from experiments.study import read_run
from fedkd.errors import FedkdError
from fedkd.results import Row

_MEASURES = tuple(field.name for field in fields(Row) if field.type is float)


def export(run: Path, folder: Path) -> Path:
    """Write a run's event files below a folder, one folder per peer and one for their mean; return that of the run.

    Args:
        run: the run's folder; one that still goes on is written as far as it is.
        folder: what `tensorboard --logdir` is given.

    Raises:
        FedkdError: TensorBoard is not installed, or it is not the folder of a run.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise FedkdError("`--tensorboard` needs TensorBoard: pip install 'fedkd[tensorboard]'.") from error
    found = read_run(run)
    place = folder / (found.path.resolve().name)
    for peer in found.peers:
        with SummaryWriter(str(place / peer)) as writer:
            for row in found.rows:
                if row.peer == peer:
                    for name in _MEASURES:
                        if math.isfinite(value := getattr(row, name)):
                            writer.add_scalar(name, value, row.round)
    with SummaryWriter(str(place / "mean")) as writer:
        for point in found.curve():
            for name, value in (("test_accuracy", point.accuracy), ("ece", point.ece), ("bytes", point.bytes)):
                writer.add_scalar(name, value, point.round)
    return place
