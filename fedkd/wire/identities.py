"""Whose key it is: a site signs the key that seals its mail, and the others know its signature from elsewhere.

The keys of sealed mail are made anew for every run and travel through the relay, which could put its own in their
place. A site therefore signs its key with one that lasts, such as its SuperNode's; whoever got that key's public half
on another way, in a file of trusted keys, can tell the relay's from the site's.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedkd.errors import SettingError
from fedkd.wire.sealing import SealError, join

_PURPOSE = "fedkd sealing key v1"
_CREDENTIAL = re.compile(r"([0-9a-f]{64})(?: ([a-z0-9-]{1,40} [A-Za-z0-9+/=]{1,400}) ([0-9a-f]{2,400}))?")
_KINDS = "an ECDSA or Ed25519 key in OpenSSH's form, without a passphrase"


@dataclass(frozen=True)
class Credential:
    """A public key for sealed mail and, where its owner has one, an identity that vouches for it.

    Attributes:
        public: the X25519 key, 32 bytes.
        identity: the public key of who signed it, ``TYPE BASE64`` as OpenSSH writes it; empty: nobody.
        signature: over run, name and key.
    """

    public: bytes
    identity: str = ""
    signature: bytes = b""

    @classmethod
    def parse(cls, text: str) -> "Credential":
        """Read what :meth:`text` wrote.

        Raises:
            SealError: anything else.

        >>> Credential.parse("ab" * 32).identity
        ''
        """
        match = _CREDENTIAL.fullmatch(text)
        if match is None or len(match[3] or "") % 2:
            raise SealError("Expected a public key to be 64 hexadecimal digits, and who signed it.")
        return cls(bytes.fromhex(match[1]), match[2] or "", bytes.fromhex(match[3] or ""))

    def text(self) -> str:
        """Return it as one line of text."""
        signed = f" {self.identity} {self.signature.hex()}" if self.identity else ""
        return self.public.hex() + signed

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the identity, as ``ssh-keygen -l`` prints it; without one, of the key itself."""
        return fingerprint(self.identity) if self.identity else _digest(self.public)

    def signed_by(self, identity: str, *, name: str, run: str) -> bool:
        """Tell whether an identity vouches for this key as a peer's in a run."""
        if not identity or self.identity != identity:
            return False
        key, message = _public(identity), _statement(self.public, name, run)
        try:
            if isinstance(key, ed25519.Ed25519PublicKey):
                key.verify(self.signature, message)
            else:
                key.verify(self.signature, message, ec.ECDSA(SHA384()))
        except InvalidSignature:
            return False
        return True


class Identity:
    """A site's private signing key.

    Args:
        path: its file.

    Raises:
        SettingError: the file is missing or holds something else.
    """

    def __init__(self, path: Path) -> None:
        try:
            key = load_ssh_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise SettingError("identity", str(path), f"the file of {_KINDS} ({error})") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
            raise SettingError("identity", str(path), f"the file of {_KINDS}")
        self._key = key
        self.public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()

    def vouch(self, public: bytes, *, name: str, run: str) -> Credential:
        """Sign a key for sealed mail."""
        message = _statement(public, name, run)
        if isinstance(self._key, ed25519.Ed25519PrivateKey):
            signature = self._key.sign(message)
        else:
            signature = self._key.sign(message, ec.ECDSA(SHA384()))
        return Credential(public, self.public, signature)


def read_trusted(path: Path) -> dict[str, str]:
    """Read a file of trusted keys, a line ``NAME TYPE BASE64 [comment]`` a peer; return the keys by name.

    Raises:
        SettingError: it cannot be read, a line has another form, or a name comes twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError("trusted-keys", str(path), f"a readable file ({error})") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) < 3 or words[0] in found:
            raise SettingError("trusted-keys", f"{path}, line {number}", "NAME TYPE BASE64, each name once")
        key = " ".join(words[1:3])
        try:
            _public(key)
        except SealError as error:
            raise SettingError("trusted-keys", f"{path}, line {number}", f"NAME and then {_KINDS}") from error
        found[words[0]] = key
    return found


def check_trusted(credentials: Mapping[str, Credential], trusted: Mapping[str, str], *, run: str) -> None:
    """Refuse keys for which nobody vouches whom this peer trusts.

    Raises:
        SealError: names every such peer, and what is wrong with its key.
    """
    problems = []
    for name, credential in credentials.items():
        if name not in trusted:
            problems.append(f"{name} is not among the trusted keys")
        elif not credential.identity:
            problems.append(f"the key given for {name} is signed by nobody, expected {fingerprint(trusted[name])}")
        elif credential.identity != trusted[name]:
            got, expected = fingerprint(credential.identity), fingerprint(trusted[name])
            problems.append(f"the key given for {name} is signed by {got}, expected {expected}")
        elif not credential.signed_by(trusted[name], name=name, run=run):
            problems.append(f"the signature of {name} does not fit the key given for it in this run")
    if problems:
        raise SealError("; ".join(problems))


def fingerprint(identity: str) -> str:
    """Return the fingerprint of an OpenSSH public key, as ``ssh-keygen -l`` prints it."""
    try:
        return _digest(base64.b64decode(identity.split()[1], validate=True))
    except (IndexError, binascii.Error) as error:
        raise SealError(f"Expected a public key in OpenSSH's form, but got {identity[:80]!r}.") from error


def _digest(data: bytes) -> str:
    return "SHA256:" + base64.b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def _statement(public: bytes, name: str, run: str) -> bytes:
    return join(_PURPOSE, run, name, public)


def _public(identity: str) -> ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey:
    try:
        key = load_ssh_public_key(identity.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SealError(f"Expected a public key in OpenSSH's form, but got {identity[:80]!r}.") from error
    if not isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey):
        raise SealError(f"Expected {_KINDS}, but got {identity.split()[0]}.")
    return key
