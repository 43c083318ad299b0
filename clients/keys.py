"""A peer's key pair and its use: sealing what it knows for the others, and opening what they sealed for it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clients.learner import Memo
from clients.state import make_private, write_whole
from fedkd.wire.codecs import BadKnowledge
from fedkd.wire.identities import Credential, Identity, check_trusted, read_trusted
from fedkd.wire.messages import Arrays, Letter
from fedkd.wire.sealing import Keys, Sealer, SealError, pack, unpack

_KEY, _PINNED = "key.json", "peers.json"


class Secrets:
    """The keys of one peer in one run; made on first use, kept in the run's folder, readable by the peer alone.

    Args:
        folder: the run's, below the peer's own.
        me: the peer's name.
        run: the run's token; another run gets another pair.
        identity: file of the private key that signs the pair's public half; empty: none.
        trusted: file of the keys that have to have signed the others'; empty: whatever the relay says.

    Attributes:
        public: the public key and who vouches for it, as the relay passes it on.

    Raises:
        SettingError: a file is missing or has another form.
    """

    def __init__(self, folder: Path, me: str, run: str, *, identity: str = "", trusted: str = "") -> None:
        self._folder, self._me, self._run = folder, me, run
        self._trusted = read_trusted(Path(trusted)) if trusted else None
        self._keys: dict[str, bytes] = {}
        keys = _own_keys(folder / _KEY, run)
        self._sealer = Sealer(keys, me, run)
        signer = Identity(Path(identity)) if identity else None
        own = signer.vouch(keys.public_bytes, name=me, run=run) if signer else Credential(keys.public_bytes)
        self.public = own.text()

    def seal(self, arrays: Arrays, *, round: int) -> Arrays:
        """Encrypt knowledge once, and its key for every peer whose key is pinned.

        Args:
            arrays: the encoded knowledge.
            round: at whose end it was made.

        Returns:
            ``sealed`` ``[n]`` and ``wraps`` ``[peers, w]``, both uint8, in the order in which the keys were pinned.

        Raises:
            BadKnowledge: a peer's key is unusable.
        """
        try:
            payload, wraps = self._sealer.seal_for(pack(arrays), to=self._keys, round=round)
        except SealError as error:
            raise BadKnowledge(str(error)) from error
        return {
            "sealed": np.frombuffer(payload, dtype=np.uint8),
            "wraps": np.stack([np.frombuffer(wrap, dtype=np.uint8) for wrap in wraps]),
        }

    def pin(self, keys: Mapping[str, str]) -> None:
        """Remember everyone's public key on first sight, and refuse another one for the rest of the run.

        ``peers.json`` in the run's folder then holds them, with fingerprints that people can compare.

        Args:
            keys: by name, in the order of the peers' indices, as the peers' ``public`` says them.

        Raises:
            BadKnowledge: a peer's key is not the one that came at the start, or nobody vouches for it whom this peer
                trusts: the relay would read along.
            SealError: the file with the keys of the start cannot be read, or this peer's own key is not the one of the
                start.
        """
        path = self._folder / _PINNED
        known = _read(path, "run", "keys")
        try:
            given = {name: Credential.parse(key) for name, key in keys.items()}
            if self._trusted is not None:
                others = {name: credential for name, credential in given.items() if name != self._me}
                check_trusted(others, self._trusted, run=self._run)
            fingerprints = {name: credential.fingerprint for name, credential in given.items()}
        except SealError as error:
            raise BadKnowledge(f"the relay's keys are not believed: {error}") from error
        public = {name: credential.public.hex() for name, credential in given.items()}
        mine = {self._me: Credential.parse(self.public).public.hex()}
        before = known["keys"] if known.get("run") == self._run else public | mine
        if before.get(self._me) != mine[self._me]:
            raise SealError(
                f"{self._me}'s own key in use, of {self._folder / _KEY}, is not the one that is pinned in {path}: "
                "nobody's mail could be opened; bring the file back, or start another run"
            )
        if changed := sorted({name for name, _ in before.items() ^ public.items()}):
            raise BadKnowledge(f"the relay gives another public key for {', '.join(changed)} than before")
        if known.get("run") != self._run:
            _write(path, {"run": self._run, "keys": public, "fingerprints": fingerprints})
        self._keys = {name: credential.public for name, credential in given.items()}

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
                    sender_public=self._keys.get(letter.sender, b""),
                    round=letter.round,
                )
            )
        except SealError as error:
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
    content = _read(path, "run", "private")
    if content.get("run") == run:
        return Keys.from_bytes(bytes.fromhex(content["private"]))
    keys = Keys.generate()
    _write(path, {"run": run, "private": keys.private_bytes.hex()})
    return keys


def _read(path: Path, *names: str) -> dict[str, Any]:
    """Return what a file holds; nothing if there is none.

    Raises:
        SealError: it is there and cannot be read: taken for none, the relay could give other keys.
    """
    try:
        content = json.loads(path.read_text())
        return {name: content[name] for name in names}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise SealError(
            f"cannot read {path} ({found}); once no run that it belongs to is to go on, remove it"
        ) from error


def _write(path: Path, content: Mapping[str, Any]) -> None:
    make_private(path.parent)
    write_whole(path, lambda partial: partial.write_text(json.dumps(content)))
