"""The resident process of a deployed peer: it keeps the model, the data and the device between messages.

Flower starts a process for every message; importing torch and its optimisers, reading the data and moving the model
to the device would cost that process ten seconds each time. The process here listens on a Unix socket in the peer's
own folder, which only the peer's user can open, answers one mail at a time, and ends with its SuperNode or when no
mail has come for long. A peer's state is on disk after every round, so it may be killed at any moment.
"""

import argparse
import contextlib
import faulthandler
import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from flwr.app import RecordDict

from clients import frames
from clients.answering import answer
from clients.configuration import PeerConfig
from fedkd.settings.config import RunConfig
from fedkd.source import source_hash

if TYPE_CHECKING:
    from clients.peer import Peer

SOCKET, LOCK, LOG = "worker.sock", "worker.lock", "worker.log"
_LOCK_SECONDS = 10.0
_LOOK_SECONDS = 0.5


def main() -> None:
    """Serve one peer until its SuperNode ends."""
    parser = argparse.ArgumentParser(description="The resident process of a deployed peer.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--supernode", type=int, help="process to end with")
    parser.add_argument("--idle-seconds", type=float, required=True)
    given = parser.parse_args()
    faulthandler.enable()
    os.umask(0o077)
    if given.supernode is not None:
        threading.Thread(target=_end_with, args=(given.supernode,), daemon=True).start()
    serve(given.folder, idle_seconds=given.idle_seconds)


def serve(folder: Path, *, idle_seconds: float) -> None:
    """Answer mail on the socket in a folder until none has come for a while; return at once if another one does so.

    Args:
        folder: the peer's own.
        idle_seconds: how long to wait for a mail.
    """
    source = source_hash()  # of the files as they are now: another run may bring other code later
    with _alone(folder) as alone:
        if not alone:
            return
        path = folder / SOCKET
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen()
            listener.settimeout(idle_seconds)
            try:
                while _serve_one(listener, source):
                    pass
            finally:
                path.unlink(missing_ok=True)
            listener.settimeout(0)  # whoever connected before the name was gone
            while _serve_one(listener, source):
                pass


def _serve_one(listener: socket.socket, source: str) -> bool:
    """Answer one mail; tell whether to go on."""
    try:
        connection, _ = listener.accept()
    except (TimeoutError, BlockingIOError):
        return False
    # A handler that was killed while it waited is no reason to end: the state is saved, the next mail finds it.
    with connection, contextlib.suppress(OSError, frames.BadFrame):
        connection.setblocking(True)
        note, content = frames.receive(connection)
        if note["source"] != source:
            frames.send(connection, {"stale": True}, RecordDict())
            return False
        peer_config = PeerConfig.of_own(note["own"], name=note["name"], root=Path(note["root"]), simulated=False)
        frames.send(connection, {}, answer(content, peer_config, _peer))
    return True


@lru_cache(maxsize=1)
def _peer(peer_config: PeerConfig, config: RunConfig, run: str) -> "Peer":
    from clients.peer import Peer

    return Peer(peer_config, config, run)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock, with this process's number in it; False if another process keeps it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    with os.fdopen(handle, "r+") as lock:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # one that is about to end for being idle or stale still holds it
                if time.monotonic() > deadline:
                    yield False
                    return
                time.sleep(0.05)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield True


def _end_with(pid: int) -> None:
    """End this process when another one has ended, even if nobody has reaped it yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_LOOK_SECONDS)
    os._exit(0)


if __name__ == "__main__":
    main()
