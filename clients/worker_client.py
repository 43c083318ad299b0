"""How a message's process asks the peer's resident worker, and starts it if there is none. Imports no torch."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from flwr.app import RecordDict

from clients import frames
from clients.configuration import PeerConfig
from clients.own_settings import Own
from clients.worker import LOCK, LOG, SOCKET
from fedkd.errors import FedkdError, SettingError
from fedkd.source import source_hash

_START_SECONDS = 60.0
_END_SECONDS = 10.0
_MAX_SOCKET_PATH = 100  # bytes; the system's own limit is 104 to 108
_LAST_WORDS = 600  # characters


class WorkerError(FedkdError):
    """The worker gave no answer."""


def ask(content: RecordDict, peer_config: PeerConfig, own: Own, *, seconds: float) -> RecordDict:
    """Have the resident worker answer a mail; start it if there is none, or if it runs other code.

    Args:
        content: the mail's.
        peer_config: the peer's own configuration.
        own: the same, as it was read.
        seconds: how long the answer may take; a worker that takes longer is ended.

    Raises:
        WorkerError: it does not start, it ended while it worked, or it took too long.
        SettingError: the peer's folder has too long a path for a socket.
    """
    note = {"source": source_hash(), "own": dict(own), "name": peer_config.name, "root": str(peer_config.cache_dir)}
    deadline = time.monotonic() + seconds
    while True:
        with _connected(peer_config) as connection:
            connection.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                frames.send(connection, note, content)
                said, reply = frames.receive(connection)
            except TimeoutError as error:
                _end(peer_config)
                raise WorkerError(f"no answer within {seconds:g} s: the worker was ended") from error
            except (OSError, frames.BadFrame) as error:
                _pass_on_last_words(peer_config)
                raise WorkerError("the worker ended while it worked; the peer's log says more") from error
        if not said.get("stale"):
            return reply


def _connected(peer_config: PeerConfig) -> socket.socket:
    """Return a connection to the worker."""
    path = peer_config.state_dir / SOCKET
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        allowed = f"a folder whose sockets have a path of at most {_MAX_SOCKET_PATH} bytes, or `worker = false`"
        raise SettingError("state-dir", str(peer_config.cache_dir), allowed)
    started: subprocess.Popen[bytes] | None = None
    deadline = time.monotonic() + _START_SECONDS
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
        if started is None:
            started = _start(peer_config)
        if started.poll() or time.monotonic() > deadline:
            _pass_on_last_words(peer_config)
            raise WorkerError("the worker did not start; the peer's log says more")
        time.sleep(0.02)


def _start(peer_config: PeerConfig) -> "subprocess.Popen[bytes]":
    peer_config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    command: list[Any] = [sys.executable, "-P", "-m", "clients.worker", peer_config.state_dir]
    command += ["--idle-seconds", str(peer_config.idle_seconds)]
    if (supernode := _supernode()) is not None:
        command += ["--supernode", str(supernode)]
    code = str(Path(__file__).resolve().parent.parent)
    # Stored bytecode halves the time that torch's import takes.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))
    handle = os.open(peer_config.state_dir / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=peer_config.state_dir,
            start_new_session=True,
        )  # fmt: skip


def _supernode() -> int | None:
    """Return the process number of the SuperNode that this process works for, if it is an ancestor."""
    found = None
    for parent in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            if any(Path(word).name == "flower-supernode" for word in parent.cmdline()[:3]):
                found = parent.pid
    return found


def _end(peer_config: PeerConfig) -> None:
    """End the worker that holds the lock of a peer's folder."""
    with contextlib.suppress(OSError, ValueError, psutil.Error):
        worker = psutil.Process(int((peer_config.state_dir / LOCK).read_text()))
        worker.kill()
        worker.wait(_END_SECONDS)  # until then its socket still takes connections


def _pass_on_last_words(peer_config: PeerConfig) -> None:
    """Print the end of the worker's log into this process's, before another worker starts the file anew."""
    with contextlib.suppress(OSError):
        last_words = (peer_config.state_dir / LOG).read_text(errors="replace").strip()[-_LAST_WORDS:]
        print(f"{peer_config.name}'s worker ended with: {last_words or 'nothing'}", file=sys.stderr, flush=True)
