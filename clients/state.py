"""A peer's state on its own disk: one safetensors file per round, written whole or not at all."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from fedkd.errors import FedkdError

_FILE = re.compile(r"round-(\d{6,})\.safetensors")
_KEEP = 2  # the state a round starts from outlives it, so that a round can be repeated after a crash


class StateError(FedkdError):
    """A peer's state is missing or does not fit its model."""


class Taught(NamedTuple):
    """A round in which a peer learned from teachers, with the temperature and the weight that it did so with."""

    round: int
    temperature: float
    weight: float


@dataclass(frozen=True)
class Trained:
    """What a state has been trained on: what the peer's controls are to do again.

    Attributes:
        rounds: those in which private batches were drawn, the start not among them, in their order.
        samples: private samples that were gone through in all, the start's among them, each as often as it was drawn.
        taught: the rounds with a teacher.
    """

    rounds: tuple[int, ...] = ()
    samples: int = 0
    taught: tuple[Taught, ...] = ()

    def then(self, round: int, samples: int, taught: Taught | None = None) -> "Trained":
        """Return what it is after one more round."""
        rounds = (*self.rounds, round) if samples else self.rounds
        return Trained(rounds, self.samples + samples, (*self.taught, taught) if taught else self.taught)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that its owner alone can read: whole or not at all, and on the disk when this returns.

    Args:
        path: the file, in a folder that exists.
        write: writes the content to the path that it is given.

    Raises:
        OSError: the disk refuses.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    os.close(handle)
    partial = Path(name)
    try:
        write(partial)
        _to_disk(partial)
        partial.replace(path)
        _to_disk(path.parent)  # the name is the folder's
    finally:
        partial.unlink(missing_ok=True)


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for their owner alone."""
    for path in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        path.mkdir(exist_ok=True, mode=0o700)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Store:
    """The states of one peer in one run.

    Args:
        folder: the run's, below the peer's own.
        run: the run's token; a state of another run is not read.

    A state is the model at the end of a round, a few numbers that the peer chose itself, its memo, and what the model
    was trained on; optimisers live for one phase and random streams are derived. It is one file that is renamed into
    place: a kill at any moment leaves the old files, or the old files and the new one. Round 0, the peer as it came, is
    kept for the controls; of the others the newest two.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder, self.run = folder, run

    def begin(self) -> None:
        """Make the folder, or empty it of what an earlier start of the run left."""
        make_private(self.folder)
        for path in self.folder.iterdir():
            if _FILE.fullmatch(path.name) or path.suffix == ".partial":
                path.unlink()

    def rounds(self) -> list[int]:
        """Return the rounds whose state is on disk, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _FILE.fullmatch(path.name)))

    def latest(self, before: int) -> int:
        """Return the newest round earlier than ``before``.

        Raises:
            StateError: there is none.
        """
        earlier = [round for round in self.rounds() if round < before]
        if not earlier:
            raise StateError(
                f"no state before round {before} in {self.folder}: the peer never started, or its folder is gone"
            )
        return earlier[-1]

    def save(
        self,
        round: int,
        model: nn.Module,
        memo: Mapping[str, float] | None = None,
        trained: Trained | None = None,
        *,
        said: Mapping[str, str] | None = None,
    ) -> Path:
        """Write the state of a round and return its file; on any error the earlier states stay as they were.

        Args:
            round: the round at whose end it stands.
            model: the peer's.
            memo: what the peer chose.
            trained: what the model was trained on so far.
            said: what else the file's header says, for readers of the file.

        Raises:
            StateError: the disk refuses (full, read-only, gone).
        """
        trained = trained or Trained()
        head = {
            "run": self.run,
            "memo": json.dumps(dict(memo or {})),
            "trained": json.dumps([trained.rounds, trained.samples, trained.taught]),
            **(said or {}),
        }
        try:
            write_whole(self._path(round), lambda partial: save_model(model, str(partial), metadata=head))
        except Exception as error:  # safetensors reports a full disk with an error type of its own
            raise StateError(f"cannot write the state of round {round} to {self.folder}: {error}") from error
        others = [other for other in self.rounds() if other not in (0, round)]
        kept = [other for other in others if other < round][1 - _KEEP :]
        for old in set(others) - set(kept):  # later ones too: nothing goes on from a round that was done over
            self._path(old).unlink(missing_ok=True)
        return self._path(round)

    def load(self, round: int, model: nn.Module) -> dict[str, float]:
        """Read the state of a round into a model of the same architecture; return its memo.

        Raises:
            StateError: the file is missing, damaged or of another architecture.
        """
        try:
            head = self._head(round)
            load_model(model, self._path(round))
            return dict(json.loads(head["memo"]))
        except Exception as error:
            raise StateError(f"cannot read the state of round {round} in {self.folder}: {error}") from error

    def trained(self, before: int) -> Trained:
        """Return what the newest state earlier than a round has been trained on; nothing where there is no state.

        Raises:
            StateError: the file is damaged or of another run.
        """
        if not (earlier := [round for round in self.rounds() if round < before]):
            return Trained()
        try:
            rounds, samples, *taught = json.loads(self._head(earlier[-1])["trained"])
            return Trained(tuple(rounds), samples, tuple(Taught(*one) for one in (taught or [()])[0]))
        except Exception as error:
            raise StateError(f"cannot read the state of round {earlier[-1]} in {self.folder}: {error}") from error

    def _head(self, round: int) -> Mapping[str, str]:
        with safe_open(self._path(round), framework="pt") as file:
            head: Mapping[str, str] = file.metadata()
        if head["run"] != self.run:
            raise StateError(f"it belongs to run {head['run']}, not to {self.run}")
        return head

    def _path(self, round: int) -> Path:
        return self.folder / f"round-{round:06d}.safetensors"
