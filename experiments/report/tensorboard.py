"""A run's curves for TensorBoard, from its files: a peer is a TensorBoard run, a measure is a chart."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

from experiments.analysis.runs import read_run
from fedkd.errors import FedkdError
from fedkd.results.folder import Row

_MEASURES = tuple(field.name for field in fields(Row) if field.type is float)
_OF_THE_MEAN = {"test_accuracy": "accuracy", "worst": "worst", "spread": "spread", "ece": "ece", "bytes": "bytes"}
_OURS = ".fedkd"  # the end of our event files' names
_BEGUN, _GONE_ON, _TRIAL = "results go to ", ("round ", "results: "), "trial "


class Board:
    """Event files below one folder: ``RUN/PEER`` for every peer and ``RUN/mean``, written as far as runs have come.

    Args:
        folder: what `tensorboard --logdir` is given.

    Raises:
        FedkdError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise FedkdError("`--tensorboard` needs TensorBoard: pip install 'fedkd[tensorboard]'.") from error
        self._folder, self._new_writer = folder, SummaryWriter
        self._writers: dict[Path, Any] = {}
        self._written: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for writer in self._writers.values():
            writer.close()

    def write(self, run: Path) -> Path:
        """Write what is new in a run's folder; return where its event files are.

        Raises:
            FedkdError: it is not the folder of a run.
        """
        found = read_run(run)
        place = self._folder / found.path.resolve().name
        for peer in found.peers:
            for row in [row for row in found.rows if row.peer == peer and self._is_new(place / peer, row.round)]:
                self._add(place / peer, row.round, {name: getattr(row, name) for name in _MEASURES})
        for point in [point for point in found.curve() if self._is_new(place / "mean", point.round)]:
            self._add(place / "mean", point.round, {name: getattr(point, of) for name, of in _OF_THE_MEAN.items()})
        return place

    def follow(self, out: Callable[[str], None], trials: Path | None = None) -> Callable[[str], None]:
        """Return what takes the lines a run prints and passes them on, writing whenever a round or a trial has ended.

        Args:
            out: takes every line.
            trials: the folder of the trials that the lines name.
        """
        runs: list[Path] = []

        def take(line: str) -> None:
            out(line)
            if line.startswith(_BEGUN):
                runs.append(Path(line.removeprefix(_BEGUN)))
            elif line.startswith(_GONE_ON) and runs:
                self.write(runs[-1])
            elif trials and line.startswith(_TRIAL) and (trials / line.split()[2] / "config.json").exists():
                self.write(trials / line.split()[2])

        return take

    def _is_new(self, place: Path, round: int) -> bool:
        return round > self._written.get(place, -1)

    def _add(self, place: Path, round: int, values: dict[str, float]) -> None:
        if place not in self._writers:
            for earlier in place.glob(f"events.out.tfevents.*{_OURS}"):  # the same curve twice would be a zigzag
                earlier.unlink()
            self._writers[place] = self._new_writer(str(place), filename_suffix=_OURS)
        for name, value in values.items():
            if math.isfinite(value):
                self._writers[place].add_scalar(name, value, round)
        self._writers[place].flush()
        self._written[place] = round


def export(run: Path, folder: Path) -> Path:
    """Write a run's event files below a folder; return where they are.

    Args:
        run: the run's folder; one that still goes on is written as far as it is.
        folder: what `tensorboard --logdir` is given.

    Raises:
        FedkdError: TensorBoard is not installed, or it is not the folder of a run.
    """
    with Board(folder) as board:
        return board.write(run)


@contextmanager
def board(folder: Path | None) -> Iterator[Callable[..., Callable[[str], None]]]:
    """Yield what makes a taker of lines also write for TensorBoard, as :meth:`Board.follow`, where a folder is given.

    Raises:
        FedkdError: TensorBoard is not installed.
    """
    if folder is None:
        yield lambda out, trials=None: out
        return
    with Board(folder) as opened:
        yield opened.follow
