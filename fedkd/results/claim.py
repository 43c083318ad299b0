"""Whose a folder is: a run writes into a new one or into its own, alone, and touches nobody else's files."""

import fcntl
import itertools
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedkd.errors import FedkdError, SettingError

LOCK = ".fedkd.lock"
RESULTS = ("rounds.jsonl", "relay.safetensors", "summary.json")
"""What took time to come by: a folder with one of them is not begun anew by another run."""
LEFT = (
    "config.json", *RESULTS, "reliability.jsonl", "error.txt", "accuracy.png", "topology.png", "profile.jsonl",
    "profile.png",
)  # fmt: skip
"""The files of a run's folder that a new run makes anew."""
STATES = "peers"
"""The folder of simulated peers' states."""

MODELS = "models"
"""The folder of the models that a run leaves: in the run's own folder, at a real peer in the peer's own."""

_BESIDE = {LOCK, STATES, MODELS, "log.txt"}
_PASSING = re.compile(r"\..*\.partial|fedkd-\w{8}")  # a file being written, and the launcher's own folder on a cluster
_MOST_NAMES = 3


class InUseError(FedkdError):
    """Another process writes to the folder."""


def new_folder(parent: Path, name: str) -> Path:
    """Make a folder that nobody else has: of that name, or with ``-2``, ``-3``, ... after it."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError("numbers do not end")


def refuse_taken(path: Path, *, own: bool = False) -> None:
    """Refuse to begin a run in a folder that holds anything of somebody else's, or results; touch nothing.

    Args:
        path: the folder, which need not exist.
        own: whether an unfinished run there is this very run, which may begin anew.

    Raises:
        SettingError: names what is there, and the way out.
    """
    if path.exists() and not path.is_dir():
        raise SettingError("out-dir", str(path), "a folder, and there is a file of that name")
    there = {entry.name for entry in path.iterdir()} if path.exists() else set()
    there = {name for name in there if not _PASSING.fullmatch(name)}
    foreign = there - {*LEFT, *_BESIDE}
    if foreign or (there and not _begun_here(path)):
        raise SettingError(
            "out-dir", str(path), f"a new or empty folder; it holds {_named(foreign or there)}: take another"
        )
    if (results := there & set(RESULTS)) and not own:
        how = f"take another, or resume={path} to go on with that run"
        raise SettingError("out-dir", str(path), f"a new or empty folder; a run left {_named(results)} there: {how}")


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a folder, made if it is not there, for the length of a block; a holder that is killed lets go.

    Raises:
        InUseError: another process holds it.
    """
    path.mkdir(parents=True, exist_ok=True)
    handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(handle, "r+") as lock:  # the file stays: without it, two could hold two files of one name
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUseError(_in_use(path, lock.read())) from None
        lock.truncate()
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def refuse_held(path: Path) -> None:
    """Refuse a folder that a process writes to at this moment; make and change nothing.

    Raises:
        InUseError: names the process.
    """
    try:
        lock = (path / LOCK).open("r+")
    except OSError:
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUseError(_in_use(path, lock.read())) from None


def _in_use(path: Path, holder: str) -> str:
    return f"{holder or 'another process'} writes to {path}: end it, let it finish, or take another folder"


def _begun_here(path: Path) -> bool:
    """Tell whether a run of ours made the files in a folder."""
    if (path / LOCK).exists():
        return True
    try:
        content = json.loads((path / "config.json").read_text())
        return isinstance(content["settings"], dict) and bool(content["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _named(names: set[str]) -> str:
    known = sorted(names)
    more = len(known) - _MOST_NAMES
    return ", ".join(known[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
