"""A peer's key pair and its use: sealing what it knows for the others, and opening what they sealed for it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clients.learner import Memo
from fedkd.codec import BadKnowledge
from fedkd.protocol import Arrays, Letter
from fedkd.sealing import Keys, Sealer, SealError, pack, unpack


class Secrets:
    """The keys of one peer in one run; made on first use, kept in the peer's folder, readable by it alone.

    Args:
        folder: the peer's own.
        me: the peer's name.
        run: the run's token; another run gets another pair.
    """

    def __init__(self, folder: Path, me: str, run: str) -> None:
        self._folder, self._run = folder, run
        self._keys: dict[str, str] = {}
        keys = _own_keys(folder / "key.json", run)
        self._sealer = Sealer(keys, me, run)
        self.public = keys.public_bytes.hex()

    def seal(self, arrays: Arrays, keys: Mapping[str, str], *, round: int) -> Arrays:
        """Encrypt knowledge once, and its key for every peer.

        Args:
            arrays: the encoded knowledge.
            keys: everyone's public key in hex, by name, in the order of the peers' indices.
            round: at whose end it was made.

        Returns:
            ``sealed`` ``[n]`` and ``wraps`` ``[peers, w]``, both uint8.

        Raises:
            BadKnowledge: a peer's key is unusable.
        """
        try:
            public = {name: bytes.fromhex(key) for name, key in keys.items()}
            payload, wraps = self._sealer.seal_for(pack(arrays), to=public, round=round)
        except (SealError, ValueError) as error:
            raise BadKnowledge(str(error)) from error
        return {
            "sealed": np.frombuffer(payload, dtype=np.uint8),
            "wraps": np.stack([np.frombuffer(wrap, dtype=np.uint8) for wrap in wraps]),
        }

    def pin(self, keys: Mapping[str, str]) -> None:
        """Remember everyone's public key on first sight, and refuse another one for the rest of the run.

        Raises:
            BadKnowledge: a peer's key is not the one that came at the start: the relay would read along.
        """
        path = self._folder / "peers.json"
        known = _read_json(path)
        if known.get("run") != self._run:
            _write_json(path, {"run": self._run, "keys": dict(keys)})
        elif known["keys"] != dict(keys):
            changed = sorted(name for name, _ in known["keys"].items() ^ dict(keys).items())
            raise BadKnowledge(
                f"the relay gives another public key for {', '.join(dict.fromkeys(changed))} than before"
            )
        self._keys = dict(keys)

    def open(self, letter: Letter, memo: Memo, *, oldest: int, newest: int | None) -> Arrays:
        """Decrypt a letter, with the pinned key of its sender.

        Args:
            letter: as the relay delivered it.
            memo: remembers the newest round heard of each sender.
            oldest: the oldest round whose knowledge still serves.
            newest: the newest that can be; None where each peer counts its own.

        Raises:
            BadKnowledge: it was changed, is not for this peer, round or run, or repeats what newer mail replaced.
        """
        heard = f"heard {letter.sender}"
        oldest = max(oldest, int(memo.get(heard, oldest)))
        if letter.round < oldest or (newest is not None and letter.round > newest):
            raise BadKnowledge(f"sealed in round {letter.round}, expected from {oldest} on: a replay")
        try:
            arrays = unpack(
                self._sealer.open_from(
                    _bytes(letter.arrays, "sealed"),
                    _bytes(letter.arrays, "wrap"),
                    sender=letter.sender,
                    sender_public=bytes.fromhex(self._keys.get(letter.sender, "")),
                    round=letter.round,
                )
            )
        except (SealError, ValueError) as error:
            raise BadKnowledge(str(error)) from error
        memo[heard] = letter.round
        return arrays


def _bytes(arrays: Arrays, name: str) -> bytes:
    array = arrays.get(name)
    if array is None or array.dtype != np.uint8 or array.ndim != 1:
        raise BadKnowledge(f"expected sealed mail with bytes `{name}`, but got {sorted(arrays)}")
    return array.tobytes()


def _own_keys(path: Path, run: str) -> Keys:
    """Return the pair that was made for this run, or make it."""
    content = _read_json(path)
    if content.get("run") == run:
        return Keys.from_bytes(bytes.fromhex(content["private"]))
    keys = Keys.generate()
    _write_json(path, {"run": run, "private": keys.private_bytes.hex()})
    return keys


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that its owner alone can read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(content, file)
    partial.replace(path)
