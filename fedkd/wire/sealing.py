"""Sealed mail: knowledge encrypted from peer to peer, so that the relay in between sees sizes only.

X25519 gives two peers a shared secret, HKDF-SHA256 turns it into one key per (sender, receiver, run), and AES-256-GCM
encrypts under it with run, sender, receiver and round authenticated. A sender doesn't know who will hear it, so
:meth:`Sealer.seal_for` encrypts a payload once, under a key of its own, and seals ("wraps") that key for everyone.

What this does not give: the relay hands out the public keys, so one that lies about them can read and forge, unless
the peers check who signed them (:mod:`fedkd.wire.identities`). Who holds a peer's private key can read its old
mail too, and the relay can drop mail or repeat mail of the round that a peer asks for.
"""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedkd.errors import FedkdError
from fedkd.wire.codecs import BadKnowledge

_NONCE, _TAG, _KEY = 12, 16, 32
_PURPOSE = "fedkd sealed mail v1"
WRAP_BYTES = _NONCE + _KEY + _TAG


class SealError(FedkdError):
    """Mail that can't be sealed, or that arrived and isn't what it says it is."""


class Keys:
    """A peer's X25519 key pair; only ``public_bytes`` ever leaves the peer."""

    def __init__(self, private: X25519PrivateKey) -> None:
        self._private = private
        self.public_bytes = private.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> "Keys":
        """A new pair, from the operating system's randomness."""
        return cls(X25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, private: bytes) -> "Keys":
        """The pair of the 32 private bytes that :attr:`private_bytes` gave.

        Raises:
            SealError: not 32 bytes.
        """
        if len(private) != _KEY:
            raise SealError(f"Expected a private key to be {_KEY} bytes, but got {len(private)}.")
        return cls(X25519PrivateKey.from_private_bytes(private))

    @property
    def private_bytes(self) -> bytes:
        """The 32 private bytes, for the peer's own disk."""
        return self._private.private_bytes_raw()

    def shared_with(self, public: bytes, *, whose: str) -> bytes:
        """The X25519 secret shared with the owner of ``public``.

        Raises:
            SealError: not 32 bytes, or one of the points of low order, with which every secret is zero.
        """
        if len(public) != _KEY:
            raise SealError(f"Expected the public key of {whose!r} to be {_KEY} bytes, but got {len(public)}.")
        try:
            return self._private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            message = f"Expected the public key of {whose!r} to be an X25519 key, but got a point of low order."
            raise SealError(message) from error


class Sealer:
    """Seals and opens the mail of one peer in one run.

    Args:
        keys: the peer's own pair.
        me: the peer's name.
        run: the run's id; mail of another run doesn't open.
        context: anything else both sides must agree on, e.g. the codec; authenticated, not sent.

    Nonces are 96 random bits. A key lives for one (sender, receiver, run), so that 2²⁰ letters under one key
    repeat a nonce with probability below 2⁻⁵⁷; a counter would repeat when a peer crashes and answers a round again.

    >>> a, b = Keys.generate(), Keys.generate()
    >>> sealed = Sealer(a, "a", "run-1").seal(b"logits", to="b", to_public=b.public_bytes, round=3)
    >>> Sealer(b, "b", "run-1").open(sealed, sender="a", sender_public=a.public_bytes, round=3)
    b'logits'
    >>> Sealer(b, "b", "run-1").open(sealed, sender="a", sender_public=a.public_bytes, round=4)
    Traceback (most recent call last):
    fedkd.wire.sealing.SealError: Mail from 'a' for round 4 does not open: changed, or not for this peer, round and run.
    """

    def __init__(self, keys: Keys, me: str, run: str, *, context: str = "") -> None:
        self.keys, self.me, self.run, self.context = keys, me, run, context

    def seal(self, plaintext: bytes, *, to: str, to_public: bytes, round: int, bound: bytes = b"") -> bytes:
        """Encrypt for one peer: nonce (12 bytes), ciphertext, tag (16 bytes).

        ``bound`` is authenticated with it, and not sent: the receiver needs the same bytes to open.

        Raises:
            SealError: ``to_public`` is no usable key.
        """
        shared = self.keys.shared_with(to_public, whose=to)
        key = self._key(shared, self.me, to, self.keys.public_bytes, to_public)
        return _encrypt(key, plaintext, self._header(self.me, to, round, bound))

    def open(self, sealed: bytes, *, sender: str, sender_public: bytes, round: int, bound: bytes = b"") -> bytes:
        """Decrypt what ``sender`` sealed for this peer in ``round`` of this run.

        Raises:
            SealError: it was changed, or ``sender`` did not seal it for this peer, round, run and context.
        """
        shared = self.keys.shared_with(sender_public, whose=sender)
        key = self._key(shared, sender, self.me, sender_public, self.keys.public_bytes)
        return _decrypt(key, sealed, self._header(sender, self.me, round, bound), sender=sender, round=round)

    def seal_for(self, plaintext: bytes, *, to: Mapping[str, bytes], round: int) -> tuple[bytes, list[bytes]]:
        """Encrypt once for many: the payload, and its key wrapped for each of ``to`` (name -> public key), in order.

        The payload's hash is bound to every wrap: a receiver knows the payload's key, and could otherwise pass on
        another payload under the sender's name.

        Raises:
            SealError: a public key is unusable; it names whose.
        """
        key = AESGCM.generate_key(8 * _KEY)
        payload = _encrypt(key, plaintext, self._header(self.me, "", round, b""))
        digest = hashlib.sha256(payload).digest()
        wraps = [self.seal(key, to=name, to_public=to[name], round=round, bound=digest) for name in to]
        return payload, wraps

    def open_from(self, payload: bytes, wrap: bytes, *, sender: str, sender_public: bytes, round: int) -> bytes:
        """Decrypt a payload with the wrap of its key that is for this peer.

        Raises:
            SealError: as :meth:`open`, for either of the two.
        """
        digest = hashlib.sha256(payload).digest()
        key = self.open(wrap, sender=sender, sender_public=sender_public, round=round, bound=digest)
        return _decrypt(key, payload, self._header(sender, "", round, b""), sender=sender, round=round)

    def _key(self, shared: bytes, sender: str, to: str, sender_public: bytes, to_public: bytes) -> bytes:
        info = join(_PURPOSE, self.run, sender, to, sender_public, to_public)
        return HKDF(algorithm=SHA256(), length=_KEY, salt=None, info=info).derive(shared)

    def _header(self, sender: str, to: str, round: int, bound: bytes) -> bytes:
        return join(_PURPOSE, self.run, sender, to, str(round), self.context, bound)


def pack(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Named arrays of numbers as one safetensors blob, which holds no code.

    Raises:
        BadKnowledge: an array that doesn't hold numbers of at most 64 bits.
    """
    from safetensors.numpy import save

    for name, array in arrays.items():
        if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
            raise BadKnowledge(f"Expected array `{name}` to hold numbers, but got {array.dtype}.")
    return save({name: np.asarray(array, order="C") for name, array in arrays.items()})


def unpack(data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of :func:`pack`, read-only views of ``data``; a codec checks them further.

    Raises:
        BadKnowledge: not such a blob.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise BadKnowledge(f"Expected {len(data)} bytes to be named arrays (safetensors): {error}.") from error


def _encrypt(key: bytes, plaintext: bytes, header: bytes) -> bytes:
    nonce = os.urandom(_NONCE)
    return nonce + AESGCM(key).encrypt(nonce, plaintext, header)


def _decrypt(key: bytes, sealed: bytes, header: bytes, *, sender: str, round: int) -> bytes:
    mail = f"Mail from {sender!r} for round {round} does not open"
    if len(sealed) < _NONCE + _TAG:
        raise SealError(f"{mail}: {len(sealed)} bytes are too few.")
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE], sealed[_NONCE:], header)
    except InvalidTag as error:
        raise SealError(f"{mail}: changed, or not for this peer, round and run.") from error


def join(*fields: str | bytes) -> bytes:
    """One encoding for each list of fields: every field after its length."""
    encoded = [field.encode() if isinstance(field, str) else field for field in fields]
    return b"".join(len(field).to_bytes(8, "big") + field for field in encoded)
