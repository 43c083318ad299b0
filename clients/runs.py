"""The runs of one peer: a folder each, below the peer's own, so that none touches another's states and keys."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from clients.state import write_whole
from fedkd.errors import FedkdError

_RUNS, _OVER, _DATA = "runs", "over", "data.json"
_KEPT, _MOST = 4, 32
_IDLE_SECONDS = {True: 24 * 3600.0, False: 3600.0}  # a run that has started waits for late peers; see `_is_over`


class RunsError(FedkdError):
    """More runs are under way at a peer than it keeps states of."""


class DataChangedError(FedkdError):
    """A run is to go on with other data than it began with."""


def run_folder(state_dir: Path, run: str) -> Path:
    """Return the folder of a run; its token is the server's word and no name for a file."""
    return state_dir / _RUNS / hashlib.blake2b(run.encode(), digest_size=16).hexdigest()


def make_room(folder: Path) -> None:
    """Remove the oldest of the runs that are over, before a new one begins in a folder. Those under way stay.

    Raises:
        RunsError: too many are under way.
    """
    if folder.exists() or not folder.parent.is_dir():
        return
    there = [path for path in folder.parent.iterdir() if path.is_dir()]
    over = sorted(filter(_is_over, there), key=_last_used, reverse=True)
    for old in over[_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    if (under_way := len(there) - len(over)) >= _MOST:
        raise RunsError(
            f"{under_way} runs are under way at this peer, and it keeps the states of no more: end some, or remove the "
            f"folders of those that will not go on from {folder.parent}"
        )


def use(folder: Path) -> None:
    """Remember that a run is under way."""
    if folder.is_dir():
        os.utime(folder)


def close(folder: Path) -> None:
    """Remember that a run asks for nothing more; its states stay until newer ones need the room."""
    (folder / _OVER).touch(mode=0o600)


def remember_data(folder: Path, fingerprints: Mapping[str, str]) -> None:
    """Keep the fingerprints of the data with which a run begins. They stay with the peer, as the data do."""
    write_whole(folder / _DATA, lambda partial: partial.write_text(json.dumps(dict(fingerprints))))


def refuse_other_data(folder: Path, fingerprints: Mapping[str, str]) -> None:
    """Refuse to go on with a run on other data than it began with.

    Args:
        folder: the run's.
        fingerprints: of the data as they are now, by what they are.

    Raises:
        DataChangedError: says what has changed, and of the data nothing.
    """
    try:
        before = dict(json.loads((folder / _DATA).read_text()))
    except FileNotFoundError:  # it has not begun
        return
    except (OSError, ValueError, TypeError) as error:
        raise DataChangedError(f"cannot read {folder / _DATA}: {error}") from error
    if changed := [what for what, now in fingerprints.items() if before.get(what, now) != now]:
        raise DataChangedError(
            f"the {' and the '.join(changed)} changed since this run began: bring back what it began with, or start "
            "another run"
        )


def _is_over(folder: Path) -> bool:
    """Tell whether a run is over: it said so, or nothing of it came for long; one that never started has less time."""
    return (folder / _OVER).exists() or time.time() - _last_used(folder) > _IDLE_SECONDS[(folder / _DATA).exists()]


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:  # removed meanwhile
        return 0.0
