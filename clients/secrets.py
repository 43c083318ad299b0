"""A peer's key pair and its use: sealing what it knows for the others, and opening what they sealed for it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from clients.learner import Memo
from fedkd.codec import BadKnowledge
from fedkd.protocol import Arrays, Letter, Mail
from fedkd.sealing import Keys, Sealer, SealError, pack, unpack


class Secrets:
    """The keys of one peer in one run; made on first use, kept in the peer's folder, readable by it alone.

    Args:
        folder: the peer's own.
        me: the peer's name.
        run: the run's token; another run gets another pair.
    """

    def __init__(self, folder: Path, me: str, run: str) -> None:
        keys = _read(folder / "key.json", run) or _make(folder / "key.json", run)
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

    def open(self, letter: Letter, mail: Mail, memo: Memo, *, oldest: int) -> Arrays:
        """Decrypt a letter.

        Args:
            letter: as the relay delivered it.
            mail: the mail it came in, with the senders' public keys.
            memo: remembers the newest round heard of each sender.
            oldest: the oldest round whose knowledge still serves.

        Raises:
            BadKnowledge: it was changed, is not for this peer, round or run, or repeats what newer mail replaced.
        """
        newest = max(oldest, int(memo.get(f"heard {letter.sender}", oldest)))
        if not newest <= letter.round < mail.round:
            raise BadKnowledge(f"sealed in round {letter.round}, expected {newest} to {mail.round - 1}: a replay")
        try:
            arrays = unpack(
                self._sealer.open_from(
                    _bytes(letter.arrays, "sealed"),
                    _bytes(letter.arrays, "wrap"),
                    sender=letter.sender,
                    sender_public=bytes.fromhex(mail.keys.get(letter.sender, "")),
                    round=letter.round,
                )
            )
        except (SealError, ValueError) as error:
            raise BadKnowledge(str(error)) from error
        memo[f"heard {letter.sender}"] = letter.round
        return arrays


def _bytes(arrays: Arrays, name: str) -> bytes:
    array = arrays.get(name)
    if array is None or array.dtype != np.uint8 or array.ndim != 1:
        raise BadKnowledge(f"expected sealed mail with bytes `{name}`, but got {sorted(arrays)}")
    return array.tobytes()


def _read(path: Path, run: str) -> Keys | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return Keys.from_bytes(bytes.fromhex(content["private"])) if content.get("run") == run else None


def _make(path: Path, run: str) -> Keys:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    keys = Keys.generate()
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"run": run, "private": keys.private_bytes.hex()}, file)
    partial.replace(path)
    return keys
