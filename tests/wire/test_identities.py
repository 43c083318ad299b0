"""Whose key it is that seals a peer's mail: signatures, files of trusted keys, and a relay that swaps keys."""

import json
import re
import subprocess

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from federation import Finished, federate, local_grid
from flwr.app import ConfigRecord

from clients.keys import Secrets
from experiments.deploy.keys import node_key, write_secret
from fedkd.errors import SettingError
from fedkd.wire.identities import Credential, Identity, _public, check_trusted, fingerprint, read_trusted
from fedkd.wire.sealing import Keys, SealError
from strategies.relay.rounds import RelayError

NAMES = ["peer-0", "peer-1", "peer-2"]


def private_key(kind):
    return ed25519.Ed25519PrivateKey.generate() if kind == "ed25519" else ec.generate_private_key(ec.SECP384R1())


def identity(path, kind="p384"):
    content = private_key(kind).private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    write_secret(path, content)
    return Identity(path)


@pytest.mark.parametrize("kind", ["p384", "ed25519"])
def test_a_signed_key_is_believed_for_its_name_run_and_key_alone(tmp_path, kind):
    signer, other = identity(tmp_path / "a", kind), identity(tmp_path / "b", kind)
    key = Keys.generate().public_bytes
    signed = Credential.parse(signer.vouch(key, name="peer-0", run="run-1").text())

    assert signed.signed_by(signer.public, name="peer-0", run="run-1")
    assert not signed.signed_by(signer.public, name="peer-1", run="run-1")
    assert not signed.signed_by(signer.public, name="peer-0", run="run-2")
    assert not signed.signed_by(other.public, name="peer-0", run="run-1")
    for forged in (
        Credential(Keys.generate().public_bytes, signed.identity, signed.signature),
        Credential(key, other.public, signed.signature),
        Credential(key, signed.identity, signed.signature[:-1] + bytes([signed.signature[-1] ^ 1])),
        Credential(key, signed.identity, b"\0"),
        Credential(key),
    ):
        assert not forged.signed_by(signer.public, name="peer-0", run="run-1")


def test_fingerprints_are_those_of_ssh_keygen(tmp_path):
    private, public = node_key()
    write_secret(tmp_path / "node.key", private)
    write_secret(tmp_path / "node.pub", public)

    said = subprocess.run(["ssh-keygen", "-l", "-f", tmp_path / "node.pub"], capture_output=True, text=True, check=True)

    assert fingerprint(Identity(tmp_path / "node.key").public) == said.stdout.split()[1]


@pytest.mark.parametrize(
    "text", ["", "ab" * 31, "AB" * 32, "zz" * 32, "ab" * 32 + " x", "ab" * 32 + " ssh-rsa AAAA 123", "ab" * 33]
)
def test_what_is_no_credential_is_refused(text):
    with pytest.raises(SealError, match="64 hexadecimal digits"):
        Credential.parse(text)


def test_an_untrusted_key_is_refused_by_its_peers_name(tmp_path):
    good, other = identity(tmp_path / "a"), identity(tmp_path / "b")
    trusted = {"ada": good.public, "bob": good.public, "cyd": good.public}
    key = Keys.generate().public_bytes
    offered = {
        "ada": Credential(key),
        "bob": other.vouch(key, name="bob", run="r"),
        "cyd": good.vouch(key, name="ada", run="r"),
        "eve": good.vouch(key, name="eve", run="r"),
    }
    with pytest.raises(SealError) as refused:
        check_trusted(offered, trusted, run="r")
    said = str(refused.value).split("; ")
    assert said[0].startswith("the key given for ada is signed by nobody, expected SHA256:")
    assert fingerprint(other.public) in said[1] and fingerprint(good.public) in said[1] and "bob" in said[1]
    assert said[2] == "the signature of cyd does not fit the key given for it in this run"
    assert said[3] == "eve is not among the trusted keys"
    check_trusted({"ada": good.vouch(key, name="ada", run="r")}, trusted, run="r")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ada", "`trusted-keys` to be NAME TYPE BASE64.*trusted, line 2"),
        ("bob ecdsa-sha2-nistp384 AAAA", "`trusted-keys` to be NAME and then an ECDSA or Ed25519 key.*line 2"),
        ("bob ssh-dss AAAA", "`trusted-keys` to be NAME and then an ECDSA or Ed25519 key.*line 2"),
        ("ada {key} again", "each name once.*line 2"),
    ],
)
def test_a_mistake_among_the_trusted_keys_names_its_line(tmp_path, line, message):
    key = node_key()[1].decode().strip()
    (tmp_path / "trusted").write_text(f"ada {key} ada@example.org\n{line.format(key=key)}\n")
    with pytest.raises(SettingError, match=message):
        read_trusted(tmp_path / "trusted")


def test_comments_and_empty_lines_are_no_keys(tmp_path):
    key = node_key()[1].decode().strip()
    (tmp_path / "trusted").write_text(f"# the sites of 2026\n\nada {key} of the north\n")
    assert read_trusted(tmp_path / "trusted") == {"ada": key}


def test_an_identity_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "node.key").write_text("no key")
    for path in (tmp_path / "node.key", tmp_path / "missing"):
        with pytest.raises(SettingError, match="`identity` to be the file of an ECDSA or Ed25519 key"):
            Identity(path)


@pytest.fixture
def trusting(tmp_path):
    """Return peers that know one another's identities from a file."""
    publics = {}
    for name in NAMES:
        private, public = node_key()
        write_secret(tmp_path / name / "node.key", private)
        publics[name] = public.decode()
    (tmp_path / "trusted-keys").write_text("".join(f"{name} {public}" for name, public in publics.items()))
    own = {
        i: {"identity": str(tmp_path / name / "node.key"), "trusted-keys": str(tmp_path / "trusted-keys")}
        for i, name in enumerate(NAMES)
    }
    return local_grid(tmp_path, 3, node_config=own)


def row_of(run, name, round):
    return next(row for row in run.rows() if (row["peer"], row["round"]) == (name, round))


def rewritten(grid, change, *, receiver=0, kinds=("start", "learn"), since=0):
    """Have the relay change the keys that one peer is given."""

    def fault(partition, message):
        mail = message.content["mail"]
        if partition == receiver and mail["kind"] in kinds and mail["round"] >= since:
            message.content["keys"] = ConfigRecord(change(dict(message.content["keys"])))

    grid.fault = fault


def test_peers_that_know_one_another_learn_as_others_do_and_fingerprints_are_told(tmp_path, trusting, capsys):
    plain = federate(tmp_path / "plain", 3)
    run = federate(tmp_path / "run", 3, grid=trusting, sealed=True)

    assert [row["test_accuracy"] for row in run.rows()] == [row["test_accuracy"] for row in plain.rows()]
    assert {row["refused_letters"] for row in run.rows()} == {0}
    trusted = read_trusted(tmp_path / "trusted-keys")
    said = capsys.readouterr().out
    assert all(f"private samples, key {fingerprint(trusted[name])}" in said for name in NAMES)
    kept = json.loads(next((tmp_path / "state" / "peer-0").rglob("peers.json")).read_text())
    assert kept["fingerprints"] == {name: fingerprint(trusted[name]) for name in NAMES}


def another_key(keys):
    return {**keys, "peer-1": Keys.generate().public_bytes.hex()}


def with_the_relays_own_identity(tmp_path):
    def change(keys):
        relay = Identity(tmp_path / "relay.key")
        return {**keys, "peer-1": relay.vouch(Keys.generate().public_bytes, name="peer-1", run="any").text()}

    write_secret(tmp_path / "relay.key", node_key()[0])
    return change


def with_another_key_under_the_old_signature(keys):
    signed = Credential.parse(keys["peer-1"])
    swapped = Credential(Keys.generate().public_bytes, signed.identity, signed.signature)
    return {**keys, "peer-1": swapped.text()}


def with_one_more_peer(keys):
    return {**keys, "peer-9": Keys.generate().public_bytes.hex()}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (another_key, "the key given for peer-1 is signed by nobody"),
        ("identity", "the key given for peer-1 is signed by SHA256:.* expected SHA256:"),
        (with_another_key_under_the_old_signature, "the signature of peer-1 does not fit"),
        (with_one_more_peer, "peer-9 is not among the trusted keys"),
    ],
)
def test_a_relay_that_swaps_keys_from_the_start_is_refused_by_name_and_gets_nothing(
    tmp_path, trusting, change, complaint
):
    change = with_the_relays_own_identity(tmp_path) if change == "identity" else change
    rewritten(trusting, change)

    with pytest.raises(RelayError, match=f"^peer-0 never trained: the relay's keys are not believed: {complaint}"):
        federate(tmp_path, 3, grid=trusting, sealed=True, rounds=1)

    run = Finished(tmp_path / "run", trusting, {})
    row = row_of(run, "peer-0", 0)
    assert row["status"] == "error"
    assert re.search(complaint, row["error"])
    sent = [r.content for r in trusting.replies if r.content["answer"]["peer"] == "peer-0"]
    assert not any("knowledge" in content for content in sent)
    assert row_of(run, "peer-1", 1)["status"] == "ok"  # the others go on


def test_nothing_is_sealed_for_a_key_that_a_relay_swaps_later(tmp_path):
    """Without trusted keys too: the keys of the start are the keys of the run."""
    grid = local_grid(tmp_path, 3)
    rewritten(grid, another_key, since=2)

    run = federate(tmp_path, 3, grid=grid, sealed=True, rounds=2)

    row = row_of(run, "peer-0", 2)
    assert row["status"] == "error" and "another public key for peer-1 than before" in row["error"]
    sent = [r.content for r in grid.replies if r.content["answer"]["peer"] == "peer-0"]
    assert [content["answer"]["round"] for content in sent if "knowledge" in content] == [0, 1]


def test_a_relay_that_gives_a_peer_another_key_as_its_own_is_refused(tmp_path):
    grid = local_grid(tmp_path, 3)
    rewritten(grid, lambda keys: {**keys, "peer-0": Keys.generate().public_bytes.hex()})

    with pytest.raises(RelayError, match=r"^peer-0 never trained: .*another public key for peer-0"):
        federate(tmp_path, 3, grid=grid, sealed=True, rounds=1)


@pytest.mark.parametrize("content", ["{", "[]", '{"run": "r"}', None])
def test_pinned_keys_that_cannot_be_read_are_not_taken_for_none(tmp_path, content):
    """A relay that can spoil the file, or waits until it is spoilt, could else give other keys from then on."""
    one, other = (Keys.generate().public_bytes.hex() for _ in range(2))
    mine = Secrets(tmp_path, "me", "run")
    mine.pin({"me": mine.public, "ada": one})
    file = tmp_path / "peers.json"
    file.unlink()
    file.write_text(content) if content else file.mkdir()

    with pytest.raises(SealError, match=r"cannot read .*peers\.json"):
        Secrets(tmp_path, "me", "run").pin({"me": mine.public, "ada": other})


def test_a_key_that_cannot_be_read_is_not_made_anew(tmp_path):
    Secrets(tmp_path, "me", "run")
    (tmp_path / "key.json").write_text("{")
    with pytest.raises(SealError, match=r"cannot read .*key\.json"):
        Secrets(tmp_path, "me", "run")


def test_signed_keys_outlive_a_relay_that_is_resumed(tmp_path, trusting):
    class Killed(BaseException):
        pass

    def kill(partition, message):
        if message.content["mail"]["round"] == 2 and partition == 1:
            raise Killed

    trusting.fault = kill
    with pytest.raises(Killed):
        federate(tmp_path, 3, grid=trusting, sealed=True)
    trusting.fault = None
    trusting.forget()

    resumed = federate(tmp_path, 3, grid=trusting, resume=str(tmp_path / "run"), sealed=True)

    assert {row["status"] for row in resumed.rows()} == {"ok"}
    assert {row["refused_letters"] for row in resumed.rows()} == {0}


def test_a_key_of_another_kind_is_named_by_its_kind_and_nothing_else_of_it_is_told():
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
    line = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() + " ada@hospital"
    with pytest.raises(SealError, match=r"but got ssh-rsa\.$"):
        _public(line)
